"""Packed histories with new events behind each user's old ones, copied block by block."""

from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.assembly import HISTORY_ARRAYS
from pipelines.buckets import SortedEvents, distinct
from pipelines.streams import npy_file, put
from recsys.history import Histories, side_by_side
from recsys.progress import Progress

EVENTS_AT_ONCE = 1_000_000

Ends = NDArray[np.int64]
"""int64 [users], the end of each user's training period"""


@dataclass(frozen=True)
class Merged:
    """What the merge added: events, distinct (user, item) pairs, training events of each item key (int64)."""

    events: int
    user_items: int
    count: NDArray[np.int64]


@dataclass(frozen=True)
class _Block:
    """A run of users: old rows users[0]..users[1], old events old[0]..old[1], new events fresh[0]..fresh[1]."""

    users: tuple[int, int]
    old: tuple[int, int]
    fresh: tuple[int, int]


def merge_histories(
    old: Histories,
    fresh: SortedEvents,
    row_of: NDArray[np.int64],
    ends: tuple[Ends, Ends],
    items: int,
    out: Path,
    progress: Progress,
) -> Merged:
    """Write `out`/histories: each user's old events, then the new ones.

    Args:
        old: the earlier histories.
        fresh: the new events, by the users' new rows; each later than all old events of its user.
        row_of: int64 [old users], the new row of each old user, ascending.
        ends: each user's training end before and after, by new row. A user's end never moves back over an old event.
        items: number of item keys.
        out: an existing directory.
        progress: told (done, total) blocks.

    Cost: memory of a million events besides the new ones; 20 million old events are copied in about a second.
    """
    users = len(ends[0])
    directory = out / "histories"
    directory.mkdir()
    old_length = np.zeros(users, np.int64)
    old_length[row_of] = np.diff(old.offsets)
    length = old_length + np.bincount(fresh.user, minlength=users)
    np.save(directory / "offsets.npy", np.concatenate([[0], np.cumsum(length)]).astype(np.int64))
    count = np.bincount(fresh.item[fresh.time < ends[1][fresh.user]], minlength=items)
    user_items, total = 0, int(length.sum())
    with ExitStack() as stack:
        files = {
            name: stack.enter_context(npy_file(directory / f"{name}.npy", kind, total))
            for name, kind in HISTORY_ARRAYS.items()
        }
        blocks = _blocks(old, fresh, row_of, length)
        for done, block in enumerate(blocks):
            user = fresh.user[slice(*block.fresh)]
            # New events go behind the old ones of their user, or of the one before where the user is new.
            behind = old.offsets[np.searchsorted(row_of, user, side="right")] - block.old[0]
            for name, file in files.items():
                values = np.asarray(getattr(old.events, name)[slice(*block.old)])
                put(file, _inserted(values, behind, getattr(fresh, name)[slice(*block.fresh)]))
            count += _joining(old, block, row_of, ends, items)
            user_items += _new_pairs(old, fresh, block, row_of)
            progress(done + 1, len(blocks))
    return Merged(len(fresh.user), user_items, count)


def _inserted(values: NDArray[Any], behind: NDArray[np.int64], new: NDArray[Any]) -> NDArray[Any]:
    """Return `np.insert(values, behind, new)` for ascending places: run by run, as a day has few among many events."""
    out = np.empty(len(values) + len(new), values.dtype)
    starts = np.flatnonzero(np.diff(behind, prepend=-1)).tolist()
    copied = 0
    for start, end in pairwise([*starts, len(new)]):
        place = int(behind[start])
        out[copied + start : place + start] = values[copied:place]
        out[place + start : place + end] = new[start:end]
        copied = place
    out[copied + len(new) :] = values[copied:]
    return out


def _blocks(old: Histories, fresh: SortedEvents, row_of: NDArray[np.int64], length: NDArray[np.int64]) -> list[_Block]:
    """Divide the users into runs of about `EVENTS_AT_ONCE` events."""
    total = np.concatenate([[0], np.cumsum(length)])
    inner = np.searchsorted(total, np.arange(EVENTS_AT_ONCE, int(total[-1]), EVENTS_AT_ONCE))
    edges = np.unique(np.concatenate([[0], inner, [len(length)]]))
    users = np.searchsorted(row_of, edges)
    events, new = old.offsets[users].tolist(), np.searchsorted(fresh.user, edges).tolist()
    users = users.tolist()
    return [
        _Block((users[i], users[i + 1]), (events[i], events[i + 1]), (new[i], new[i + 1]))
        for i in range(len(edges) - 1)
    ]


def _joining(old: Histories, block: _Block, row_of: NDArray[np.int64], ends: tuple[Ends, Ends], items: int) -> Ends:
    """Count, by item key, the block's old events that lie in the training period now and did not before."""
    time = np.asarray(old.events.time[slice(*block.old)])
    mine = row_of[slice(*block.users)]
    if not len(mine):
        return np.zeros(items, np.int64)
    # Few events lie between the earliest end before and the latest end now: only these are compared with their user's.
    near = np.flatnonzero((time >= ends[0][mine].min()) & (time < ends[1][mine].max()))
    owner = row_of[np.searchsorted(old.offsets, near + block.old[0], side="right") - 1]
    joins = near[(time[near] >= ends[0][owner]) & (time[near] < ends[1][owner])]
    return np.bincount(old.events.item[joins + block.old[0]], minlength=items)


def _new_pairs(old: Histories, fresh: SortedEvents, block: _Block, row_of: NDArray[np.int64]) -> int:
    """Count the (user, item) pairs of a block's new events that the same users' old events do not have."""
    user = fresh.user[slice(*block.fresh)]
    if not len(user):
        return 0
    new = distinct(_pairs(user, fresh.item[slice(*block.fresh)]))
    active = np.intersect1d(row_of[slice(*block.users)], user, assume_unique=False)
    old_row = np.searchsorted(row_of, active)
    length = np.diff(old.offsets)[old_row]
    place, _ = side_by_side(old.offsets[old_row], length)
    had = _perhaps_in(new, _pairs(np.repeat(active, length), old.events.item[place]))
    place = np.minimum(np.searchsorted(new, had), len(new) - 1)
    return len(new) - len(distinct(had[new[place] == had]))


def _perhaps_in(words: NDArray[np.uint64], some: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return those of `some` that may be among `words`, and a few more: most are told by one look, not by a search."""
    bits = max(1, int(16 * len(words)).bit_length())
    seen = np.zeros(1 << bits, np.bool_)

    def place(of: NDArray[np.uint64]) -> NDArray[np.uint64]:
        return of * np.uint64(0x9E3779B97F4A7C15) >> np.uint64(64 - bits)

    seen[place(words)] = True
    return some[seen[place(some)]]


def _pairs(user: NDArray[np.int64], item: NDArray[np.uint32]) -> NDArray[np.uint64]:
    return user.astype(np.uint64) << np.uint64(32) | item
