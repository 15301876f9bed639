"""What two bundles would have answered the same request: a log for the online comparison, written beside the answers.

    pairs/<microseconds>-<process>.jsonl      one request a line

Pairs are written after the answer has gone out, by a thread that gives up rather than make anybody wait, and the oldest
files go when there are too many: losing some of them costs precision, not truth.
"""

import contextlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

logger = logging.getLogger(__name__)

FILE_BYTES = 16 * 2**20
MOST_BYTES = 32 * FILE_BYTES
"""Of one directory; the oldest files go first."""


@dataclass(frozen=True)
class Listed:
    """One of the two answers: who gave it, its items best first, and the seconds it took."""

    role: str
    version: str
    items: list[str]
    seconds: float


@dataclass(frozen=True)
class Pair:
    """One request, what was answered, and what the other bundle would have answered at the same moment."""

    at: int  # microseconds UTC
    user_id: str
    answered: Listed
    other: Listed


class PairLog:
    """Appends pairs to files of this process; used by one thread at a time.

    Args:
        directory: made at the first pair.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._file: IO[str] | None = None

    def append(self, pair: Pair) -> None:
        """Write one pair; it is with the operating system when this returns."""
        if self._file is None or self._file.tell() >= FILE_BYTES or not Path(self._file.name).exists():
            self._begin()  # another process may have removed the file to make room
        assert self._file is not None
        self._file.write(json.dumps(asdict(pair), separators=(",", ":"), ensure_ascii=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file under way, if there is one."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _begin(self) -> None:
        self.close()
        self._directory.mkdir(parents=True, exist_ok=True)
        self._file = (self._directory / f"{time.time_ns() // 1000:020d}-{os.getpid()}.jsonl").open("a")
        kept = FILE_BYTES  # the one that begins
        for old in sorted(self._directory.glob("*.jsonl"), reverse=True):
            with contextlib.suppress(FileNotFoundError):
                kept += old.stat().st_size
                if kept > MOST_BYTES:
                    old.unlink()


def read_pairs(directory: Path) -> Iterator[Pair]:
    """Yield all pairs of a directory; a line cut short by a kill is left out."""
    for path in sorted(directory.glob("*.jsonl")):
        # As bytes: `str.splitlines` also ends a line at U+2028, which ids may hold, and a kill may cut a character.
        for line in path.read_bytes().split(b"\n"):
            try:
                fields: dict[str, Any] = json.loads(line)
            except ValueError:
                continue
            answered, other = Listed(**fields["answered"]), Listed(**fields["other"])
            yield Pair(fields["at"], fields["user_id"], answered, other)


class Aside:
    """One thread for work nobody waits for, which is dropped rather than queued beyond a bound.

    Args:
        waiting: most pieces of work under way or waiting.
    """

    def __init__(self, waiting: int = 4) -> None:
        self._bound = waiting
        self._waiting = 0
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="aside")

    def offer(self, work: Callable[[], None]) -> bool:
        """Take on a piece of work, or give False at once if too much is waiting. Call it from one thread."""
        if self._waiting >= self._bound:
            return False
        self._waiting += 1

        def run() -> None:
            try:
                work()
            except Exception:
                logger.exception("work beside the answers failed")
            finally:
                self._waiting -= 1

        self._thread.submit(run)
        return True
