"""Live histories: what the event log adds to the published snapshot, as a view in LMDB that every process shares.

    key     length of the user id (2 bytes), user id in UTF-8, number of the chunk (4 bytes, big-endian)
    value   up to 256 events of 13 bytes: time int64, item key uint32, action code uint8; oldest first

A user whom the log forgets has no chunks from before, and a mark that hides the snapshot's part.

The view is never the truth. It remembers the log position up to which it has applied events, in the same transaction
as the events, so `follow` applies each event exactly once whichever process wrote it and whichever was killed. For the
same reason it is not synced to disk: a kill cannot harm it, and after a power cut (another boot of the machine) it
is rebuilt from the log.
"""

import fcntl
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import lmdb
import numpy as np
from numpy.typing import NDArray

from recsys.errors import DataError
from recsys.history import UNKNOWN_KEY, Events
from recsys.log_format import Record
from recsys.stores import Event, HistoryReader, Tombstone

MAX_USER_BYTES = 480
"""Longest user id in UTF-8 bytes; LMDB keys end at 511."""

CHUNK_EVENTS = 256  # 3.3 KB: what one more event rewrites; 40 chunks make a history of 10,000 events
APPLY_EVENTS = 100_000  # events held in memory at once by `follow` and `rebuild`
RECORD = np.dtype([("time", "<i8"), ("item", "<u4"), ("action", "u1")])

_POSITION = b"position"
_UNKNOWN = b"unknown"
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class Snapshot(HistoryReader, Protocol):
    """The published base under the live events."""

    def users(self, limit: int) -> list[str]:
        """Give the ids of the first `limit` users."""
        ...


class ReplayableLog(Protocol):
    """What the view needs of the event log."""

    @property
    def end(self) -> int:
        """Position after the last known record."""
        ...

    def refresh(self) -> int:
        """Take note of what other processes have written; gives the new end."""
        ...

    def replay(self, start: int = 0) -> Iterator[Record]:
        """Give the events from a position to the end."""
        ...


@dataclass(frozen=True)
class Encoder:
    """How outside names become the numbers of a history: item id -> item key, action -> code."""

    key_of: Callable[[str], int]
    action_of: Callable[[str], int]

    def events(self, events: Iterable[Event]) -> Events:
        """Give packed events in the order given; an item that the catalogue lacks is `UNKNOWN_KEY`."""
        rows = np.array([(e.time, self.key_of(e.item_id), self.action_of(e.action)) for e in events], RECORD)
        return _events(rows)


class LmdbHistoryStore:
    """Snapshot plus applied events; reads never wait for writes, and see every committed one in every process.

    Args:
        directory: where LMDB keeps its files; made if absent. One machine only, not a network file system.
        base: the published snapshot.
        map_bytes: largest size the view may grow to; address space, not memory.

    A process opens a directory once and does not fork afterwards.
    """

    def __init__(self, directory: Path, base: Snapshot, map_bytes: int = 64 * 2**30) -> None:
        self._base = base
        self._env = _open(directory, map_bytes)
        self._env.reader_check()
        self._meta = self._env.open_db(b"meta")
        self._chunks = self._env.open_db(b"chunks")
        self._forgotten = self._env.open_db(b"forgotten")

    def read(self, user_id: str) -> Events | None:
        """Give the user's history, oldest first, or None if neither the snapshot nor the log knows the user.

        Cost: some 20 us plus 4 us for every 1,000 events that were posted; the snapshot's part is views.
        """
        base, posted = self.parts(user_id)
        if posted is None:
            return base
        return posted if base is None else Events.concatenate(base, posted)

    def parts(self, user_id: str) -> tuple[Events | None, Events | None]:
        """Give what the snapshot and what the log know of a user, None each for nothing."""
        encoded = user_id.encode()
        if len(encoded) > MAX_USER_BYTES:
            return self._base.read(user_id), None
        prefix = _prefix(encoded)
        with self._env.begin(self._chunks, buffers=True) as txn:
            raw = b"".join(self._chunks_of(txn, prefix))
            forgotten = self._is_forgotten(txn, prefix)
        base = None if forgotten else self._base.read(user_id)
        return base, _events(np.frombuffer(raw, RECORD)) if raw else None

    def users(self, limit: int) -> list[str]:
        """Give up to `limit` user ids: those with posted events first, then users of the snapshot."""
        users: dict[str, None] = {}
        with self._env.begin(self._chunks) as txn, txn.cursor() as cursor:
            found = cursor.first()
            while found and len(users) < limit:
                prefix = cursor.key()[:-4]
                users[prefix[2:].decode()] = None
                found = cursor.set_range(prefix + b"\xff\xff\xff\xff")
            hidden = txn.stat(self._forgotten)["entries"]
            for user in self._base.users(limit + hidden):
                if len(users) >= limit:
                    break
                if not (hidden and self._is_forgotten(txn, _prefix(user.encode()))):
                    users[user] = None
        return list(users)

    def append(self, user_id: str, events: Events) -> None:
        """Add events to a user's history without a log; late ones are put in their place of time.

        A store that follows a log is written by `follow` alone: what is appended here, `rebuild` does not know.
        """
        with self._env.begin(write=True) as txn:
            self._merge(txn, user_id, _records(events))

    def follow(self, log: ReplayableLog, encoder: Encoder) -> int:
        """Apply what the log holds beyond this view, whoever wrote it; gives the number of events applied.

        Visible to the next `read` in every process. Starts from nothing if the log ends before the view does.
        """
        with self._env.begin(write=True) as txn:
            position = self._number(txn, _POSITION)
            if position > log.end and position > log.refresh():
                self._clear(txn)
                position = 0
            return self._apply(txn, log, position, encoder)

    def rebuild(self, log: ReplayableLog, encoder: Encoder) -> int:
        """Build the view again from the whole log in one transaction; readers see the old one until it is done.

        Needed when a new bundle knows items that were unknown when their events were applied.
        """
        with self._env.begin(write=True) as txn:
            self._clear(txn)
            log.refresh()
            return self._apply(txn, log, 0, encoder)

    @property
    def position(self) -> int:
        """Log position up to which events have been applied."""
        with self._env.begin() as txn:
            return self._number(txn, _POSITION)

    @property
    def unknown_events(self) -> int:
        """Number of applied events whose item was unknown; a bundle that knows more makes `rebuild` worth while."""
        with self._env.begin() as txn:
            return self._number(txn, _UNKNOWN)

    def close(self) -> None:
        """Close the environment; the object can't be used afterwards."""
        self._env.close()

    def _is_forgotten(self, txn: Any, prefix: bytes) -> bool:
        # A longer id can neither be posted nor forgotten.
        return len(prefix) <= MAX_USER_BYTES + 2 and txn.get(prefix, db=self._forgotten) is not None

    def _chunks_of(self, txn: Any, prefix: bytes) -> Iterator[memoryview]:
        with txn.cursor(self._chunks) as cursor:
            found = cursor.set_range(prefix)
            while found and bytes(cursor.key()[:-4]) == prefix:
                yield cursor.value()
                found = cursor.next()

    def _apply(self, txn: Any, log: ReplayableLog, position: int, encoder: Encoder) -> int:
        applied = 0
        unknown = self._number(txn, _UNKNOWN)
        records = log.replay(position)
        while batch := list(islice(records, APPLY_EVENTS)):
            by_user: dict[str, list[Event]] = {}
            for entry in (record.event for record in batch):
                if isinstance(entry, Tombstone):
                    by_user.pop(entry.user_id, None)
                    unknown -= self._forget(txn, entry.user_id)
                else:
                    by_user.setdefault(entry.user_id, []).append(entry)
            for user_id, events in by_user.items():
                packed = encoder.events(events)
                unknown += int((packed.item == UNKNOWN_KEY).sum())
                self._merge(txn, user_id, _records(packed))
            applied += len(batch)
            position = batch[-1].end
        if applied:
            txn.put(_POSITION, position.to_bytes(8, "big"), db=self._meta)
            txn.put(_UNKNOWN, unknown.to_bytes(8, "big"), db=self._meta)
        return applied

    def _forget(self, txn: Any, user_id: str) -> int:
        """Drop a user's chunks and hide the snapshot's part; gives how many events of unknown items were dropped."""
        prefix = _prefix(user_id.encode())
        unknown = 0
        with txn.cursor(self._chunks) as cursor:
            found = cursor.set_range(prefix)
            while found and cursor.key()[:-4] == prefix:
                unknown += int((np.frombuffer(cursor.value(), RECORD)["item"] == UNKNOWN_KEY).sum())
                found = cursor.delete()
        txn.put(prefix, b"", db=self._forgotten)
        return unknown

    def _merge(self, txn: Any, user_id: str, new: NDArray[np.void]) -> None:
        """Put records in their place: the usual case rewrites the last chunk, a late event all of the user's."""
        encoded = user_id.encode()
        if len(encoded) > MAX_USER_BYTES:
            raise DataError(f"user id of {len(encoded)} bytes; the history store takes up to {MAX_USER_BYTES}")
        if not len(new):
            return
        prefix = _prefix(encoded)
        new = new[np.argsort(new["time"], kind="stable")]
        number, last = self._last_chunk(txn, prefix)
        if len(last) and new["time"][0] < last["time"][-1]:
            everything = np.frombuffer(b"".join(self._chunks_of(txn, prefix)), RECORD)
            number, joined = 0, np.concatenate([everything, new])
            joined = joined[np.argsort(joined["time"], kind="stable")]
        else:
            joined = np.concatenate([last, new])
        for start in range(0, len(joined), CHUNK_EVENTS):
            key = prefix + (number + start // CHUNK_EVENTS).to_bytes(4, "big")
            txn.put(key, joined[start : start + CHUNK_EVENTS].tobytes(), db=self._chunks)

    def _last_chunk(self, txn: Any, prefix: bytes) -> tuple[int, NDArray[np.void]]:
        with txn.cursor(self._chunks) as cursor:
            # The greatest key up to the end of the user's range.
            found = cursor.prev() if cursor.set_range(prefix + b"\xff\xff\xff\xff") else cursor.last()
            if not found or cursor.key()[:-4] != prefix:
                return 0, np.empty(0, RECORD)
            return int.from_bytes(cursor.key()[-4:], "big"), np.frombuffer(cursor.value(), RECORD)

    def _clear(self, txn: Any) -> None:
        txn.drop(self._chunks, delete=False)
        txn.drop(self._meta, delete=False)
        txn.drop(self._forgotten, delete=False)

    def _number(self, txn: Any, name: bytes) -> int:
        return int.from_bytes(txn.get(name, default=b"", db=self._meta), "big")


def _open(directory: Path, map_bytes: int) -> Any:
    """Open the environment, empty if another boot of the machine may have left it half written."""
    boot = _BOOT_ID.read_text() if _BOOT_ID.exists() else None
    marker = directory / "boot_id"
    directory.parent.mkdir(parents=True, exist_ok=True)
    with (directory.parent / f"{directory.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # replicas start together; one of them clears and marks the directory
        if directory.exists() and boot is not None and (not marker.exists() or marker.read_text() != boot):
            shutil.rmtree(directory)
        directory.mkdir(exist_ok=True)
        if boot is not None:
            marker.write_text(boot)
        unsynced = boot is not None  # without a boot id a power cut can't be told from a restart, so sync
        return lmdb.open(
            str(directory),
            map_size=map_bytes,
            max_dbs=3,
            max_readers=512,
            sync=not unsynced,
            metasync=not unsynced,
            readahead=False,
        )


def _prefix(encoded: bytes) -> bytes:
    # The length in front keeps the chunks of one user together and apart from those of a user whose id begins alike.
    return len(encoded).to_bytes(2, "big") + encoded


def _events(records: NDArray[np.void]) -> Events:
    return Events(*(np.ascontiguousarray(records[name]) for name in ("item", "action", "time")))


def _records(events: Events) -> NDArray[np.void]:
    records = np.empty(len(events), RECORD)
    records["item"], records["action"], records["time"] = events.item, events.action, events.time
    return records
