"""Live histories as a request reads them: what could not be read is told, and what was read is remembered."""

import logging
import threading

from recsys.errors import StoreError
from recsys.history import Events
from serving.view import LiveHistories, Observed

logger = logging.getLogger(__name__)


class Watched:
    """The live histories as a recommender reads them: one that can't be had is none, and is told to the caller.

    Remembers per thread what the last read gave, so that the answer made of it can be logged with its origin.
    """

    def __init__(self, store: LiveHistories) -> None:
        self._store = store
        self._last = threading.local()

    def read(self, user_id: str) -> Events | None:
        """Return the user's history; None too if the store can't be had."""
        try:
            observed = self._store.observe(user_id)
        except StoreError as error:
            self._last.missed = True
            logger.warning("user unknown for now: %s", error)
            return None
        self._last.observed = observed
        return observed.events

    def missed(self) -> bool:
        """Whether the store could not be had since this thread asked last."""
        missed = getattr(self._last, "missed", False)
        self._last.missed = False
        return missed

    def observed(self) -> Observed | None:
        """Return what this thread read since it asked last, None for nothing."""
        observed: Observed | None = getattr(self._last, "observed", None)
        self._last.observed = None
        return observed
