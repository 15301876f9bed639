"""Starts and stops the service: under Ray Serve, or as one plain uvicorn process."""

import contextlib
import dataclasses
import io
import itertools
import logging
import os
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from recsys.errors import ConfigError, RecsysError
from serving.app import REPLICA
from serving.event_log import SegmentLog
from serving.lineup import BundlePlace, Plan
from serving.logs import LOGS, log_to
from serving.security import read_keys
from serving.settings import ServeConfig, load_plan, open_service
from serving.split import PARTS
from serving.telemetry import MULTIPROCESS
from serving.watcher import MlflowRegistry, WatchConfig, Watcher, adopt, check, keep, last_plan

__all__ = ["Running", "ServeConfig", "run_bare", "start"]

APPLICATION = "recsys"
READY_SECONDS = 300.0
WATCHER_SECONDS = 30.0
GRACE_SECONDS = 10  # for requests under way at the end, such as an upload that its client never ends
RAY_TRIES = 3
RAY_LOGS = "/tmp/ray/session_latest/logs/serve"
OBJECT_STORE_BYTES = 100 * 2**20  # nothing of a request goes through Ray's object store; this is near its least

_SENT = itertools.count()

logger = logging.getLogger(__name__)


class Running:
    """A started service; a context manager that stops it.

    Attributes:
        address: URL of the endpoint.
        plan: the bundles it serves.
    """

    def __init__(self, config: ServeConfig, directory: Path, plan: Plan) -> None:
        host = "127.0.0.1" if config.host == "0.0.0.0" else config.host
        self.address = f"http://{host}:{config.port}"
        self.plan = plan
        self._config = config
        self._directory = directory
        self._deployed = False
        self._stopped = False

    def swap(self, bundle: Path) -> str:
        """Serve another champion without losing a request; gives its version once every replica serves it.

        Raises:
            BundleError: the bundle is damaged or answers differently; the old one is still served.
        """
        place = adopt(bundle, check(bundle), self._config.state)
        self.deploy(self.plan.with_role("champion", place))
        return place.version

    def deploy(self, plan: Plan) -> None:
        """Serve the bundles of a plan without losing a request; returns once every replica serves them.

        Raises:
            RecsysError: they were not served within five minutes.
        """
        if not self._deployed:
            _deploy(self._config, plan, plan)
        else:
            if self._config.topology == "split":  # parts hold a bundle before anybody asks them for it
                _redeploy(self._config, plan, self.plan)
            _redeploy(self._config, plan, plan)
        _await_ready(self.address, plan.champion.version, self._config.replicas)
        self.plan = plan
        self._deployed = True
        keep(self._config.state, plan)

    def wait(self) -> None:
        """Wait until SIGINT or SIGTERM, following the registry's aliases meanwhile if there is one to follow."""
        ended = threading.Event()
        before = {number: signal.signal(number, lambda *_: ended.set()) for number in (signal.SIGINT, signal.SIGTERM)}
        watching = _watching(self._config, self.plan, self.deploy, ended)
        try:
            # Not one endless wait: a signal that another thread takes wakes this one only when it next runs.
            while not ended.wait(1.0):
                pass
        finally:
            if watching is not None:
                watching.join(timeout=WATCHER_SECONDS)
            for number, handler in before.items():
                signal.signal(number, handler)

    def stop(self) -> None:
        """Stop the service and Ray; safe to call twice."""
        if self._stopped:
            return
        self._stopped = True
        import ray
        from ray import serve

        # Ray prints, on the standard output, that the controller it was told to kill is dead.
        with contextlib.redirect_stdout(io.StringIO()):
            if ray.is_initialized():
                serve.shutdown()  # type: ignore[no-untyped-call]
            ray.shutdown()
        shutil.rmtree(self._directory, ignore_errors=True)

    def __enter__(self) -> "Running":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def start(config: ServeConfig) -> Running:
    """Start the service under Ray Serve and give it once `/readyz` answers.

    Raises:
        ConfigError: the port is in use, or Ray Serve was imported before its settings could be made.
        DataError: the bundle, the snapshot or the event log is damaged; nothing is started then.
        RecsysError: Ray Serve did not get ready; the message has its own.

    Cost: about 15 s on two cores.
    """
    from ranking.snapshot import SnapshotReader

    _require_free(config.host, config.port)
    _require_unset()
    read_keys(config.api_keys)
    plan = _first_plan(config)
    SnapshotReader(config.snapshot)
    SegmentLog(config.state / "log", config.durability, config.window).close()
    directory = Path(tempfile.mkdtemp(prefix="recsys-serve-"))
    _set_environment(directory)
    running = Running(config, directory, plan)
    try:
        _start_ray(config, directory)
        running.deploy(plan)
    except BaseException:
        running.stop()
        raise
    return running


def _watching(
    config: ServeConfig, plan: Plan, deploy: Callable[[Plan], None], ended: threading.Event
) -> threading.Thread | None:
    """Start the one watcher of a service, beside what answers; None if there is nothing to follow."""
    watch = config.watch
    if not watch.mlflow:
        return None
    watcher = Watcher(MlflowRegistry(watch.mlflow, watch.model), config.state, plan, deploy)
    thread = threading.Thread(target=watcher.watch, args=(watch.seconds, ended), name="watcher", daemon=True)
    thread.start()
    return thread


def run_bare(config: ServeConfig, ready: Callable[[str], None] = lambda _: None) -> None:
    """Serve the same application in this process under plain uvicorn, until interrupted; always fused.

    The registry's aliases are followed meanwhile, if there is one to follow: a thread loads the next bundle beside the
    one that answers.

    `ready` is called with the address once the bundle is loaded.
    """
    import uvicorn

    from serving.app import create_app

    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch reads it at its first allocation
    _require_free(config.host, config.port)
    keys = read_keys(config.api_keys)
    plan = _first_plan(config) if config.watch.mlflow else Plan(BundlePlace(config.bundle, ""))
    service = open_service(config)
    load_plan(service, plan)
    log_to(config.state / LOGS, config.log_requests)
    app = create_app(service, config.limits, keys=keys)
    ready(f"http://{config.host}:{config.port}")
    ended = threading.Event()
    watching = _watching(config, plan, lambda wanted: load_plan(service, wanted), ended)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # uvicorn stops by it, then raises it again
    try:
        with contextlib.suppress(KeyboardInterrupt):
            uvicorn.run(
                app,
                host=config.host,
                port=config.port,
                log_level="warning",
                access_log=False,
                timeout_graceful_shutdown=GRACE_SECONDS,
            )
    finally:
        ended.set()
        if watching is not None:
            watching.join(timeout=WATCHER_SECONDS)


def _require_free(host: str, port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigError(
                f"port {port} of {host} is unavailable ({error.strerror}); stop what uses it or choose another port"
            ) from None


def _require_unset() -> None:
    """Refuse if Ray Serve has already read its settings: it does so when it is imported."""
    if "ray.serve._private.constants" in sys.modules and "RAY_SERVE_ENABLE_HA_PROXY" not in os.environ:
        raise ConfigError("ray.serve was imported before the service was started; start the service first")


def _first_plan(config: ServeConfig) -> Plan:
    """Return what to start with: what the registry says, else what was served last, else the published bundle.

    Without a registry to follow it is the published bundle. A damaged one is refused here, in plain words, rather than
    in a replica's log.
    """
    watch = config.watch
    plan = last_plan(config.state) if watch.mlflow else None
    if plan is None:
        plan = Plan(adopt(config.bundle, check(config.bundle), config.state))
    if watch.mlflow:
        watcher = Watcher(MlflowRegistry(watch.mlflow, watch.model), config.state, plan, deploy=lambda _: None)
        watcher.look()
        plan = watcher.plan
    return plan


def _set_environment(directory: Path) -> None:
    """Make Ray Serve's settings, which it reads when it is first imported, in every process of the cluster."""
    files = {
        # HAProxy's are for the whole machine by default; two services would meet there.
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(directory / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(directory / "admin.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(directory),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(directory / "server-state"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(directory / "metrics.sock"),
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1",
        "RAY_DEDUP_LOGS": "0",
    }
    os.environ.update(node_settings() | files)


def _set_ports() -> None:
    """Give Serve's own proxies ports that are free now; one may be taken before they get to it."""
    for name in ("HAPROXY_METRICS", "HAPROXY_STATS", "FALLBACK_PROXY_HTTP", "FALLBACK_PROXY_GRPC"):
        os.environ[f"RAY_SERVE_{name}_PORT"] = str(_free_port())


def node_settings() -> dict[str, str]:
    """Return the environment that Ray needs on every node: what `deploy/ray.env` says."""
    lines = (Path(__file__).parent / "deploy/ray.env").read_text().splitlines()
    pairs = (line.split("=", 1) for line in lines if line and not line.startswith("#"))
    return {name: value.strip('"') for name, value in pairs}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _start_ray(config: ServeConfig, directory: Path) -> None:
    _set_ports()  # before Serve is imported, which reads them
    import ray
    from ray import serve

    counts = directory / "metrics"
    counts.mkdir()
    for tries_left in reversed(range(RAY_TRIES)):
        try:
            ray.init(
                address="local",
                num_cpus=max(config.replicas, 2),
                object_store_memory=OBJECT_STORE_BYTES,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                runtime_env={"env_vars": {MULTIPROCESS: str(counts)}},
            )
            logging.getLogger("ray.serve").setLevel(logging.WARNING)
            serve.start(http_options={"host": config.host, "port": config.port})
            return
        except (
            Exception
        ) as error:  # Ray raises bare ones if its processes do not start within 30 s, as on a busy machine
            ray.shutdown()
            _set_ports()  # what starts next reads them anew
            if not tries_left:
                reason = _last_line(str(error) or repr(error))
                raise RecsysError(f"Ray did not start: {reason}; details in {RAY_LOGS}") from error


def _redeploy(config: ServeConfig, held: Plan, answering: Plan) -> None:
    """Bring a running Serve to other plans; sends them again if a replica died before it had taken them."""
    deadline = time.monotonic() + READY_SECONDS
    while True:
        try:
            _deploy(config, held, answering)
            return
        except RecsysError as error:
            if time.monotonic() > deadline:
                raise
            logger.warning("the plan was not taken, and is sent again (%s)", error)
            time.sleep(1.0)


def _deploy(config: ServeConfig, held: Plan, answering: Plan) -> None:
    """Bring Serve to a config. If only plans differ from the last, replicas live on and change them in place.

    Args:
        config: of the service.
        held: what the parts of the split topology load.
        answering: what the replicas that answer serve.
    """
    from ray.serve.context import _get_global_client
    from ray.serve.schema import ServeDeploySchema

    parts = PARTS if config.topology == "split" else ()
    # Serve gives up a change during which a replica died, does not replace that replica, and then takes the same
    # config for no change at all. So no two that are sent are the same.
    sent = {"sent": {"number": str(next(_SENT))}}
    schema = ServeDeploySchema.model_validate(
        {
            "applications": [
                {
                    "name": APPLICATION,
                    "route_prefix": "/",
                    "import_path": "serving.deployment:application",
                    "args": _plain(config),
                    "deployments": [
                        {"name": APPLICATION, "user_config": answering.table() | sent},
                        *({"name": part, "user_config": held.table() | sent} for part in parts),
                    ],
                }
            ]
        }
    )
    client = _get_global_client()
    assert client is not None, "Ray Serve is started before anything is deployed"
    client.deploy_apps(schema)
    _await_running()


def _plain(config: ServeConfig) -> dict[str, Any]:
    """Return a config as plain values, without the registry: its URI may hold a password, and replicas need it not."""
    table = dataclasses.asdict(dataclasses.replace(config, watch=WatchConfig()))
    return {key: str(value.resolve()) if isinstance(value, Path) else value for key, value in table.items()}


def _await_running() -> None:
    from ray import serve

    deadline = time.monotonic() + READY_SECONDS
    while time.monotonic() < deadline:
        time.sleep(0.2)
        application = serve.status().applications.get(APPLICATION)
        if application is None:
            continue
        if application.status == "RUNNING":
            return
        if application.status in ("DEPLOY_FAILED", "UNHEALTHY"):
            messages = [application.message, *(each.message for each in application.deployments.values())]
            reasons = {_last_line(message): None for message in messages if message}
            raise RecsysError(f"the service did not start: {'; '.join(reasons)}; details in {RAY_LOGS}")
    raise RecsysError(f"the service was not ready after {READY_SECONDS:.0f} s; details in {RAY_LOGS}")


def _last_line(message: str) -> str:
    """Return the last line of a message: the error itself, if the message is a traceback."""
    return message.strip().splitlines()[-1].strip()


def _await_ready(address: str, version: str, replicas: int) -> None:
    """Wait until `replicas` replicas have named a bundle and none another since."""
    deadline = time.monotonic() + READY_SECONDS
    ready: set[str | None] = set()
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError):  # not listening yet, or a bundle still being loaded
            with urllib.request.urlopen(f"{address}/readyz", timeout=5) as response:
                if response.read().decode() == f"ready {version}":
                    ready.add(response.headers[REPLICA])
                else:
                    ready.clear()
            if len(ready) >= replicas:
                return
        time.sleep(0.1)
    raise RecsysError(f"{address}/readyz did not name bundle {version} within {READY_SECONDS:.0f} s")
