"""A large published world without training: what a request costs does not depend on what the weights have learnt."""

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ranking.batch import FIRST_ITEM
from ranking.bundle import Contents, write_bundle
from ranking.bundle_models import NamedModel
from ranking.index import IndexConfig
from ranking.items import ItemTable
from ranking.manifest import MANIFEST, Provenance
from ranking.models import RANKERS
from ranking.mqsa_ted import MqsaTed, MqsaTedConfig
from ranking.snapshot import write_snapshot
from recsys.history import Events, Histories
from recsys.randomness import generator

CATEGORIES = 1_000
WIDTH = 64
LISTED = IndexConfig(probes=128, compared=8, recall=0)
"""What finds .99 of a million trained vectors; not searched for here, as users of an untrained model lie nowhere."""
START = 1_700_000_000_000_000  # microseconds


@dataclass(frozen=True)
class BigWorld:
    """Where the snapshot lies, a bundle, and another of the same contents under another version."""

    snapshot: Path
    bundle: Path
    twin: Path


def lay_in_clusters(vectors: torch.Tensor) -> None:
    """Overwrite vectors [n, D] with ones around 5,000 centres, as trained ones lie: an index has to do with neither."""
    centre = torch.randn(5_000, vectors.shape[1])
    with torch.no_grad():
        vectors.copy_(centre[torch.randint(len(centre), (len(vectors),))] + 0.3 * torch.randn_like(vectors))


def write_big_world(directory: Path, ranker: str, items: int, users: int, length: int, seed: int = 0) -> BigWorld:
    """Write histories of `length` events and a bundle of `ranker`, untrained, behind a retriever of 64 columns."""
    world = BigWorld(directory / "snapshot", directory / "bundle", directory / "twin")
    draws = generator(seed, 0, "big world")
    rows = items + FIRST_ITEM
    category = np.zeros((rows, 1), np.int32)
    category[FIRST_ITEM:, 0] = draws.integers(2, CATEGORIES + 2, items)
    count = np.zeros(rows, np.int64)
    count[FIRST_ITEM:] = 1 + draws.zipf(1.5, items).clip(max=100_000)
    table = ItemTable(("category",), torch.from_numpy(category), (CATEGORIES + 2,), torch.from_numpy(count))
    keys = draws.integers(0, items, users * length).astype(np.uint32)
    time = START + np.sort(draws.integers(0, 365 * 86_400_000_000, (users, length)), axis=1).ravel()
    events = Events(keys, np.ones(users * length, np.uint8), time.astype(np.int64))
    histories = Histories(events, np.arange(users + 1, dtype=np.int64) * length)
    write_snapshot(world.snapshot, [f"user-{number}" for number in range(users)], histories, "big")
    torch.manual_seed(seed)
    config: Any = RANKERS[ranker][0]()
    if hasattr(config, "window"):
        config = replace(config, window=length)
    model: Any = RANKERS[ranker][1](config, table)  # type: ignore[call-arg]
    retriever = MqsaTedConfig(width=WIDTH)
    finder = MqsaTed(retriever, table)
    lay_in_clusters(finder.item)
    contents = Contents(
        items=table,
        item_ids=["", "", *(f"item-{number}" for number in range(items))],
        names=["", "", *(f"Item {number}" for number in range(items))],
        key_to_row=np.arange(FIRST_ITEM, rows, dtype=np.int32),
        vocabulary={},
        actions=["", "purchase"],
        ranker=NamedModel(ranker, config, model),
        retriever=NamedModel("mqsa_ted", retriever, finder),
    )
    provenance = Provenance(created="2026-01-01T00:00:00Z", commit="none", data_digest="big")
    write_bundle(world.bundle, contents, provenance, LISTED)
    shutil.copytree(world.bundle, world.twin)
    manifest = json.loads((world.twin / MANIFEST).read_text())
    manifest["provenance"]["created"] = "2026-01-02T00:00:00Z"
    (world.twin / MANIFEST).write_text(json.dumps(manifest))
    return world
