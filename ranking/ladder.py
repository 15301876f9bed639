"""What stays of an answer when a part of the system is out or late: the fallback ladder.

    history out or late      the history sent along, else popularity
    retrieval out or late    the other candidate sources
    rank out or late         the retriever's order
    search late              fewer than k items, though a deeper search would find more

A query has a budget of its own (`ranking.deadline`): without the reranker the order is that of the first stage, without
vectors that of the words.

Each step taken is named in `degraded`. Only a host with users waiting climbs down: without a budget, as in the batch
job and offline, an error is an error.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from ranking.sources import Pool
from recsys.errors import ConfigError, RequestError

Stage = Literal["history", "retrieval", "rank", "search"]

logger = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True)
class Deadlines:
    """Seconds after a request's arrival beyond which a stage is not begun any more."""

    request: float = 2.0
    """the request itself: it is refused then, since whoever asked has given up"""
    history: float = 1.6
    """reading the stored history"""
    retrieval: float = 1.4
    """the retriever"""
    rank: float = 1.2
    """the ranker"""
    search: float = 0.8
    """a further round of search, where filters and rules left too few"""

    def __post_init__(self) -> None:
        for each in fields(self):
            if getattr(self, each.name) <= 0:
                raise ConfigError(f"[deadlines] {each.name} is {getattr(self, each.name)}; expected more than 0")


class Budget:
    """The time one request has.

    Args:
        deadlines: of its stages.
        clock: seconds, monotonic; the request arrives now.
    """

    def __init__(self, deadlines: Deadlines, clock: Callable[[], float] = time.perf_counter) -> None:
        self._deadlines = deadlines
        self._clock = clock
        self._began = clock()

    @property
    def seconds(self) -> float:
        """Seconds since the request arrived."""
        return self._clock() - self._began

    def late(self, stage: Stage | Literal["request"]) -> bool:
        """Whether it is too late to begin a stage."""
        limit: float = getattr(self._deadlines, stage)
        return self.seconds > limit


class Ladder:
    """The steps taken down for one request.

    Args:
        budget: the request's; None takes no step: errors go up, and nothing is ever late.

    Attributes:
        degraded: stages that were left out, in order.
    """

    def __init__(self, budget: Budget | None) -> None:
        self._budget = budget
        self.degraded: list[str] = []

    def attempt(self, stage: Stage, work: Callable[[], T], instead: T) -> T:
        """Return the result of a stage, or `instead` if it is late, fails, or was left out before in this request."""
        if self._budget is None:
            return work()
        if stage in self.degraded or self.give_up_if_late(stage):
            return instead
        try:
            return work()
        except RequestError:
            raise  # the request's fault, and an answer to it
        except Exception:
            logger.exception("stage %r failed; the answer does without", stage)
            self.degraded.append(stage)
            return instead

    def give_up_if_late(self, stage: Stage) -> bool:
        """Leave a stage out if it is too late to begin it; says whether it is."""
        if self._budget is None or not self._budget.late(stage):
            return False
        if stage not in self.degraded:
            self.degraded.append(stage)
        return True


def retriever_order(pool: Pool, retrieval: int | None, below: float) -> NDArray[np.float32]:
    """Return scores float32 [C] that put candidates in the retriever's order, then in the best order of other sources.

    Args:
        pool: candidates and their ranks by source.
        retrieval: place of the retriever among the sources; None if it is not one of them.
        below: all scores are less than this.
    """
    far = np.iinfo(np.int32).max
    rank = np.where(pool.rank > 0, pool.rank, far)
    first = np.full(len(pool), far) if retrieval is None else rank[retrieval]
    order = np.lexsort((pool.rows, rank.min(axis=0, initial=far), first))
    scores = np.empty(len(pool), np.float32)
    scores[order] = below - 1 - np.arange(len(pool))
    return scores
