"""How well a served index finds what an exhaustive search finds: a sample of its searches is done again, beside them.

At publish recall is measured on vectors of that day's users (`ranking.item_index`). Users drift and filters narrow, so
a share of the searches of living requests is looked at too, filters included. A thread of its own searches everything,
one query after the other, and rests `REST` times as long as each took: it uses a hundredth of a core at most, and what
is drawn meanwhile is let go.
"""

import contextlib
import logging
import queue
import random
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ranking.index import Index, share_found

REST = 99.0
"""Seconds of rest for each second of searching."""

NEWEST = 256
"""Searches whose mean is told."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Search:
    """A search as it was served: `vector` float32 [1, D], `scores` float32 [k] of what was found."""

    index: Index
    vector: NDArray[np.float32]
    allowed: NDArray[np.bool_] | None
    scores: NDArray[np.float32]

    def recall(self) -> float | None:
        """Return the share of the exact best that was found; None if nothing could be."""
        best = self.index.exact(self.vector, len(self.scores), self.allowed)[1]
        return float(share_found(self.scores[None], best)[0]) if np.isfinite(best).any() else None


class RecallWatch:
    """Searches everything for a share of the searches of one index. Safe to call from several threads.

    Args:
        share: of the searches, 0 to 1.
        tell: takes the mean recall of the newest searches, each time there is another.
        rest: seconds of rest for each second of searching.
        draws: gives numbers in [0, 1) that choose the searches.
    """

    def __init__(
        self, share: float, tell: Callable[[float], None], rest: float = REST, draws: random.Random | None = None
    ) -> None:
        self._share = share
        self._tell = tell
        self._rest = rest
        self._draws = draws or random.Random()
        self._index: Index | None = None
        self._newest: deque[float] = deque(maxlen=NEWEST)
        self._waiting: queue.Queue[_Search | None] = queue.Queue(1)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="recall", daemon=True)
        self._thread.start()

    def follow(self, index: Index | None) -> None:
        """Watch this index from now on, and no other."""
        if index is not self._index:
            self._index, self._newest = index, deque(maxlen=NEWEST)

    def searched(
        self,
        index: Index,
        vector: NDArray[np.float32],
        allowed: NDArray[np.bool_] | None,
        scores: NDArray[np.float32],
    ) -> None:
        """Take note of a search: of `vector` float32 [1, D] among `allowed`, which found scores float32 [k]."""
        if index is self._index and len(scores) and self._draws.random() < self._share:
            with contextlib.suppress(queue.Full):
                self._waiting.put_nowait(_Search(index, vector.copy(), allowed, scores))

    def close(self) -> None:
        """End the thread; the object can't be used afterwards."""
        self._closed.set()
        with contextlib.suppress(queue.Full):
            self._waiting.put_nowait(None)  # wakes it up
        self._thread.join()

    def _watch(self) -> None:
        while (search := self._waiting.get()) is not None and not self._closed.is_set():
            self._look_at(search)

    def _look_at(self, search: _Search) -> None:
        began, newest = time.perf_counter(), self._newest
        try:
            recall = search.recall()
        except Exception:
            logger.exception("an exhaustive search beside a served one failed")
            return
        if recall is not None and search.index is self._index:
            newest.append(recall)
            self._tell(float(np.mean(newest)))
        self._closed.wait(self._rest * (time.perf_counter() - began))
