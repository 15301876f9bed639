"""Structured logs: one JSON object a line, each with the id of the request it belongs to.

    {"time": "2026-01-01T00:00:00.000000+00:00", "level": "info", "logger": "serving.requests", "message": "request",
     "request_id": "...", "method": "POST", "route": "/v1/recommend", "status": 200, "seconds": 0.0061, "bytes": 1412}

A route is told by its template, so that no line of a request names a user or an item; no body or header is ever logged.
"""

import contextlib
import json
import logging
import os
from contextvars import ContextVar
from datetime import UTC, datetime
from logging.handlers import RotatingFileHandler
from pathlib import Path

REQUEST_ID: ContextVar[str] = ContextVar("request_id", default="")
LOGS = "logs"
"""Directory of the log files under the state directory."""

REQUESTS = "serving.requests"
"""Logger of the line that every request gets."""

FILE_BYTES = 16 * 2**20
FILES = 8
MOST_FILES = 64
"""Newest files kept of earlier processes when one starts."""

FIELDS = ("method", "route", "status", "seconds", "bytes")


class JsonFormatter(logging.Formatter):
    """Formats a record as one line of JSON."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line; a traceback is one of its fields."""
        fields: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="microseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if request_id := REQUEST_ID.get():
            fields["request_id"] = request_id
        fields |= {name: getattr(record, name) for name in FIELDS if hasattr(record, name)}
        if record.exc_info:
            fields["traceback"] = self.formatException(record.exc_info)
        return json.dumps(fields, ensure_ascii=False)


def log_to(directory: Path, requests: bool) -> None:
    """Write what this process logs to a file of its own in a directory, oldest lines dropped beyond 128 MiB.

    Of earlier processes the newest files stay, one GiB at most.

    Args:
        directory: made if absent.
        requests: whether every request gets a line.
    """
    directory.mkdir(parents=True, exist_ok=True)
    _make_room(directory)
    handler = RotatingFileHandler(directory / f"{os.getpid()}.jsonl", maxBytes=FILE_BYTES, backupCount=FILES - 1)
    handler.setFormatter(JsonFormatter())
    for name in ("serving", "ranking", "recsys"):
        logger = logging.getLogger(name)
        logger.setLevel(logging.INFO)
        for old in [each for each in logger.handlers if isinstance(each, RotatingFileHandler)]:
            logger.removeHandler(old)
            old.close()
        logger.addHandler(handler)
    logging.getLogger(REQUESTS).setLevel(logging.INFO if requests else logging.WARNING)


def _make_room(directory: Path) -> None:
    """Remove the oldest files of processes that are gone, all but `MOST_FILES`: each start writes one of its own."""
    ages = []
    for path in directory.glob("*.jsonl*"):
        with contextlib.suppress(FileNotFoundError):  # another process that starts makes room too
            if not _lives(path.name.partition(".")[0]):
                ages.append((path.stat().st_mtime, path))
    for _, path in sorted(ages)[:-MOST_FILES]:
        path.unlink(missing_ok=True)


def _lives(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except (ValueError, ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True
