"""What outlives a bundle in the request path: its settings, the live table of availability, cached states, a watch."""

from dataclasses import dataclass

from ranking.availability import AvailabilityFile
from ranking.bundle import Bundle
from ranking.recall_watch import RecallWatch
from ranking.recommender import Recommender
from ranking.recommender_config import DEFAULTS, RecommenderConfig
from ranking.state_cache import StateCache
from recsys.stores import HistoryReader


@dataclass(frozen=True)
class RequestPath:
    """Makes the recommender of each bundle that is served, one after the other or side by side.

    Attributes:
        config: quotas, limits, filters and rules.
        availability: what cannot be had now; None if all can.
        states: the states of users with long histories; a bundle with the same ranker goes on with them.
        watch: looks at the recall of some searches of the champion's index.
    """

    config: RecommenderConfig = DEFAULTS
    availability: AvailabilityFile | None = None
    states: StateCache | None = None
    watch: RecallWatch | None = None

    def recommender(self, bundle: Bundle, histories: HistoryReader) -> Recommender:
        """Return the recommender of a bundle; raises `ConfigError` if the config names a column or action it lacks."""
        return Recommender(bundle, histories, self.config, self.availability, states=self.states, watch=self.watch)
