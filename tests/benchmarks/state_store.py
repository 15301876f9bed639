"""What live histories cost: reading a long one, writing durably, and the time from a post to its effect elsewhere.

    OMP_NUM_THREADS=1 python tests/benchmarks/state_store.py --out state_store.json     # about 3 minutes

LMDB and Redis stand side by side over event logs of their own on one disk, in one run, asked in turns. A history is
read whole, as a request does. `posted` came through the log after the snapshot was published, `snapshot` is in it. A
write is what a post waits for: the log's append, durable as it says, then the view brought up to it. The effect is
timed from before the append until another process, which reads the user all the time, sees the event. Redis runs
without a disk of its own: the log is the truth. A raw write and fdatasync of the same bytes says what the disk allows.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from itertools import count
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, get_args

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
from redis_server import redis_server

from ranking.snapshot import SnapshotReader, write_snapshot
from recsys.history import Events, Histories
from recsys.stores import Encoder, Event
from serving.event_log import Durability, SegmentLog
from serving.history_store import LmdbHistoryStore
from serving.redis_store import RedisHistoryStore
from serving.view import LiveHistories

USERS = 20
READ_GOAL_MS = 0.2
PER_POST = (1, 100)
ENCODER = Encoder(lambda item: int(item), len)


@dataclass(frozen=True)
class Place:
    """Where a store is: what a process needs to open it."""

    kind: str
    view: Path
    snapshot: Path
    url: str

    def open(self) -> LiveHistories:
        base = SnapshotReader(self.snapshot)
        return RedisHistoryStore(self.url, base) if self.kind == "redis" else LmdbHistoryStore(self.view, base)


@dataclass(frozen=True)
class Row:
    """One measurement; times in milliseconds, `per_second` of events."""

    what: str
    store: str
    p50_ms: float
    p99_ms: float
    per_second: float | None = None


def row(what: str, store: str, seconds: list[float], events: int | None = None) -> Row:
    p50, p99 = (float(1e3 * np.percentile(seconds, q)) for q in (50, 99))
    return Row(what, store, p50, p99, None if events is None else events * len(seconds) / sum(seconds))


def publish(directory: Path, length: int) -> Path:
    """Write a snapshot whose users have `length` events each."""
    rng = np.random.default_rng(0)
    total = USERS * length
    events = Events(
        rng.integers(0, 100_000, total, dtype=np.uint32),
        np.zeros(total, np.uint8),
        np.tile(np.arange(length, dtype=np.int64), USERS),
    )
    histories = Histories(events, np.arange(USERS + 1, dtype=np.int64) * length)
    write_snapshot(directory, [f"snapshot-{user}" for user in range(USERS)], histories, "benchmark")
    return directory


def post(user: str, start: int, size: int) -> list[Event]:
    return [Event("", user, str(number % 100_000), number) for number in range(start, start + size)]


def fill(log: SegmentLog, store: LiveHistories, length: int) -> None:
    """Give posted users `length` events each, and every user of the snapshot one posted event."""
    for user in range(USERS):
        for start in range(0, length, 1_000):
            log.append(post(f"posted-{user}", start, min(1_000, length - start)))
        log.append(post(f"snapshot-{user}", length, 1))
    store.follow(log, ENCODER)


def in_turns(works: dict[str, Callable[[int], Any]], times: int) -> dict[str, list[float]]:
    """Time each work `times` times, one after the other in turns, so that all meet the same machine."""
    found: dict[str, list[float]] = {name: [] for name in works}
    for number in range(times):
        for name, work in works.items():
            started = time.perf_counter()
            work(number)
            found[name].append(time.perf_counter() - started)
    return found


def reads(stores: dict[str, LiveHistories], length: int, times: int) -> Iterator[Row]:
    for origin in ("posted", "snapshot"):

        def read(store: LiveHistories, number: int, origin: str = origin) -> None:
            found = store.read(f"{origin}-{number % USERS}")
            assert found is not None
            assert len(found) == length + (origin == "snapshot")

        works = {kind: lambda number, store=store: read(store, number) for kind, store in stores.items()}
        in_turns(works, USERS)
        for kind, seconds in in_turns(works, times).items():
            yield row(f"read {length:,} events, {origin}", kind, seconds)


def raw_writes(path: Path, data: bytes) -> Callable[[int], None]:
    """Return what writes bytes and waits for the disk, and no more."""
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)

    def write(_: int) -> None:
        os.write(file, data)
        os.fdatasync(file)

    return write


def poster(log: SegmentLog, store: LiveHistories | None, size: int) -> Callable[[int], None]:
    """Return what does a post: append, and bring the view up to it if there is one."""

    def write(number: int) -> None:
        log.append(post(f"writer-{number % 1_000}", number * size, size))
        if store is not None:
            store.follow(log, ENCODER)

    return write


def writes(folder: Path, places: dict[str, Place], times: int) -> Iterator[Row]:
    """Time posts of new users' events, by durability and size of a post."""
    for durability in get_args(Durability):
        for size in PER_POST:
            works: dict[str, Callable[[int], Any]] = {}
            with ExitStack() as stack:
                for kind in ("log alone", *places):
                    log = SegmentLog(folder / f"{durability}-{size}-{kind}", durability)
                    stack.callback(log.close)
                    store = None
                    if kind in places:
                        place = places[kind]
                        store = replace(place, view=folder / f"view-{durability}-{size}").open()
                        stack.callback(store.close)
                        store.follow(log, ENCODER)

                    works[kind] = poster(log, store, size)
                if durability == "fsync":
                    works["disk alone"] = raw_writes(folder / f"raw-{size}", b"x" * 120 * size)
                in_turns(works, 5)
                for kind, seconds in in_turns(works, times).items():
                    yield row(f"post of {size}, {durability}", kind, seconds, size)


def watch(place: Place, user: str, pipe: Connection) -> None:
    """In another process: tell when each new event of a user is seen; ends when told to."""
    store = place.open()
    last = store.read(user).time[-1]
    pipe.send(time.monotonic_ns())
    while not pipe.poll():
        newest = store.read(user).time[-1]
        if newest != last:
            pipe.send(time.monotonic_ns())
            last = newest
    store.close()


def effects(
    places: dict[str, Place], logs: dict[str, SegmentLog], stores: dict[str, LiveHistories], length: int, times: int
) -> Iterator[Row]:
    """Time from before an append until a reader of another process sees the event in a long history."""
    context = multiprocessing.get_context("spawn")
    for kind, place in places.items():
        here, there = context.Pipe()
        reader = context.Process(target=watch, args=(place, "posted-0", there))
        reader.start()
        here.recv()
        seconds: list[float] = []
        for number, pause in zip(count(length), np.random.default_rng(1).uniform(0, 0.002, times), strict=False):
            time.sleep(pause)
            started = time.monotonic_ns()
            logs[kind].append(post("posted-0", number, 1))
            stores[kind].follow(logs[kind], ENCODER)
            seconds.append((here.recv() - started) / 1e9)
        here.send(None)
        reader.join()
        yield row(f"event to effect, {logs[kind].durability}", kind, seconds)


def table(rows: list[Row]) -> Iterator[str]:
    yield "| what | store | p50 ms | p99 ms | events/s |"
    yield "|---|---|---:|---:|---:|"
    for one in rows:
        rate = "" if one.per_second is None else f"{one.per_second:,.0f}"
        yield f"| {one.what} | {one.store} | {one.p50_ms:.3f} | {one.p99_ms:.3f} | {rate} |"


def measure(folder: Path, length: int, times: int) -> list[Row]:
    snapshot = publish(folder / "snapshot", length)
    with ExitStack() as stack:
        places = {"lmdb": Place("lmdb", folder / "view", snapshot, "")}
        if shutil.which("redis-server"):
            url = stack.enter_context(redis_server(folder)).url
            places["redis"] = Place("redis", folder, snapshot, url)
        else:
            print("no redis-server on this machine: LMDB alone", file=sys.stderr)
        logs = {kind: SegmentLog(folder / f"log-{kind}") for kind in places}
        stores = {kind: place.open() for kind, place in places.items()}
        for kind, store in stores.items():
            stack.callback(logs[kind].close)
            stack.callback(store.close)
            fill(logs[kind], store, length)
        rows = list(reads(stores, length, times))
        rows += effects(places, logs, stores, length, times)
        return rows + list(writes(folder, places, times))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--history", type=int, default=10_000, help="events of a user whose history is read")
    parser.add_argument("--times", type=int, default=1_000, help="repeats of every measurement")
    parser.add_argument("--folder", type=Path, help="on the disk to measure; the temporary folder if absent")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        rows = measure(Path(folder), options.history, options.times)
    print("\n".join(table(rows)))
    reached = {r.store: bool(r.p50_ms < READ_GOAL_MS) for r in rows if r.what.endswith("posted")}
    print(f"\np50 of a posted history under {READ_GOAL_MS} ms: {reached}")
    if options.out:
        about = {"history": options.history, "times": options.times, "goal_ms": READ_GOAL_MS, "reached": reached}
        options.out.write_text(json.dumps({**about, "rows": [asdict(one) for one in rows]}, indent=2) + "\n")


if __name__ == "__main__":
    main()
