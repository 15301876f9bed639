"""What Ray Serve's own proxy says where a replica died under a request; loaded by the path in `deploy/ray.env`.

HAProxy stands in front of it and asks it only while no replica is known to be up. By itself it says a bare 500 then,
which a client takes for a defect and does not try again.
"""

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.types import Message as AsgiMessage

from serving.problems import problem


class AnswerAnyway:
    """ASGI middleware that refuses, with a problem document and `Retry-After`, what nobody has answered."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        answered = False

        async def watched(message: AsgiMessage) -> None:
            nonlocal answered
            answered = True
            await send(message)

        await self._app(scope, receive, watched)
        if scope["type"] == "http" and not answered:
            refusal = problem(503, "no_replica", "the process that had the request died; send it again")
            await refusal(scope, receive, send)


def middleware() -> list[Middleware]:
    """Return what Ray Serve puts around its proxy."""
    return [Middleware(AnswerAnyway)]
