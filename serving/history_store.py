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
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import lmdb
import numpy as np
from numpy.typing import NDArray

from recsys.errors import DataError
from recsys.history import UNKNOWN_KEY, Events
from recsys.log_format import Record
from recsys.stores import Encoder, LogMark
from serving.view import (
    HISTORY_EVENTS,
    MAX_USER_BYTES,
    RECORD,
    Observed,
    ReplayableLog,
    Snapshot,
    batches,
    by_user,
    joined,
    packed,
    unavailable,
    unpacked,
)
from serving.view_files import lock_of, open_view

CHUNK_EVENTS = 256  # 3.3 KB: what one more event rewrites; 40 chunks make a history of 10,000 events

NO_EVENTS = np.empty(0, RECORD)

_POSITION = b"position"
_UNKNOWN = b"unknown"
_LOG = b"log"
T = TypeVar("T")


class LmdbHistoryStore:
    """Snapshot plus applied events; reads never wait for writes, and see every committed one in every process.

    Args:
        directory: where LMDB keeps its files; made if absent. One machine only, not a network file system. It belongs
            to one snapshot: another one has another directory, so that replicas may change over one by one.
        base: the published snapshot.
        bound: newest posted events kept of a user.
        check: whether to read the whole view first, in another process, and begin anew if it is damaged.
        map_bytes: largest size the view may grow to; address space, not memory.

    A damaged view is begun anew, which `follow` fills from the log. One that turns out to be damaged later raises
    `StoreError` and is begun anew at the next start. A process opens a directory once and does not fork afterwards.
    """

    kind = "lmdb"

    def __init__(
        self,
        directory: Path,
        base: Snapshot,
        bound: int = HISTORY_EVENTS,
        check: bool = False,
        map_bytes: int = 64 * 2**30,
    ) -> None:
        self._base = base
        self._bound = bound
        self._directory = directory
        self._env = open_view(directory, map_bytes, check)
        self._used = lock_of(directory, "used").open("w")
        fcntl.flock(self._used, fcntl.LOCK_SH)  # `remove_unused` of another process leaves this view alone
        self._env.reader_check()
        self._meta = self._env.open_db(b"meta")
        self._chunks = self._env.open_db(b"chunks")
        self._forgotten = self._env.open_db(b"forgotten")

    def read(self, user_id: str) -> Events | None:
        """Return the user's history, oldest first, or None if neither the snapshot nor the log knows the user.

        Cost: some 20 us plus 4 us for every 1,000 events that were posted; the snapshot's part is views.
        """
        return self.observe(user_id).events

    def observe(self, user_id: str) -> Observed:
        """Return the user's history with the log position and the snapshot it was read from."""
        base, posted, position = self._sound(lambda: self._look_up(user_id))
        return Observed(joined(base, posted), position, self._base.id)

    def parts(self, user_id: str) -> tuple[Events | None, Events | None]:
        """Return what the snapshot and what the log know of a user, None each for nothing."""
        base, posted, _ = self._sound(lambda: self._look_up(user_id))
        return base, posted

    def _look_up(self, user_id: str) -> tuple[Events | None, Events | None, int]:
        encoded = user_id.encode()
        if len(encoded) > MAX_USER_BYTES:
            return self._base.read(user_id), None, self.position
        prefix = _prefix(encoded)
        with self._env.begin(self._chunks, buffers=True) as txn:
            raw = b"".join(self._chunks_of(txn, prefix))
            forgotten = self._is_forgotten(txn, prefix)
            position = self._number(txn, _POSITION)
        base = None if forgotten else self._base.read(user_id)
        return base, unpacked(np.frombuffer(raw, RECORD)) if raw else None, position

    def users(self, limit: int) -> list[str]:
        """Return up to `limit` user ids: those with posted events first, then users of the snapshot."""
        return self._sound(lambda: self._users(limit))

    def _users(self, limit: int) -> list[str]:
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
            self._merge(txn, user_id, packed(events))

    def follow(self, log: ReplayableLog, encoder: Encoder) -> int:
        """Apply what the log holds beyond this view, whoever wrote it; gives the number of events applied.

        Visible to the next `read` in every process. Starts from nothing if the log ends before the view does.
        """

        def apply() -> int:
            with self._env.begin(write=True) as txn:
                if bytes(txn.get(_LOG, default=b"", db=self._meta)).decode() == log.id:
                    position = self._number(txn, _POSITION)
                    if position <= log.end or position <= log.refresh():
                        return self._apply(txn, log, position, None, encoder)
                return self._begin(txn, log, encoder)

        return self._sound(apply)

    def rebuild(self, log: ReplayableLog, encoder: Encoder) -> int:
        """Build the view again from the log in one transaction; readers see the old one until it is done.

        Needed when what was applied can't be trusted, as after a log was mended.
        """

        def apply() -> int:
            with self._env.begin(write=True) as txn:
                log.refresh()
                return self._begin(txn, log, encoder)

        return self._sound(apply)

    def learn(self, log: ReplayableLog, encoder: Encoder) -> None:
        """Give events of items that were unknown the keys they have now, as `rebuild` does.

        What the log has of users with such events is read while others read and write; then these users are merged
        anew in one transaction.
        """
        self.follow(log, encoder)
        users = self._sound(self._with_unknown)
        if not users:
            return
        mark = self._base.mark(log.id)
        posted: dict[str, list[NDArray[np.void]]] = {}
        position = _gather(batches(log, mark.position, mark), users, encoder, posted) or mark.position

        def apply() -> None:
            with self._env.begin(write=True) as txn:
                log.refresh()
                self._apply(txn, log, self._number(txn, _POSITION), None, encoder)
                _gather(batches(log, position, None), users, encoder, posted)  # since it was read
                unknown = self._number(txn, _UNKNOWN)
                for user_id in users:
                    unknown -= self._drop(txn, _prefix(user_id.encode()))
                    unknown += self._merge(txn, user_id, np.concatenate(posted.get(user_id, [NO_EVENTS])))
                txn.put(_UNKNOWN, unknown.to_bytes(8, "big"), db=self._meta)

        self._sound(apply)

    def _with_unknown(self) -> set[str]:
        """Return the users who have events of unknown items."""
        with self._env.begin(self._chunks, buffers=True) as txn, txn.cursor() as cursor:
            return {bytes(key[2:-4]).decode() for key, value in cursor if _unknown(np.frombuffer(value, RECORD))}

    def before_append(self, log: ReplayableLog) -> None:
        """Do nothing: what this view knows comes from the log."""

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
        self._used.close()

    def _is_forgotten(self, txn: Any, prefix: bytes) -> bool:
        # A longer id can neither be posted nor forgotten.
        return len(prefix) <= MAX_USER_BYTES + 2 and txn.get(prefix, db=self._forgotten) is not None

    def _chunks_of(self, txn: Any, prefix: bytes) -> Iterator[memoryview]:
        with txn.cursor(self._chunks) as cursor:
            found = cursor.set_range(prefix)
            while found and bytes(cursor.key()[:-4]) == prefix:
                yield cursor.value()
                found = cursor.next()

    def _sound(self, work: Callable[[], T]) -> T:
        try:
            return work()
        except (lmdb.MapFullError, lmdb.ReadersFullError, lmdb.DiskError) as error:
            raise unavailable(self.kind, error) from error
        except lmdb.Error as error:
            (self._directory / "damaged").touch()
            raise unavailable(self.kind, error) from error

    def _begin(self, txn: Any, log: ReplayableLog, encoder: Encoder) -> int:
        """Apply all that the snapshot does not contain to an empty view."""
        self._clear(txn)
        txn.put(_LOG, log.id.encode(), db=self._meta)
        mark = self._base.mark(log.id)
        txn.put(_POSITION, mark.position.to_bytes(8, "big"), db=self._meta)
        return self._apply(txn, log, mark.position, mark, encoder)

    def _apply(self, txn: Any, log: ReplayableLog, position: int, mark: LogMark | None, encoder: Encoder) -> int:
        applied = 0
        unknown = self._number(txn, _UNKNOWN)
        for batch in batches(log, position, mark):
            unknown += self._apply_batch(txn, batch, encoder)
            applied += len(batch)
            position = batch[-1].end
        if applied:
            txn.put(_POSITION, position.to_bytes(8, "big"), db=self._meta)
            txn.put(_UNKNOWN, unknown.to_bytes(8, "big"), db=self._meta)
        return applied

    def _apply_batch(self, txn: Any, batch: list[Record], encoder: Encoder) -> int:
        """Apply entries; give how many more events of unknown items there are now."""
        forgotten, posted = by_user(batch)
        unknown = -sum(self._forget(txn, user_id) for user_id in forgotten)
        for user_id, events in posted.items():
            unknown += self._merge(txn, user_id, packed(encoder.events(events)))
        return unknown

    def _forget(self, txn: Any, user_id: str) -> int:
        """Drop a user's chunks and hide the snapshot's part; gives how many events of unknown items were dropped."""
        prefix = _prefix(user_id.encode())
        txn.put(prefix, b"", db=self._forgotten)
        return self._drop(txn, prefix)

    def _merge(self, txn: Any, user_id: str, new: NDArray[np.void]) -> int:
        """Put records in their place, and take out the oldest above the bound.

        The usual case rewrites the last chunk and perhaps the first, a late event all of the user's. Gives how many
        more events of unknown items there are now.
        """
        encoded = user_id.encode()
        if len(encoded) > MAX_USER_BYTES:
            raise DataError(f"user id of {len(encoded)} bytes; the history store takes up to {MAX_USER_BYTES}")
        if not len(new):
            return 0
        prefix = _prefix(encoded)
        unknown = _unknown(new)
        new = new[np.argsort(new["time"], kind="stable")]
        number, last = self._last_chunk(txn, prefix)
        if len(last) and new["time"][0] < last["time"][-1]:
            everything = np.frombuffer(b"".join(self._chunks_of(txn, prefix)), RECORD)
            self._drop(txn, prefix)
            number, last = 0, everything
        merged = np.concatenate([last, new])
        merged = merged[np.argsort(merged["time"], kind="stable")]
        for start in range(0, len(merged), CHUNK_EVENTS):
            key = prefix + (number + start // CHUNK_EVENTS).to_bytes(4, "big")
            txn.put(key, merged[start : start + CHUNK_EVENTS].tobytes(), db=self._chunks)
        return unknown - self._evict(txn, prefix, number + (len(merged) - 1) // CHUNK_EVENTS, len(merged))

    def _evict(self, txn: Any, prefix: bytes, last: int, tail: int) -> int:
        """Take out the oldest records above the bound; give how many of them were of unknown items.

        Args:
            txn: to write in.
            prefix: of the user's keys.
            last: number of the last chunk.
            tail: records in the chunks just written, the last ones.
        """
        unknown = 0
        with txn.cursor(self._chunks) as cursor:
            cursor.set_range(prefix)
            first = int.from_bytes(cursor.key()[-4:], "big")
            oldest = len(cursor.value()) // RECORD.itemsize
            # All chunks between the first and the last are full.
            newest = tail if first == last else (tail - 1) % CHUNK_EVENTS + 1
            count = newest if first == last else oldest + (last - first - 1) * CHUNK_EVENTS + newest
            while count > self._bound:
                chunk = np.frombuffer(cursor.value(), RECORD)
                gone = min(count - self._bound, len(chunk))
                unknown += _unknown(chunk[:gone])
                key, rest = bytes(cursor.key()), chunk[gone:].tobytes()
                cursor.delete()
                if rest:
                    txn.put(key, rest, db=self._chunks)
                count -= gone
        return unknown

    def _drop(self, txn: Any, prefix: bytes) -> int:
        """Delete a user's chunks; give how many records of unknown items they held."""
        unknown = 0
        with txn.cursor(self._chunks) as cursor:
            found = cursor.set_range(prefix)
            while found and cursor.key()[:-4] == prefix:
                unknown += _unknown(np.frombuffer(cursor.value(), RECORD))
                found = cursor.delete()
        return unknown

    def _last_chunk(self, txn: Any, prefix: bytes) -> tuple[int, NDArray[np.void]]:
        with txn.cursor(self._chunks) as cursor:
            # The greatest key up to the end of the user's range.
            found = cursor.prev() if cursor.set_range(prefix + b"\xff\xff\xff\xff") else cursor.last()
            if not found or cursor.key()[:-4] != prefix:
                return 0, NO_EVENTS
            return int.from_bytes(cursor.key()[-4:], "big"), np.frombuffer(cursor.value(), RECORD)

    def _clear(self, txn: Any) -> None:
        txn.drop(self._chunks, delete=False)
        txn.drop(self._meta, delete=False)
        txn.drop(self._forgotten, delete=False)

    def _number(self, txn: Any, name: bytes) -> int:
        return int.from_bytes(txn.get(name, default=b"", db=self._meta), "big")


def _gather(
    some: Iterable[list[Record]], users: set[str], encoder: Encoder, posted: dict[str, list[NDArray[np.void]]]
) -> int:
    """Add to `posted` what a log has of some users, without what it forgets; gives where it ends, 0 for nothing."""
    end = 0
    for batch in some:
        forgotten, events = by_user(record for record in batch if record.event.user_id in users)
        for user_id in forgotten:
            posted.pop(user_id, None)
        for user_id, new in events.items():
            posted.setdefault(user_id, []).append(packed(encoder.events(new)))
        end = batch[-1].end
    return end


def _prefix(encoded: bytes) -> bytes:
    # The length in front keeps the chunks of one user together and apart from those of a user whose id begins alike.
    return len(encoded).to_bytes(2, "big") + encoded


def _unknown(records: NDArray[np.void]) -> int:
    return int((records["item"] == UNKNOWN_KEY).sum())
