"""Fixtures of many test files: a small but real workspace, made once, and a made world to serve, once for each file."""

import gc
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from fastapi.dependencies import models
from hypothesis import settings

settings.register_profile("recsys", deadline=None)  # how long an example takes is the machine's affair
settings.load_profile("recsys")

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

USERS = 60


@pytest.fixture(scope="module", autouse=True)
def forgotten() -> Iterator[None]:
    """Close what the services of a file hold open: FastAPI remembers their routes, and they hide from the collector."""
    yield
    for remembered in vars(models).values():
        if hasattr(remembered, "cache_clear"):
            remembered.cache_clear()
    gc.unfreeze()
    gc.collect()


@pytest.fixture(scope="session")
def mlflow_uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tracking store of its own for the whole session: its first migration takes seconds."""
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow') / 'mlflow.db'}"


@pytest.fixture(scope="session")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The canonical log of sixty real households."""
    from pipelines.datasets import completejourney
    from pipelines.ingest import ingest

    directory = tmp_path_factory.mktemp("log") / "log"
    ingest(completejourney(USERS), directory)
    return directory


@pytest.fixture(scope="session")
def prepared(log: Path, tmp_path_factory: pytest.TempPathFactory):
    """The prepared set of sixty real households."""
    from pipelines.prepare import PrepareConfig, prepare

    return prepare(log, tmp_path_factory.mktemp("prepared") / "prepared", PrepareConfig(workers=1, negatives=20))


@dataclass(frozen=True)
class Published:
    """Where a published bundle and the histories under it lie."""

    bundle: Path
    snapshot: Path


@pytest.fixture(scope="session")
def published(prepared, mlflow_uri: str, tmp_path_factory: pytest.TempPathFactory) -> Published:
    """A bundle of a briefly trained DARE behind a briefly trained MQSA-TED, with its user snapshot."""
    from pipelines.publish import publish
    from pipelines.train import train
    from pipelines.train_config import load_config

    root = tmp_path_factory.mktemp("published")
    quick = ["stop.max_steps=4", "stop.requests=40", "batches.rows=32"]
    trained = {
        name: train(load_config(Path(f"pipelines/configs/{name}.toml"), quick), prepared, root / name, mlflow_uri)
        for name in ("dare", "mqsa_ted")
    }
    place = Published(root / "bundle", root / "snapshot")
    publish(prepared, trained["dare"], trained["mqsa_ted"], place.bundle, place.snapshot, {}, ())
    return place


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory):
    """Where a snapshot and two bundles of a made world lie, for one file of tests."""
    from serving_world import publish_world

    return publish_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def service(place, tmp_path_factory: pytest.TempPathFactory):
    """A service over `place`, for one file of tests."""
    from serving_world import make_service

    service = make_service(place, tmp_path_factory.mktemp("state"))
    yield service
    service.close()
