"""Events per second and peak memory of ingest and prepare, on the grocery purchases and on a synthetic log.

    python tests/benchmarks/prepare_throughput.py                      both, 20 million synthetic events
    python tests/benchmarks/prepare_throughput.py --events 2000000     a smaller synthetic log
    python tests/benchmarks/prepare_throughput.py --events 0           the real log only

The synthetic log has the shape of the real one where it matters for cost: baskets of nine lines at one stamp, a hundred
events per user (log-normal), items by a power law (one per hundred events), ids as strings. Each step runs in a process
of its own; memory is the resident memory of that process and all its children, summed, sampled every 20 ms, so shared
pages count more than once. CPU seconds stand beside wall seconds: on a busy machine only the former can be compared.
"""

import argparse
import json
import os
import resource
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import polars as pl
import psutil

from pipelines.datasets import RawLog, completejourney
from pipelines.ingest import ingest
from pipelines.prepare import PrepareConfig, prepare

LINES_PER_BASKET, EVENTS_PER_USER, EVENTS_PER_ITEM = 9, 100, 100
YEAR, START = 365 * 86_400, 1_483_228_800
CHUNK_BASKETS = 200_000


@dataclass(frozen=True)
class Row:
    """One measured step."""

    log: str
    step: str
    events: int
    seconds: float
    cpu_seconds: float
    events_per_second: float
    peak_gib: float


def write_synthetic(events: int, folder: Path, seed: int = 0) -> None:
    """Write a synthetic log in chunks of baskets, oldest first, and its catalogue."""
    draw = np.random.default_rng(seed)
    users, items = max(events // EVENTS_PER_USER, 1), max(events // EVENTS_PER_ITEM, 1000)
    activity = draw.lognormal(0, 1, users)
    popularity = np.cumsum(1 / np.arange(10, items + 10) ** 0.9)
    names = draw.permutation(items)
    made = chunk = 0
    while made < events:
        size = draw.geometric(1 / LINES_PER_BASKET, CHUNK_BASKETS)
        size = size[: int(np.searchsorted(np.cumsum(size), events - made)) + 1]
        basket = np.repeat(np.arange(len(size)), size)[: events - made]
        user = draw.choice(users, len(size), p=activity / activity.sum())
        share = (made + np.cumsum(size) - size) / events  # of the year gone
        item = names[np.searchsorted(popularity, draw.random(len(basket)) * popularity[-1])]
        pl.DataFrame(
            {
                "user_id": user[basket],
                "item_id": item,
                "timestamp": ((START + (share * YEAR).astype(np.int64)) * 1_000_000)[basket],
                "action": pl.repeat("purchase", len(basket), eager=True),
                "session_id": basket + chunk * CHUNK_BASKETS,
            }
        ).with_columns(pl.col("user_id", "item_id", "session_id").cast(pl.String)).write_parquet(
            folder / f"events{chunk:04}.parquet"
        )
        made, chunk = made + len(basket), chunk + 1
    catalogue = pl.DataFrame({"item_id": np.arange(items), "category": np.arange(items) % 300})
    catalogue.with_columns(pl.all().cast(pl.String)).write_parquet(folder / "items.parquet")


def measured(log: str, step: str, work: Callable[..., int], *arguments: object) -> Row:
    """Run one step in a fresh process and watch it."""
    context = get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_timed, args=(sender, work, *arguments))
    process.start()
    peak = 0
    while not receiver.poll(0.02):
        peak = max(peak, _resident(process.pid))
        if not process.is_alive() and not receiver.poll():
            raise SystemExit(f"{log}, {step}: the process ended with code {process.exitcode}")
    events, seconds, cpu = receiver.recv()
    process.join()
    return Row(log, step, events, round(seconds, 2), round(cpu, 1), round(events / seconds), round(peak / 2**30, 2))


def _timed(sender: Connection, work: Callable[..., int], *arguments: object) -> None:
    start = time.perf_counter()
    events = work(*arguments)
    seconds = time.perf_counter() - start
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    sender.send((events, seconds, sum(usage.ru_utime + usage.ru_stime for usage in used)))


def _resident(pid: int | None) -> int:
    total = 0
    try:
        parent = psutil.Process(pid)
        for process in (parent, *parent.children(recursive=True)):
            total += process.memory_info().rss
    except psutil.NoSuchProcess:
        pass
    return total


def run_ingest(folder: Path) -> int:
    """Ingest the synthetic log under `folder`, or the real one if there is none."""
    raw = completejourney()
    if (folder / "raw").exists():
        events = pl.scan_parquet(folder / "raw" / "events*.parquet")
        raw = RawLog("synthetic", events, pl.scan_parquet(folder / "raw" / "items.parquet"))
    return ingest(raw, folder / "source").events


def run_prepare(folder: Path, config: PrepareConfig) -> int:
    """Prepare what `run_ingest` wrote."""
    return int(prepare(folder / "source", folder / "set", config).manifest["counts"]["events"])


def main() -> None:
    """Measure, print a table, then the same as JSON."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--events", type=int, default=20_000_000, help="synthetic events; 0 leaves them out")
    options.add_argument("--workers", type=int, default=None, help="processes of prepare; one per core if absent")
    options.add_argument("--folder", type=Path, default=None, help="where to write; a temporary folder if absent")
    given = options.parse_args()
    rows = []
    for events in (0, given.events) if given.events else (0,):
        log = "synthetic" if events else "completejourney"
        with tempfile.TemporaryDirectory(dir=given.folder) as name:
            folder = Path(name)
            if events:
                (folder / "raw").mkdir()
                write_synthetic(events, folder / "raw")
            rows.append(measured(log, "ingest", run_ingest, folder))
            rows.append(measured(log, "prepare", run_prepare, folder, PrepareConfig(workers=given.workers)))
    print(f"{'log':<16}{'step':<9}{'events':>12}{'seconds':>9}{'CPU s':>8}{'events/s':>12}{'peak GiB':>10}")
    for row in rows:
        print(
            f"{row.log:<16}{row.step:<9}{row.events:>12,}{row.seconds:>9.2f}{row.cpu_seconds:>8.1f}"
            f"{row.events_per_second:>12,}{row.peak_gib:>10.2f}"
        )
    print(json.dumps({"cores": os.cpu_count(), "rows": [asdict(row) for row in rows]}))


if __name__ == "__main__":
    main()
