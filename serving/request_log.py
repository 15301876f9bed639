"""Writes the request log (`recsys.request_log`): sampled, bounded in size, never in the way of an answer."""

import errno
import logging
import os
import queue
import random
import threading
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

from recsys.errors import ConfigError
from recsys.history import Events
from recsys.messages import RecommendRequest, RecommendResponse
from recsys.request_log import LoggedItem, LoggedRequest, encode, files, history_digest
from serving.view import Observed

WAITING = 1_000
"""Answers that may wait to be written; the next one is dropped and counted."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RequestLogConfig:
    """Which answers are logged, and how much room they get."""

    share: float = 0.0
    """of the answers to users with an id; 0 logs none"""
    max_bytes: int = 2**30
    """of all files together; the oldest file goes when there would be more"""
    segment_bytes: int = 16 * 2**20
    """a file this large is closed and a new one begun"""

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise ConfigError(f"[request_log] share is {self.share}; expected 0 to 1")
        if not 1 <= self.segment_bytes <= self.max_bytes:
            raise ConfigError(
                f"[request_log] segment_bytes is {self.segment_bytes}, max_bytes {self.max_bytes}; "
                "expected at least 1 and no more than max_bytes"
            )


class RequestLog:
    """The files one process writes; a thread of its own does it.

    Args:
        directory: of the log; made if absent.
        config: how much is logged.
        draws: gives numbers in [0, 1) that choose what is logged.

    Attributes:
        dropped: answers that found the queue full, or the disk.
    """

    def __init__(self, directory: Path, config: RequestLogConfig, draws: random.Random | None = None) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.dropped = 0
        self._directory = directory
        self._config = config
        self._draws = draws or random.Random()
        self._queue: queue.Queue[LoggedRequest | None] = queue.Queue(WAITING)
        self._path: Path | None = None
        self._thread = threading.Thread(target=self._write_all, name="request-log", daemon=True)
        self._thread.start()

    def wanted(self) -> bool:
        """Draw whether an answer is logged."""
        return self._draws.random() < self._config.share

    def offer(self, request: LoggedRequest) -> bool:
        """Take an answer to be written soon; False, and counted, if too many wait."""
        try:
            self._queue.put_nowait(request)
        except queue.Full:
            self.dropped += 1
            return False
        return True

    def close(self) -> None:
        """Write what waits and end; the object can't be used afterwards."""
        self._queue.put(None)
        self._thread.join()

    def _write_all(self) -> None:
        while (request := self._queue.get()) is not None:
            try:
                self._write(encode(request))
            except Exception as error:  # a thread that ended here would log nothing ever after, and `close` would wait
                self.dropped += 1
                logger.warning("%s: an answer is not logged: %s", self._directory, error)

    def _write(self, line: bytes) -> None:
        # Another process may have removed the file to make room.
        known = self._path is not None and self._path.exists()
        if self._path is None or not known or self._path.stat().st_size >= self._config.segment_bytes:
            self._path = self._directory / f"{time.time_ns() // 1000:020d}-{uuid.uuid4().hex[:8]}.jsonl"
            self._path.touch()
            self._make_room()
        with self._path.open("ab", buffering=0) as file:
            before = file.tell()
            try:
                if file.write(line) < len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError:
                file.truncate(before)  # half a line would make the whole file a damaged one
                raise

    def _make_room(self) -> None:
        """Remove the oldest files, other processes' too, until a whole further one fits."""
        known = files(self._directory)
        size = sum(path.stat().st_size for path in known) + self._config.segment_bytes
        for path in known:
            if size <= self._config.max_bytes or path == self._path:
                return
            size -= path.stat().st_size
            path.unlink(missing_ok=True)


def logged(
    request: RecommendRequest,
    response: RecommendResponse,
    at: int,
    observed: Observed,
    log: str,
    champion: str,
    keys: int,
    settings: str,
) -> LoggedRequest:
    """Return the entry of an answer.

    Args:
        request: what was asked.
        response: what was answered.
        at: the moment it was for, microseconds UTC.
        observed: the history it was made from.
        log: id of the event log.
        champion: version of the bundle whose item keys the histories have.
        keys: how many item keys it knows.
        settings: the recommender's digest of them.
    """
    asked = request.model_dump(mode="json", exclude_defaults=True, exclude={"user_id", "at", "explain"})
    return LoggedRequest(
        request_id=uuid.uuid4().hex,
        user_id=str(request.user_id),
        at=at,
        log=log,
        position=observed.position,
        snapshot=observed.base,
        history=history_digest(observed.events or Events.empty(), at, keys),
        champion=champion,
        model=response.model_version,
        request=asked,
        # Answers are not randomised: what was shown was certain to be.
        items=tuple(LoggedItem(item.item_id, item.score, tuple(item.sources), 1.0) for item in response.items),
        settings=settings,
    )
