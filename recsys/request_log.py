"""What was answered to whom, from which history and by which model: the log that training and replay read.

    requests/
      {microseconds}-{8 digits}.jsonl    one answer a line, framed as in `recsys.log_format`; a process writes its own

An answer is logged with what it takes to make it again: the request, the position of the event log up to which the
histories had been filled, the snapshot under them, and a digest of the very history that was used.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from recsys.errors import DataError
from recsys.history import UNKNOWN_KEY, Events
from recsys.log_format import frame, torn, unframe

DIGEST_EVENTS = 10_000
"""Newest events that a digest of a history covers: those that a recommender uses at most."""


@dataclass(frozen=True)
class LoggedItem:
    """An item of an answer, in its place; `propensity` is the chance that the policy showed it there."""

    item_id: str
    score: float
    sources: tuple[str, ...]
    propensity: float


@dataclass(frozen=True)
class LoggedRequest:
    """One answer.

    Attributes:
        request_id: its own.
        user_id: whom it was for.
        at: the moment it was for, microseconds UTC.
        log: id of the event log.
        position: of that log, up to which the histories were filled; -1 where several logs filled them.
        snapshot: id of the snapshot under them.
        history: `history_digest` of what was used; empty if the histories were unavailable.
        champion: version of the bundle whose item keys the histories have.
        model: version of the bundle that answered.
        request: the request's fields that are not defaults, but user and moment.
        items: the answer, best first.
        settings: `Recommender.settings_digest` when it was made; empty in logs from before there was one.
    """

    request_id: str
    user_id: str
    at: int
    log: str
    position: int
    snapshot: str
    history: str
    champion: str
    model: str
    request: dict[str, Any]
    items: tuple[LoggedItem, ...]
    settings: str = ""


def history_digest(events: Events, at: int, keys: int = UNKNOWN_KEY) -> str:
    """Return 64 bits, in hexadecimal, over the newest items and times strictly before a moment.

    Actions are left out: an action that a bundle learns to name changes its code in later events only, and models that
    read actions may score such a history otherwise. Item keys from
    `keys` on count as unknown: a bundle that is served again after a larger one reads them so.
    """
    used = events.before(at)
    used = used.slice(max(0, len(used) - DIGEST_EVENTS), len(used))
    digest = xxhash.xxh3_64(np.ascontiguousarray(used.time).tobytes())
    digest.update(np.where(used.item < keys, used.item, UNKNOWN_KEY).astype(np.uint32).tobytes())
    return digest.hexdigest()


def encode(request: LoggedRequest) -> bytes:
    """Return the line of an answer."""
    return frame(asdict(request))


def read_file(path: Path, start: int = 0) -> Iterator[tuple[LoggedRequest, int]]:
    """Yield the answers of a file from a byte on, each with the byte just after it; a torn tail is passed over.

    Raises:
        DataError: a damaged line that is not a torn tail.
    """
    with path.open("rb") as file:
        file.seek(start)
        position = start
        for line in file:
            fields = unframe(line)
            if fields is None:
                if torn(line + file.read()):
                    return
                raise DataError(f"{path}: damaged line at byte {position}; remove it, or the file")
            position += len(line)
            items = tuple(LoggedItem(**{**item, "sources": tuple(item["sources"])}) for item in fields.pop("items"))
            yield LoggedRequest(**fields, items=items), position


def files(directory: Path) -> list[Path]:
    """Return the files of a request log, oldest first; none if there is no log."""
    return sorted(directory.glob("*.jsonl"))
