"""Soak: mixed load on the service while bundles are swapped, replicas killed, and at the end everything is killed.

    make soak                    # five minutes
    make soak SECONDS=60         # as in CI

Two replicas under Ray Serve over a small bundle. Clients retry once, as `serving.client` does. It fails (exit 1) if a
request fails, if an acknowledged event is lost, or if the memory of a replica grows by 5 % or more after its warm-up.
"""

import argparse
import itertools
import json
import os
import random
import signal
import socket
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import psutil
from serving_world import LATER, Place, free_port, publish_world

from recsys.messages import EventIn
from serving.client import Client
from serving.host import Running, ServeConfig, start

WARM_UP = 0.25
"""Share of the time before memory is looked at."""

CLIENTS = 4
GROWTH = 0.05


@dataclass
class Report:
    """What happened."""

    seconds: float = 0.0
    requests: dict[str, int] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)
    swaps: int = 0
    kills: int = 0
    acknowledged: int = 0
    lost: int = 0
    lost_after_sigkill: int = 0
    memory_growth: float = 0.0

    def sound(self) -> bool:
        return not self.errors and self.lost == self.lost_after_sigkill == 0 and self.memory_growth < GROWTH


class Load:
    """Clients that recommend, rank, look up and post, and remember what was acknowledged."""

    def __init__(self, address: str, report: Report) -> None:
        self.address, self.report = address, report
        self.ended, self.counts = threading.Event(), Counter[str]()
        self.acknowledged: list[list[EventIn]] = [[] for _ in range(CLIENTS)]
        self.threads = [threading.Thread(target=self.run, args=(number,), daemon=True) for number in range(CLIENTS)]

    def run(self, number: int) -> None:
        draw = random.Random(number)
        with Client(self.address, timeout=30) as client:
            for turn in itertools.count():
                if self.ended.is_set():
                    return
                user = f"user-{draw.randrange(20)}"
                kind = draw.choice(["recommend", "recommend", "rank", "events", "events", "history"])
                try:
                    if kind == "recommend":
                        client.recommend(user, k=10, at=LATER)
                    elif kind == "rank":
                        client.rank(user, [f"item-{draw.randrange(60)}" for _ in range(20)], at=LATER)
                    elif kind == "history":
                        client.history(user)
                    else:
                        own = f"soak-{number}-{turn % 50}"
                        event = EventIn(user_id=own, item_id=f"item-{turn % 60}", event_id=f"{number} {turn}")
                        client.events(event)
                        self.acknowledged[number].append(event)
                    self.counts[kind] += 1
                except Exception as error:
                    self.report.errors.append(f"{kind}: {type(error).__name__}: {error}"[:300])

    def lost(self, client: Client) -> int:
        """Give how many acknowledged events the service does not know: one it knows is a duplicate."""
        missing = 0
        events = [event for own in self.acknowledged for event in own]
        for first in range(0, len(events), 500):
            verdicts = client.events(*events[first : first + 500]).verdicts
            missing += sum(verdict.verdict != "duplicate" for verdict in verdicts)
        return missing


def replicas() -> list[psutil.Process]:
    """Give the processes of this service's replicas."""
    mine = psutil.Process().children(recursive=True)
    return [process for process in mine if "ServeReplica:recsys" in " ".join(_command(process))]


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def soak(place: Place, state: Path, seconds: float) -> Report:
    report = Report()
    config = ServeConfig(place.bundle, place.snapshot, state, port=free_port(), replicas=2)
    with start(config) as running:
        load = Load(running.address, report)
        for thread in load.threads:
            thread.start()
        began = time.monotonic()
        _disturb(running, place, report, seconds)
        load.ended.set()
        for thread in load.threads:
            thread.join()
        report.seconds = time.monotonic() - began
        report.requests = dict(load.counts)
        report.acknowledged = sum(map(len, load.acknowledged))
        with Client(running.address, timeout=60) as client:
            report.lost = load.lost(client)
        for process in psutil.Process().children(recursive=True):  # as a power switch would
            if "ServeReplica" in " ".join(_command(process)):
                process.send_signal(signal.SIGKILL)
    again = ServeConfig(place.bundle, place.snapshot, state, port=free_port(), replicas=1)
    with start(again) as running, Client(running.address, timeout=60) as client:
        report.lost_after_sigkill = load.lost(client)
    return report


def _disturb(running: Running, place: Place, report: Report, seconds: float) -> None:
    """Swap a bundle every tenth of the time, kill a replica at a third and at two thirds of it, watch memory."""
    began, kills = time.monotonic(), [seconds / 3, seconds * 2 / 3]
    bundles = itertools.cycle([place.smaller, place.bundle])
    first: dict[int, int] = {}
    last: dict[int, int] = {}
    ages: dict[int, float] = {}
    while (now := time.monotonic() - began) < seconds:
        running.swap(next(bundles))
        report.swaps += 1
        found = replicas()
        if kills and now >= kills[0] and len(found) == 2:
            kills.pop(0)
            found[0].send_signal(signal.SIGKILL)
            report.kills += 1
            _await_two()
        for process in found:
            try:
                resident = process.memory_info().rss
            except psutil.Error:
                continue
            born = ages.setdefault(process.pid, now)
            if now - born >= seconds * WARM_UP:
                first.setdefault(process.pid, resident)
                last[process.pid] = resident
        time.sleep(max(seconds / 10 - 2, 1))
    report.memory_growth = max((last[pid] / first[pid] - 1 for pid in first), default=0.0)


def _await_two() -> None:
    """Wait until Serve has replaced a replica: until then it takes no new plan."""
    from ray import serve

    deadline = time.monotonic() + 60
    time.sleep(1)  # until the death is noticed
    while time.monotonic() < deadline:
        application = serve.status().applications["recsys"]
        if application.status == "RUNNING" and len(replicas()) == 2:
            return
        time.sleep(0.5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    socket.setdefaulttimeout(60)
    with tempfile.TemporaryDirectory() as directory:
        report = soak(publish_world(Path(directory) / "world"), Path(directory) / "state", arguments.seconds)
    for name, value in asdict(report).items():
        print(f"{name:<20} {value if name != 'errors' else f'{len(value)} {value[:3]}'}")
    if arguments.out:
        arguments.out.write_text(json.dumps(asdict(report), indent=2) + "\n")
    sys.exit(0 if report.sound() else 1)


if __name__ == "__main__":
    main()
