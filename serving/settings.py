"""What a service is started with, and the service made of it: shared by the Ray Serve and the plain host."""

import gc
import logging
import math
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ranking.devices import Device
from ranking.recommender_config import DEFAULTS, RecommenderConfig
from ranking.searched import SearchConfig
from recsys.errors import BundleError, ConfigError
from recsys.history import DAY, OLD_DAYS, POSITIONS
from recsys.memory import keep_freed_memory
from recsys.messages import InlineEvent, RankRequest, RecommendRequest
from serving.app import Limits
from serving.event_log import WINDOW, Durability, SegmentLog
from serving.history_store import LmdbHistoryStore
from serving.lineup import BundlePlace, NoRanker, Plan, Role, Served
from serving.pairs import PairLog
from serving.request_log import RequestLog, RequestLogConfig
from serving.service import Service
from serving.split import PARTS, Elsewhere, SplitConfig
from serving.state import machine_clock, position_clock
from serving.telemetry import Telemetry
from serving.view import HISTORY_EVENTS, LiveHistories, Snapshot
from serving.view_files import remove_unused
from serving.watcher import WatchConfig

PAIRS = "pairs"
REQUESTS = "requests"
REDIS_URL = "RECSYS_REDIS_URL"
WARM_EVENTS = 50
WARM_REQUESTS = 3
SWITCH_SECONDS = 1e-4
"""After which a thread lets another one have the interpreter. At Python's 5 ms a request waits that long, many times
over, while a bundle is loaded beside it."""

GPU_PARTS = 10_000
"""Of which Ray counts a GPU; it rounds to the nearest, so that six times a sixth would be more than one."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ServeConfig:
    """How the endpoint is served."""

    bundle: Path
    """published bundle"""
    snapshot: Path
    """published histories, the base under the live events"""
    state: Path
    """directory of the event log and the live histories; made if absent, kept from one start to the next"""
    host: str = "127.0.0.1"
    port: int = 8000
    replicas: int = 1
    """processes that answer; they share log and histories, so all of them run on this machine"""
    topology: Literal["fused", "split"] = "fused"
    """whether models run in the processes that answer, or in deployments of their own (`serving.split`)"""
    device: Device = "auto"
    """where models run: auto takes the GPU that a process sees; the index lies there in any case"""
    gpus: float = 0.25
    """most of a GPU that each process with models takes of Ray, where Ray has GPUs (`gpu_share`)"""
    split: SplitConfig = field(default_factory=SplitConfig)
    """sizes of those deployments"""
    cores: int = 1
    """threads of torch and FAISS within one request"""
    limits: Limits = field(default_factory=Limits)
    """of each replica"""
    durability: Durability = "fsync"
    """whether an accepted event is on the disk (`fsync`) or with the operating system (`os`)"""
    window: int = WINDOW
    """newest events among which a repeated event id is recognised"""
    challenger_share: float = 0.05
    """of the users whom a challenger answers, where there is one"""
    search: SearchConfig = field(default_factory=SearchConfig)
    """depths and time budgets of text search, where the bundle has it"""
    watch: WatchConfig = field(default_factory=WatchConfig)
    """registry whose aliases say which bundles serve"""
    request_log: RequestLogConfig = field(default_factory=RequestLogConfig)
    """which answers are logged for training and replay; none unless asked for"""
    history_store: Literal["lmdb", "redis"] = "lmdb"
    """where live histories are: in files that the replicas of this machine share, or in Redis, for several machines"""
    redis_url: str = field(default="", repr=False)
    """of the Redis store; the environment variable RECSYS_REDIS_URL if empty, where a password belongs"""
    recall_share: float = 0.01
    """of the searches of the index that are compared with an exact one, beside the requests; 0 compares none"""
    log_requests: bool = True
    """whether every request gets a line in `logs/` under the state directory"""
    api_keys: Path | None = None
    """file with one API key a line, beside those of the variable RECSYS_API_KEYS; without any, everybody may ask"""
    history_events: int = HISTORY_EVENTS
    """newest posted events kept of a user; the recommender uses the newest 10,000 of a history"""
    recommender: RecommenderConfig = DEFAULTS
    """quotas, limits, filters and rules of the request path"""

    def __post_init__(self) -> None:
        for name in ("replicas", "cores", "window", "history_events"):
            if getattr(self, name) < 1:
                raise ConfigError(f"[serve] {name} is {getattr(self, name)}; expected at least 1")
        if self.history_store == "redis" and not redis_url(self):
            raise ConfigError(f'[serve] history_store is "redis"; expected its URL in {REDIS_URL} or in redis_url')
        if self.gpus < 0:
            raise ConfigError(f"[serve] gpus is {self.gpus}; expected 0 or more")
        if not 1 <= self.port <= 65_535:
            raise ConfigError(f"[serve] port is {self.port}; expected 1 to 65535")
        for name in ("challenger_share", "recall_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"[serve] {name} is {getattr(self, name)}; expected 0 to 1")


def gpu_share(config: ServeConfig, available: float) -> float:
    """Return the share of a GPU that each process with models asks of Ray: `config.gpus`, or less so that all get one.

    Args:
        config: says how many such processes there are.
        available: GPUs of Ray's cluster.
    """
    processes = config.replicas if config.topology == "fused" else sum(map(config.split.replicas, PARTS))
    if processes <= available:
        share = min(config.gpus, available // processes)
        return float(int(share)) if share > 1 else share  # Ray knows whole GPUs and parts of one
    if available < 1:
        return 0.0
    each = math.ceil(processes / int(available))  # a part is of one GPU: nobody gets what is left of two
    return min(config.gpus, GPU_PARTS // each / GPU_PARTS)


def redis_url(config: ServeConfig) -> str:
    """Return where the Redis store is; empty if nobody said."""
    return config.redis_url or os.environ.get(REDIS_URL, "")


def open_service(config: ServeConfig) -> Service:
    """Open log and histories and give a service that still needs its bundle; sets threads and memory of this process.

    Raises:
        DataError: the snapshot or the log is damaged.
    """
    import torch

    from ranking.availability import AVAILABILITY, AvailabilityFile
    from ranking.index import use_threads
    from ranking.recall_watch import RecallWatch
    from ranking.request_path import RequestPath
    from ranking.snapshot import SnapshotReader
    from ranking.state_cache import StateCache

    keep_freed_memory()
    torch.set_num_threads(config.cores)
    use_threads(config.cores)
    sys.setswitchinterval(SWITCH_SECONDS)
    log = SegmentLog(config.state / "log", config.durability, config.window)
    pairs = PairLog(config.state / PAIRS)
    requests = RequestLog(config.state / REQUESTS, config.request_log) if config.request_log.share else None
    snapshot = SnapshotReader(config.snapshot)
    store, telemetry = _open_store(config, snapshot), Telemetry()
    telemetry.recovered(*log.recovered())
    states = StateCache(config.recommender.states) if config.recommender.states.bytes else None
    watch = RecallWatch(config.recall_share, telemetry.recall) if config.recall_share else None
    path = RequestPath(config.recommender, AvailabilityFile(config.state / AVAILABILITY), states, watch)
    return Service(
        log,
        store,
        telemetry,
        clock=_clock(snapshot.newest, log),
        share=config.challenger_share,
        pairs=pairs,
        path=path,
        search=config.search,
        requests=requests,
        device=config.device,
    )


def _clock(newest: int | None, log: SegmentLog) -> Callable[[], int]:
    """Return what tells the moment of a request: the machine's clock, unless histories are of positions.

    Args:
        newest: time of the snapshot's newest event, None without any.
        log: events posted since.
    """
    if newest is not None and abs(newest) < POSITIONS:
        return position_clock(newest, log)
    if newest is not None and (days := (machine_clock() - newest) // DAY) > OLD_DAYS:
        logger.warning(
            "the newest event of the snapshot is %d days old, so all that is recent to a model is long past; publish a "
            "newer log, or let requests say `at`",
            days,
        )
    return machine_clock


def _open_store(config: ServeConfig, base: Snapshot) -> LiveHistories:
    if config.history_store == "redis":
        try:
            from serving.redis_store import RedisHistoryStore
        except ImportError as error:
            raise ConfigError(f"the Redis history store needs the extra `redis` ({error})") from None

        return RedisHistoryStore(redis_url(config), base, config.history_events)
    views = config.state / "histories"
    store = LmdbHistoryStore(views / base.id, base, config.history_events, check=True)
    remove_unused(views, keep=base.id)
    return store


def load_into(service: Service, directory: Path) -> None:
    """Load a bundle, golden requests included, and swap the service to it; raises `BundleError`, changing nothing."""
    served = load_served(service, BundlePlace(directory, ""))
    service.swap(served)
    settle()


def load_plan(service: Service, plan: Plan, elsewhere: Elsewhere | None = None) -> None:
    """Bring a service to a plan: load beside the old what it does not have yet, then swap one reference.

    With `elsewhere` models run there; they are loaded here too, for as long as the golden requests take.

    A challenger or shadow that is refused leaves the one before in its role.

    Raises:
        BundleError: the champion is refused; nothing has changed.
    """
    held = {served.bundle.version: served for _, served in service.lineup.members()} if service.version else {}
    loaded: dict[Role, Served | None] = {}
    for role, place in plan.places():
        try:
            loaded[role] = held.get(place.version) or load_served(service, place, elsewhere)
        except BundleError as error:
            service.telemetry.refused()
            if role == "champion":
                raise
            logger.error("%s bundle %s is refused: %s", role, place.directory, error)
            loaded[role] = service.lineup.of(role) if service.version else None
        if served := loaded[role]:
            held[served.bundle.version] = served
    champion = loaded["champion"]
    assert champion is not None, "a plan has a champion, and one that is refused has raised"
    service.swap(champion, loaded.get("challenger"), loaded.get("shadow"))
    settle()


def load_served(service: Service, place: BundlePlace, elsewhere: Elsewhere | None = None) -> Served:
    """Load a bundle, replay its golden requests and answer some more, so that no user waits for what is built lazily.

    Raises:
        BundleError: the bundle is damaged, answers otherwise than when published, is not the version meant, or lacks
            an item column that a filter or rule names, or an action that is to count as seen.
    """
    from ranking.bundle import Bundle
    from ranking.devices import pick_device
    from ranking.rerank_depth import paced
    from ranking.searcher import Searcher

    # Where models run elsewhere this process has no share of a GPU, and perhaps none at all.
    device = pick_device(service.device if elsewhere is None else "cpu")
    bundle = Bundle.load(place.directory, device)
    if place.version and bundle.version != place.version:
        raise BundleError(f"{place.directory}: holds bundle {bundle.version}, expected {place.version}")
    if elsewhere is not None:
        bundle = elsewhere.bundle(bundle)
    searcher, config = None, service.search_config
    if bundle.text is not None:
        searcher = elsewhere.searcher(bundle, config) if elsewhere else paced(Searcher(bundle.text, config))
        for _ in range(WARM_REQUESTS):
            searcher.search(bundle.text.passages.text(0), rerank=True)
    if bundle.ranking_model is None:
        return Served(bundle, NoRanker(bundle.version), searcher)
    try:
        served = Served(bundle, service.path.recommender(bundle, service.histories), searcher)
    except ConfigError as error:
        raise BundleError(f"{place.directory}: {error}; change the recommender's file, or publish with it") from None
    _ = served.names  # a million names take seconds
    known = [item for item in bundle.item_ids if item][:WARM_EVENTS]
    history = [InlineEvent(item_id=item, timestamp=number) for number, item in enumerate(known)]
    for _ in range(WARM_REQUESTS):
        served.recommender.recommend(RecommendRequest(history=history), len(history))
        served.recommender.rank(RankRequest(history=history, item_ids=known or ["?"]), len(history))
    return served


def settle() -> None:
    """Keep what was loaded out of the collector's sight, so that no request waits while it walks over all of it.

    Nothing that was kept so before is looked at again: that stopped all requests for a tenth of a second and more at
    every swap. A bundle that was replaced is freed all the same, as it holds no cycle (`tests/test_lifecycle.py`).
    """
    gc.collect()
    gc.freeze()
