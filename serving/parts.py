"""How the ingress of the split topology asks the other deployments, over Ray Serve's handles."""

import asyncio
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from ray.serve.handle import DeploymentHandle

from recsys.errors import PartError, RequestError
from serving.lineup import BundlePlace
from serving.split import PARTS, Part, Refusal

LOAD_SECONDS = 300.0
"""A part may take this long for an answer while a bundle is being loaded."""

REST_SECONDS = 5.0
"""A part that was late is not asked again for so long, so that not every request waits for it in vain."""


class Parts:
    """Asks the parts from any thread but that of the event loop, which carries the words; an `Ask`.

    Args:
        handles: of the parts, in the order of `PARTS`.
        loop: of the process that asks.
        seconds: after which an answer is not waited for any more.
    """

    def __init__(
        self, handles: Sequence[DeploymentHandle[Any]], loop: asyncio.AbstractEventLoop, seconds: float
    ) -> None:
        self._handles = dict(zip(PARTS, handles, strict=True))
        self._loop = loop
        self._seconds = seconds
        self._patient = threading.local()
        self._rests: dict[Part, float] = {}

    @contextmanager
    def patience(self) -> Iterator[None]:
        """Let this thread wait for answers as long as loading a bundle may take."""
        self._patient.now = True
        try:
            yield
        finally:
            self._patient.now = False

    def __call__(self, part: Part, stage: str, place: BundlePlace, *arguments: Any) -> Any:
        """Return the answer; raises `PartError` if there is none, `RequestError` if the part refuses."""
        patient = getattr(self._patient, "now", False)
        if not patient and time.monotonic() < self._rests.get(part, 0.0):
            raise PartError(f"the {part} was late a moment ago")
        hop = self._hop(part, stage, place, arguments, LOAD_SECONDS if patient else self._seconds)
        try:
            answer = asyncio.run_coroutine_threadsafe(hop, self._loop).result()
        except TimeoutError:
            self._rests[part] = time.monotonic() + REST_SECONDS
            raise PartError(f"the {part} did not answer {stage!r} in time") from None
        except Exception as error:  # whatever Ray raises when a process is gone, or the model itself
            raise PartError(f"the {part} failed at {stage!r}: {error}") from error
        if isinstance(answer, Refusal):
            raise RequestError(answer.status, answer.code, answer.message)
        return answer

    async def _hop(self, part: Part, stage: str, place: BundlePlace, arguments: tuple[Any, ...], seconds: float) -> Any:
        return await asyncio.wait_for(self._handles[part].answer.remote(stage, place, arguments), seconds)
