"""What a process checks of itself beside the requests: does it still answer as published, do scores still lie so."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import datetime

from ranking.bundle import Bundle, parity_error
from ranking.drift import TOP, Drift
from ranking.golden import TOLERANCE
from recsys.messages import RecommendResponse
from serving.service import Service
from serving.worker import Worker

logger = logging.getLogger(__name__)


class Monitor:
    """Replays a golden request every so often, and follows the drift of the champion's scores.

    Args:
        service: what is watched.
        worker: where a golden request takes its turn; it takes no place of those who wait.
        seconds: between two checks.
    """

    def __init__(self, service: Service, worker: Worker, seconds: float) -> None:
        self._service = service
        self._worker = worker
        self._seconds = seconds
        self._turn = 0
        self._drift: tuple[str, Drift] | None = None

    @asynccontextmanager
    async def watching(self) -> AsyncIterator[None]:
        """Check as long as the context is open."""
        task = asyncio.create_task(self._watch())
        try:
            yield
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    def answered(self, response: RecommendResponse) -> None:
        """Take note of an answer of the champion that the ranker gave."""
        bundle = self._service.served.bundle
        if not response.user_known or response.degraded or response.model_version != bundle.version:
            return
        if bundle.reference is None:
            return
        if self._drift is None or self._drift[0] != bundle.version:
            self._drift = bundle.version, Drift(bundle.reference)
        self._drift[1].add(item.score for item in response.items[:TOP])

    async def check(self) -> None:
        """Check once; a service without a bundle is left alone."""
        if not self._service.version:
            return
        bundle, turn = self._service.served.bundle, self._turn
        self._turn += 1
        error, _ = await self._worker.run_uncounted(lambda: parity_error(bundle, turn))
        telemetry = self._service.telemetry
        telemetry.parity(error)
        telemetry.created(_created(bundle))
        if self._drift is not None and (drift := self._drift[1].value()) is not None:
            telemetry.drift(drift)
        if error > TOLERANCE:
            logger.error("bundle %s answers a golden request otherwise than published, by %g", bundle.version, error)

    async def _watch(self) -> None:
        while True:
            try:
                await self.check()
            except Exception:
                logger.exception("the check of a golden request failed")
            await asyncio.sleep(self._seconds)


def _created(bundle: Bundle) -> float:
    """Return when a bundle was made, seconds since 1970."""
    return datetime.fromisoformat(bundle.manifest.provenance.created).timestamp()
