"""A moment by which a request wants its answer, asked between the steps of long work."""

import time
from collections.abc import Callable


class OutOfTimeError(Exception):
    """Raised inside work that a deadline ends; whoever set the deadline catches it and answers without that work."""


class Deadline:
    """Ends work that takes too long.

    Args:
        seconds: of the whole work.
        clock: gives seconds from any origin.
        used: seconds of them that are over already, in another process.
    """

    def __init__(self, seconds: float, clock: Callable[[], float] = time.perf_counter, used: float = 0.0) -> None:
        self.seconds = seconds
        self._clock = clock
        self._end = clock() + seconds - used

    @property
    def left(self) -> float:
        """Seconds left, below 0 once it is past."""
        return self._end - self._clock()

    def check(self, done: int = 0, total: int = 0, words: str = "") -> None:
        """Raise `OutOfTimeError` if it is past; a `recsys.progress.Progress`."""
        if self.left <= 0:
            raise OutOfTimeError(f"{done} of {total} done when the time was up")
