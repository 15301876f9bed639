"""Live histories as a request reads them: what could not be read is told, and what was read is remembered."""

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from recsys.errors import StoreError
from recsys.history import Events
from serving.view import LiveHistories, Observed

logger = logging.getLogger(__name__)


@dataclass
class Reading:
    """What one request read.

    Attributes:
        missed: whether the store was unavailable.
        observed: the history read last, with its origin, so that the answer made of it can be logged; None for none.
    """

    missed: bool = False
    observed: Observed | None = None


class Watched:
    """The live histories as a recommender reads them: one that is unavailable is none, and is told to the caller."""

    def __init__(self, store: LiveHistories) -> None:
        self._store = store
        self._here = threading.local()

    @contextmanager
    def reading(self) -> Iterator[Reading]:
        """Tell what this thread reads inside."""
        self._here.reading = reading = Reading()
        try:
            yield reading
        finally:
            del self._here.reading

    def read(self, user_id: str) -> Events | None:
        """Return the user's history; None too if the store is unavailable."""
        reading: Reading = getattr(self._here, "reading", Reading())
        try:
            observed = self._store.observe(user_id)
        except StoreError as error:
            reading.missed = True
            logger.warning("user unknown for now: %s", error)
            return None
        reading.observed = observed
        return observed.events
