"""Users per second of the batch job `recsys recommend`, in one process and on Ray workers.

    python tests/benchmarks/batch_recommend.py --workspace workspace                      1 and 2 workers, 4,000 users
    python tests/benchmarks/batch_recommend.py --workspace workspace --users 20000 --out batch.json

A workspace with a published bundle is needed. Each count of workers runs the verb in a process of its own, once over a
single user and once over all: the difference leaves out the start, Ray's and the loading of the bundle, which is shown
beside it. Users come in turn from the snapshot, again and again until there are enough. The tables of all runs must
have the same bytes. Before that, some users are answered in this process one by one, as the service does, and sixteen
at a time, as the job does, in turns: CPU milliseconds per user of both, on one thread.
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
from statistics import median

import polars as pl
import torch

from ranking.bundle import Bundle
from ranking.recommender import Recommender
from ranking.snapshot import SnapshotReader
from recsys.files import sha256_file
from recsys.messages import RecommendRequest


@dataclass(frozen=True)
class Row:
    """One count of workers."""

    workers: int
    users: int
    start_seconds: float
    seconds: float
    users_per_second: float


@dataclass(frozen=True)
class Ways:
    """CPU milliseconds per user, the median of the turns."""

    one_by_one: float
    many: float


def compare_ways(workspace: Path, count: int, turns: int = 3) -> Ways:
    """Answer users both ways, in turns."""
    torch.set_num_threads(1)
    reader = SnapshotReader(workspace / "snapshot")
    users = reader.users(count)
    at = newest(reader, users)
    recommender = Recommender(Bundle.load(workspace / "bundle"), reader)
    requests = [RecommendRequest(user_id=user, k=10, at=at) for user in users]
    spent: dict[str, list[float]] = {"one": [], "many": []}
    for _ in range(turns + 1):
        for way, work in (
            ("one", lambda: [recommender.trace(request, at) for request in requests]),
            ("many", lambda: recommender.trace_many(requests, at)),
        ):
            start = time.process_time()
            work()
            spent[way].append((time.process_time() - start) / len(users) * 1e3)
    return Ways(*(round(median(spent[way][1:]), 2) for way in ("one", "many")))  # the first turn warms up


def newest(reader: SnapshotReader, users: list[str]) -> int:
    """Return a moment after all of their events, microseconds UTC."""
    histories = [reader.read(user) for user in users]
    return max(int(events.time[-1]) for events in histories if events is not None and len(events)) + 1


def write_users(snapshot: Path, count: int, path: Path) -> int:
    """Write the ids of `count` users of a snapshot; gives a moment after all of their events, microseconds UTC."""
    reader = SnapshotReader(snapshot)
    known = reader.users(count)
    pl.DataFrame({"user_id": list(islice(cycle(known), count))}).write_parquet(path)
    return newest(reader, known)


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
    options.add_argument("--workers", type=int, nargs="*", default=[1, 2], help="none: leave the verb out")
    options.add_argument("--out", type=Path, default=None, help="JSON file for the rows")
    given = options.parse_args()
    ways = compare_ways(given.workspace, min(given.users, 250))
    print(
        f"CPU ms per user: {ways.one_by_one} one by one, {ways.many} sixteen at a time, "
        f"{ways.one_by_one / ways.many:.2f} times"
    )
    rows = measure(given.workspace, given.users, given.workers) if given.workers else []
    print(f"{'workers':>7}{'users':>9}{'start s':>9}{'whole s':>9}{'users/s':>9}")
    for row in rows:
        print(
            f"{row.workers:>7}{row.users:>9,}{row.start_seconds:>9.2f}{row.seconds:>9.2f}{row.users_per_second:>9.1f}"
        )
    if given.out:
        given.out.write_text(
            json.dumps(
                {"cores": os.cpu_count(), "cpu_ms_per_user": asdict(ways), "rows": [asdict(row) for row in rows]},
                indent=2,
            )
        )


if __name__ == "__main__":
    main()
