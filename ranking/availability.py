"""What cannot be had now: a small table in one JSON file, shared by the replicas of a machine.

    {"unavailable": ["item id", ...]}          an item that is not listed is available

The file is replaced whole, by `put` or by whoever knows the stock (write another file, rename it), and every process
notices at its next request: a look at the file's stamp takes 2 us, reading 10,000 ids some 2 ms. A file that cannot be
read leaves the table before it in force, and says so in the log, once.
"""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from threading import Lock
from typing import Any

from ranking.filters import Unavailable
from recsys.errors import DataError
from recsys.files import alone, read_json, write_json

logger = logging.getLogger(__name__)

AVAILABILITY = "availability.json"
"""Name of the file, in a service's state."""

Stamp = tuple[int, int, int]
"""Of a file: inode, time of change in nanoseconds, bytes."""


class AvailabilityFile:
    """A live table in a file; it need not exist yet.

    Args:
        path: the file.

    Raises:
        DataError: there is a file, and it is no such table.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = Lock()
        self._stamp = _stamp(path)
        self._table = Unavailable(0, _read(path) if self._stamp else frozenset())

    def unavailable(self) -> Unavailable:
        """Return the table of this moment."""
        stamp = _stamp(self._path)
        if stamp != self._stamp:
            with self._lock:
                if stamp != self._stamp:
                    self._reload(stamp)
        return self._table

    def put(self, available: Mapping[str, bool]) -> int:
        """Say of some items whether they can be had, for every process, and give how many cannot.

        Raises:
            DataError: the file there is no such table; nothing is changed.
        """
        with alone(self._path.with_suffix(".lock")):  # two processes must not write over each other's changes
            items = set(_read(self._path) if self._path.exists() else ())
            items.difference_update(item for item, there in available.items() if there)
            items.update(item for item, there in available.items() if not there)
            write_json(self._path, {"unavailable": sorted(items)})
        return len(items)

    def _reload(self, stamp: Stamp | None) -> None:
        try:
            items = _read(self._path) if stamp else frozenset()
            self._table = Unavailable(self._table.version + 1, items)
        except DataError as error:
            logger.warning("%s; what was unavailable before stays so", error)
        self._stamp = stamp


def _stamp(path: Path) -> Stamp | None:
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_ino, status.st_mtime_ns, status.st_size


def _read(path: Path) -> frozenset[str]:
    table: Any = read_json(path)
    items = table.get("unavailable") if isinstance(table, dict) and len(table) == 1 else None
    if not isinstance(items, list) or not all(isinstance(item, str) for item in items):
        example = json.dumps({"unavailable": ["item id"]})
        raise DataError(f"{path}: not a table of unavailable items; expected {example}")
    return frozenset(items)
