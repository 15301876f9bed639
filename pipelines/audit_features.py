"""Checks whether one column alone reads the label: an attribute of items or users made with the evaluated period in it.

A column is turned into a score in the ways a model could use it: numbers and dates as they are, columns of few values
by the share of positives each value has in every second request (judged on the others), and a user's column of item
ids by whether it names the candidate. An AUC above .95, or below .05, is no attribute but the answer.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl
from numpy.typing import NDArray

from pipelines.audit_record import Check
from pipelines.audit_requests import SPLITS
from pipelines.catalogue import TRAIN_COUNT
from pipelines.prepared import CandidateSets, PreparedSet
from pipelines.scoring import Sample, draw_requests
from recsys.columns import ITEM_ID, ITEM_KEY, TEXT, USER_ID, USER_KEY
from recsys.metrics import auc, groups_of, rank

LEAK = 0.95
MAX_VALUES = 100
"""Most values of a column judged by their shares of positives; a column of more names items rather than describes them,
and their shares are popularity in the very period."""
REQUESTS = 5_000
"""Requests per split the columns are judged on, drawn by seed."""
SEED = 2023
FEWEST = 10
"""Positives, and negatives, from which on an AUC says more than chance."""


@dataclass(frozen=True)
class Pool:
    """The candidates of some requests of one split and sampler; `request` int64 [N] is the request of each."""

    name: str
    sample: Sample
    sets: CandidateSets
    request: NDArray[np.int64]

    @property
    def user(self) -> NDArray[np.int64]:
        """History row of each candidate's user, int64 [N]."""
        return self.sample.requests.user[self.request]


@dataclass(frozen=True)
class Reading:
    """How well one column, read in one way, tells positives from negatives."""

    column: str
    way: str
    pool: str
    auc: float

    @property
    def strength(self) -> float:
        """The AUC of the better direction."""
        return max(self.auc, 1 - self.auc)


def feature_checks(prepared: PreparedSet, samplers: Sequence[str]) -> list[Check]:
    """Look whether any item or user column alone reads the label of validation or test candidates."""
    pools = list(_pools(prepared, samplers))
    items = [reading for pool in pools for reading in _item_readings(prepared, pool)]
    rows = dict(zip(prepared.catalogue[ITEM_ID].to_list(), prepared.key_to_row.tolist(), strict=True))
    users = [reading for pool in pools for reading in _user_readings(prepared, pool, rows)]
    return [_check("item_features", items), _check("user_features", users)]


def _pools(prepared: PreparedSet, samplers: Sequence[str]) -> Iterator[Pool]:
    for split in SPLITS[1:]:
        sample = draw_requests(prepared, split, REQUESTS, SEED)
        for sampler in samplers if len(sample) else ():
            sets = prepared.candidates(split, sampler).take(sample.index)
            yield Pool(f"{split}, {sampler}", sample, sets, groups_of(sets.offsets))


def _check(name: str, readings: Sequence[Reading]) -> Check:
    leaks = [reading for reading in readings if reading.strength > LEAK]
    wanted = f"no column with an AUC above {LEAK} or below {1 - LEAK:.2f} by itself"
    if leaks:
        worst = {reading.column: reading for reading in sorted(leaks, key=lambda reading: reading.strength)}
        described = [f"{one.column!r} {one.way}: AUC {one.auc:.4f} ({one.pool})" for one in worst.values()]
        return Check(name, False, "; ".join(described), wanted)
    if not readings:
        return Check(name, True, "no column to read", wanted)
    best = max(readings, key=lambda reading: reading.strength)
    columns = len({reading.column for reading in readings})
    words = f"{columns} columns; at most {best.column!r} {best.way}: AUC {best.auc:.4f} ({best.pool})"
    return Check(name, True, words, wanted)


def _item_readings(prepared: PreparedSet, pool: Pool) -> Iterator[Reading]:
    """Read every column of the catalogue and of the item table's dense part."""
    rows = len(prepared.items)
    for column in prepared.catalogue.columns:
        if column not in (ITEM_KEY, ITEM_ID, TEXT, TRAIN_COUNT):
            found = _codes(prepared.catalogue[column])
            if found is not None:
                codes = np.zeros(rows, np.int64)
                codes[prepared.key_to_row] = found
                yield from _readings(column, codes[pool.sets.item], _ordered(prepared.catalogue[column]), pool)
    dense, names = prepared.items.dense.numpy(), prepared.manifest.get("numeric", [])
    for place in range(dense.shape[1]):
        codes = np.unique(np.nan_to_num(dense[:, place]), return_inverse=True)[1]
        name = str(names[place]) if place < len(names) else f"dense[{place}]"
        yield from _readings(f"{name}, as models see it", codes[pool.sets.item], True, pool)


def _user_readings(prepared: PreparedSet, pool: Pool, rows: Mapping[str, int]) -> Iterator[Reading]:
    """Read every column of the users; `rows` has the model row of each item id."""
    for column in prepared.users.columns:
        if column in (USER_KEY, USER_ID):
            continue
        series = prepared.users[column]
        codes = _codes(series)
        if codes is not None:
            yield from _readings(column, codes[pool.user], _ordered(series), pool)
        if series.dtype == pl.String or series.dtype.is_integer():
            yield from _naming(column, series, rows, pool)


def _readings(column: str, codes: NDArray[np.int64], ordered: bool, pool: Pool) -> Iterator[Reading]:
    """Read the candidates' codes (0 is missing) as numbers, and by the share of positives of each."""
    label = pool.sets.label
    if ordered:
        yield from _reading(column, "as a number", pool, codes, label)
    if codes.max(initial=0) <= MAX_VALUES:
        learn = pool.request % 2 == 0
        positives = np.bincount(codes[learn], label[learn], MAX_VALUES + 1)
        known = np.bincount(codes[learn], minlength=MAX_VALUES + 1)
        share = (positives + label.mean()) / (known + 1)
        yield from _reading(column, "by its values", pool, share[codes[~learn]], label[~learn])


def _naming(column: str, series: pl.Series, rows: Mapping[str, int], pool: Pool) -> Iterator[Reading]:
    """Read a user's column as the id of an item: does it name one of the request's positives, and none of the others?

    A column can name one item of a basket only, so each request counts as one positive.
    """
    named = np.array([rows.get(value, 0) for value in series.cast(pl.String).to_list()], np.int64)
    if not named.any():
        return
    match = named[pool.user] == pool.sets.item
    positive = pool.sets.label == 1
    requests = len(pool.sample)
    asked = np.bincount(pool.request[positive], minlength=requests) > 0
    met = np.bincount(pool.request[positive & match], minlength=requests) > 0
    score = np.concatenate([met[asked], match[~positive]])
    label = np.concatenate([np.ones(int(asked.sum()), np.uint8), np.zeros(int((~positive).sum()), np.uint8)])
    yield from _reading(column, "as an item id", pool, score, label)


def _reading(
    column: str, way: str, pool: Pool, score: NDArray[np.generic], label: NDArray[np.uint8]
) -> Iterator[Reading]:
    if min(int((label == 1).sum()), int((label == 0).sum())) >= FEWEST:
        value = float(auc(rank(score.astype(np.float32), label))[0])
        yield Reading(column, way, pool.name, value)


def _ordered(series: pl.Series) -> bool:
    return series.dtype.is_numeric() or series.dtype.is_temporal() or series.dtype == pl.Boolean


def _codes(series: pl.Series) -> NDArray[np.int64] | None:
    """Return each value's place among the sorted distinct ones, from 1; 0 is missing. None for lists and the like."""
    if not (_ordered(series) or series.dtype in (pl.String, pl.Categorical, pl.Enum)):
        return None
    values = series.fill_nan(None) if series.dtype.is_float() else series
    if isinstance(series.dtype, pl.Categorical | pl.Enum):
        values = series.cast(pl.String)
    known = values.drop_nulls().unique().sort()
    places = pl.DataFrame({"value": known}).with_row_index("place", offset=1)
    joined = pl.DataFrame({"value": values}).join(places, on="value", how="left", maintain_order="left")
    return joined["place"].fill_null(0).to_numpy().astype(np.int64)
