"""The event log on disk: the truth that every other store of the service can be rebuilt from.

    log/
      00000000000000000000.jsonl    one event a line: CRC-32 in hexadecimal, a space, the event as JSON
      00000000000016777301.jsonl    a segment is named by the position of its first byte in the whole log
      lock

All writers share one sequence of segments under a file lock, rather than one file each. The lock costs 1 us beside an
fsync of some 100 us, and it buys one order of all events, one window of event ids for all replicas (a repeated post
is recognised whichever replica it reaches), and a position that says exactly what a view of the log has seen.

A user who is forgotten leaves a tombstone, an entry like the others: views drop what came before it. The bytes of
those events stay in their segments; nothing here writes a segment anew.

A process killed while it writes leaves a torn tail that nobody was told is durable: a line cut short, or zeros after a
power cut. The next writer, alone under the lock, cuts it off. Any other damage is a `DataError` and is left as it is.
"""

import fcntl
import json
import math
import os
import threading
import uuid
import zlib
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, NamedTuple

from recsys.errors import DataError
from recsys.stores import Event, Tombstone

Durability = Literal["fsync", "os"]
"""`fsync`: on the disk before `append` returns. `os`: with the operating system; survives a kill, not a power cut."""

SEGMENT_BYTES = 16 * 2**20
WINDOW = 100_000


class Record(NamedTuple):
    """An entry of the log and the position just after it, from which a later replay goes on."""

    event: Event | Tombstone
    end: int


class SegmentLog:
    """An append-only log of events in segment files; one object per process, shared by its threads.

    Args:
        directory: where the segments are; made if absent.
        durability: `fsync` or `os`.
        window: how many of the newest events a repeated event id is recognised among, over all writers.
        segment_bytes: a segment this large is closed and a new one begun.

    Attributes:
        end: position after the last record known to this process.
        recovered_bytes: bytes of torn tails that this object has cut off.

    Raises:
        DataError: a damaged record in the segments read that is not a torn tail.

    Opening reads the newest segments until the window is full: 100,000 events take about half a second.
    """

    def __init__(
        self,
        directory: Path,
        durability: Durability = "fsync",
        window: int = WINDOW,
        segment_bytes: int = SEGMENT_BYTES,
    ) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory
        self.durability = durability
        self.recovered_bytes = 0
        self._segment_bytes = segment_bytes
        self._window_size = window
        self._window: OrderedDict[str, None] = OrderedDict()  # oldest first
        self._threads = threading.Lock()
        self._lock_file = os.open(directory / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        self._segment_start = 0
        self._file = -1
        self._unsynced = False
        self.end = 0
        with self._exclusive():
            self._open_newest()

    def append(self, events: Sequence[Event]) -> list[bool]:
        """Write events durably; False marks those whose event id is in the window already (not written again).

        An empty event id is replaced by a fresh one.

        Raises:
            DataError: an event that cannot be written, such as a value that is not finite; nothing is written then.
            OSError: the disk refused; nothing of the call remains in the log.

        Cost: about 10 us an event, and one fsync a call.
        """
        return self._append([_encode(event) for event in events])

    def forget(self, user_id: str) -> None:
        """Write a tombstone durably: views of the log drop all events of the user before it.

        Raises:
            OSError: the disk refused; nothing of the call remains in the log.
        """
        event_id = uuid.uuid4().hex
        self._append([(event_id, _line({"id": event_id, "forget": user_id}))])

    def refresh(self) -> int:
        """Take note of what other processes have written; gives the new end."""
        with self._exclusive():
            self._catch_up()
            return self.end

    def _append(self, lines: Sequence[tuple[str, bytes]]) -> list[bool]:
        """Write lines with their ids, except those whose id is in the window; True marks what was written."""
        with self._exclusive():
            self._catch_up()
            fresh: list[bool] = []
            new: dict[str, None] = {}
            for event_id, _ in lines:
                fresh.append(event_id not in self._window and event_id not in new)
                new[event_id] = None
            self._write(b"".join(line for (_, line), wanted in zip(lines, fresh, strict=True) if wanted))
            self._remember(event_id for (event_id, _), wanted in zip(lines, fresh, strict=True) if wanted)
        return fresh

    def replay(self, start: int = 0) -> Iterator[Record]:
        """Give the entries from position `start` to the end this process knows, oldest first.

        Raises:
            DataError: `start` is not a position of this log, a record is damaged or a segment is missing.
        """
        return self._records(start, self.end)

    def close(self) -> None:
        """Close the files; the object can't be used afterwards."""
        os.close(self._file)
        os.close(self._lock_file)

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        with self._threads:
            fcntl.flock(self._lock_file, fcntl.LOCK_EX)
            try:
                yield
            finally:
                fcntl.flock(self._lock_file, fcntl.LOCK_UN)

    def _segments(self) -> list[tuple[int, Path]]:
        return sorted((int(path.stem), path) for path in self.directory.glob("*.jsonl"))

    def _records(self, start: int, end: int) -> Iterator[Record]:
        position = start
        for segment, path in self._segments():
            if position == end or segment > position:
                break
            with path.open("rb") as file:
                file.seek(position - segment)
                for line in file:
                    event = _decode(line)
                    if event is None:
                        raise DataError(f"{path}: no sound record at byte {position - segment}; is it a position?")
                    position += len(line)
                    yield Record(event, position)
                    if position == end:
                        break
        if position != end:
            raise DataError(
                f"{self.directory}: nothing at position {position}, though the log goes from 0 to {end}; "
                "restore the missing segment, or rebuild the view that asked for it"
            )

    def _open_newest(self) -> None:
        """Stand at the end of the newest segment and fill the window from the newest segments."""
        starts = [start for start, _ in self._segments()] or [0]
        self._open_segment(starts[-1])
        self.end = starts[-1]
        parts = [self._read_on()]
        for start, end in zip(reversed(starts[:-1]), reversed(starts[1:]), strict=True):
            if sum(map(len, parts)) >= self._window_size:
                break
            parts.append([record.event.event_id for record in self._records(start, end)])
        for part in reversed(parts):
            self._remember(part)

    def _path(self, start: int) -> Path:
        return self.directory / f"{start:020d}.jsonl"

    def _open_segment(self, start: int) -> None:
        if self._file >= 0:
            self._sync()
            os.close(self._file)
        new = not self._path(start).exists()
        self._file = os.open(self._path(start), os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        self._segment_start = start
        if new and self.durability == "fsync":
            descriptor = os.open(self.directory, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)

    def _catch_up(self) -> None:
        """Read what other processes have appended since; cut off the torn tail of one that died."""
        self._remember(self._read_on())
        while self._path(self.end).exists() and self.end != self._segment_start:
            self._open_segment(self.end)
            self._remember(self._read_on())

    def _read_on(self) -> list[str]:
        """Give the event ids between `end` and the end of the open segment, and move `end` there."""
        path = self._path(self._segment_start)
        size = os.fstat(self._file).st_size
        good = self.end - self._segment_start
        if size == good:
            return []
        if size < good:
            raise DataError(f"{path}: {size} bytes, but {good} were there; restore it and rebuild the views")
        ids: list[str] = []
        with path.open("rb") as file:
            file.seek(good)
            for line in file:
                event = _decode(line)
                if event is None:
                    if _torn(line + file.read()):
                        break
                    raise DataError(
                        f"{path}: damaged record at byte {good}; restore the file from a copy, or remove the record "
                        "and rebuild the views"
                    )
                ids.append(event.event_id)
                good += len(line)
        # A writer may have been killed between its write and its sync; a repeat of its events is then "a duplicate",
        # so they must be on the disk before anybody is told so.
        self._unsynced = True
        if size > good:
            os.ftruncate(self._file, good)
            self.recovered_bytes += size - good
        self.end = self._segment_start + good
        return ids

    def _write(self, data: bytes) -> None:
        if data and self.end - self._segment_start >= self._segment_bytes:
            self._open_segment(self.end)
        try:
            view = memoryview(data)
            while view:
                view = view[os.write(self._file, view) :]
                self._unsynced = True
            self._sync()
        except OSError:
            os.ftruncate(self._file, self.end - self._segment_start)
            raise
        self.end += len(data)

    def _sync(self) -> None:
        if self._unsynced and self.durability == "fsync":
            os.fdatasync(self._file)
        self._unsynced = False

    def _remember(self, ids: Iterable[str]) -> None:
        for event_id in ids:
            self._window[event_id] = None
            self._window.move_to_end(event_id)  # it may have been taken again after it had left the window
        while len(self._window) > self._window_size:
            self._window.popitem(last=False)


def _torn(tail: bytes) -> bool:
    """Whether unsound bytes at the end are what an interrupted write leaves: a line cut short, or pages of zeros."""
    return b"\n" not in tail or bytes(8) in tail


def _encode(event: Event) -> tuple[str, bytes]:
    """Give the event's id, a fresh one if it has none, and its line."""
    event_id = event.event_id or uuid.uuid4().hex
    if not math.isfinite(event.value):
        raise DataError(f"event {event_id!r}: value {event.value} is not a finite number")
    if not -(2**63) <= event.time < 2**63:
        raise DataError(f"event {event_id!r}: time {event.time} is not a 64-bit number of microseconds")
    fields: dict[str, str | int | float] = {
        "id": event_id,
        "user": event.user_id,
        "item": event.item_id,
        "time": event.time,
        "action": event.action,
        "value": event.value,
    }
    try:
        return event_id, _line(fields)
    except UnicodeEncodeError:
        raise DataError(f"event {event_id!r}: a text is not valid Unicode (half of a surrogate pair)") from None


def _line(fields: Mapping[str, str | int | float]) -> bytes:
    payload = json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode()
    return b"%08x %s\n" % (zlib.crc32(payload), payload)


def _decode(line: bytes) -> Event | Tombstone | None:
    """Give the entry of a line, or None if the line is damaged or not whole."""
    payload = line[9:-1]
    if line[-1:] != b"\n" or line[:9] != b"%08x " % zlib.crc32(payload):
        return None
    fields = json.loads(payload)
    if "forget" in fields:
        return Tombstone(fields["id"], fields["forget"])
    return Event(fields["id"], fields["user"], fields["item"], fields["time"], fields["action"], float(fields["value"]))
