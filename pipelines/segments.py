"""Segments: parts of the test requests for which quality is told apart, as `[segments]` of the evaluation asks.

A segment of requests (who asks) holds all their candidates. A segment of positives (what is to be found) holds, of each
request with such a positive, those positives and all negatives: can these items be found among the same others?

    new_users             users without an event of the training period
    cold_items            positives without training events
    popularity_<part>     head, middle, tail: training events decide. Items in descending order of training events;
                          the head makes up the first `head_share` of all those events, the tail the last `tail_share`
    item_age_<days>       positives by days since the item's first event in the log, `item_age_unseen` before it
    item_<column>_<value> positives by a column of the items, the `values` most frequent values in training
    user_<column>_<value> requests by a column of the users; a column of numbers is cut at its thirds

Nothing here looks at a score, and thresholds come from the training period alone (user columns: from all users).
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import polars as pl
from numpy.typing import NDArray

from pipelines.prepared import PreparedSet
from pipelines.scoring import Sample
from ranking.batch import FIRST_ITEM
from recsys.columns import USER_ID, USER_KEY
from recsys.errors import ConfigError
from recsys.files import read_json
from recsys.history import DAY, POSITIONS

MISSING = "missing"

Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class SegmentsConfig:
    """Which segments are told apart beside history length and target in history.

    Attributes:
        head_share: of all training events, those of the most frequent items that make up the head.
        tail_share: of all training events, those of the least frequent items that make up the tail.
        item_age_days: ages at which the item-age segments start anew; empty leaves them out.
        item_columns: columns of the items; absent takes the first categorical one, empty none.
        user_columns: columns of the users.
        values: most values told apart in a column, the most frequent ones.
    """

    head_share: float = 0.5
    tail_share: float = 0.2
    item_age_days: tuple[int, ...] = (30, 180)
    item_columns: tuple[str, ...] | None = None
    user_columns: tuple[str, ...] = ()
    values: int = 6

    def __post_init__(self) -> None:
        if not (0 < self.head_share < 1 and 0 < self.tail_share < 1 and self.head_share + self.tail_share <= 1):
            raise ConfigError(
                f"[segments] head_share = {self.head_share}, tail_share = {self.tail_share}; expected shares above 0 "
                "that together make at most 1"
            )
        if list(self.item_age_days) != sorted({days for days in self.item_age_days if days > 0}):
            raise ConfigError(f"[segments] item_age_days = {list(self.item_age_days)}; expected ascending days above 0")
        if self.values < 1:
            raise ConfigError(f"[segments] values = {self.values}; expected at least 1")


@dataclass(frozen=True)
class Segment:
    """A part of what was scored.

    Attributes:
        name: as in `segment/<name>/gauc`.
        kind: what it is a part by, e.g. `item popularity`.
        words: what a reader calls it.
        requests: bool [R], whose requests belong to it; None where positives decide.
        rows: bool [V], which items' positives belong to it; None where requests decide.
        positives: bool [N over all candidates], where neither does: it depends on both.
    """

    name: str
    kind: str
    words: str
    requests: Mask | None = None
    rows: Mask | None = None
    positives: Mask | None = None

    def kept(self, request: NDArray[np.int64], item: NDArray[np.int32], label: Mask) -> Mask:
        """Return the candidates of the segment, bool [N]; `request` [N] is each candidate's request."""
        if self.requests is not None:
            return np.asarray(self.requests[request])
        own = label & (self.rows[item] if self.rows is not None else _given(self.positives))
        having = np.zeros(int(request.max(initial=-1)) + 1, np.bool_)
        having[request[own]] = True
        return np.asarray(own | (~label & having[request]))


def segments_of(
    prepared: PreparedSet, sample: Sample, request: NDArray[np.int64], item: NDArray[np.int32], config: SegmentsConfig
) -> list[Segment]:
    """Return every segment the configuration asks for, those without requests included.

    Args:
        prepared: the set.
        sample: the R requests scored.
        request: int64 [N], the request of each candidate.
        item: int32 [N], its model row.
        config: which segments.

    Raises:
        ConfigError: a column the items or users do not have; the message names those there are.
    """
    found = [_new_users(prepared, sample), *_popularity(prepared, config)]
    found += _ages(prepared, sample, request, item, config)
    items = prepared.items
    columns = items.columns[:1] if config.item_columns is None else config.item_columns
    for column in columns:
        found += _item_column(prepared, column, config.values)
    for column in config.user_columns:
        found += _user_column(prepared, sample, column, config.values)
    return _apart(found)


def popularity_bounds(count: NDArray[np.int64], head_share: float, tail_share: float) -> tuple[int, int]:
    """Return the training events from which an item is in the head, and up to which it is in the tail.

    Args:
        count: int64 [V], training events of each row.
        head_share: share of all events the head makes up, at least.
        tail_share: share of all events the tail makes up, at most; 0 events where the rarest items have more.
    """
    value, items = np.unique(count[count > 0], return_counts=True)  # ascending
    if not len(value):
        return 1, 0
    events = np.cumsum(value * items)  # of items with `value` events or fewer
    above = events[-1] - events + value * items  # of items with `value` or more
    head = int(value[np.flatnonzero(above >= head_share * events[-1])[-1]])
    within = int(np.count_nonzero(events <= tail_share * events[-1]))
    tail = int(value[within - 1]) if within else 0
    return head, min(tail, head - 1)


def first_seen(prepared: PreparedSet) -> NDArray[np.int64]:
    """Return the moment of each row's first event in the log, int64 [V]; the largest number where there is none."""
    events = prepared.histories.events
    first = np.full(len(prepared.key_to_row), np.iinfo(np.int64).max)
    known = np.asarray(events.item) < len(first)
    np.minimum.at(first, np.asarray(events.item)[known], np.asarray(events.time)[known])
    rows = np.full(len(prepared.items), np.iinfo(np.int64).max)
    np.minimum.at(rows, prepared.key_to_row, first)
    return rows


def _apart(found: list[Segment]) -> list[Segment]:
    """Number the names that several values share once they are written plainly."""
    times: dict[str, int] = {}
    named = []
    for segment in found:
        times[segment.name] = times.get(segment.name, 0) + 1
        again = times[segment.name]
        named.append(segment if again == 1 else replace(segment, name=f"{segment.name}_{again}"))
    return named


def _new_users(prepared: PreparedSet, sample: Sample) -> Segment:
    offsets, time = np.asarray(prepared.histories.offsets), prepared.histories.events.time
    user = sample.requests.user
    cuts = prepared.manifest.get("cuts") or {}
    first = offsets[user]
    empty = offsets[user + 1] == first
    newest = max(len(time) - 1, 0)
    begins = np.asarray(time[np.minimum(first, newest)]) if len(time) else np.zeros(len(user), np.int64)
    # Under last_request there are no cuts: whoever has events before the request has trained.
    new = empty | (begins >= cuts["valid"]) if "valid" in cuts else sample.length == 0
    return Segment("new_users", "user", "new users, without training events", requests=np.asarray(new))


def _popularity(prepared: PreparedSet, config: SegmentsConfig) -> list[Segment]:
    count = prepared.items.count.cpu().numpy()
    trained = prepared.items.trained.cpu().numpy()
    head, tail = popularity_bounds(count[FIRST_ITEM:], config.head_share, config.tail_share)
    parts = {
        "head": (trained & (count >= head), f"head, from {head:,} training events"),
        "middle": (trained & (count < head) & (count > tail), "middle"),
        "tail": (trained & (count <= tail), f"long tail, up to {tail:,} training events"),
    }
    found = [
        Segment(f"popularity_{name}", "item popularity", words, rows=np.asarray(rows))
        for name, (rows, words) in parts.items()
    ]
    cold = ~trained
    cold[:FIRST_ITEM] = False
    return [*found, Segment("cold_items", "item popularity", "cold, no training events", rows=cold)]


def _ages(
    prepared: PreparedSet, sample: Sample, request: NDArray[np.int64], item: NDArray[np.int32], config: SegmentsConfig
) -> Iterator[Segment]:
    at = sample.requests.at
    if not config.item_age_days or not len(at) or abs(int(at.max())) < POSITIONS:  # positions have no age in days
        return
    seen = np.minimum(first_seen(prepared)[item], at[request])  # what is taken now was seen now at the latest
    age = np.where(seen < at[request], (at[request] - seen) / DAY, -1.0)
    starts = [0, *config.item_age_days]
    yield Segment("item_age_unseen", "item age", "never seen before the request", positives=np.asarray(age < 0))
    for low, high in zip(starts, [*config.item_age_days, None], strict=True):
        part = (age >= low) if high is None else (age >= low) & (age < high)
        name = f"item_age_{low}_up" if high is None else f"item_age_{low}_{high - 1}"
        words = f"{low:,} days and more" if high is None else f"{low:,}–{high - 1:,} days"
        yield Segment(name, "item age", words, positives=np.asarray(part))


def _item_column(prepared: PreparedSet, column: str, most: int) -> Iterator[Segment]:
    items = prepared.items
    numeric = tuple(prepared.manifest.get("numeric") or ())
    if column in numeric:
        yield from _thirds(items.dense[:, numeric.index(column)].cpu().numpy(), column, "item", None)
        return
    if column not in items.columns:
        known = ", ".join([*items.columns, *numeric]) or "none"
        raise ConfigError(f"[segments] item_columns: no column {column!r}; the items have {known}")
    codes = items.column(column).cpu().numpy()
    values = read_json(prepared.directory / "vocabulary.json")[column]
    weight = np.bincount(codes, items.count.cpu().numpy(), items.codes(column))
    weight[0] = 0
    for code in np.argsort(-weight, kind="stable")[:most].tolist():
        if weight[code]:
            word = MISSING if code == 1 else str(values[code - 2])
            rows = codes == code
            yield Segment(f"item_{column}_{_plain(word)}", f"item {column}", word, rows=np.asarray(rows))


def _user_column(prepared: PreparedSet, sample: Sample, column: str, most: int) -> Iterator[Segment]:
    users = prepared.users
    if column not in users.columns or column in (USER_ID, USER_KEY):
        known = ", ".join(name for name in users.columns if name not in (USER_ID, USER_KEY)) or "none"
        raise ConfigError(f"[segments] user_columns: no column {column!r}; the users have {known}")
    values = users[column]
    if values.dtype.is_numeric() and values.n_unique() > most:
        yield from _thirds(values.cast(pl.Float64).to_numpy(), column, "user", sample.requests.user)
        return
    words = values.cast(pl.String).fill_null(MISSING)
    for word in words.value_counts(sort=True)[column].to_list()[:most]:
        chosen = (words == word).to_numpy()[sample.requests.user]
        yield Segment(f"user_{column}_{_plain(word)}", f"user {column}", word, requests=np.asarray(chosen))


def _thirds(value: NDArray[np.floating], column: str, owner: str, user: NDArray[np.int64] | None) -> Iterator[Segment]:
    known = value[np.isfinite(value)]
    if not len(known):
        return
    low, high = np.quantile(known, [1 / 3, 2 / 3])
    parts = {
        "low": (value <= low, f"up to {low:.4g}"),
        "middle": ((value > low) & (value <= high), f"{low:.4g} to {high:.4g}"),
        "high": (value > high, f"above {high:.4g}"),
    }
    for name, (chosen, words) in parts.items():
        title, kind = f"{owner}_{column}_{name}", f"{owner} {column}"
        if user is None:
            yield Segment(title, kind, words, rows=np.asarray(chosen))
        else:
            yield Segment(title, kind, words, requests=np.asarray(chosen[user]))


def _plain(word: str) -> str:
    """Return a value as it can stand in a metric's name."""
    return re.sub(r"[^0-9a-z]+", "_", word.lower()).strip("_") or "blank"


def _given(mask: Mask | None) -> Mask:
    assert mask is not None
    return mask
