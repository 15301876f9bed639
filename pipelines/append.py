"""One more part for a prepared set, at the cost of the part: the set that preparing all parts anew would give.

    keys          new items, users and actions get the next numbers
    requests      of the new events; those that wait (`pipelines.waiting`) with them are split by the new cuts
    histories     copied block by block, each user's new events behind the old
    training      requests whose session now lies before the cut join those that train; their counts and the pairs
                  they add or take away are added
    the rest      as `prepare` does it: tables, evaluated requests, their fixed candidates, digest

The contract is that of `pipelines.parts`: a user's new events are all later than those the set has, and a session ends
with its part. The set itself is read once, from front to back; what is computed anew depends on the new events, on the
requests that wait, and on the number of evaluated requests: their candidates are drawn again, because the trained items
have changed (`max_eval_requests` bounds them).
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from shutil import copy2, rmtree

import numpy as np
import polars as pl
from numpy.typing import NDArray

from pipelines import assembly, buckets, splits
from pipelines.buckets import Sessions, SortedEvents
from pipelines.candidates import may_be_chosen
from pipelines.catalogue import USER_HASH
from pipelines.edges import EdgeRuns
from pipelines.forgotten import NAME as FORGOTTEN
from pipelines.forgotten import refuse_if_forgotten_since
from pipelines.growth import PairRuns, updated_edges
from pipelines.merging import Merged, merge_histories
from pipelines.parts import Part, PartRecord, keep_part, open_part
from pipelines.prepare import finish
from pipelines.prepared import GROWTH, IMPRESSIONS, PreparedSet, Requests
from pipelines.settings import PrepareConfig
from pipelines.shown import shown_in
from pipelines.spans import NEWEST, read_spans
from pipelines.transitions import Words, pair_words
from pipelines.waiting import Users, Waiting
from pipelines.write import Log, Names, name_all, rule_of
from recsys.columns import USER_ID, USER_KEY
from recsys.config import parse
from recsys.errors import DataError
from recsys.files import whole_directory, work_directory
from recsys.history import Histories
from recsys.memory import keep_freed_memory
from recsys.progress import Progress, silent, titled


def append(
    source: Path, previous: Path, out: Path, progress: Progress = silent, named: Path | None = None
) -> PreparedSet:
    """Add a part to a prepared set, with the set's own settings.

    Args:
        source: a directory `ingest` wrote, with events later than those of the set only.
        previous: the prepared set; it is not changed unless `out` is the same.
        out: where the larger set is written, whole or not at all.
        progress: told as work goes on.
        named: the directory that messages name, where `source` is a copy.

    Raises:
        DataError: the part is in the set already, has an event that is not later than all of its user's in the set, or
            the set was prepared without `appendable`.

    Cost: a day of 220,000 events on 90 of 20 million takes 9 % of the CPU of all 91 days anew
    (`tests/benchmarks/prepare_throughput.py --append --events 20000000`). Histories and edges are written whole, and
    the words of all pairs are searched: that grows with the log, not with the day. Every sixteenth append merges what
    those before it added, and costs twice as much.
    """
    keep_freed_memory()  # arrays of some megabytes come and go: a tenth of the time went into fresh pages
    earlier, part = PreparedSet(previous), replace(open_part(source), named=named)
    config = parse(PrepareConfig, earlier.manifest["config"], f"{previous / 'manifest.json'} [config]")
    records = known_parts(earlier)
    if part.record.digest in {record.digest for record in records}:
        raise DataError(f"{source}: is part of {previous} already; nothing to append")
    if part.hidden:
        raise DataError(f"{source}: it has users who asked to be forgotten; prepare all parts anew")
    if not (previous / GROWTH).exists():
        raise DataError(f"{previous}: nothing was kept to append to (appendable = false); prepare all parts anew")
    with whole_directory(out) as target, work_directory(out) as work:
        if (previous / FORGOTTEN).exists():
            copy2(previous / FORGOTTEN, target / FORGOTTEN)
        names, log = _grow(earlier, part, records, target, work, config, progress)
        finish(target, names, log, config, progress)
    return PreparedSet(out)


def add_part(
    source: Path,
    parts: Sequence[Path],
    later: Path,
    directory: Path,
    progress: Progress = silent,
    named: Path | None = None,
) -> PreparedSet:
    """Keep a part of a log in the folder `later` and append it, and any of `parts` it lacks, to a prepared set.

    The part is kept first: should the work end half-way, doing it again goes on. A part that is refused is not kept.

    Args:
        source: a directory `ingest` wrote.
        parts: the parts the log has so far, oldest first.
        later: where later parts lie, one numbered directory each.
        directory: the prepared set, replaced as a whole.
        progress: told as work goes on.
        named: the directory that messages name; `source` if absent.
    """
    refuse_if_forgotten_since(directory, parts)
    kept = keep_part(source, later)
    try:
        prepared = PreparedSet(directory)
        for path in [part for part in parts if part != kept] + [kept]:
            if open_part(path).record.digest not in {record.digest for record in known_parts(prepared)}:
                prepared = append(path, directory, directory, progress, (named or source) if path == kept else None)
    except DataError:
        if kept not in parts:
            rmtree(kept)
        raise
    return prepared


def known_parts(prepared: PreparedSet) -> tuple[PartRecord, ...]:
    """Return the parts a set was made of."""
    return tuple(PartRecord(**record) for record in prepared.manifest.get("parts", ()))


def _grow(
    earlier: PreparedSet,
    part: Part,
    records: tuple[PartRecord, ...],
    out: Path,
    work: Path,
    config: PrepareConfig,
    progress: Progress,
) -> tuple[Names, Log]:
    """Write histories, training requests and the pairs of growth; give what is left to write."""
    progress(0, 1, "keys")
    hashes = np.load(earlier.directory / GROWTH / "hashes.npy", allow_pickle=False)
    (work / "spans").mkdir()
    spans = read_spans(part, work / "spans")
    names = name_all([part], [spans], config, earlier, 1, _newest(earlier), hashes)
    progress(1, 1, "keys")
    events = buckets.numbered(part, len(records), names.people, names.items, names.actions, rule_of(config)).collect()
    fresh = buckets.sort_events(events, 0)
    shift = _Shift.of(earlier.histories, names.people, fresh)
    divided = _divide(earlier, fresh, shift, names, _newest_moments(records, part), out / GROWTH, config)
    old_train = shift.plain(Requests.map(earlier.directory / "requests" / "train.safetensors"))
    (out / "requests").mkdir()
    _write_training(old_train, divided.trained, out / "requests" / "train.safetensors")
    with ThreadPoolExecutor(1) as pool:
        # Copying waits for the disk, counting does not.
        merging = pool.submit(
            merge_histories,
            earlier.histories,
            fresh,
            shift.row_of,
            divided.ends,
            names.items.height,
            out,
            titled(progress, "histories"),
        )
        transitions = _transitions(
            earlier, old_train, divided.trained, out / GROWTH / "pairs", names.rows, config.transitions_top_n
        )
        merged = merging.result()
    log = Log(
        records=(*records, part.record),
        histories=Histories.load(out / "histories"),
        evaluated={split: (requests,) for split, requests in divided.evaluated.items()},
        tally=_tally(earlier, merged, divided, names.rows),
        transitions=transitions,
        shown=shown_in([part], earlier.directory / GROWTH / f"{IMPRESSIONS}.parquet"),
    )
    return names, log


@dataclass(frozen=True)
class _Divided:
    """The requests that did not train before, as the new cuts divide them.

    Attributes:
        trained: those that train now, by user.
        found: number of requests by the name of `pipelines.buckets.KINDS`; of training requests the new ones.
        evaluated: of each split those that may be chosen, by (at, user).
        ends: each user's training end before and after.
    """

    trained: Sessions
    found: Mapping[str, int]
    evaluated: Mapping[str, Requests]
    ends: tuple[NDArray[np.int64], NDArray[np.int64]]


def _divide(
    earlier: PreparedSet,
    fresh: SortedEvents,
    shift: "_Shift",
    names: Names,
    newest: tuple[int, int],
    growth: Path,
    config: PrepareConfig,
) -> _Divided:
    """Divide the requests that waited and those of the new events; keep in `growth` those that still wait.

    `newest` are the newest moments before and after.
    """
    cuts = [splits.cuts(config.split, moment) for moment in newest]
    hashes = names.people[USER_HASH].to_numpy()
    users = Users(names.people[USER_KEY].to_numpy().astype(np.int64), shift.start)
    known = Waiting.open(earlier.directory / GROWTH)
    waiting = known.grown(shift.fresh(buckets.session_requests(fresh)), users, growth)
    heads = waiting.heads(users)
    order: slice | NDArray[np.int64] = slice(None)
    old: slice | NDArray[np.int64] = slice(0)  # by time no request has a say in where training ends
    if config.split.kind == "last_request":
        order = heads.by_user(np.arange(len(heads)))
        old = order[heads.place[order] < known.begins[-1]]
    _, before = splits.assign(cuts[0], len(hashes), heads.user[old], heads.at[old], heads.last[old])
    split = np.empty(len(heads), np.uint8)
    split[order], after = splits.assign(cuts[1], len(hashes), heads.user[order], heads.at[order], heads.last[order])
    trains = split == splits.TRAIN
    trained = waiting.take(heads, heads.by_user(np.flatnonzero(trains)), users)
    found = {"train": len(trained), buckets.WAITING: len(heads) - len(trained)}
    evaluated = {}
    for name, code in (("valid", splits.VALID), ("test", splits.TEST)):
        index = np.flatnonzero(split == code)
        found[name] = len(index)
        index = index[may_be_chosen(heads.user[index], heads.at[index], hashes, config.max_eval_requests, config.seed)]
        index = index[np.lexsort((heads.place[index], heads.user[index], heads.at[index]))]
        evaluated[name] = _plain(waiting.take(heads, index, users))
    waiting.keep(heads, ~trains, users)
    return _Divided(trained, found, evaluated, (before, after))


def _newest(earlier: PreparedSet) -> pl.DataFrame:
    """Return each user's newest moment."""
    histories = earlier.histories
    some = np.flatnonzero(np.diff(histories.offsets))
    newest = histories.events.time[histories.offsets[some + 1] - 1]
    return pl.DataFrame({USER_ID: earlier.users[USER_ID].gather(some), NEWEST: newest})


def _newest_moments(records: Sequence[PartRecord], part: Part) -> tuple[int, int]:
    before = max(record.last for record in records)
    return before, max(before, part.record.last)


@dataclass(frozen=True)
class _Shift:
    """Where the old users and events lie in the larger set.

    `row_of` int64 [old users] is the new history row; `moved` int64 [old users] how far a user's events move;
    `start` and `old_length` int64 [users] where a user's events start and how many of them are old; `fresh_start` int64
    [users] where the user's new events start among the new events.
    """

    row_of: NDArray[np.int64]
    moved: NDArray[np.int64]
    start: NDArray[np.int64]
    old_length: NDArray[np.int64]
    fresh_start: NDArray[np.int64]

    @staticmethod
    def of(old: Histories, people: pl.DataFrame, fresh: SortedEvents) -> "_Shift":
        # Rows are in the order of hashes, of old users as of all: the old keep their order.
        row_of = np.flatnonzero(people[USER_KEY].to_numpy() < len(old))
        old_length = np.zeros(people.height, np.int64)
        old_length[row_of] = np.diff(old.offsets)
        fresh_length = np.bincount(fresh.user, minlength=people.height)
        length = old_length + fresh_length
        start = np.cumsum(length) - length
        return _Shift(
            row_of, start[row_of] - old.offsets[:-1], start, old_length, np.cumsum(fresh_length) - fresh_length
        )

    def ends(self, user: NDArray[np.int64], end: NDArray[np.int64]) -> NDArray[np.int64]:
        """Move the ends of old requests; `user` are old rows."""
        return end + self.moved[user]

    def plain(self, requests: Requests) -> Requests:
        """Return old requests with new rows and ends."""
        user, end = self.row_of[requests.user], self.ends(requests.user, requests.end)
        return Requests(user, requests.at, end, requests.offsets, requests.positive)

    def fresh(self, requests: Sessions) -> Sessions:
        """Return requests among the new events with ends counted in all events."""
        user = requests.user
        end = requests.end + (self.start + self.old_length - self.fresh_start)[user]
        return Sessions(user, requests.at, requests.last, end, requests.offsets, requests.positive)


def _plain(requests: Sessions) -> Requests:
    return Requests(requests.user, requests.at, requests.end, requests.offsets, requests.positive)


def _joined(first: Requests, second: Requests) -> Requests:
    return Requests(
        np.concatenate([first.user, second.user]),
        np.concatenate([first.at, second.at]),
        np.concatenate([first.end, second.end]),
        np.concatenate([first.offsets, second.offsets[1:] + first.offsets[-1]]),
        np.concatenate([first.positive, second.positive]),
    )


def _write_training(old: Requests, trained: Sessions, path: Path) -> None:
    """Write all training requests by (at, user); only those from the first new moment on need sorting."""
    kept = int(np.searchsorted(old.at, trained.at.min())) if len(trained) else len(old)
    middle = int(old.offsets[kept])
    head = Requests(old.user[:kept], old.at[:kept], old.end[:kept], old.offsets[: kept + 1], old.positive[:middle])
    tail = _joined(old.take(np.arange(kept, len(old))), _plain(trained))
    # Stable: of one user's requests at one moment the earlier trained stand first, as they ended first.
    tail = tail.take(np.lexsort((tail.user, tail.at)))
    count, positives = len(head) + len(tail), len(head.positive) + len(tail.positive)
    assembly.write_requests(path, count, positives, iter((head, tail)))


def _transitions(
    earlier: PreparedSet, old: Requests, trained: Sessions, folder: Path, rows: int, top_n: int
) -> EdgeRuns:
    """Return the new matrix; write the pairs of growth into the new `folder`."""
    added, removed = changed_words(old, _plain(trained))
    folder.mkdir()
    runs = PairRuns.open(earlier.directory / GROWTH / "pairs").grown(folder, added, removed, rows)
    before = earlier.items.transitions
    return EdgeRuns(len(before.target) + len(added), updated_edges(runs, before, added, removed, rows, top_n))


def changed_words(old: Requests, trained: Requests) -> tuple[Words, Words]:
    """Return the pair words that new training requests add, and those they take away, both ascending.

    Args:
        old: training requests by (at, user).
        trained: those that join them, by (user, at); at one moment they come after the old.

    Per user, the chain of requests changes only behind the last old one before the first new one: its words are taken
    away and those of the new chain added. Usually that old request is the last, and nothing is taken away.
    """
    users = int(max(old.user.max(initial=-1), trained.user.max(initial=-1))) + 1
    first_at = np.full(users, splits.NEVER)
    np.minimum.at(first_at, trained.user, trained.at)
    chain = np.flatnonzero(first_at[old.user] < splits.NEVER)
    chain = chain[np.argsort(old.user[chain], kind="stable")]  # by (user, at)
    user, late = old.user[chain], old.at[chain] > first_at[old.user[chain]]
    last = np.append((user[1:] != user[:-1]) | late[1:], True)[: len(chain)]
    tail = old.take(chain[late | last])
    longer = _joined(tail, trained)
    longer = longer.take(np.lexsort((longer.at, longer.user)))
    added, removed = (pair_words(part.user, part.offsets, part.positive) for part in (longer, tail))
    return added, removed


def _tally(earlier: PreparedSet, merged: Merged, divided: _Divided, rows: int) -> assembly.Tally:
    """Add what is new to what was counted."""
    counts = earlier.manifest["counts"]
    before = earlier.items.count.numpy()
    count = np.zeros(rows, np.int64)
    count[: len(before)] = before
    count[buckets.FIRST_ROW :] += merged.count
    return assembly.Tally(
        events=counts["events"] + merged.events,
        user_items=counts["user_items"] + merged.user_items,
        requests={**divided.found, "train": counts["requests"]["train"] + divided.found["train"]},
        train_positives=counts["positives"]["train"] + len(divided.trained.positive),
        count=count,
    )
