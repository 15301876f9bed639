"""How a replica is brought to plans: loaded beside what answers, one after the other."""

import asyncio
import logging
from collections.abc import Callable

from recsys.errors import RecsysError
from serving.lineup import Plan

logger = logging.getLogger("ray.serve")


class Follower:
    """Follows plans in the order they come.

    Args:
        load: brings the service to a plan; runs in a thread.
        served: gives the version that answers, "" before there is one.
    """

    def __init__(self, load: Callable[[Plan], None], served: Callable[[], str]) -> None:
        self._load = load
        self._served = served
        self._last: asyncio.Task[None] | None = None

    async def follow(self, plan: Plan) -> None:
        """Go to a plan; returns at once, unless nothing is served yet: then once the plan is.

        Raises:
            RecsysError: the first champion is refused. A later one that is refused leaves everything as it was.
        """
        self._last = asyncio.create_task(self._go(plan, self._last))
        if not self._served():
            await self._last

    async def idle(self) -> None:
        """Wait until the last plan has been served or refused."""
        if self._last is not None:
            await asyncio.wait([self._last])

    async def _go(self, plan: Plan, before: "asyncio.Task[None] | None") -> None:
        if before is not None:
            await asyncio.wait([before])
        try:
            await asyncio.to_thread(self._load, plan)
        except RecsysError:
            if not self._served():
                raise
            logger.exception("%s is refused; %s goes on", plan, self._served())
