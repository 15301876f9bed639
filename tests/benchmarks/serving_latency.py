"""Latency of `/v1/recommend` and `/v1/rank` (200 candidates) under Ray Serve, beside a bare uvicorn process.

    python tests/benchmarks/serving_latency.py --bundle BUNDLE --snapshot SNAPSHOT --out latency.json
    python tests/benchmarks/serving_latency.py --ranker sdim --clients 1 8 32 --swaps --requests 500  # 5 min, 6 GiB

The second form makes a world of 1 M items x 64, 1,000-event histories, and answers from 200 candidates; `--ranker` may
be repeated, and `--swaps` measures Ray Serve once more while a bundle is swapped again and again. `--hosts bare serve
split` adds the split topology, whose models run in deployments of their own.

All hosts run the same application over the same bundle, one after the other, each in processes of its own. Clients
are threads of this process with one connection each, so client and server share the machine's cores.
"""

import argparse
import dataclasses
import http.client
import itertools
import json
import multiprocessing
import os
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent))

from big_world import write_big_world
from serving_world import free_port

from ranking.recommender_config import DEFAULTS, RecommenderConfig
from serving.host import Running, ServeConfig, run_bare, start

WARM_UP = 50
CANDIDATES = 200
USERS = 200
QUOTAS = RecommenderConfig(retrieval=100, repeats=75, transitions=0, popularity=25)


@dataclasses.dataclass(frozen=True)
class Row:
    """Latency of one route under one host."""

    host: str
    ranker: str  # of a large world, else empty
    route: str
    clients: int
    requests: int
    per_second: float
    p50_ms: float
    p99_ms: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path)
    parser.add_argument("--snapshot", type=Path)
    parser.add_argument("--ranker", action="append", default=[], help="make a large world for it")
    parser.add_argument("--items", type=int, default=1_000_000, help="of a large world")
    parser.add_argument("--length", type=int, default=1_000, help="events of a history of a large world")
    parser.add_argument("--swaps", action="store_true", help="measure Ray Serve during swaps too (large worlds)")
    parser.add_argument("--requests", type=int, default=1000, help="per measurement")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--hosts", nargs="+", choices=["bare", "serve", "split"], default=["bare", "serve"])
    parser.add_argument("--out", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    os.environ["THP_MEM_ALLOC_ENABLE"] = "1"  # for both hosts
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as directory:
        worlds = {"": (arguments.bundle, arguments.snapshot, None)} if arguments.bundle else {}
        for ranker in arguments.ranker:
            big = write_big_world(Path(directory) / ranker, ranker, arguments.items, USERS, arguments.length)
            worlds[ranker] = (big.bundle, big.snapshot, big.twin)
        for ranker, (bundle, snapshot, twin) in worlds.items():
            bodies = _bodies(bundle, snapshot)
            for name in arguments.hosts:
                state = Path(directory) / f"state-{ranker}-{name}"
                quotas = QUOTAS if twin else DEFAULTS
                config = ServeConfig(bundle, snapshot, state, port=free_port(), recommender=quotas)
                with {"bare": _bare, "serve": _serve, "split": _split}[name](config) as running:
                    asked = (ranker, config.port, bodies, arguments.clients, arguments.requests)
                    rows += _measured(name, *asked)
                    if arguments.swaps and running is not None and twin is not None:
                        with _swapping(running, [twin, bundle]):
                            rows += _measured(f"{name}+swaps", *asked)
    _compare(rows)
    if arguments.out:
        arguments.out.write_text(json.dumps([dataclasses.asdict(row) for row in rows], indent=2) + "\n")


def _measured(
    host: str, ranker: str, port: int, bodies: dict[str, list[str]], clients: list[int], requests: int
) -> list[Row]:
    """Measure every route with every number of clients, each after a warm-up."""
    rows = []
    _measure(port, "/v1/rank", bodies["/v1/rank"], 1, WARM_UP)
    for number, (route, texts) in itertools.product(clients, bodies.items()):
        _measure(port, route, texts, number, WARM_UP)
        seconds, times = _measure(port, route, texts, number, requests)
        count = len(times)
        rows.append(
            Row(host, ranker, route, number, count, count / seconds, times[count // 2], times[int(count * 0.99)])
        )
        print(_line(rows[-1]), flush=True)
    return rows


@contextmanager
def _swapping(running: Running, bundles: list[Path]) -> Iterator[None]:
    """Swap bundles one after the other as long as the context is open."""
    ended = threading.Event()

    def swap() -> None:
        for bundle in itertools.cycle(bundles):
            if ended.is_set():
                return
            running.swap(bundle)

    thread = threading.Thread(target=swap)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _bodies(bundle: Path, snapshot: Path) -> dict[str, list[str]]:
    """Return request bodies over the snapshot's users and, for `rank`, items spread over the catalogue."""
    from ranking.bundle import Bundle
    from ranking.snapshot import SnapshotReader

    users = SnapshotReader(snapshot).users(500)
    items = Bundle.load(bundle, golden=False).item_ids[2:]
    step = max(len(items) // CANDIDATES, 1)
    chosen = [items[(number * step) % len(items)] for number in range(CANDIDATES)]
    return {
        "/v1/recommend": [json.dumps({"user_id": user, "k": 10}) for user in users],
        "/v1/rank": [json.dumps({"user_id": user, "item_ids": chosen}) for user in users],
    }


def _measure(port: int, route: str, bodies: list[str], clients: int, requests: int) -> tuple[float, list[float]]:
    """Return seconds of the whole and milliseconds of each request, ascending."""
    times: list[list[float]] = [[] for _ in range(clients)]

    def client(number: int) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        connection.connect()
        connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for index in range(number, requests, clients):
            began = time.perf_counter()
            connection.request("POST", route, bodies[index % len(bodies)], {"Content-Type": "application/json"})
            response = connection.getresponse()
            body = response.read()
            times[number].append((time.perf_counter() - began) * 1e3)
            if response.status != 200:
                raise RuntimeError(f"{route}: {response.status} {body[:200]!r}")
        connection.close()

    threads = [threading.Thread(target=client, args=(number,)) for number in range(clients)]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - began
    found = sorted(itertools.chain.from_iterable(times))
    if len(found) != requests:
        raise RuntimeError(f"{route}: {len(found)} of {requests} requests were answered")
    return seconds, found


@contextmanager
def _serve(config: ServeConfig) -> Iterator[Running | None]:
    with start(config) as running:
        yield running


@contextmanager
def _split(config: ServeConfig) -> Iterator[Running | None]:
    with start(dataclasses.replace(config, topology="split")) as running:
        yield running


@contextmanager
def _bare(config: ServeConfig) -> Iterator[Running | None]:
    process = multiprocessing.get_context("spawn").Process(target=run_bare, args=(config,), daemon=True)
    process.start()
    try:
        _await(config.port, process.is_alive)
        yield None
    finally:
        process.terminate()
        process.join(10)


def _await(port: int, alive: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 300  # a large world takes its time
    while time.monotonic() < deadline and alive():
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise RuntimeError("the bare server did not come up")


def _line(row: Row) -> str:
    return (
        f"{row.host:<11} {row.ranker:<6} {row.route:<14} {row.clients:>3} clients  {row.per_second:7.0f} requests/s  "
        f"p50 {row.p50_ms:7.2f} ms  p99 {row.p99_ms:7.2f} ms"
    )


def _compare(rows: list[Row]) -> None:
    """Print how many times the bare process's latency Ray Serve takes."""
    found: dict[tuple[str, str, int], dict[str, Row]] = {}
    for row in rows:
        found.setdefault((row.ranker, row.route, row.clients), {})[row.host] = row
    for (ranker, route, clients), by_host in found.items():
        for host, row in by_host.items():
            if "bare" in by_host and host != "bare":
                bare = by_host["bare"]
                print(
                    f"{host} / bare  {ranker:<6} {route:<14} {clients:>3} clients  "
                    f"p50 x {row.p50_ms / bare.p50_ms:.2f} "
                    f"({row.p50_ms - bare.p50_ms:+.2f} ms)  p99 x {row.p99_ms / bare.p99_ms:.2f}  "
                    f"throughput x {row.per_second / bare.per_second:.2f}"
                )


if __name__ == "__main__":
    main()
