"""Users per second of the batch job `recsys recommend`, in one process and on Ray workers.

    python tests/benchmarks/batch_recommend.py --workspace workspace                      1 and 2 workers, 4,000 users
    python tests/benchmarks/batch_recommend.py --workspace workspace --users 20000 --out batch.json

A workspace with a published bundle is needed. Each count of workers runs the verb in a process of its own, once over a
single user and once over all: the difference leaves out the start, Ray's and the loading of the bundle, which is shown
beside it. Users come in turn from the snapshot, again and again until there are enough. The tables of all runs must
have the same bytes.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from itertools import cycle, islice
from pathlib import Path

import polars as pl

from ranking.snapshot import SnapshotReader
from recsys.files import sha256_file


@dataclass(frozen=True)
class Row:
    """One count of workers."""

    workers: int
    users: int
    start_seconds: float
    seconds: float
    users_per_second: float


def write_users(snapshot: Path, count: int, path: Path) -> int:
    """Write the ids of `count` users of a snapshot; gives a moment after all of their events, microseconds UTC."""
    reader = SnapshotReader(snapshot)
    known = reader.users(count)
    pl.DataFrame({"user_id": list(islice(cycle(known), count))}).write_parquet(path)
    histories = [reader.read(user) for user in known]
    return max(int(events.time[-1]) for events in histories if events is not None and len(events)) + 1


def timed(workspace: Path, users: Path, at: int, workers: int, out: Path) -> float:
    """Run the verb; gives its wall seconds. CPU time is not asked for: Ray's workers are no children of the verb."""
    arguments = ["--users", str(users), "--at", str(at), "--workers", str(workers), "--out", str(out)]
    start = time.perf_counter()
    command = [sys.executable, "-m", "recsys.cli", "recommend", "--workspace", str(workspace), *arguments]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def measure(workspace: Path, count: int, every: list[int]) -> list[Row]:
    """Measure each count of workers; all must write the same bytes."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        at = write_users(workspace / "snapshot", count, folder / "users.parquet")
        write_users(workspace / "snapshot", 1, folder / "one.parquet")
        rows, digests = [], set()
        for workers in every:
            start = timed(workspace, folder / "one.parquet", at, workers, folder / "one_out.parquet")
            whole = timed(workspace, folder / "users.parquet", at, workers, folder / "out.parquet")
            if whole <= 1.5 * start:
                raise SystemExit(
                    f"{workers} workers: all users took {whole:.1f} s, a single one {start:.1f} s; expected far more "
                    "for all: take more --users, or a machine without other work"
                )
            rate = (count - 1) / (whole - start)
            rows.append(Row(workers, count, round(start, 2), round(whole, 2), round(rate, 1)))
            digests.add(sha256_file(folder / "out.parquet"))
        if len(digests) > 1:
            raise SystemExit("the counts of workers did not write the same table")
        return rows


def main() -> None:
    """Measure, print a table, and write it as JSON."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--workspace", type=Path, default=Path("workspace"))
    options.add_argument("--users", type=int, default=4000)
    options.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    options.add_argument("--out", type=Path, default=None, help="JSON file for the rows")
    given = options.parse_args()
    rows = measure(given.workspace, given.users, given.workers)
    print(f"{'workers':>7}{'users':>9}{'start s':>9}{'whole s':>9}{'users/s':>9}")
    for row in rows:
        print(
            f"{row.workers:>7}{row.users:>9,}{row.start_seconds:>9.2f}{row.seconds:>9.2f}{row.users_per_second:>9.1f}"
        )
    if given.out:
        given.out.write_text(json.dumps({"cores": os.cpu_count(), "rows": [asdict(row) for row in rows]}, indent=2))


if __name__ == "__main__":
    main()
