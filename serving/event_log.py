"""The event log on disk: the truth that every other store of the service can be rebuilt from.

All writers share one sequence of segments (`recsys.log_format`) under a file lock, rather than one file each. The lock
costs 1 us beside an fsync of some 100 us, and it buys one order of all events, one window of event ids for all replicas
(a repeated post is recognised whichever replica it reaches), and a position that says exactly what a view has seen.

A user who is forgotten leaves a tombstone, an entry like the others: views drop what came before it. The bytes of
those events stay in their segments; nothing here writes a segment anew.

A process killed while it writes leaves a torn tail that nobody was told is durable: a line cut short, or zeros after a
power cut. The next writer, alone under the lock, cuts it off and says so. Any other damage is a `DataError` and is left
as it is.

Times that the service gives follow the order of the log even if the machine's clock steps back: by up to `STEP_BACK` an
event takes the time of the newest one before it. A larger step is believed, or one wrong future would last for ever.
"""

import fcntl
import logging
import os
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Literal

import xxhash

from recsys.errors import DataError
from recsys.files import write_json
from recsys.history import POSITIONS
from recsys.log_format import (
    Record,
    decode,
    encode,
    encode_tombstone,
    new_id,
    records,
    recovered,
    segment_path,
    segments,
    torn,
)
from recsys.stores import Event, Tombstone, Verdict

Durability = Literal["fsync", "os"]
"""`fsync`: on the disk before `append` returns. `os`: with the operating system; survives a kill, not a power cut."""

SEGMENT_BYTES = 16 * 2**20
WINDOW = 100_000
STEP_BACK = 60_000_000
"""Microseconds."""

Content = tuple[int, int | None]
"""What an id stands for: a hash of all but the time, and the time unless the service gave it."""

logger = logging.getLogger(__name__)


class SegmentLog:
    """An append-only log of events in segment files; one object per process, shared by its threads.

    Args:
        directory: where the segments are; made if absent.
        durability: `fsync` or `os`.
        window: how many of the newest events a repeated event id is recognised among, over all writers.
        segment_bytes: a segment this large is closed and a new one begun.

    Attributes:
        id: names this log for ever.
        durability: as given.
        window: as given.
        end: position after the last record known to this process.
        newest_stamp: the latest time a service gave to an event, as far as this process knows.
        newest_position: the latest time of an event that is a position in a log of order only, likewise.
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
        self.window = window
        self._window: OrderedDict[str, Content] = OrderedDict()  # oldest first
        self._threads = threading.Lock()
        self._lock_file = os.open(directory / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        self._segment_start = 0
        self._file = -1
        self._unsynced = False
        self.end = 0
        self.newest_stamp = self.newest_position = -(2**63)
        with self._exclusive():
            self.id = self._identify()
            self._open_newest()

    def append(self, events: Sequence[Event]) -> list[Verdict]:
        """Write events durably, unless their id is in the window already; says of each what became of it.

        `duplicate`: the very same event is there. `conflict`: a different event has the id; the log keeps that one. An
        empty event id is replaced by a fresh one.

        Raises:
            DataError: an event that cannot be written, such as a value that is not finite; nothing is written then.
            OSError: the disk refused; nothing of the call remains in the log.

        Cost: about 10 us an event, and one fsync a call.
        """
        named = [event if event.event_id else replace(event, event_id=new_id()) for event in events]
        return self._append([(event, encode(event)) for event in named])

    def forget(self, user_id: str) -> int:
        """Write a tombstone durably: views of the log drop all events of the user before it. Gives its position.

        Raises:
            OSError: the disk refused; nothing of the call remains in the log.
        """
        self.copy_tombstone(Tombstone(new_id(), user_id))
        return self.end

    def copy_tombstone(self, tombstone: Tombstone) -> None:
        """Write a tombstone of another machine's log durably, unless it is in the window already."""
        self._append([(tombstone, encode_tombstone(tombstone))])

    def recovered(self) -> tuple[int, int]:
        """Return how many torn tails were cut off since the log began, whoever did it, and their bytes."""
        return recovered(self.directory)

    def refresh(self) -> int:
        """Take note of what other processes have written; gives the new end."""
        with self._exclusive():
            self._catch_up()
            return self.end

    def _append(self, entries: Sequence[tuple[Event | Tombstone, bytes]]) -> list[Verdict]:
        """Write entries, except those whose id is in the window."""
        with self._exclusive():
            self._catch_up()
            verdicts: list[Verdict] = []
            new: dict[str, Content] = {}
            lines: list[bytes] = []
            stamp = self.newest_stamp
            for entry, line in entries:
                if isinstance(entry, Event) and entry.stamped:
                    if 0 < stamp - entry.time <= STEP_BACK:
                        entry = replace(entry, time=stamp)
                        line = encode(entry)
                    stamp = max(stamp, entry.time)
                content = _content(entry)
                known = new.get(entry.event_id) or self._window.get(entry.event_id)
                if known is None:
                    new[entry.event_id] = content
                    lines.append(line)
                    verdicts.append("accepted")
                else:
                    verdicts.append("duplicate" if _same(known, content) else "conflict")
            self._write(b"".join(lines))
            self.newest_stamp = stamp
            accepted = zip(entries, verdicts, strict=True)
            self._note_positions(entry for (entry, _), verdict in accepted if verdict == "accepted")
            self._remember(new.items())
        return verdicts

    def behind(self) -> bool:
        """Whether other processes have written since; asked without the lock, so perhaps a moment ago."""
        if os.fstat(self._file).st_size != self.end - self._segment_start:
            return True
        return self.end != self._segment_start and self._path(self.end).exists()

    def replay(self, start: int = 0) -> Iterator[Record]:
        """Return the entries from position `start` to the end this process knows, oldest first.

        Raises:
            DataError: `start` is not a position of this log, a record is damaged or a segment is missing.
        """
        with self._threads:
            segment, end = self._segment_start, self.end
        return records(self.directory, start, end, segment if segment <= start else None)

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

    def _identify(self) -> str:
        """Return the log's id; a log without one, as it was first or is from before there were ids, gets it."""
        path = self.directory / "id"
        if not path.exists():
            temporary = path.with_suffix(".new")
            temporary.write_text(new_id())
            temporary.replace(path)
        return path.read_text().strip()

    def _open_newest(self) -> None:
        """Stand at the end of the newest segment and fill the window from the newest segments."""
        starts = [start for start, _ in segments(self.directory)] or [0]
        self._open_segment(starts[-1])
        self.end = starts[-1]
        parts = [self._read_on()]
        for start, end in zip(reversed(starts[:-1]), reversed(starts[1:]), strict=True):
            if sum(map(len, parts)) >= self.window:
                break
            parts.append([self._noted(record.event) for record in records(self.directory, start, end)])
        for part in reversed(parts):
            self._remember(part)

    def _path(self, start: int) -> Path:
        return segment_path(self.directory, start)

    def _open_segment(self, start: int) -> None:
        if self._file >= 0:
            self._sync()
        new = not self._path(start).exists()
        opened = os.open(self._path(start), os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        if self._file >= 0:  # only now: where the new one is unavailable, this one is still the log's
            os.close(self._file)
        self._file, self._segment_start = opened, start
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

    def _read_on(self) -> list[tuple[str, Content]]:
        """Return ids and contents between `end` and the end of the open segment, and move `end` there."""
        path = self._path(self._segment_start)
        size = os.fstat(self._file).st_size
        good = self.end - self._segment_start
        if size == good:
            return []
        if size < good:
            raise DataError(f"{path}: {size} bytes, but {good} were there; restore it and rebuild the views")
        found: list[tuple[str, Content]] = []
        with path.open("rb") as file:
            file.seek(good)
            for line in file:
                entry = decode(line)
                if entry is None:
                    if torn(line + file.read()):
                        break
                    raise DataError(
                        f"{path}: damaged record at byte {good}; restore the file from a copy, or remove the record "
                        "and rebuild the views"
                    )
                found.append(self._noted(entry))
                good += len(line)
        # A writer may have been killed between its write and its sync; a repeat of its events is then "a duplicate",
        # so they must be on the disk before anybody is told so.
        self._unsynced = True
        if size > good:
            self._cut(good, size - good)
        self.end = self._segment_start + good
        return found

    def _noted(self, entry: Event | Tombstone) -> tuple[str, Content]:
        if isinstance(entry, Event) and entry.stamped:
            self.newest_stamp = max(self.newest_stamp, entry.time)
        self._note_positions([entry])
        return entry.event_id, _content(entry)

    def _note_positions(self, entries: Iterable[Event | Tombstone]) -> None:
        for entry in entries:
            if isinstance(entry, Event) and entry.time < POSITIONS:
                self.newest_position = max(self.newest_position, entry.time)

    def _cut(self, good: int, torn_bytes: int) -> None:
        """Cut a torn tail off the open segment, and keep count for whoever asks later."""
        os.ftruncate(self._file, good)
        self.recovered_bytes += torn_bytes
        tails, total = self.recovered()
        write_json(self.directory / "recovered.json", {"tails": tails + 1, "bytes": total + torn_bytes})
        logger.warning(
            "%s: a writer died while it wrote; %d bytes that nobody was told are durable are cut off at byte %d "
            "(%d torn tails so far), all before them is sound",
            self._path(self._segment_start),
            torn_bytes,
            good,
            tails + 1,
        )

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

    def _remember(self, found: Iterable[tuple[str, Content]]) -> None:
        for event_id, content in found:
            self._window[event_id] = content
            self._window.move_to_end(event_id)  # it may have been taken again after it had left the window
        while len(self._window) > self.window:
            self._window.popitem(last=False)


def _content(entry: Event | Tombstone) -> Content:
    if isinstance(entry, Tombstone):
        return _hash(entry.user_id), None
    value = repr((entry.value or 0.0) + 0.0)  # none is 0, as it was written once
    return _hash(entry.user_id, entry.item_id, entry.action, value), None if entry.stamped else entry.time


def _hash(*texts: str) -> int:
    """Return 64 bits that tell sequences of texts apart."""
    return xxhash.xxh3_64_intdigest("".join(f"{len(text)}:{text}" for text in texts).encode("utf-8", "surrogatepass"))


def _same(known: Content, posted: Content) -> bool:
    """Whether two contents are one event; a time that the service gave can't tell them apart."""
    times = (known[1], posted[1])
    return known[0] == posted[0] and (None in times or times[0] == times[1])
