"""Checks on what may have seen the training period only: counts, trained flags, transitions, sampler weights.

Each is worked out anew from the stored histories, the stored training requests and the cuts, and must be equal to the
last bit. Which requests and events belong to the training period is itself checked, against the cuts here and against
the log in `pipelines/audit_log.py`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from pipelines import splits
from pipelines.audit_record import Check, counted
from pipelines.audit_requests import EVENTS_AT_ONCE, SPLITS, AllRequests, user_slices
from pipelines.buckets import user_hashes
from pipelines.candidates import fixed_candidates, history_rows, request_keys
from pipelines.catalogue import TRAIN_COUNT
from pipelines.prepared import PreparedSet, Requests
from pipelines.samplers import SAMPLERS
from pipelines.settings import PrepareConfig
from pipelines.transitions import Edges, block_edges, blocks, pair_words
from ranking.batch import FIRST_ITEM, rows_of
from ranking.items import ItemTable
from recsys.errors import DataError
from recsys.files import work_directory
from recsys.history import moment

Counts = NDArray[np.int64]
EVENTS_PER_FILE = 500_000


@dataclass(frozen=True)
class Period:
    """The training period of a set: the cuts (unused under `last_request`) and its end for each user, int64 [users]."""

    cuts: splits.Cuts
    ends: NDArray[np.int64]

    @property
    def last_request(self) -> bool:
        """Whether each user has cuts of their own."""
        return self.cuts.kind == "last_request"


def stored_cuts(prepared: PreparedSet, config: PrepareConfig) -> splits.Cuts:
    """Return the cuts the manifest states."""
    if config.split.kind == "last_request":
        return splits.Cuts("last_request")
    stated = prepared.manifest.get("cuts")
    if not isinstance(stated, Mapping) or not {"valid", "test"} <= set(stated):
        raise DataError(f"{prepared.directory / 'manifest.json'}: cuts are {stated!r}; a split by time has two")
    return splits.Cuts("time", int(stated["valid"]), int(stated["test"]))


def period_of_requests(prepared: PreparedSet, cuts: splits.Cuts, requests: AllRequests) -> Period:
    """Return the training period as the stored requests tell it, where there is no log to ask.

    Under `last_request` it ends, for each user, at the validation request, or the test request of a user with one only.

    Raises:
        DataError: that split with only a choice of the evaluated requests kept; the others' moments are in the log.
    """
    users = len(prepared.histories)
    if cuts.kind == "time":
        return Period(cuts, np.full(users, cuts.valid, np.int64))
    counts = prepared.manifest["counts"]
    for split in ("valid", "test"):
        if counts["requests"][split] != counts["requests_found"][split]:
            raise DataError(
                f"{prepared.directory}: keeps {counts['requests'][split]:,} of {counts['requests_found'][split]:,} "
                f"{split} requests of split last_request; audit it together with the log it was made from"
            )
    ends = np.full(users, splits.NEVER, np.int64)
    for some in (requests["valid"], requests["test"]):
        np.minimum.at(ends, some.user, some.at)
    return Period(cuts, ends)


def cuts_check(prepared: PreparedSet, config: PrepareConfig, cuts: splits.Cuts) -> Check:
    """Compare the cuts with those the configuration gives for the newest event there is."""
    time = prepared.histories.events.time
    newest = max((int(time[i : i + EVENTS_AT_ONCE].max()) for i in range(0, len(time), EVENTS_AT_ONCE)), default=0)
    wanted = splits.cuts(config.split, newest)
    if cuts.kind == "last_request":
        return Check("cuts", True, "each user's two newest requests", "none under last_request")
    found, expected = (
        f"validation from {moment(one.valid)}, test from {moment(one.test)} ({one.valid}, {one.test})"
        for one in (cuts, wanted)
    )
    return Check("cuts", cuts == wanted, found, expected)


def period_check(requests: AllRequests, period: Period) -> Check:
    """Look whether each split's requests lie in its period."""
    train, valid, test = (requests[split] for split in ("train", "valid", "test"))
    outside = {"train": int((train.at >= period.ends[train.user]).sum())}
    if period.last_request:
        newest = np.full(len(period.ends), splits.NEVER, np.int64)
        newest[test.user] = test.at
        outside["valid"] = int((valid.at > newest[valid.user]).sum()) + _more_than_one(valid)
        outside["test"] = int((test.at < period.ends[test.user]).sum()) + _more_than_one(test)
    else:
        outside["valid"] = int(((valid.at < period.cuts.valid) | (valid.at >= period.cuts.test)).sum())
        outside["test"] = int((test.at < period.cuts.test).sum())
    wrong = [f"{count:,} of {len(requests[split]):,} {split}" for split, count in outside.items() if count]  # type: ignore[index]
    sizes = ", ".join(f"{len(some):,} {split}" for split, some in requests.items())
    return Check(
        "splits_in_period",
        not wrong,
        f"outside their period: {' and '.join(wrong)} requests" if wrong else f"{sizes} requests",
        "train before the cut, then validation, then test",
    )


def _more_than_one(requests: Requests) -> int:
    return len(requests) - len(np.unique(requests.user))


def training_counts(prepared: PreparedSet, ends: NDArray[np.int64] | None = None) -> Counts:
    """Count the events of each model row before its user's training period ends, int64 [V]; all events without ends."""
    offsets, events = np.asarray(prepared.histories.offsets), prepared.histories.events
    counts = np.zeros(len(prepared.items), np.int64)
    for begin, end in user_slices(offsets, EVENTS_AT_ONCE):
        low, high = int(offsets[begin]), int(offsets[end])
        item = np.asarray(events.item[low:high])
        if ends is not None:
            end_of_user = np.repeat(ends[begin:end], np.diff(offsets[begin : end + 1]))
            item = item[np.asarray(events.time[low:high]) < end_of_user]
        counts += np.bincount(rows_of(item, prepared.key_to_row), minlength=len(counts))
    return counts


def count_checks(prepared: PreparedSet, counts: Counts) -> list[Check]:
    """Compare stored counts and trained flags with those of the training period."""
    stored, flags = prepared.items.count.numpy(), prepared.items.trained.numpy()
    shown = np.zeros(len(counts), np.int64)
    shown[prepared.key_to_row] = prepared.catalogue[TRAIN_COUNT].to_numpy()
    wrong = np.flatnonzero((stored != counts) | (shown != counts))
    found = f"{int(counts.sum()):,} events of {int((counts > 0).sum()):,} items"
    if len(wrong):
        row = int(wrong[0])
        told = int(stored[row] if stored[row] != counts[row] else shown[row])
        found = f"other counts of {len(wrong):,} of {len(counts) - FIRST_ITEM:,} items, e.g. {_item(prepared, row)}: "
        found += f"{told:,} stored, {int(counts[row]):,} before the cut"
        if np.array_equal(stored, training_counts(prepared)):
            found += "; the stored counts are those of the whole log, test period included"
    unearned = np.flatnonzero(flags & (counts == 0))
    unmarked = np.flatnonzero(~flags & (counts > 0))
    flagged = f"{int(flags.sum()):,} trained, {len(flags) - FIRST_ITEM - int(flags.sum()):,} untrained items"
    if len(unearned) or len(unmarked):
        row = int([*unearned, *unmarked][0])
        flagged = f"marked trained without a training event: {counted(len(unearned), 'item')}; untrained with one: "
        flagged += f"{len(unmarked):,}; e.g. {_item(prepared, row)}"
    return [
        Check("training_counts", not len(wrong), found, "events of the training period alone, item by item"),
        Check(
            "trained_flags",
            not len(unearned) and not len(unmarked),
            flagged,
            "trained where there is a training event, and only there",
        ),
    ]


def transition_check(prepared: PreparedSet, train: Requests, top_n: int) -> Check:
    """Compare stored transitions with those of the stored training requests, `top_n` per item as prepared.

    Cost: as in `prepare`, pairs are written in sorted files and merged a block of source rows at a time.
    """
    table, rows = prepared.items.transitions, len(prepared.items)
    offsets, target, weight = (part.numpy() for part in (table.offsets, table.target, table.weight))
    if len(offsets) != rows + 1 or offsets[-1] != len(target) or len(target) != len(weight):
        raise DataError(f"{prepared.directory / 'items.safetensors'}: transitions do not fit {rows} item rows")
    wrong: list[int] = []
    with work_directory(prepared.directory.parent / "audit") as work:
        files = _write_pairs(train, len(prepared.histories), work)
        for block in blocks(files, rows):
            edges = block_edges(files, block, top_n)
            low, high = int(offsets[block.low]), int(offsets[block.high])
            degree = np.diff(offsets[block.low : block.high + 1])
            stored = Edges(degree, target[low:high], weight[low:high])
            wrong += (np.flatnonzero(_unlike(stored, edges)) + block.low).tolist()
    found = f"{len(target):,} transitions out of {int((np.diff(offsets) > 0).sum()):,} items"
    if wrong:
        found = f"other transitions out of {counted(len(wrong), 'item')}, e.g. {_item(prepared, wrong[0])}"
    return Check("transitions", not wrong, found, "consecutive training requests alone, to the last bit")


def _write_pairs(train: Requests, users: int, work: Path) -> list[Path]:
    """Write the pairs of runs of users into one sorted file each."""
    order = np.argsort(train.user, kind="stable")  # requests are by moment, so each user's stay oldest first
    first = np.searchsorted(train.user[order], np.arange(users + 1))
    positives = np.concatenate([[0], np.cumsum(np.diff(train.offsets)[order])])[first]
    files = []
    for begin, end in user_slices(positives, EVENTS_PER_FILE):
        some = train.take(order[first[begin] : first[end]])
        files.append(work / f"{begin}.bin")
        pair_words(some.user, some.offsets, some.positive).tofile(files[-1])
    return files


def _unlike(stored: Edges, edges: Edges) -> NDArray[np.bool_]:
    """Mark the source rows of a block whose edges differ."""
    unlike: NDArray[np.bool_] = stored.degree != edges.degree
    mine, theirs = np.repeat(~unlike, stored.degree), np.repeat(~unlike, edges.degree)
    owner = np.repeat(np.arange(len(unlike)), stored.degree)[mine]
    differs = (stored.target[mine] != edges.target[theirs]) | (stored.weight[mine] != edges.weight[theirs])
    unlike[owner[differs]] = True
    return unlike


def sampler_checks(prepared: PreparedSet, requests: AllRequests, config: PrepareConfig, counts: Counts) -> list[Check]:
    """Draw the fixed negatives again with the counts of the training period, and look whether any item is untrained."""
    items = prepared.items
    table = ItemTable(items.columns, items.categorical, items.cardinality, torch.from_numpy(counts))
    hashes = user_hashes(prepared.users["user_id"].to_list())
    look_up = history_rows(prepared.histories, prepared.key_to_row)
    other: list[str] = []
    cold: list[str] = []
    total = 0
    for split in SPLITS[1:]:
        some = requests[split]
        for name in config.samplers:
            stored = prepared.candidates(split, name)
            negatives = stored.item[stored.label == 0]
            total += len(negatives)
            if untrained := int((counts[np.clip(negatives, 0, len(counts) - 1)] == 0).sum()):
                cold.append(f"{untrained:,} of {len(negatives):,} in {split}, {name}")
            keys = request_keys(some, hashes)
            drawn = fixed_candidates(some, keys, SAMPLERS[name](table), config.negatives, config.seed, look_up)
            same = np.array_equal(stored.offsets, drawn.offsets) and np.array_equal(stored.item, drawn.item)
            if not (same and np.array_equal(stored.label, drawn.label)):
                other.append(f"{split}, {name}")
    names = ", ".join(config.samplers)
    return [
        Check(
            "sampler_weights",
            not other,
            f"other candidates in {'; '.join(other)}" if other else f"{names}: {total:,} negatives drawn again alike",
            "the candidates that training counts and the seed give",
        ),
        Check(
            "negatives_trained",
            not cold,
            f"items without a training event: {'; '.join(cold)}" if cold else f"{total:,} negatives",
            "negatives of items with training events only",
        ),
    ]


def _item(prepared: PreparedSet, row: int) -> str:
    keys = np.flatnonzero(prepared.key_to_row == row)
    return f"item {prepared.catalogue['item_id'][int(keys[0])]!r}" if len(keys) else f"item row {row}"
