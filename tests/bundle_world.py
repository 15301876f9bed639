"""A small world, named models of it and what a bundle of them holds, for tests of bundles."""

import worlds
from ranking.bundle import Contents
from ranking.bundle_models import NamedModel
from ranking.manifest import Provenance

WORLD = worlds.make_world(users=40, length=12, known=30)
PROVENANCE = Provenance(created="2025-01-01T00:00:00+00:00", commit="abc", data_digest="d" * 64, metrics={"auc": 0.5})
SMALL = {"mqsa_ted": {"width": 8, "window": 10}}


def named(name: str, seed: int = 0) -> NamedModel:
    return worlds.named_model(name, WORLD, SMALL.get(name, {}), seed, spread=0.1)


def contents(ranker: NamedModel, retriever: NamedModel | None) -> Contents:
    items = len(WORLD.key_to_row)
    return Contents(
        items=WORLD.items,
        item_ids=["", "", *(f"item-{key}" for key in range(items))],
        names=["", "", *(f"Thé nº {key} 茶" for key in range(items))],
        key_to_row=WORLD.key_to_row,
        vocabulary={"category": ["a", "b", "c"]},
        actions=["", "purchase"],
        ranker=ranker,
        retriever=retriever,
    )
