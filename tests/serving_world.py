"""A small published bundle and snapshot, and services over them, for the tests of `serving/`."""

import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from fastapi import FastAPI
from torch import Tensor

from ranking.batch import FIRST_ITEM
from ranking.bundle import Contents, write_bundle
from ranking.bundle_models import NamedModel
from ranking.content import content_features, match_content
from ranking.content_vectors import ContentVectors
from ranking.items import ItemTable
from ranking.ladder import Deadlines
from ranking.mqsa_ted import MqsaTed, MqsaTedConfig
from ranking.personal_frequency import PersonalFrequency, PersonalFrequencyConfig
from ranking.searched import SearchConfig
from ranking.snapshot import write_snapshot
from serving.app import Limits, create_app
from serving.security import ApiKeys
from serving.service import Service
from serving.settings import ServeConfig, load_into, open_service
from worlds import DAY, PROVENANCE, START, make_world

USERS = 20
ITEMS = 62
PATIENT = Deadlines(**{each.name: 600.0 for each in fields(Deadlines)})
"""For tests whose answers must be whole however busy the machine is."""

PATIENT_SEARCH = SearchConfig(budget_ms=60_000)
"""The same for searches."""

WAIT = 120.0
"""Seconds to wait for what comes soon on any machine that is not very busy."""

LATER = START + 1_000 * DAY
"""After all events of the world."""


@dataclass(frozen=True)
class Place:
    """Where the snapshot and two bundles lie; `smaller` does not know the last two items of `bundle`."""

    snapshot: Path
    bundle: Path
    smaller: Path


def publish_world(directory: Path) -> Place:
    """Write a snapshot of twenty users (`user-0`...) and two bundles over sixty items (`item-0`...)."""
    world = make_world(users=USERS)
    place = Place(directory / "snapshot", directory / "bundle", directory / "smaller")
    write_snapshot(place.snapshot, [f"user-{number}" for number in range(USERS)], world.histories, "digest")
    _write(place.bundle, world.items, ITEMS)
    _write(place.smaller, world.items, ITEMS - 2)
    return place


def publish_described(directory: Path, vectors: ContentVectors | None = None, retrieves: bool = True) -> None:
    """Write a bundle whose items without training events (`item-60`, `item-61`) are known by name and category only."""
    _write(directory, make_world(users=USERS).items, ITEMS, described=True, vectors=vectors, retrieves=retrieves)


def publish_priced(directory: Path) -> None:
    """Write a bundle whose item `item-N` costs N, and every third item, `item-0` among them, has no price."""
    prices = torch.arange(ITEMS + FIRST_ITEM, dtype=torch.float32)[:, None] - FIRST_ITEM
    _write(directory, make_world(users=USERS).items, ITEMS, prices=prices, free=prices % 3 == 0)


def _write(
    directory: Path,
    items: ItemTable,
    known: int,
    described: bool = False,
    vectors: ContentVectors | None = None,
    retrieves: bool = True,
    prices: Tensor | None = None,
    free: Tensor | None = None,
) -> None:
    rows = known + FIRST_ITEM
    columns = items.columns, items.categorical[:rows], items.cardinality, items.count[:rows]
    dense = None if prices is None or free is None else torch.where(free, 0, prices)
    table = ItemTable(*columns, dense=dense, numeric=() if dense is None else ("price",), missing=free)
    torch.manual_seed(known)
    retriever = MqsaTedConfig(width=8)
    names = ["", ""] + [f"Item number {number}" for number in range(known)]
    contents = Contents(
        items=table,
        item_ids=["", ""] + [f"item-{number}" for number in range(known)],
        names=names,
        key_to_row=torch.arange(FIRST_ITEM, rows, dtype=torch.int32).numpy(),
        vocabulary={},
        actions=["", "purchase"],
        ranker=NamedModel(
            "personal_frequency", PersonalFrequencyConfig(), PersonalFrequency(PersonalFrequencyConfig(), table)
        ),
        retriever=NamedModel("mqsa_ted", retriever, MqsaTed(retriever, table)) if retrieves else None,
        content=match_content(content_features(table, names), table.count) if described else None,
        content_vectors=vectors,
    )
    write_bundle(directory, contents, PROVENANCE)


def make_service(place: Place, state: Path, bundle: Path | None = None, **settings) -> Service:
    """Open a service over a bundle, `place.bundle` unless said otherwise."""
    service = open_service(ServeConfig(bundle or place.bundle, place.snapshot, state, durability="os", **settings))
    load_into(service, bundle or place.bundle)
    return service


def patient_app(service: Service, keys: ApiKeys | None = None, **limits) -> FastAPI:
    """Return the application with deadlines that no busy machine misses."""
    return create_app(service, Limits(**{"deadlines": PATIENT} | limits), keys=keys)


def eventually(holds: Callable[[], bool]) -> bool:
    """Whether something comes to hold."""
    deadline = time.monotonic() + WAIT
    while not (held := holds()) and time.monotonic() < deadline:
        time.sleep(0.01)
    return held


def free_port() -> int:
    """Return a port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def sample(text: str, name: str) -> float:
    """Return the value of a metric without labels in what a scrape gives."""
    return float(next(line for line in text.splitlines() if line.startswith(f"{name} ")).rsplit(" ", 1)[1])
