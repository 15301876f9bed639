"""How the event log lies on disk: what `serving` writes, and every other reader relies on.

    log/
      id                            names this log for ever: a position means nothing in another
      00000000000000000000.jsonl    one entry a line: CRC-32 in hexadecimal, a space, the entry as JSON
      00000000000016777301.jsonl    a segment is named by the position of its first byte in the whole log
      recovered.json                how often a torn tail was cut off, and how many bytes in all

A line is whole or it is not an entry: the last bytes of a writer that was killed are passed over by every reader.
"""

import json
import math
import uuid
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from recsys.errors import DataError
from recsys.files import read_json
from recsys.stores import Event, Tombstone


class Record(NamedTuple):
    """An entry of the log and the position just after it, from which a later replay goes on."""

    event: Event | Tombstone
    end: int


class LogReader:
    """Reads an event log that another process may be writing; changes nothing.

    Args:
        directory: of the log.

    Raises:
        DataError: there is no log.
    """

    def __init__(self, directory: Path) -> None:
        if not (directory / "id").exists():
            raise DataError(f"{directory}: no event log; expected the folder `log` of a service's state")
        self.directory = directory
        self.id = (directory / "id").read_text().strip()

    def replay(self, start: int = 0) -> Iterator[Record]:
        """Return the entries from position `start` to the last whole one, oldest first.

        Raises:
            DataError: `start` is not a position of this log, a record is damaged or a segment is missing.
        """
        return records(self.directory, start, None)


def segments(directory: Path) -> list[tuple[int, Path]]:
    """Return (position of its first byte, path) of each segment, oldest first."""
    return sorted((int(path.stem), path) for path in directory.glob("*.jsonl"))


def segment_path(directory: Path, start: int) -> Path:
    """Return where the segment lies that begins at a position."""
    return directory / f"{start:020d}.jsonl"


def records(directory: Path, start: int, end: int | None, segment: int | None = None) -> Iterator[Record]:
    """Yield the entries from one position to another, or to the last whole entry if `end` is None.

    Args:
        directory: of the log.
        start: position of the first entry.
        end: position after the last one.
        segment: first position of the segment that holds `start`; looked for among all segments if absent.

    Raises:
        DataError: `start` is not a position of this log, a record is damaged or a segment is missing.
    """
    position = start
    if segment is None:
        segment = max((begin for begin, _ in segments(directory) if begin <= start), default=start)
    while position != end and (path := segment_path(directory, segment)).exists():
        with path.open("rb") as file:
            file.seek(position - segment)
            for line in file:
                entry = decode(line)
                if entry is None:
                    if end is None and torn(line + file.read()):
                        return
                    raise DataError(f"{path}: no sound record at byte {position - segment}; is it a position?")
                position += len(line)
                yield Record(entry, position)
                if position == end:
                    break
        if position == segment:  # an empty one is the last
            break
        segment = position  # each begins where the one before ends
    if position != end and (end is not None or any(segment > position for segment, _ in segments(directory))):
        raise DataError(
            f"{directory}: nothing at position {position}, though the log goes on; "
            "restore the missing segment, or rebuild the view that asked for it"
        )


def torn(tail: bytes) -> bool:
    """Whether unsound bytes are what an interrupted write leaves at the end: a line cut short, or pages of zeros.

    Never so where a sound line follows: it may have been told to somebody as durable.
    """
    interrupted = b"\n" not in tail or bytes(8) in tail
    return interrupted and not any(unframe(line) is not None for line in tail.splitlines(keepends=True))


def frame(fields: Mapping[str, Any]) -> bytes:
    """Return an entry's line."""
    payload = json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode()
    return b"%08x %s\n" % (zlib.crc32(payload), payload)


def unframe(line: bytes) -> dict[str, Any] | None:
    """Return the fields of a line, or None if the line is damaged or not whole."""
    payload = line[9:-1]
    if line[-1:] != b"\n" or line[:9] != b"%08x " % zlib.crc32(payload):
        return None
    fields: dict[str, Any] = json.loads(payload)
    return fields


def encode(event: Event) -> bytes:
    """Return the line of an event that has an id.

    Raises:
        DataError: a value that is not finite, a time beyond 64 bits, text that no UTF-8 can carry.
    """
    if event.value is not None and not math.isfinite(event.value):
        raise DataError(f"event {event.event_id!r}: value {event.value} is not a finite number")
    if not -(2**63) <= event.time < 2**63:
        raise DataError(f"event {event.event_id!r}: time {event.time} is not a 64-bit number of microseconds")
    fields: dict[str, str | int | float | bool | None] = {
        "id": event.event_id,
        "user": event.user_id,
        "item": event.item_id,
        "time": event.time,
        "action": event.action,
        "value": event.value,
    }
    if event.stamped:
        fields["stamped"] = True
    try:
        return frame(fields)
    except UnicodeEncodeError:
        raise DataError(f"event {event.event_id!r}: a text is not valid Unicode (half of a surrogate pair)") from None


def encode_tombstone(tombstone: Tombstone) -> bytes:
    """Return the line of a tombstone."""
    return frame({"id": tombstone.event_id, "forget": tombstone.user_id})


def decode(line: bytes) -> Event | Tombstone | None:
    """Return the entry of a line, or None if the line is damaged or not whole."""
    fields = unframe(line)
    if fields is None:
        return None
    if "forget" in fields:
        return Tombstone(fields["id"], fields["forget"])
    return Event(
        fields["id"],
        fields["user"],
        fields["item"],
        fields["time"],
        fields["action"],
        None if fields["value"] is None else float(fields["value"]),
        fields.get("stamped", False),
    )


def new_id() -> str:
    """Return an id that nothing else has."""
    return uuid.uuid4().hex


def recovered(directory: Path) -> tuple[int, int]:
    """Return how many torn tails of a log were cut off so far, and their bytes."""
    path = directory / "recovered.json"
    found = read_json(path) if path.exists() else {}
    return int(found.get("tails", 0)), int(found.get("bytes", 0))
