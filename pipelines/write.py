"""The last step of preparing and of appending alike: from what a log holds to the files of a prepared set."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray

from pipelines import assembly, catalogue, splits
from pipelines.buckets import BUCKET, FIRST_ROW, USER_ROW, WAITING, Rule
from pipelines.candidates import chosen, fixed_candidates, history_rows, request_keys, write_evaluated
from pipelines.edges import EdgeRuns
from pipelines.parts import Part, PartRecord, source_of
from pipelines.prepared import FORMAT, CandidateSets, PreparedSet, Requests, Split
from pipelines.samplers import SAMPLERS, Sampler
from pipelines.settings import PrepareConfig
from pipelines.shown import write_shown
from pipelines.spans import Spans
from pipelines.streams import put, safetensors_file
from pipelines.transitions import MAX_ROWS
from ranking.items import ItemTable, identity_rows
from recsys.config import parse
from recsys.errors import DataError
from recsys.files import write_json
from recsys.history import Histories
from recsys.progress import Progress

_OFFSETS, _TARGET, _WEIGHT = "transition_offsets", "transition_target", "transition_weight"


@dataclass(frozen=True)
class Names:
    """Items by key, users by history row, names of action codes 1, 2, ..., and the columns models read.

    `unlisted` marks, by key, the items that no catalogue has.
    """

    items: pl.DataFrame
    people: pl.DataFrame
    actions: list[str]
    categorical: list[str]
    multi: list[str]
    numeric: list[str]
    unlisted: NDArray[np.bool_]

    @property
    def rows(self) -> int:
        """Model rows V."""
        return self.items.height + FIRST_ROW


@dataclass(frozen=True)
class Log:
    """A log as sequences: what is left to do depends on the items and on the requests that are evaluated.

    Attributes:
        records: the parts it came in.
        histories: all events, packed and on disk.
        evaluated: the validation and the test requests by (at, user), in pieces that can be gone through twice.
        tally: what was counted.
        transitions: of the training period.
        shown: its impressions (`pipelines.shown`); None if it has none.
    """

    records: tuple[PartRecord, ...]
    histories: Histories
    evaluated: Mapping[str, Iterable[Requests]]
    tally: assembly.Tally
    transitions: EdgeRuns
    shown: pl.DataFrame | None = None

    @property
    def newest(self) -> int:
        """Moment of the newest event."""
        return max(record.last for record in self.records)


def name_all(
    parts: Sequence[Part],
    spans: Sequence[Spans],
    config: PrepareConfig,
    previous: PreparedSet | None,
    buckets: int,
    newest: pl.DataFrame | None = None,
    hashes: NDArray[np.uint64] | None = None,
) -> Names:
    """Number items, users and actions; see `pipelines.catalogue`.

    Raises:
        DataError: a column or a positive action that does not occur, more items than transitions can be counted over.
    """
    items = catalogue.catalogue(parts, spans, previous)
    if any(part.hidden for part in parts):
        previous_users, hashes = None, None  # those who are forgotten must not come back from the set before
    else:
        previous_users = previous
    actions = catalogue.action_names(spans, [] if previous is None else previous.manifest["actions"])
    for name in config.positive:
        if name not in actions:
            raise DataError(
                f"positive action {name!r} does not occur; the log has {', '.join(actions) or 'no actions'}"
            )
    categorical = catalogue.categorical_columns(items, config.columns)
    multi = catalogue.multi_columns(items, config.multi)
    numeric = catalogue.numeric_columns(items, config.numeric, categorical)
    people = catalogue.users(parts, spans, previous_users, buckets, newest, hashes)
    grown = None if newest is None else previous  # else the parts are the whole log, and say themselves what is listed
    unlisted = catalogue.unlisted(items, parts, grown)
    names = Names(items, people, actions, categorical, multi, numeric, unlisted)
    if names.rows > MAX_ROWS:
        raise DataError(f"{items.height:,} items; transitions can be counted over at most {MAX_ROWS:,}")
    return names


def rule_of(config: PrepareConfig) -> Rule:
    """Return what makes an event a positive."""
    return Rule(config.positive, config.min_value)


def write_set(out: Path, names: Names, log: Log, config: PrepareConfig, progress: Progress) -> dict[str, Any]:
    """Write all but the histories and the training requests, which are there; give the manifest without its digest."""
    cuts = splits.cuts(config.split, log.newest)
    hashes = names.people[catalogue.USER_HASH].to_numpy()
    values = catalogue.vocabulary(names.items, [*names.categorical, *names.multi])
    count = torch.from_numpy(log.tally.count)
    table = catalogue.item_table(names.items, values, names.numeric, count, names.unlisted)
    transitions = _write_tables(out, names, values, table, log.transitions)
    kept = _write_evaluated(out, log, names, table, config, progress)
    shown: dict[Split, dict[str, int]] = {}
    if log.shown is not None:
        shown = write_shown(
            out,
            log.shown,
            names.people,
            names.items,
            log.histories,
            cuts,
            config.max_eval_requests,
            hashes,
            config.seed,
        )
    lengths = np.diff(log.histories.offsets)
    return {
        "format": FORMAT,
        "config": lasting(config),
        "source": source_of(log.records),
        "parts": [asdict(record) for record in log.records],
        "actions": names.actions,
        "categorical": names.categorical,
        "multi": names.multi,
        "numeric": names.numeric,
        "samplers": list(config.samplers),
        "time": {"first": min(record.first for record in log.records), "last": log.newest},
        "cuts": {"valid": cuts.valid, "test": cuts.test} if config.split.kind == "time" else None,
        "history_length": {f"p{p}": int(np.percentile(lengths, p, method="lower")) for p in (10, 25, 50, 75, 90, 100)},
        "counts": {
            **_counts(log.tally, kept),
            "items": names.items.height,
            "trained_items": int(table.trained.sum()),
            "users": names.people.height,
            "transitions": transitions,
            **shown,
        },
    }


def lasting(config: PrepareConfig) -> dict[str, Any]:
    """Return the settings that shape the result; how the work was shared out does not."""
    settings = asdict(parse(PrepareConfig, asdict(config), "settings of prepare"))  # 14 and 14.0 are one setting
    return {name: value for name, value in settings.items() if name not in ("buckets", "workers")}


def _counts(found: assembly.Tally, kept: Mapping[str, tuple[int, int]]) -> dict[str, Any]:
    """Return the manifest's counts: events, repeats, requests found and kept, positives.

    `kept` are the numbers of evaluated requests and of their positives, by split.
    """
    requests = {name: number for name, number in found.requests.items() if name != WAITING}
    return {
        "events": found.events,
        "user_items": found.user_items,
        "repeated_share": 1 - found.user_items / found.events,
        "requests": {"train": requests["train"], **{name: number for name, (number, _) in kept.items()}},
        "requests_found": requests,
        "requests_straddling": found.requests[WAITING] - requests["valid"] - requests["test"],
        "positives": {"train": found.train_positives, **{name: number for name, (_, number) in kept.items()}},
    }


def _write_tables(
    out: Path, names: Names, values: dict[str, list[str]], table: ItemTable, transitions: EdgeRuns
) -> int:
    """Write catalogue, users, vocabulary, item table and the rows of the keys; give the number of transitions."""
    trained = pl.Series(catalogue.TRAIN_COUNT, table.count.numpy()[FIRST_ROW:])
    names.items.with_columns(trained).write_parquet(out / "catalogue.parquet")
    names.people.drop(USER_ROW, BUCKET, catalogue.USER_HASH).write_parquet(out / "users.parquet")
    write_json(out / "vocabulary.json", values)
    np.save(out / "key_to_row.npy", identity_rows(names.items.height))
    return _write_items(out / "items.safetensors", table, transitions)


def _write_items(path: Path, table: ItemTable, edges: EdgeRuns) -> int:
    """Write an item table with other transitions than its own, as `ItemTable.load` reads it; give their number."""
    arrays = {name: tensor.numpy() for name, tensor in table.tensors().items()}
    names = sorted(arrays, key=lambda name: (-arrays[name].itemsize, name))  # the widest first
    layout = {name: (arrays[name].dtype.type, arrays[name].shape) for name in names}
    for name in (_TARGET, _WEIGHT):
        layout[name] = (layout[name][0], (edges.most,))
    degrees = [np.zeros(1, np.int64)]
    with safetensors_file(path, layout, table.metadata()) as files:
        for run in edges.runs:
            degrees.append(run.degree)
            put(files[_TARGET], run.target)
            put(files[_WEIGHT], run.weight)
        arrays[_OFFSETS] = np.cumsum(np.concatenate(degrees))
        for name in names:
            if name not in (_TARGET, _WEIGHT):
                put(files[name], arrays[name])
    return int(arrays[_OFFSETS][-1])


def _write_evaluated(
    out: Path, log: Log, names: Names, table: ItemTable, config: PrepareConfig, progress: Progress
) -> dict[str, tuple[int, int]]:
    """Write the validation and test requests, and the fixed candidates of each by sampler; see `write_evaluated`."""
    (out / "candidates").mkdir()
    hashes = names.people[catalogue.USER_HASH].to_numpy()
    look_up = history_rows(log.histories, identity_rows(names.items.height))

    def drawn(sampler: Sampler, requests: Requests) -> CandidateSets:
        keys = request_keys(requests, hashes)
        return fixed_candidates(requests, keys, sampler, config.negatives, config.seed, look_up)

    draw = {name: partial(drawn, SAMPLERS[name](table)) for name in config.samplers}
    kept = {}
    for done, (split, found) in enumerate(log.evaluated.items()):
        requests = chosen(found, hashes, config.max_eval_requests, config.seed)
        kept[split] = write_evaluated(requests, out, split, draw)
        progress(done + 1, len(log.evaluated), "candidates")
    return kept
