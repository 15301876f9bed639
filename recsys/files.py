"""Files that are whole or absent: written under a temporary name, then renamed; and their digests."""

import fcntl
import hashlib
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from recsys.errors import DataError


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; it takes that name only if the block ends without an error.

    What writers that were killed left beside it is removed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    held, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    temporary = Path(name)
    try:
        fcntl.flock(held, fcntl.LOCK_EX)  # falls with the process, however it ends
        for left in _leftovers(path):
            if left.is_file():
                _remove_unheld(left)
        yield temporary
        temporary.chmod(0o644)
        temporary.replace(path)
    finally:
        os.close(held)
        temporary.unlink(missing_ok=True)


@contextmanager
def whole_directory(path: Path) -> Iterator[Path]:
    """Yield a temporary directory beside `path`; it replaces `path` only if the block ends without an error.

    What writers that were killed left beside it is removed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    held = os.open(temporary, os.O_RDONLY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX)
        if path.exists():  # else it may lie in one of them
            for left in _leftovers(path, r"(old\.)?"):
                if left.is_dir():
                    _remove_unheld(left)
        yield temporary
        for written in temporary.rglob("*"):  # some libraries write files that only their owner may read
            if not written.is_symlink():
                written.chmod(0o755 if written.is_dir() else 0o644)
        temporary.chmod(0o755)
        if path.exists():
            old = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.old."))
            path.replace(old / path.name)
            temporary.replace(path)
            shutil.rmtree(old)
        else:
            temporary.replace(path)
    finally:
        os.close(held)
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def work_directory(path: Path) -> Iterator[Path]:
    """Yield a directory beside `path` that goes when the block ends; those of killed processes go when it begins."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.work."))
    held = os.open(temporary, os.O_RDONLY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX)
        for left in _leftovers(path, r"work\."):
            _remove_unheld(left)
        yield temporary
    finally:
        os.close(held)
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Hold the lock file `path` against every other process and thread; it falls with the process, however it ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        yield


YOUNG_SECONDS = 60
"""Age below which what has no lock may be what its writer has just begun."""


def _leftovers(path: Path, kind: str = "") -> list[Path]:
    """Return what lies beside `path` under the temporary names of a kind, those in use among them."""
    temporary = re.compile(rf"\.{re.escape(path.name)}\.{kind}[a-z0-9_]{{8}}")  # as `tempfile` names them
    return [left for left in path.parent.iterdir() if temporary.fullmatch(left.name) and not left.is_symlink()]


def _remove_unheld(left: Path) -> None:
    """Remove a file or directory that no process holds; one that is gone meanwhile or somebody else's is passed."""
    with suppress(OSError):
        if time.time() - left.stat().st_mtime < YOUNG_SECONDS:
            return
        handle = os.open(left, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails where somebody writes
            if left.is_dir():
                shutil.rmtree(left, ignore_errors=True)
            else:
                left.unlink()
        finally:
            os.close(handle)


def link_file(source: Path, target: Path) -> None:
    """Link a file that never changes; copy it where links are not possible."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON with sorted keys, whole or not at all; NaN is refused."""
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, sort_keys=True, allow_nan=False, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """Read JSON; a missing or malformed file is a `DataError` that names it."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except json.JSONDecodeError as error:
        raise DataError(f"{path}: not valid JSON, {error.msg} at line {error.lineno}, column {error.colno}") from None


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file's bytes in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_json(value: Any) -> str:
    """Return the SHA-256 of a value's canonical JSON (sorted keys, no spaces)."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
