"""Where requests wait for their turn, and how answers leave."""

import asyncio
import contextvars
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from fastapi import Response
from pydantic import BaseModel

from ranking.ladder import Budget
from recsys.errors import RequestError

T = TypeVar("T")
Timings = Mapping[str, float]


class Worker:
    """One thread with a bounded queue.

    Args:
        waiting: most requests under way or waiting.
    """

    def __init__(self, waiting: int) -> None:
        self._bound = waiting
        self._waiting = 0
        self._began: float | None = None  # of the work under way
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="worker")

    @property
    def waiting(self) -> int:
        """Requests under way or waiting."""
        return self._waiting

    @property
    def busy_seconds(self) -> float:
        """How long the work under way has taken so far; 0 if there is none."""
        began = self._began
        return 0.0 if began is None else time.perf_counter() - began

    async def run(self, work: Callable[[], T], budget: Budget | None = None) -> tuple[T, float]:
        """Return the result of `work` and the seconds it waited for its turn.

        Raises:
            RequestError: 503 if too many wait already, or if its turn came too late for its budget.
        """
        if self._waiting >= self._bound:
            raise RequestError(503, "overloaded", f"{self._waiting} requests are waiting; come back in a moment")
        self._waiting += 1
        try:
            return await self.run_uncounted(work, budget)
        finally:
            self._waiting -= 1

    async def run_uncounted(self, work: Callable[[], T], budget: Budget | None = None) -> tuple[T, float]:
        """Do the same for work of the service itself, which takes its turn but no request's place."""
        asked = time.perf_counter()
        result, started = await asyncio.get_running_loop().run_in_executor(
            self._thread, contextvars.copy_context().run, self._timed, work, budget
        )
        return result, started - asked

    def _timed(self, work: Callable[[], T], budget: Budget | None) -> tuple[T, float]:
        if budget is not None and budget.late("request"):
            raise RequestError(503, "too_late", f"waited {budget.seconds:.1f} s for its turn; come back in a moment")
        self._began = started = time.perf_counter()
        try:
            return work(), started
        finally:
            self._began = None


def json_response(value: BaseModel, timings: Timings) -> Response:
    """Return a response that is serialised once, with its stages in `Server-Timing`, which counts in milliseconds."""
    stages = ", ".join(f"{stage};dur={seconds * 1e3:.2f}" for stage, seconds in timings.items())
    return Response(value.model_dump_json(), headers={"Server-Timing": stages}, media_type="application/json")
