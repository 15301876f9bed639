"""Events per second and peak memory of ingest and prepare, on the grocery purchases and on a synthetic log.

    python tests/benchmarks/prepare_throughput.py                      both, 20 million synthetic events
    python tests/benchmarks/prepare_throughput.py --events 2000000     a smaller synthetic log
    python tests/benchmarks/prepare_throughput.py --events 0           the real log only
    python tests/benchmarks/prepare_throughput.py --events 200000000   needs 25 GB of disk
    python tests/benchmarks/prepare_throughput.py --append             one day appended to 90, against all 91 anew

The synthetic log has the shape of the real one where it matters for cost: baskets of nine lines at one stamp, a
hundred events per user (log-normal), items by a power law (one per hundred events, but 200,000 at most: a catalogue
does not grow as its log does), ids as strings. Each step runs in a process of its own; memory is the resident memory
of that process and all its children, summed, sampled every 20 ms, so shared pages count more than once. `private`
leaves out pages of files, which Linux counts as resident while they are mapped and drops when memory is wanted. CPU
seconds stand by wall seconds: on a busy machine only the former can be compared. Both begin when the modules are
loaded: in that process alone, since the processes of `prepare` read this file too and would carry them. `--append`
repeats both steps side by side and gives the ratio of their CPU and wall seconds, the median of the repeats.
"""

import argparse
import json
import os
import resource
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import import_module
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median

import numpy as np
import polars as pl
import psutil

from pipelines.settings import PrepareConfig

LINES_PER_BASKET, EVENTS_PER_USER, EVENTS_PER_ITEM, MOST_ITEMS = 9, 100, 100, 200_000
DAY, YEAR, START = 86_400, 365, 1_483_228_800
CHUNK_BASKETS = 200_000
APPENDED_TO = 90
"""days"""
EVALUATED = 4_000
"""Validation and test requests kept, as the quickstart keeps: memory and time of their candidates grow with them."""


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
    private_gib: float


def write_synthetic(events: int, folder: Path, days: int = YEAR, seed: int = 0) -> None:
    """Write a synthetic log of so many days in chunks of baskets, oldest first, and its catalogue."""
    draw = np.random.default_rng(seed)
    users, items = max(events // EVENTS_PER_USER, 1), min(max(events // EVENTS_PER_ITEM, 1000), MOST_ITEMS)
    activity = np.cumsum(draw.lognormal(0, 1, users))
    popularity = np.cumsum(1 / np.arange(10, items + 10) ** 0.9)
    names = draw.permutation(items)
    made = chunk = 0
    while made < events:
        size = draw.geometric(1 / LINES_PER_BASKET, CHUNK_BASKETS)
        size = size[: int(np.searchsorted(np.cumsum(size), events - made)) + 1]
        basket = np.repeat(np.arange(len(size)), size)[: events - made]
        user = np.searchsorted(activity, draw.random(len(size)) * activity[-1])
        share = (made + np.cumsum(size) - size) / events  # of the time gone
        item = names[np.searchsorted(popularity, draw.random(len(basket)) * popularity[-1])]
        pl.DataFrame(
            {
                "user_id": user[basket],
                "item_id": item,
                "timestamp": ((START + (share * days * DAY).astype(np.int64)) * 1_000_000)[basket],
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
    peak = private = 0
    while not receiver.poll(0.02):
        resident, own = _memory(process.pid)
        peak, private = max(peak, resident), max(private, own)
        if not process.is_alive() and not receiver.poll():
            raise SystemExit(f"{log}, {step}: the process ended with code {process.exitcode}")
    events, seconds, cpu = receiver.recv()
    process.join()
    gib = round(peak / 2**30, 2), round(private / 2**30, 2)
    return Row(log, step, events, round(seconds, 2), round(cpu, 2), round(events / seconds), *gib)


def _timed(sender: Connection, work: Callable[..., int], *arguments: object) -> None:
    for name in ("pipelines.append", "pipelines.ingest"):
        import_module(name)
    start, used = time.perf_counter(), _cpu()
    events = work(*arguments)
    sender.send((events, time.perf_counter() - start, _cpu() - used))


def _cpu() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def _memory(pid: int | None) -> tuple[int, int]:
    """Return the bytes of a process and its children: all that is resident, and that without pages of files."""
    resident = private = 0
    try:
        parent = psutil.Process(pid)
        for process in (parent, *parent.children(recursive=True)):
            memory = process.memory_info()
            resident, private = resident + memory.rss, private + memory.rss - memory.shared
    except psutil.NoSuchProcess:
        pass
    return resident, private


def run_ingest(folder: Path) -> int:
    """Ingest the synthetic log under `folder`, or the real one if there is none."""
    from pipelines.datasets import RawLog, completejourney
    from pipelines.ingest import ingest

    raw = completejourney()
    if (folder / "raw").exists():
        events = pl.scan_parquet(folder / "raw" / "events*.parquet")
        raw = RawLog("synthetic", events, pl.scan_parquet(folder / "raw" / "items.parquet"))
    return ingest(raw, folder / "source").events


def run_ingest_days(folder: Path, first: int, end: int, out: str) -> int:
    """Ingest the days first..end of the synthetic log."""
    from pipelines.datasets import RawLog
    from pipelines.ingest import ingest

    low, high = ((START + day * DAY) * 1_000_000 for day in (first, end))
    events = pl.scan_parquet(folder / "raw" / "events*.parquet")
    events = events.filter((pl.col("timestamp") >= low) & (pl.col("timestamp") < high))
    return ingest(RawLog(out, events, pl.scan_parquet(folder / "raw" / "items.parquet")), folder / out).events


def run_prepare(folder: Path, config: PrepareConfig, sources: tuple[str, ...] = ("source",)) -> int:
    """Prepare what was ingested."""
    from pipelines.prepare import prepare

    done = prepare([folder / source for source in sources], folder / "set", config)
    return int(done.manifest["counts"]["events"])


def run_append(folder: Path) -> int:
    """Append the last day; what it gives must be what preparing all days gave."""
    from pipelines.append import append

    return int(append(folder / "day", folder / "before", folder / "grown").manifest["counts"]["events"])


def measure_append(events: int, folder: Path, workers: int | None, repeats: int) -> tuple[list[Row], dict[str, float]]:
    """Measure 90 days at once; then, `repeats` times, a day appended to them and all 91 at once, and their ratios."""
    from pipelines.prepared import PreparedSet

    config = PrepareConfig(workers=workers, max_eval_requests=EVALUATED)
    (folder / "raw").mkdir()
    write_synthetic(events, folder / "raw", APPENDED_TO + 1)
    rows = [
        measured("90 days", "ingest", run_ingest_days, folder, 0, APPENDED_TO, "days"),
        measured("1 day", "ingest", run_ingest_days, folder, APPENDED_TO, APPENDED_TO + 1, "day"),
    ]
    shutil.rmtree(folder / "raw")
    rows.append(measured("90 days", "prepare", run_prepare, folder, config, ("days",)))
    (folder / "set").rename(folder / "before")
    pairs = []
    for _ in range(repeats):
        pairs.append(
            (
                measured("90 + 1 days", "append", run_append, folder),
                measured("91 days", "prepare", run_prepare, folder, config, ("days", "day")),
            )
        )
        if PreparedSet(folder / "set").digest != PreparedSet(folder / "grown").digest:
            raise SystemExit("the appended set is not the set prepared anew")
    ratios = {
        "cpu": median(one.cpu_seconds / other.cpu_seconds for one, other in pairs),
        "wall": median(one.seconds / other.seconds for one, other in pairs),
    }
    return [*rows, *(row for pair in pairs for row in pair)], ratios


def measure_logs(events: int, parent: Path | None, workers: int | None) -> list[Row]:
    """Measure ingest and prepare of the real log, and of a synthetic one unless `events` is 0."""
    config = PrepareConfig(workers=workers, max_eval_requests=EVALUATED)
    rows = []
    for size in (0, events) if events else (0,):
        log = "synthetic" if size else "completejourney"
        with tempfile.TemporaryDirectory(dir=parent) as name:
            folder = Path(name)
            if size:
                (folder / "raw").mkdir()
                write_synthetic(size, folder / "raw")
            rows.append(measured(log, "ingest", run_ingest, folder))
            shutil.rmtree(folder / "raw", ignore_errors=True)
            rows.append(measured(log, "prepare", run_prepare, folder, config))
    return rows


def main() -> None:
    """Measure, print a table, and write it as JSON."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--events", type=int, default=20_000_000, help="synthetic events; 0 leaves them out")
    options.add_argument("--append", action="store_true", help="measure appending a day instead")
    options.add_argument("--workers", type=int, default=None, help="processes of prepare; one per core if absent")
    options.add_argument("--folder", type=Path, default=None, help="where to write; a temporary folder if absent")
    options.add_argument("--repeats", type=int, default=3, help="of --append")
    options.add_argument("--out", type=Path, default=None, help="JSON file for the rows")
    given = options.parse_args()
    ratios: dict[str, float] = {}
    if given.append:
        with tempfile.TemporaryDirectory(dir=given.folder) as name:
            rows, ratios = measure_append(given.events, Path(name), given.workers, given.repeats)
    else:
        rows = measure_logs(given.events, given.folder, given.workers)
    sizes = f"{'peak GiB':>10}{'private':>9}"
    print(f"{'log':<16}{'step':<9}{'events':>12}{'seconds':>9}{'CPU s':>8}{'events/s':>12}{sizes}")
    for row in rows:
        print(
            f"{row.log:<16}{row.step:<9}{row.events:>12,}{row.seconds:>9.2f}{row.cpu_seconds:>8.2f}"
            f"{row.events_per_second:>12,}{row.peak_gib:>10.2f}{row.private_gib:>9.2f}"
        )
    for name, ratio in ratios.items():
        print(f"appending a day takes {ratio:.1%} of the {name} seconds of preparing all days anew")
    if given.out:
        table = {"cores": os.cpu_count(), "rows": [asdict(row) for row in rows], "append_over_prepare": ratios}
        given.out.write_text(json.dumps(table, indent=2))


if __name__ == "__main__":
    main()
