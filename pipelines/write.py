"""The last step of preparing and of appending alike: from what a log holds to the files of a prepared set."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray

from pipelines import assembly, catalogue, splits
from pipelines.buckets import BUCKET, FIRST_ROW, USER_ROW, Rule, Sessions
from pipelines.parts import Part, PartRecord, source_of
from pipelines.prepared import FORMAT, PreparedSet, Requests, Split
from pipelines.samplers import SAMPLERS
from pipelines.settings import PrepareConfig
from pipelines.shown import write_shown
from pipelines.transitions import MAX_ROWS
from ranking.items import ItemTable, Transitions, identity_rows
from recsys.config import parse
from recsys.errors import DataError
from recsys.files import write_json
from recsys.history import Histories

Progress = Callable[[str, int, int], None]
"""(step, done, total)"""


@dataclass(frozen=True)
class Names:
    """Items by key, users by history row, names of action codes 1, 2, ..., and the columns models read."""

    items: pl.DataFrame
    people: pl.DataFrame
    actions: list[str]
    categorical: list[str]
    multi: list[str]
    numeric: list[str]

    @property
    def rows(self) -> int:
        """Model rows V."""
        return self.items.height + FIRST_ROW


@dataclass(frozen=True)
class Log:
    """A log as sequences: what is left to do depends on the items and on the requests that do not train.

    Attributes:
        records: the parts it came in.
        histories: all events, packed and on disk.
        pending: the requests that do not train, by user.
        tally: what was counted.
        transitions: of the training period.
        shown: its impressions (`pipelines.shown`); None if it has none.
    """

    records: tuple[PartRecord, ...]
    histories: Histories
    pending: Sessions
    tally: assembly.Tally
    transitions: Transitions
    shown: pl.DataFrame | None = None

    @property
    def newest(self) -> int:
        """Moment of the newest event."""
        return max(record.last for record in self.records)


def name_all(
    parts: Sequence[Part],
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
    items = catalogue.catalogue(parts, previous)
    if any(part.hidden for part in parts):
        previous_users, hashes = None, None  # those who are forgotten must not come back from the set before
    else:
        previous_users = previous
    actions = catalogue.action_names(parts, [] if previous is None else previous.manifest["actions"])
    for name in config.positive:
        if name not in actions:
            raise DataError(
                f"positive action {name!r} does not occur; the log has {', '.join(actions) or 'no actions'}"
            )
    categorical = catalogue.categorical_columns(items, config.columns)
    multi = catalogue.multi_columns(items, config.multi)
    numeric = catalogue.numeric_columns(items, config.numeric, categorical)
    people = catalogue.users(parts, previous_users, buckets, newest, hashes)
    names = Names(items, people, actions, categorical, multi, numeric)
    if names.rows > MAX_ROWS:
        raise DataError(f"{items.height:,} items; transitions can be counted over at most {MAX_ROWS:,}")
    return names


def rule_of(config: PrepareConfig) -> Rule:
    """Give what makes an event a positive."""
    return Rule(config.positive, config.min_value)


def write_set(out: Path, names: Names, log: Log, config: PrepareConfig, report: Progress) -> dict[str, Any]:
    """Write all but the histories and the training requests, which are there; give the manifest without its digest."""
    cuts = splits.cuts(config.split, log.newest)
    pending = log.pending
    split, _ = splits.assign(cuts, names.people.height, pending.user, pending.at, pending.last)
    hashes = names.people[catalogue.USER_HASH].to_numpy()
    requests = assembly.evaluated(pending, split, hashes, config.max_eval_requests, config.seed)
    values = catalogue.vocabulary(names.items, [*names.categorical, *names.multi])
    count = torch.from_numpy(log.tally.count)
    table = catalogue.item_table(names.items, values, names.numeric, count, log.transitions)
    _write_tables(out, names, values, table)
    _write_evaluated(out, requests, names, table, log.histories, config, report)
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
            **assembly.counts(log.tally, split, requests),
            "items": names.items.height,
            "trained_items": int(table.trained.sum()),
            "users": names.people.height,
            "transitions": len(log.transitions.target),
            **shown,
        },
    }


def lasting(config: PrepareConfig) -> dict[str, Any]:
    """Give the settings that shape the result; how the work was shared out does not."""
    settings = asdict(parse(PrepareConfig, asdict(config), "settings of prepare"))  # 14 and 14.0 are one setting
    return {name: value for name, value in settings.items() if name not in ("buckets", "workers")}


def _write_tables(out: Path, names: Names, values: dict[str, list[str]], table: ItemTable) -> None:
    """Write catalogue, users, vocabulary, item table and the rows of the keys."""
    trained = pl.Series(catalogue.TRAIN_COUNT, table.count.numpy()[FIRST_ROW:])
    names.items.with_columns(trained).write_parquet(out / "catalogue.parquet")
    names.people.drop(USER_ROW, BUCKET, catalogue.USER_HASH).write_parquet(out / "users.parquet")
    write_json(out / "vocabulary.json", values)
    table.save(out / "items.safetensors")
    np.save(out / "key_to_row.npy", identity_rows(names.items.height))


def _write_evaluated(
    out: Path,
    requests: dict[str, Requests],
    names: Names,
    table: ItemTable,
    histories: Histories,
    config: PrepareConfig,
    report: Progress,
) -> None:
    """Write the validation and test requests, and the fixed candidates of each by sampler."""
    (out / "candidates").mkdir()
    hashes = names.people[catalogue.USER_HASH].to_numpy()
    look_up = assembly.history_rows(histories, identity_rows(names.items.height))
    jobs = [(split, name) for split in requests for name in config.samplers]
    for done, (split, name) in enumerate(jobs):
        keys = assembly.request_keys(requests[split], hashes)
        sampler = SAMPLERS[name](table)
        sets = assembly.fixed_candidates(requests[split], keys, sampler, config.negatives, config.seed, look_up)
        sets.save(out / "candidates" / f"{split}_{name}.safetensors")
        report("candidates", done + 1, len(jobs))
    for split, found in requests.items():
        found.save(out / "requests" / f"{split}.safetensors")
