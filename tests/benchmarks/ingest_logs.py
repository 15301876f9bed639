"""Three quite different logs by TOML alone: what `recsys init` wrote, one edit, then ingest and prepare.

    python tests/benchmarks/ingest_logs.py                         1.47 million events each
    python tests/benchmarks/ingest_logs.py --events 20000000       a larger size; 200000000 needs 60 GB of disk
    python tests/benchmarks/ingest_logs.py --logs order            one of them

    returns     CSV in order of time: text ids with blanks and quotes, 3 % returns (negative pieces), a catalogue
    unsorted    Parquet in no order: whole-number ids and seconds; no text, no catalogue, sessions cut by a gap
    order       tab-separated: only which event of a user came first; no time, no sessions, no catalogue

All are made by a seed, with a hundred events per user and at most 200,000 items by a power law. Every verb is a process
of its own, as a user starts it, so its seconds hold the start. Memory is the resident memory of the whole process tree,
summed, sampled every 20 ms; CPU seconds stand beside wall seconds for machines that have other work.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import polars as pl
import psutil

EVENTS_PER_USER, MOST_ITEMS, LINES_PER_BASKET = 100, 200_000, 9
CHUNK = 2_000_000
START, YEAR = 1_672_531_200, 365 * 86_400
RETURNED = 0.03


@dataclass(frozen=True)
class Log:
    """How one log is made and read.

    Attributes:
        write: writes `events` rows and whatever else there is into a folder; gives the events file.
        items: name of its catalogue, if it has one.
        edit: a line of the mapping `init` writes, and what a user makes of it.
    """

    write: Callable[[int, Path], Path]
    items: str | None = None
    edit: tuple[str, str] | None = None


def draws(events: int, seed: int) -> Iterator[pl.DataFrame]:
    """Yield chunks of so many lines, oldest first: user, item, second, basket; lines of a basket share a second."""
    draw = np.random.default_rng(seed)
    users, items = max(events // EVENTS_PER_USER, 20), min(max(events // EVENTS_PER_USER, 50), MOST_ITEMS)
    popularity = np.cumsum(1 / np.arange(10, items + 10) ** 0.9)
    activity = np.cumsum(draw.lognormal(0, 1, users))
    for begin in range(0, events, CHUNK):
        count = min(CHUNK, events - begin)
        basket = np.cumsum(draw.random(count) < 1 / LINES_PER_BASKET)
        user = np.searchsorted(activity, draw.random(basket[-1] + 1) * activity[-1])[basket]
        second = START + ((begin + np.searchsorted(basket, basket)) / events * YEAR).astype(np.int64)
        item = np.searchsorted(popularity, draw.random(count) * popularity[-1])
        yield pl.DataFrame({"user": user, "item": item, "second": second, "basket": basket + begin})


def write_returns(events: int, folder: Path) -> Path:
    """Text ids, returns, a catalogue with several tags per item."""
    path = folder / "sales.csv"
    draw = np.random.default_rng(1)
    with path.open("wb") as file:
        for number, lines in enumerate(draws(events, 0)):
            pieces = np.where(draw.random(lines.height) < RETURNED, -1, draw.integers(1, 4, lines.height))
            lines.select(
                pl.from_epoch("second").dt.to_string("%Y-%m-%d %H:%M:%S").alias("when"),
                pl.format('Card "{}" é', "user").alias("customer"),
                pl.format("SKU {}/x", "item").alias("article"),
                pl.Series("pieces", pieces),
                pl.format("R-{}", "basket").alias("receipt"),
            ).write_csv(file, include_header=not number)
    names = pl.DataFrame({"item": np.arange(min(max(events // EVENTS_PER_USER, 50), MOST_ITEMS))})
    names.select(
        pl.format("SKU {}/x", "item").alias("article"),
        pl.format("Thing number {}, the {}. of its kind", "item", pl.col("item") % 97).alias("title"),
        pl.format("shelf {}", pl.col("item") % 20).alias("shelf"),
        pl.format("t{}|t{}", pl.col("item") % 7, pl.col("item") % 11).alias("tags"),
    ).write_csv(folder / "articles.csv")
    return path


def write_unsorted(events: int, folder: Path) -> Path:
    """Every file in no order, and the files in none either."""
    (folder / "clicks").mkdir()
    draw = np.random.default_rng(2)
    places = draw.permutation(-(-events // CHUNK))
    for place, lines in zip(places, draws(events, 0), strict=True):
        lines[draw.permutation(lines.height)].select(
            pl.col("user").alias("visitor_id"), pl.col("item").alias("product_id"), pl.col("second").alias("ts")
        ).write_parquet(folder / "clicks" / f"part{place:04}.parquet")
    return folder / "clicks" / "part0000.parquet"


def write_order(events: int, folder: Path) -> Path:
    """Positions of a user's events, which are all there is to tell them apart."""
    path = folder / "plays.tsv"
    played = np.zeros(max(events // EVENTS_PER_USER, 20), np.int64)
    with path.open("wb") as file:
        for number, lines in enumerate(draws(events, 0)):
            user = lines["user"].to_numpy()
            within = lines.select(pl.int_range(pl.len()).over("user"))["literal"].to_numpy()
            lines.select(
                pl.col("user").alias("member"), pl.col("item").alias("track"), pl.Series("pos", played[user] + within)
            ).write_csv(file, separator="\t", include_header=not number)
            played += np.bincount(user, minlength=len(played))
    return path


LOGS = {
    "returns": Log(write_returns, "articles.csv"),
    "unsorted": Log(write_unsorted, edit=('# gap = "30m"', 'gap = "30m"')),
    "order": Log(write_order),
}


def edit_mapping(log: Log, mapping: Path) -> None:
    """Make the one edit a log needs, and let a log of several files be read whole."""
    text = mapping.read_text().replace("part0000.parquet", "*.parquet")
    if log.edit is not None:
        before, after = log.edit
        if before not in text:
            raise SystemExit(f"{mapping}: no line {before!r}; `recsys init` has changed")
        text = text.replace(before, after)
    mapping.write_text(text)


def verbs(log: Log, events: Path, folder: Path) -> dict[str, list[str]]:
    """Return the arguments of each verb, in order; `edit_mapping` comes after the first."""
    mapping, workspace = str(folder / "my.toml"), str(folder / "workspace")
    items = ["--items", str(folder / log.items)] if log.items else []
    return {
        "init": ["init", "--events", str(events), *items, "--out", mapping],
        "ingest": ["ingest", "--config", mapping, "--workspace", workspace, "--json"],
        "prepare": ["prepare", "--workspace", workspace, "--set", "max_eval_requests=4000", "--json"],
    }


@dataclass(frozen=True)
class Row:
    """One verb on one log."""

    log: str
    verb: str
    events: int
    seconds: float
    cpu_seconds: float
    events_per_second: float
    peak_gib: float


def measured(name: str, verb: str, arguments: list[str], events: int) -> Row:
    """Run one verb as its own process and watch it and its children."""
    used, start, peak = _cpu(), time.perf_counter(), 0
    process = psutil.Popen([sys.executable, "-m", "recsys.cli", *arguments], stdout=subprocess.DEVNULL)
    while process.poll() is None:
        peak = max(peak, _resident(process))
        time.sleep(0.02)
    seconds = time.perf_counter() - start
    if process.returncode:
        raise SystemExit(f"{name}: recsys {' '.join(arguments)} ended with code {process.returncode}")
    cpu = _cpu() - used
    return Row(name, verb, events, round(seconds, 2), round(cpu, 1), round(events / seconds), round(peak / 2**30, 2))


def _cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _resident(process: psutil.Process) -> int:
    total = 0
    try:
        for one in (process, *process.children(recursive=True)):
            total += one.memory_info().rss
    except psutil.NoSuchProcess:
        pass
    return total


def measure(name: str, events: int, parent: Path | None) -> list[Row]:
    """Make one log, and take it through the verbs."""
    log = LOGS[name]
    folder = Path(tempfile.mkdtemp(dir=parent, prefix=f"{name}."))
    try:
        steps = verbs(log, log.write(events, folder), folder)
        rows = []
        for verb, arguments in steps.items():
            rows.append(measured(name, verb, arguments, events))
            if verb == "init":
                edit_mapping(log, folder / "my.toml")
        return rows
    finally:
        shutil.rmtree(folder)


def main() -> None:
    """Measure, print a table, and write it as JSON."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--events", type=int, default=1_470_000, help="of each log")
    options.add_argument("--logs", nargs="+", choices=LOGS, default=list(LOGS))
    options.add_argument("--folder", type=Path, default=None, help="where to write; the temporary folder if absent")
    options.add_argument("--out", type=Path, default=None, help="JSON file for the rows")
    given = options.parse_args()
    rows = [row for name in given.logs for row in measure(name, given.events, given.folder)]
    print(f"{'log':<10}{'verb':<9}{'events':>13}{'seconds':>9}{'CPU s':>8}{'events/s':>12}{'peak GiB':>10}")
    for row in rows:
        print(
            f"{row.log:<10}{row.verb:<9}{row.events:>13,}{row.seconds:>9.2f}{row.cpu_seconds:>8.1f}"
            f"{row.events_per_second:>12,}{row.peak_gib:>10.2f}"
        )
    if given.out:
        given.out.write_text(json.dumps({"cores": os.cpu_count(), "rows": [asdict(row) for row in rows]}, indent=2))


if __name__ == "__main__":
    main()
