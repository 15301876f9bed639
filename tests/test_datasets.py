"""Known logs: what they hold, whose they are, and what is said where they are missing."""

import os
from pathlib import Path

import polars as pl
import pytest

from pipelines import datasets
from pipelines.cards import prepare_defaults
from pipelines.datasets import DATASETS, SEQUENCE_SETS, movielens_100k, sequence_set
from pipelines.ingest import ingest
from pipelines.prepare import PrepareConfig, prepare
from recsys.config import overlaid, parse
from recsys.errors import DataError

# users, items, events: as published with the sets
SIZES = {
    "ml-1m": (6040, 3416, 999_611),
    "beauty": (22_363, 12_101, 198_502),
    "sports": (35_598, 18_357, 296_337),
    "toys": (19_412, 11_924, 167_597),
    "yelp": (30_431, 20_033, 316_354),
}


def has(name: str) -> bool:
    root = os.environ.get(datasets.DATA_VARIABLE)
    return bool(root) and (Path(root) / name / "interactions.parquet").exists()


@pytest.mark.parametrize("name", SEQUENCE_SETS)
def test_a_sequence_set_is_whole_and_prepared_by_order_alone(tmp_path: Path, name: str) -> None:
    if not has(name):
        pytest.skip(f"no {name} under the folder {datasets.DATA_VARIABLE} names")
    raw = sequence_set(name, users=300)
    card = ingest(raw, tmp_path / "log")
    assert (card.users, card.order, card.bad) == (300, "position", {})
    settings = overlaid(prepare_defaults(tmp_path / "log"), {"workers": 1, "negatives": 5})
    done = prepare(tmp_path / "log", tmp_path / "set", parse(PrepareConfig, settings, ""))
    assert done.manifest["config"]["split"]["kind"] == "last_request"
    counts = done.manifest["counts"]
    assert counts["events"] == card.events
    # One request per event: positions have no ties. Every user has a last one and one before it.
    assert counts["requests"]["test"] == counts["requests"]["valid"] == 300
    assert sum(counts["requests"].values()) == card.events
    facts = (
        sequence_set(name)
        .events.select(
            pl.col("user_id").n_unique().alias("users"),
            pl.col("item_id").n_unique().alias("items"),
            pl.len().alias("n"),
        )
        .collect()
    )
    assert facts.row(0) == SIZES[name]


def test_beauty_keeps_the_split_of_its_paper(tmp_path: Path) -> None:
    if not has("beauty"):
        pytest.skip(f"no beauty under the folder {datasets.DATA_VARIABLE} names")
    rows = pl.read_parquet(Path(os.environ[datasets.DATA_VARIABLE]) / "beauty" / "interactions.parquet")
    place = pl.col("position").rank("ordinal", descending=True).over("user_id")
    named = pl.when(place == 1).then(pl.lit("test")).when(place == 2).then(pl.lit("valid")).otherwise(pl.lit("train"))
    assert rows.select((named == pl.col("split")).all()).item()


def test_movielens_is_read_in_place_from_the_wheel(tmp_path: Path) -> None:
    pytest.importorskip("recbole", reason="recbole is not installed: it carries MovieLens-100K")
    card = ingest(movielens_100k(), tmp_path / "log")
    assert (card.users, card.items, card.events, card.catalogue_items) == (943, 1682, 100_000, 1682)
    assert card.missing_text == 0
    assert card.positive.min_value == 4
    assert card.history["p100"] == 737
    assert prepare_defaults(tmp_path / "log") == {"min_value": 4}
    items = pl.read_parquet(tmp_path / "log" / "items.parquet")
    assert items.filter(pl.col("item_id") == "1").select("text", "genres").row(0) == (
        "Toy Story (1995)",
        ["Animation", "Children's", "Comedy"],
    )


def test_what_is_missing_is_said_with_the_way_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(datasets.DATA_VARIABLE, raising=False)
    with pytest.raises(DataError, match="beauty: the environment variable RECSYS_DATA is not set; expected a folder"):
        DATASETS["beauty"](None)
    monkeypatch.setenv(datasets.DATA_VARIABLE, str(tmp_path))
    with pytest.raises(DataError, match=r"toys/interactions.parquet: no such file; expected the set toys under"):
        DATASETS["toys"](None)
    monkeypatch.setattr(datasets, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"recbole is not installed; .*pip install --no-deps recbole"):
        DATASETS["movielens-100k"](None)
