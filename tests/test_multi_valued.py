"""Columns of several values per item: from lists in the catalogue to codes, embeddings, content and back from disk."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from logs import raw, synthetic

from pipelines.ingest import ingest
from pipelines.prepare import PrepareConfig, prepare
from pipelines.prepared import PreparedSet
from pipelines.samplers import SAMPLERS
from ranking.attributes import Attributes
from ranking.bundle import Bundle
from ranking.content import content_features
from ranking.embeddings import Fields, FieldWidths
from ranking.items import ItemTable, MultiValued
from ranking.recommender_config import Cap
from ranking.rules import Rules
from ranking.sim_hard import SimHard, SimHardConfig
from recsys.errors import ConfigError, DataError
from recsys.files import read_json

GENRES = [["b", "a"], [], None, ["c"], [None], ["a", None, "c", "a"], ["c", "b", "a"], ["a"], ["b"]]
"""of the items i3 .. i11"""
CODES = [[3, 2], [1], [1], [4], [1], [2, 4], [4, 3, 2], [2], [3]]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("genres") / "source"
    log = raw(synthetic(2000))
    assert log.items is not None
    ingest(replace(log, items=log.items.with_columns(genres=pl.Series(GENRES))), folder)
    return folder


@pytest.fixture(scope="module")
def done(source: Path) -> PreparedSet:
    return prepare(source, source.with_name("set"), PrepareConfig(workers=1))


def codes_of(table: ItemTable, row: int) -> list[int]:
    column = table.multi("genres")
    assert (column.offsets.dtype, column.code.dtype) == (torch.int64, torch.int32)
    return column.code[column.offsets[row] : column.offsets[row + 1]].tolist()


def test_lists_become_codes_and_what_is_missing_or_empty_is_one_missing_value(done: PreparedSet) -> None:
    assert (done.manifest["categorical"], done.manifest["multi"]) == (["category"], ["genres"])
    assert read_json(done.directory / "vocabulary.json")["genres"] == ["a", "b", "c"]
    table = done.items  # written and read again
    assert (table.columns, table.multi_columns, table.codes("genres")) == (("category",), ("genres",), 5)
    row = {item: key + 2 for item, key in done.catalogue.select("item_id", "item_key").iter_rows()}
    assert [codes_of(table, row[f"i{3 + n}"]) for n in range(9)] == CODES
    assert [codes_of(table, n) for n in (0, 1, row["i0"])] == [[0], [1], [1]]  # i0 is not in the catalogue
    assert len(table.multi("genres").offsets) == len(table) + 1


def test_a_column_of_lists_is_asked_for_as_such(source: Path, done: PreparedSet, tmp_path: Path) -> None:
    def prepared(**settings: tuple[str, ...]) -> PreparedSet:
        return prepare(source, tmp_path / "set", PrepareConfig(workers=1, **settings))

    without = prepared(multi=()).items
    assert without.multi_columns == ()
    assert without.columns == ("category",)
    with pytest.raises(DataError, match="column 'genres' holds several values per item; expected it in multi"):
        prepared(columns=("genres",))
    with pytest.raises(DataError, match="column 'category' is String; expected lists of values"):
        prepared(multi=("category",))
    with pytest.raises(DataError, match="no column 'tags' to read as several values; the catalogue has category, gen"):
        prepared(multi=("tags",))
    with pytest.raises(ConfigError, match="no multi-valued item column 'category'; there are genres"):
        done.items.multi("category")
    with pytest.raises(ConfigError, match=r"'genres' has several values per item; expected one value each: category"):
        SimHard(SimHardConfig(category="genres"), done.items)  # searches by one category per item


lists = st.lists(st.lists(st.integers(1, 6), min_size=1, max_size=4, unique=True), min_size=1, max_size=8)


def table_of(codes: list[list[int]]) -> ItemTable:
    """A table of items with these codes, all of them trained."""
    every = [[0], [1], *codes]
    offsets = torch.tensor([0, *(len(some) for some in every)]).cumsum(0)
    column = MultiValued(offsets, torch.tensor([code for some in every for code in some]).int(), 7)
    rows = len(every)
    return ItemTable([], torch.zeros(rows, 0, dtype=torch.int32), [], torch.ones(rows).long(), multi={"genres": column})


@given(codes=lists, seed=st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_a_field_is_the_mean_of_its_values_and_only_they_are_trained(codes: list[list[int]], seed: int) -> None:
    items = table_of(codes)
    fields = Fields(items, FieldWidths(item=0, category=3, position=0), "genres", window=1)
    assert fields.category is not None
    weight = fields.category.weight
    asked = torch.randint(0, len(items), (2, 5), generator=torch.Generator().manual_seed(seed), dtype=torch.int32)
    found = fields.semantic(asked, items.embedding_row)
    every = [[0], [1], *codes]
    for place, row in enumerate(asked.flatten().tolist()):
        torch.testing.assert_close(found.view(-1, 3)[place], weight[every[row]].mean(0))
    assert found[asked == 0].abs().sum() == 0  # padding
    found.square().sum().backward()
    assert weight.grad is not None
    read = {code for row in asked.flatten().tolist() for code in every[row]} - {0}
    assert set(weight.grad.to_dense().abs().sum(1).nonzero().flatten().tolist()) == read


@given(codes=lists)
@settings(max_examples=10, deadline=None)
def test_the_values_of_an_item_divide_its_vote(codes: list[list[int]]) -> None:
    items = table_of(codes)
    wanted = torch.zeros(7, dtype=torch.float64)
    for some in codes:
        wanted[some] += 1 / len(some) / len(codes)
    torch.testing.assert_close(items.multi("genres").shares(torch.arange(2, len(items))), wanted)


def test_known_values_are_content_of_length_one(done: PreparedSet) -> None:
    items = done.items
    features = content_features(items, [""] * len(items))
    first = sum(items.cardinality)  # the columns of genres begin behind those of the categories
    for row in range(len(items)):
        entries = slice(int(features.offsets[row]), int(features.offsets[row + 1]))
        column, value = features.column[entries], features.value[entries]
        genre = column >= first
        known = [code for code in codes_of(items, row) if code > 1]
        assert (column[genre] - first).tolist() == sorted(known)
        assert value[genre].square().sum() == pytest.approx(1.0 if known else 0.0)


def test_in_category_wants_one_category_per_item() -> None:
    column = table_of([[2, 3]]).multi("genres")
    rows = len(column.offsets) - 1
    items = ItemTable([], torch.zeros(rows, 0).int(), [], torch.ones(rows).long(), multi={"category": column})
    with pytest.raises(ConfigError, match="'category' has several values per item"):
        SAMPLERS["in_category"](items)


def test_a_filter_finds_an_item_by_any_of_its_values(done: PreparedSet) -> None:
    vocabulary = read_json(done.directory / "vocabulary.json")
    bundle = cast(Bundle, SimpleNamespace(items=done.items, vocabulary=vocabulary, row_of={}))
    attributes = Attributes(bundle)
    assert attributes.columns == ["item_id", "category", "genres"]
    for asked in (["a"], ["b", "c"], ["nothing"]):
        wanted = [
            any({"a": 2, "b": 3, "c": 4}.get(value) in codes_of(done.items, row) for value in asked)
            for row in range(len(done.items))
        ]
        assert attributes.having("genres", asked).tolist() == wanted


@given(codes=lists, at_most=st.integers(1, 3), k=st.integers(1, 8), seed=st.integers(0, 99))
@settings(max_examples=50, deadline=None)
def test_a_cap_counts_every_value_of_an_item(codes: list[list[int]], at_most: int, k: int, seed: int) -> None:
    items = table_of(codes)
    vocabulary = {"genres": [f"g{code}" for code in range(2, 7)]}
    bundle = cast(Bundle, SimpleNamespace(items=items, vocabulary=vocabulary, row_of={}))
    rules = Rules(Attributes(bundle), (Cap("genres", at_most),))
    rows = np.random.default_rng(seed).permutation(np.arange(2, len(items))).astype(np.int32)
    chosen = rules.select(rows, k)
    taken: Counter[int] = Counter()
    places = []
    for place, row in enumerate(rows.tolist()):  # by the definition
        known = [code for code in codes[row - 2] if code > 1]
        if len(places) < k and all(taken[code] < at_most for code in known):
            places.append(place)
            taken.update(known)
    assert chosen.places.tolist() == places
    full = {code for code, count in taken.items() if count >= at_most}
    assert {code for _, code in chosen.full} == full
    allowed = np.ones(len(items), bool)
    rules.without(allowed, chosen.full)
    assert allowed[2:].tolist() == [not full & set(some) for some in codes]
