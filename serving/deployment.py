"""The Ray Serve application: one fused deployment, since a hop between deployments costs several milliseconds.

Imported only by Ray's processes, through the path `serving.deployment:application`.
"""

import asyncio
import logging
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.serve import Application
from ray.serve.config import BackpressureConfig

from recsys.config import parse
from recsys.errors import RecsysError
from serving.app import create_app
from serving.problems import RETRY_AFTER_SECONDS
from serving.settings import ServeConfig, load_into, open_service

NAME = "recsys"

logger = logging.getLogger("ray.serve")


@serve.deployment(name=NAME)
@serve.ingress()
class Replica:
    """One process that answers. It turns healthy once its bundle has answered the golden requests as published.

    Args:
        table: a `ServeConfig` as plain values.
    """

    def __init__(self, table: dict[str, Any]) -> None:
        self._config = parse(ServeConfig, table, "[serve]")
        self._service = open_service(self._config)

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Give the application; Ray Serve calls this once, after the constructor."""
        return create_app(self._service, self._config.limits, request_ids=False)

    async def reconfigure(self, user_config: dict[str, str]) -> None:
        """Serve a bundle: load it in a thread, replay its golden requests, then swap one reference.

        A refused bundle leaves the one before in place. If there is none, the error makes the start fail.

        Args:
            user_config: `bundle`, a directory, and `version`, which bundle is meant to be in it.
        """
        if user_config["version"] == self._service.version:
            return
        try:
            await asyncio.to_thread(load_into, self._service, Path(user_config["bundle"]))
        except RecsysError:
            if not self._service.version:
                raise
            self._service.telemetry.refused()
            logger.exception("bundle %s is refused; %s goes on", user_config["bundle"], self._service.version)


def application(table: dict[str, Any]) -> Application:
    """Give the application for a `ServeConfig` as plain values."""
    config = parse(ServeConfig, table, "[serve]")
    waiting = config.limits.waiting
    replica: Any = Replica  # the decorator makes it a Deployment, which its annotations don't say
    deployed: Application = replica.options(
        num_replicas=config.replicas,
        ray_actor_options={"num_cpus": 0.1},
        # The application refuses by itself, with a problem document, before Ray Serve's own bounds are reached.
        max_ongoing_requests=2 * waiting,
        max_queued_requests=2 * waiting,
        backpressure_config=BackpressureConfig(retry_after_s=RETRY_AFTER_SECONDS),
        graceful_shutdown_timeout_s=5,
        max_constructor_retry_count=1,  # a damaged log or snapshot will not be mended by trying again
    ).bind(table)
    return deployed
