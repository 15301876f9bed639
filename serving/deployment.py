"""The Ray Serve application: one fused deployment, since a hop between deployments costs milliseconds, or a split one.

Imported only by Ray's processes, through the path `serving.deployment:application`.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Any

import ray
from fastapi import FastAPI
from ray import serve
from ray.serve import Application
from ray.serve.config import BackpressureConfig
from ray.serve.handle import DeploymentHandle

from recsys.config import parse
from recsys.errors import PartError, RequestError
from serving.app import create_app
from serving.follower import Follower
from serving.lineup import BundlePlace, Plan
from serving.logs import LOGS, log_to
from serving.parts import LOAD_SECONDS, Parts
from serving.problems import RETRY_AFTER_SECONDS
from serving.security import read_keys
from serving.settings import ServeConfig, gpu_share, load_plan, open_service
from serving.split import PARTS, Elsewhere, Part, PartHost, Refusal
from serving.worker import Worker

NAME = "recsys"

logger = logging.getLogger("ray.serve")


@serve.deployment
class ModelReplica:
    """One process that runs the models of one part of the split topology.

    Args:
        part: which.
        table: a `ServeConfig` as plain values.
    """

    def __init__(self, part: Part, table: dict[str, Any]) -> None:
        import torch

        from ranking.index import use_threads

        config = parse(ServeConfig, table, "[serve]")
        torch.set_num_threads(config.cores)
        use_threads(config.cores)
        self._host = PartHost(part, config.device, config.search)
        self._follower = Follower(self._host.follow, lambda: self._host.version)
        self._worker = Worker(config.limits.waiting)
        self._stuck_seconds = config.limits.stuck_seconds

    async def reconfigure(self, user_config: dict[str, dict[str, str]]) -> None:
        """Hold the bundles of a plan, a later one loaded beside the requests; `user_config` is it as plain values."""
        await self._follower.follow(Plan.of(user_config))

    async def answer(self, stage: str, place: BundlePlace, arguments: tuple[Any, ...]) -> Any:
        """Return what a stage makes of its arguments, or the `Refusal` of the request."""
        try:
            if not self._host.holds(place):  # a plan that the ingress had first; nobody else waits for it
                await asyncio.to_thread(self._host.hold, place)
            return (await self._worker.run(lambda: self._host.answer(stage, place, arguments)))[0]
        except RequestError as error:
            return Refusal(error.status, error.code, str(error))

    def check_health(self) -> None:
        """Raise if a piece of work has been stuck, so that Serve replaces this process."""
        if self._worker.busy_seconds > self._stuck_seconds:
            raise RuntimeError(f"one stage has been under way for {self._worker.busy_seconds:.0f} s")


@serve.deployment(name=NAME)
@serve.ingress()
class Replica:
    """One process that answers. It turns healthy once its bundle has answered the golden requests as published.

    Args:
        table: a `ServeConfig` as plain values.
        handles: of the deployments that run the models, in the order of `PARTS`; none where all is fused.
    """

    def __init__(self, table: dict[str, Any], *handles: DeploymentHandle[Any]) -> None:
        self._handles = handles
        self._parts: Parts | None = None
        self._config = parse(ServeConfig, table, "[serve]")
        self._service = open_service(self._config)
        self._busy_seconds: Callable[[], float] = lambda: 0.0
        self._follower: Follower | None = None

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Return the application; Ray Serve calls this once, after the constructor."""
        log_to(self._config.state / LOGS, self._config.log_requests)
        keys = read_keys(self._config.api_keys)
        app = create_app(self._service, self._config.limits, request_ids=False, keys=keys)
        self._busy_seconds = app.state.busy_seconds
        return app

    def check_health(self) -> None:
        """Raise if a piece of work has been stuck, so that Serve replaces this process."""
        busy = self._busy_seconds()
        if busy > self._config.limits.stuck_seconds:
            raise RuntimeError(f"one request has been under way for {busy:.0f} s")

    async def reconfigure(self, user_config: dict[str, dict[str, str]]) -> None:
        """Serve the bundles of a plan: load them in a thread, replay their golden requests, then swap one reference.

        Serve sends a replica no request until this returns, so only the first bundle is waited for; of the next,
        `/readyz` says when it is served. A refused champion leaves everything as it was. If there was none before, the
        error makes the start fail.

        Args:
            user_config: a `Plan` as plain values.
        """
        if self._follower is None:
            loop = asyncio.get_running_loop()
            self._follower = Follower(lambda plan: self._load(plan, loop), lambda: self._service.version)
        await self._follower.follow(Plan.of(user_config))

    def _load(self, plan: Plan, loop: asyncio.AbstractEventLoop) -> None:
        if not self._handles:
            load_plan(self._service, plan)
            return
        if self._parts is None:
            self._parts = Parts(self._handles, loop, self._config.limits.deadlines.request)
        deadline = time.monotonic() + LOAD_SECONDS
        while True:
            try:
                with self._parts.patience():
                    load_plan(self._service, plan, Elsewhere(self._parts))
                return
            except PartError:  # Serve replaces it, with this very plan
                if time.monotonic() > deadline:
                    raise
                time.sleep(1.0)


def application(table: dict[str, Any]) -> Application:
    """Return the application for a `ServeConfig` as plain values."""
    config = parse(ServeConfig, table, "[serve]")
    waiting = config.limits.waiting
    replica: Any = Replica  # the decorator makes it a Deployment, which its annotations don't say
    shared: dict[str, Any] = {
        # The application refuses by itself, with a problem document, before Ray Serve's own bounds are reached.
        "max_ongoing_requests": 2 * waiting,
        "max_queued_requests": 2 * waiting,
        "graceful_shutdown_timeout_s": 5,
        "max_constructor_retry_count": 1,  # a damaged log or snapshot will not be mended by trying again
    }
    gpus = gpu_share(config, ray.cluster_resources().get("GPU", 0.0))  # type: ignore[no-untyped-call]
    parts = []
    if config.topology == "split":
        cost = {"num_cpus": 0.1, "num_gpus": gpus}
        model_replica: Any = ModelReplica
        for part in PARTS:
            sized = model_replica.options(
                name=part, num_replicas=config.split.replicas(part), ray_actor_options=cost, **shared
            )
            parts.append(sized.bind(part, table))
    deployed: Application = replica.options(
        num_replicas=config.replicas,
        ray_actor_options={"num_cpus": 0.1, "num_gpus": 0.0 if parts else gpus},
        backpressure_config=BackpressureConfig(retry_after_s=RETRY_AFTER_SECONDS),
        **shared,
    ).bind(table, *parts)
    return deployed
