"""What happens around every request: its id, its size, its time, its line in the log and its metrics."""

import asyncio
import logging
import time
import uuid
from collections.abc import Mapping

from fastapi import Response
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.types import Message as AsgiMessage

from serving import problems
from serving.logs import REQUEST_ID, REQUESTS
from serving.telemetry import Telemetry

METHODS = ("GET", "HEAD", "OPTIONS", "POST", "PUT", "PATCH", "DELETE")

GONE = 499
"""What a request counts as whose client did not wait for the answer, as nginx has it."""

logger = logging.getLogger(__name__)
requests = logging.getLogger(REQUESTS)


class Frame:
    """ASGI middleware around every request: its id, its size, its time and its metrics.

    Args:
        app: the application inside.
        telemetry: where requests are counted.
        body_bytes: longest body taken.
        request_ids: whether to answer with `x-request-id`; Ray Serve does it itself.
    """

    def __init__(self, app: ASGIApp, telemetry: Telemetry, body_bytes: int, request_ids: bool) -> None:
        self._app = app
        self._telemetry = telemetry
        self._body_bytes = body_bytes
        self._request_ids = request_ids

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":  # lifespan, websocket
            await self._app(scope, receive, send)
            return
        began = time.perf_counter()
        headers = dict(scope["headers"])
        request_id: bytes = headers.get(b"x-request-id", b"")[:128] or uuid.uuid4().hex.encode()
        REQUEST_ID.set(request_id.decode("latin-1"))
        status, sent, started = 500, 0, False

        async def framed_send(message: AsgiMessage) -> None:
            nonlocal status, sent, started
            if message["type"] == "http.response.start":
                status, started = message["status"], True
                added = [(b"server-timing", b"http;dur=%.2f" % ((time.perf_counter() - began) * 1e3))]
                if self._request_ids:
                    added.append((b"x-request-id", request_id))
                message["headers"] = [*message.get("headers", []), *added]
            elif message["type"] == "http.response.body":
                sent += len(message.get("body", b""))
            await send(message)

        try:
            if _declared(headers) > self._body_bytes:
                await self._too_large(_declared(headers))(scope, receive, framed_send)
            else:
                await self._app(scope, self._counted(receive), framed_send)
        except asyncio.CancelledError:  # so Ray Serve says that the client has gone
            if not started:
                status = GONE
            raise
        except Exception:
            # The path may name a user; its template does not.
            logger.exception(
                "%s %s: unexpected error", scope["method"], getattr(scope.get("route"), "path_format", "unmatched")
            )
            if started:
                raise
            await problems.unexpected()(scope, receive, framed_send)
        finally:
            route = getattr(scope.get("route"), "path_format", "unmatched")
            method = scope["method"] if scope["method"] in METHODS else "other"  # labels that clients can't multiply
            seconds = time.perf_counter() - began
            self._telemetry.request(route, method, status, seconds, sent)
            if requests.isEnabledFor(logging.INFO):
                told = {"method": method, "route": route, "status": status, "seconds": round(seconds, 6), "bytes": sent}
                requests.info("request", extra=told)

    def _counted(self, receive: Receive) -> Receive:
        """Stop a body that comes in chunks, without a declared length, once it is too long."""
        received = 0

        async def counted() -> AsgiMessage:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._body_bytes:
                raise HTTPException(413, self._limit_text(received))  # FastAPI lets only this one through
            return message

        return counted

    def _too_large(self, length: int) -> Response:
        return problems.problem(413, "body_too_large", self._limit_text(length))

    def _limit_text(self, length: int) -> str:
        return f"a body of {length} bytes or more; the service takes up to {self._body_bytes}"


def _declared(headers: Mapping[bytes, bytes]) -> int:
    length = headers.get(b"content-length", b"0")
    return int(length) if length.isdigit() else 0
