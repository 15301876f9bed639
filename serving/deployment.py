"""The Ray Serve application: one fused deployment, since a hop between deployments costs several milliseconds.

Imported only by Ray's processes, through the path `serving.deployment:application`.
"""

import asyncio
import logging
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.serve import Application
from ray.serve.config import BackpressureConfig

from recsys.config import parse
from recsys.errors import RecsysError
from serving.app import create_app
from serving.lineup import Plan
from serving.logs import LOGS, log_to
from serving.problems import RETRY_AFTER_SECONDS
from serving.security import read_keys
from serving.settings import ServeConfig, load_plan, open_service
from serving.worker import Worker

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
        self._worker: Worker | None = None

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Give the application; Ray Serve calls this once, after the constructor."""
        log_to(self._config.state / LOGS, self._config.log_requests)
        keys = read_keys(self._config.api_keys)
        app = create_app(self._service, self._config.limits, request_ids=False, keys=keys)
        self._worker = app.state.worker
        return app

    def check_health(self) -> None:
        """Raise if a piece of work has been stuck, so that Serve replaces this process."""
        if self._worker is not None and self._worker.busy_seconds > self._config.limits.stuck_seconds:
            raise RuntimeError(f"one request has been under way for {self._worker.busy_seconds:.0f} s")

    async def reconfigure(self, user_config: dict[str, dict[str, str]]) -> None:
        """Serve the bundles of a plan: load them in a thread, replay their golden requests, then swap one reference.

        A refused champion leaves everything as it was. If there was none before, the error makes the start fail.

        Args:
            user_config: a `Plan` as plain values.
        """
        try:
            await asyncio.to_thread(load_plan, self._service, Plan.of(user_config))
        except RecsysError:
            if not self._service.version:
                raise
            logger.exception("%s is refused; %s goes on", user_config, self._service.version)


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
