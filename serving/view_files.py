"""The files of an LMDB view: opened, checked, begun anew where damaged, removed where no longer used."""

import fcntl
import logging
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import lmdb

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")

logger = logging.getLogger(__name__)


def remove_unused(directory: Path, keep: str) -> None:
    """Remove the views of earlier snapshots under a directory that no process has open any more."""
    for other in directory.glob("*/data.mdb"):
        view = other.parent
        if view.name == keep:
            continue
        with lock_of(view, "used").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                continue
            shutil.rmtree(view)


def open_view(directory: Path, map_bytes: int, check: bool) -> Any:
    """Open the environment, empty if it is damaged or another boot of the machine may have left it half written."""
    boot = _BOOT_ID.read_text() if _BOOT_ID.exists() else None
    marker = directory / "boot_id"
    directory.parent.mkdir(parents=True, exist_ok=True)
    with lock_of(directory, "opening").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # replicas start together; one of them clears and marks the directory
        if directory.exists() and boot is not None and (not marker.exists() or marker.read_text() != boot):
            shutil.rmtree(directory)
        directory.mkdir(exist_ok=True)
        if boot is not None:
            marker.write_text(boot)
        if problem := _damage(directory, check):
            logger.warning("%s: %s; it is rebuilt from snapshot and log", directory, problem)
            shutil.rmtree(directory)
            directory.mkdir()
            if boot is not None:
                marker.write_text(boot)
        unsynced = boot is not None  # without a boot id a power cut can't be told from a restart, so sync
        return lmdb.open(
            str(directory),
            map_size=map_bytes,
            max_dbs=3,
            max_readers=512,
            sync=not unsynced,
            metasync=not unsynced,
            readahead=False,
        )


def _damage(directory: Path, check: bool) -> str:
    """Say what is wrong with a view, nothing if nothing is; the deep check is another process, as it may crash."""
    if (directory / "damaged").exists():
        return "found damaged while it was used"
    data = directory / "data.mdb"
    if not data.exists() or not data.stat().st_size:
        return ""
    if check:
        done = subprocess.run(
            [sys.executable, "-m", "serving.view_check", str(directory)], capture_output=True, text=True
        )
        if done.returncode:
            return (done.stderr.strip().splitlines() or [f"the check ended with {done.returncode}"])[-1]
        return ""
    try:
        with lmdb.open(str(directory), readonly=True, max_dbs=3, lock=False) as env:
            pages, size = env.info()["last_pgno"] + 1, env.stat()["psize"]
    except lmdb.Error as error:
        return str(error)
    return "" if data.stat().st_size >= pages * size else f"{data.stat().st_size} bytes, expected {pages * size}"


def lock_of(directory: Path, purpose: str) -> Path:
    """Return the lock file of a view: beside it, so that the view can be removed under it."""
    return directory.parent / f"{directory.name}.{purpose}.lock"
