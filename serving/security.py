"""Who may ask: optional API keys, compared in constant time and kept as digests only.

Keys come from the environment variable `RECSYS_API_KEYS` (separated by commas) or from a file, one key a line. They are
never part of a config, an argument or a log line. Without any key the service is open, as on a developer's machine.
"""

import hashlib
import hmac
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from starlette.types import ASGIApp, Receive, Scope, Send

from recsys.errors import ConfigError
from serving import problems

KEYS = "RECSYS_API_KEYS"
LEAST_LENGTH = 16
OPEN = frozenset({"/", "/livez", "/readyz", "/openapi.json", "/docs"})
"""Paths that need no key: probes, and what holds nothing of anybody."""


class ApiKeys:
    """Digests of the keys that are accepted.

    Args:
        keys: at least 16 characters each.

    Raises:
        ConfigError: a key is too short to be a secret.
    """

    def __init__(self, keys: Iterable[str]) -> None:
        found = [key.strip() for key in keys if key.strip()]
        if any(len(key) < LEAST_LENGTH for key in found):
            raise ConfigError(f"an API key is shorter than {LEAST_LENGTH} characters; use `openssl rand -hex 32`")
        self._digests = [_digest(key.encode()) for key in found]

    def __bool__(self) -> bool:
        return bool(self._digests)

    def accepts(self, presented: bytes) -> bool:
        """Whether a key is one of those accepted; takes the same time for every key presented."""
        digest, found = _digest(presented), False
        for known in self._digests:
            found |= hmac.compare_digest(digest, known)
        return found


def read_keys(file: Path | None, environment: Mapping[str, str] = os.environ) -> ApiKeys:
    """Return the keys of environment and file; raises `ConfigError` for a file that is empty or can't be read."""
    keys = environment.get(KEYS, "").split(",")
    if file is not None:
        try:
            lines = [line for line in file.read_text().splitlines() if line.strip()]
        except OSError as error:
            raise ConfigError(f"API keys: {file} cannot be read ({error.strerror})") from None
        if not lines:
            raise ConfigError(f"API keys: {file} is empty; expected one key a line")
        keys += lines
    return ApiKeys(keys)


class KeyCheck:
    """ASGI middleware that answers requests without an accepted key with 401.

    A key is sent as `Authorization: Bearer KEY` or as `x-api-key: KEY`.

    Args:
        app: the application inside.
        keys: what is accepted.
    """

    def __init__(self, app: ASGIApp, keys: ApiKeys) -> None:
        self._app = app
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        path = scope.get("path", "").removeprefix(scope.get("root_path", ""))
        if scope["type"] != "http" or path in OPEN or self._accepted(scope):
            await self._app(scope, receive, send)
            return
        detail = "no accepted API key; send one as `Authorization: Bearer KEY`"
        refusal = problems.problem(401, "unauthorized", detail, headers={"WWW-Authenticate": "Bearer"})
        await refusal(scope, receive, send)

    def _accepted(self, scope: Scope) -> bool:
        first, second = (self._keys.accepts(key) for key in _presented(scope))  # both, for the same time
        return first or second


def declare(app: FastAPI) -> None:
    """Say in the OpenAPI document that a key is needed."""
    plain = app.openapi

    def with_keys() -> dict[str, Any]:
        schema = plain()
        schema.setdefault("components", {})["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        schema["security"] = [{"key": []}]
        return schema

    app.openapi = with_keys  # type: ignore[method-assign]


def _presented(scope: Scope) -> list[bytes]:
    """Return the keys sent along: one of them may be for a proxy in front."""
    headers: dict[bytes, bytes] = dict(scope["headers"])
    kind, _, key = headers.get(b"authorization", b"").partition(b" ")
    return [key.strip() if kind.lower() == b"bearer" else b"", headers.get(b"x-api-key", b"")]


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
