"""What a service is started with, and the service made of it: shared by the Ray Serve and the plain host."""

import gc
from dataclasses import dataclass, field
from pathlib import Path

from recsys.errors import ConfigError
from serving.app import Limits
from serving.event_log import WINDOW, Durability, SegmentLog
from serving.history_store import LmdbHistoryStore
from serving.service import Served, Service
from serving.telemetry import Telemetry


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
    cores: int = 1
    """threads of torch and FAISS within one request"""
    limits: Limits = field(default_factory=Limits)
    """of each replica"""
    durability: Durability = "fsync"
    """whether an accepted event is on the disk (`fsync`) or with the operating system (`os`)"""
    window: int = WINDOW
    """newest events among which a repeated event id is recognised"""

    def __post_init__(self) -> None:
        for name in ("replicas", "cores", "window"):
            if getattr(self, name) < 1:
                raise ConfigError(f"[serve] {name} is {getattr(self, name)}; expected at least 1")
        if not 1 <= self.port <= 65_535:
            raise ConfigError(f"[serve] port is {self.port}; expected 1 to 65535")


def open_service(config: ServeConfig) -> Service:
    """Open log and histories and give a service that still needs its bundle; sets the threads of this process.

    Raises:
        DataError: the snapshot or the log is damaged.
    """
    import torch

    from ranking.index import use_threads
    from ranking.snapshot import SnapshotReader

    torch.set_num_threads(config.cores)
    use_threads(config.cores)
    store = LmdbHistoryStore(config.state / "histories", SnapshotReader(config.snapshot))
    log = SegmentLog(config.state / "log", config.durability, config.window)
    return Service(log, store, Telemetry())


def load_into(service: Service, directory: Path) -> None:
    """Load a bundle, golden requests included, and swap the service to it; raises `BundleError`, changing nothing."""
    from ranking.bundle import Bundle
    from ranking.recommender import Recommender

    bundle = Bundle.load(directory)
    served = Served(bundle, Recommender(bundle, service.store))
    _ = served.names  # built here, not by the first search: a million names take seconds
    service.swap(served)
    gc.collect()
    gc.freeze()  # what was loaded stays: the collector need not look at it again during requests
