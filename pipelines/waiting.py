"""The requests of a set that do not train yet, so kept that an append writes its own and reads few of the rest.

    pending/{n}/user.npy, at.npy, last.npy     int64 [R], user key, first and last moment of each request's session
    pending/{n}/end.npy                        int64 [R], events of the user before it
    pending/{n}/offsets.npy, positive.npy      int64 [R + 1], int32: its distinct item rows
    pending/{n}/waits.npy                      bool [R], whether it still waits

Run 0000 is what `prepare` found, each further one what an append brought; all are by (history row, first moment). Keys,
moments and counts of a user's earlier events are what no append changes, so but for `waits.npy` a run is never written
again: the next set links it. After `RUNS` appends all that wait become one.
"""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from shutil import rmtree
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.buckets import Sessions
from pipelines.growth import RUNS
from pipelines.streams import Kind, npy_file, put
from recsys.errors import DataError
from recsys.files import link_file
from recsys.history import side_by_side

WRITTEN_AT_ONCE = 500_000
"""Requests."""
_FOLDER, _WAITS = "pending", "waits.npy"
_KINDS: dict[str, Kind] = {**dict.fromkeys(("user", "at", "last", "end", "offsets"), np.int64), "positive": np.int32}


@dataclass(frozen=True)
class Users:
    """The users of a set by history row: int64 [U] keys, and where each one's events start."""

    key: NDArray[np.int64]
    start: NDArray[np.int64]


@dataclass(frozen=True)
class Heads:
    """Requests that wait, without what only few of them are asked for; each run's are by (history row, first moment).

    `user`, `at`, `last`, `place` int64 [R]: history row, first and last moment, and where in the runs it lies.
    """

    user: NDArray[np.int64]
    at: NDArray[np.int64]
    last: NDArray[np.int64]
    place: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.user)

    def by_user(self, index: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return indices in the order of (history row, first moment)."""
        return index[np.argsort(self.user[index], kind="stable")]  # a later run's requests are a user's later ones


def save_waiting(pieces: Iterable[Sessions], count: int, positives: int, users: Users, growth: Path) -> None:
    """Write run 0000: requests by user, piece by piece, `count` of them with `positives` positives."""
    _write_run(pieces, count, positives, users, growth / _FOLDER / "0000")


@dataclass(frozen=True)
class Waiting:
    """The runs of a set, oldest first, and where each one's first request is counted."""

    folder: Path
    runs: tuple[Path, ...]
    begins: tuple[int, ...]

    @staticmethod
    def open(growth: Path) -> "Waiting":
        """Open the folder `growth` of a set; raises `DataError` for one of an earlier version."""
        folder = growth / _FOLDER
        runs = tuple(sorted(folder.glob("[0-9]*")))
        if not runs:
            raise DataError(f"{folder}: no such folder; the set is of an earlier version: prepare all parts anew")
        sizes = [len(_mapped(run, "user")) for run in runs]
        return Waiting(folder, runs, tuple(np.cumsum([0, *sizes]).tolist()))

    def grown(self, fresh: Sessions, users: Users, growth: Path) -> "Waiting":
        """Return these runs, linked, and one of new requests by user in the folder `growth` of a larger set."""
        for run in self.runs:
            (target := growth / _FOLDER / run.name).mkdir(parents=True)
            for file in run.iterdir():
                if file.name != _WAITS:
                    link_file(file, target / file.name)
            (target / _WAITS).write_bytes((run / _WAITS).read_bytes())
        number = int(self.runs[-1].name) + 1
        _write_run([fresh], len(fresh), len(fresh.positive), users, growth / _FOLDER / f"{number:04}")
        return Waiting.open(growth)

    def heads(self, users: Users) -> Heads:
        """Return all that wait, run by run."""
        row_of = np.empty(len(users.key), np.int64)
        row_of[users.key] = np.arange(len(users.key))
        parts: list[tuple[NDArray[np.int64], ...]] = []
        for run, begin in zip(self.runs, self.begins, strict=False):
            index = np.flatnonzero(_mapped(run, "waits"))
            parts.append((*(_mapped(run, name)[index] for name in ("user", "at", "last")), index + begin))
        user, at, last, place = (np.concatenate(column) for column in zip(*parts, strict=True))
        return Heads(row_of[user], at, last, place)

    def take(self, heads: Heads, index: NDArray[np.int64], users: Users) -> Sessions:
        """Return the requests at `index` of the heads, in that order, with ends counted in all events."""
        user, place = heads.user[index], heads.place[index]
        order = np.argsort(place, kind="stable")
        sorted_place = place[order]
        limits = np.searchsorted(sorted_place, self.begins)
        ends, sizes, positives = [], [], []
        for number, run in enumerate(self.runs):
            mine = sorted_place[limits[number] : limits[number + 1]] - self.begins[number]
            offsets = _mapped(run, "offsets")
            first, size = offsets[mine], offsets[mine + 1] - offsets[mine]
            where, _ = side_by_side(first, size)
            ends.append(_mapped(run, "end")[mine])
            sizes.append(size)
            positives.append(_mapped(run, "positive")[where])
        offsets = np.concatenate([[0], np.cumsum(np.concatenate(sizes))])
        back = np.empty(len(order), np.int64)
        back[order] = np.arange(len(order))
        end = np.concatenate(ends) + users.start[user[order]]
        found = Sessions(
            user[order], heads.at[index][order], heads.last[index][order], end, offsets, np.concatenate(positives)
        )
        return found.take(back)

    def keep(self, heads: Heads, waits: NDArray[np.bool_], users: Users) -> None:
        """Note which of the heads still wait, in these runs: those of a set that is being written."""
        if len(self.runs) > RUNS:
            self._merge(heads, heads.by_user(np.flatnonzero(waits)), users)
            return
        still = np.zeros(self.begins[-1], np.bool_)
        still[heads.place[waits]] = True
        for number, run in enumerate(self.runs):
            np.save(run / _WAITS, still[self.begins[number] : self.begins[number + 1]])

    def _merge(self, heads: Heads, index: NDArray[np.int64], users: Users) -> None:
        def pieces() -> Iterator[Sessions]:
            for begin in range(0, len(index), WRITTEN_AT_ONCE):
                yield self.take(heads, index[begin : begin + WRITTEN_AT_ONCE], users)

        positives = sum(len(piece.positive) for piece in pieces())
        _write_run(pieces(), len(index), positives, users, self.folder / "merged")
        for run in self.runs:
            rmtree(run)
        (self.folder / "merged").rename(self.folder / "0000")


def _write_run(pieces: Iterable[Sessions], count: int, positives: int, users: Users, run: Path) -> None:
    run.mkdir(parents=True)
    lengths = {**dict.fromkeys(_KINDS, count), "offsets": count + 1, "positive": positives}
    with ExitStack() as stack:
        files = {
            name: stack.enter_context(npy_file(run / f"{name}.npy", kind, lengths[name]))
            for name, kind in _KINDS.items()
        }
        put(files["offsets"], np.zeros(1, np.int64))
        written = 0
        for piece in pieces:
            put(files["user"], users.key[piece.user])
            put(files["at"], piece.at)
            put(files["last"], piece.last)
            put(files["end"], piece.end - users.start[piece.user])
            put(files["offsets"], piece.offsets[1:] + written)
            put(files["positive"], piece.positive)
            written += len(piece.positive)
    np.save(run / _WAITS, np.ones(count, np.bool_))


def _mapped(run: Path, name: str) -> NDArray[Any]:
    array: NDArray[Any] = np.load(run / f"{name}.npy", mmap_mode="r", allow_pickle=False)
    return array
