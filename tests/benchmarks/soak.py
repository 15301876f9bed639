"""Soak: mixed load on the service while bundles are swapped and replicas killed; at the end everything is killed.

    make soak                    # five minutes and a half
    make soak SECONDS=60         # as in CI (`tests/test_soak.py`), where it takes two minutes

Two replicas under Ray Serve over a small bundle, in a process of their own. Clients retry once, as `serving.client`
does. A bundle is swapped every tenth of the time; a replica dies by SIGKILL at a third and at two thirds of it; at the
end all processes of the service die at once under load, and it starts again. It fails (exit 1) if a request fails, if
an acknowledged event is lost, or, from five minutes on, if the memory of a replica grows by 5 % or more after its
warm-up.
"""

import argparse
import contextlib
import itertools
import json
import multiprocessing
import os
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import psutil
from serving_world import LATER, PATIENT, Place, free_port, publish_world

from recsys.messages import EventIn
from serving.app import Limits
from serving.client import Client
from serving.host import ServeConfig, start

WARM_UP = 0.25
"""Share of the time before memory is looked at."""

CLIENTS = 4
TIMEOUT = 120.0
"""Seconds that a client waits: how fast answers come is measured elsewhere."""

GROWTH = 0.05
GROWTH_SECONDS = 300.0
"""A shorter run says too little of memory to fail for it."""


@dataclass
class Report:
    """What happened."""

    seconds: float = 0.0
    requests: dict[str, int] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)
    swaps: int = 0
    kills: int = 0
    killed_at_once: int = 0
    acknowledged: int = 0
    lost: int = 0
    lost_after_sigkill: int = 0
    memory_growth: float = 0.0

    def sound(self) -> bool:
        grown = self.seconds >= GROWTH_SECONDS and self.memory_growth >= GROWTH
        return not self.errors and self.lost == self.lost_after_sigkill == 0 and not grown


def _serve(config: ServeConfig, pipe: Connection) -> None:
    """Serve until told to end; every bundle that is sent is swapped in, and its version sent back."""
    with start(config) as running:
        pipe.send(running.address)
        for bundle in iter(pipe.recv, None):
            pipe.send(running.swap(bundle))


class Host:
    """The service in processes of its own, which can be killed together.

    Attributes:
        address: URL of the endpoint.
    """

    def __init__(self, config: ServeConfig) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(config, theirs))
        self._process.start()
        theirs.close()  # so that a service that ends is an EOFError here
        self.address: str = self._pipe.recv()

    def swap(self, bundle: Path) -> str:
        """Serve another bundle; gives its version once every replica serves it."""
        self._pipe.send(bundle)
        version: str = self._pipe.recv()
        return version

    def stop(self) -> None:
        """End the service in order."""
        self._pipe.send(None)
        self._process.join()

    def replicas(self) -> list[psutil.Process]:
        """Return the processes that answer."""
        return [process for process in self._family() if "ServeReplica:recsys" in " ".join(_command(process))]

    def kill(self) -> int:
        """Kill all processes of the service, as a power switch would; gives how many there were."""
        family: list[psutil.Process] = []
        while (found := self._family()) != family:  # one that is stopped starts no other
            for process in found:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.suspend()
            family = found
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self._process.join()
        psutil.wait_procs(family, TIMEOUT)
        return len(family)

    def _family(self) -> list[psutil.Process]:
        assert self._process.pid is not None, "it was started"
        process = psutil.Process(self._process.pid)
        return [process, *process.children(recursive=True)]


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


class Load:
    """Clients that recommend, rank, look up and post, and remember what was acknowledged.

    Attributes:
        cut: whether the service is being killed: what fails from then on is no error.
    """

    def __init__(self, address: str, report: Report) -> None:
        self.address, self.report = address, report
        self.cut, self.counts = False, Counter[str]()
        self.acknowledged: list[list[EventIn]] = [[] for _ in range(CLIENTS)]
        self.threads = [threading.Thread(target=self.run, args=(number,), daemon=True) for number in range(CLIENTS)]

    def run(self, number: int) -> None:
        draw = random.Random(number)
        with Client(self.address, timeout=TIMEOUT) as client:
            for turn in itertools.count():
                kind = draw.choice(["recommend", "recommend", "rank", "events", "events", "history"])
                try:
                    self.ask(client, number, turn, kind, draw)
                    self.counts[kind] += 1
                except Exception as error:
                    if self.cut:
                        return
                    self.report.errors.append(f"{kind}: {type(error).__name__}: {error}"[:300])

    def ask(self, client: Client, number: int, turn: int, kind: str, draw: random.Random) -> None:
        user = f"user-{draw.randrange(20)}"
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

    def lost(self, client: Client) -> int:
        """Return how many acknowledged events the service does not know: one it knows is a duplicate."""
        missing = 0
        events = [event for own in self.acknowledged for event in list(own)]
        for first in range(0, len(events), 500):
            verdicts = client.events(*events[first : first + 500]).verdicts
            missing += sum(verdict.verdict != "duplicate" for verdict in verdicts)
        return missing


@contextlib.contextmanager
def _hosted(place: Place, state: Path, port: int, replicas: int) -> Iterator[Host]:
    config = ServeConfig(
        place.bundle, place.snapshot, state, port=port, replicas=replicas, limits=Limits(deadlines=PATIENT)
    )
    host = Host(config)
    try:
        yield host
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            host.kill()


def soak(place: Place, state: Path, seconds: float) -> Report:
    """Return what happened in so many seconds, and then when everything was killed and started again."""
    report, port = Report(), free_port()
    with _hosted(place, state, port, replicas=2) as host:
        load = Load(host.address, report)
        for thread in load.threads:
            thread.start()
        began = time.monotonic()
        _disturb(host, place, report, seconds)
        report.seconds = time.monotonic() - began
        with Client(host.address, timeout=TIMEOUT) as client:
            report.lost = load.lost(client)
        load.cut = True
        report.killed_at_once = host.kill()
        for thread in load.threads:
            thread.join()
    report.requests = dict(load.counts)
    report.acknowledged = sum(map(len, load.acknowledged))
    with _hosted(place, state, port, replicas=1) as host:  # the port is free only if nothing outlived the kill
        with Client(host.address, timeout=TIMEOUT) as client:
            report.lost_after_sigkill = load.lost(client)
        host.stop()
    return report


def _disturb(host: Host, place: Place, report: Report, seconds: float) -> None:
    """Swap, kill replicas and watch memory for so long, and until both kills are done."""
    began, kills = time.monotonic(), [seconds / 3, seconds * 2 / 3]
    bundles = itertools.cycle([place.smaller, place.bundle])
    first: dict[int, int] = {}
    last: dict[int, int] = {}
    born: dict[int, float] = {}
    while (now := time.monotonic() - began) < seconds or kills:
        host.swap(next(bundles))  # returns once every replica answers, so that one may die again
        report.swaps += 1
        replicas = host.replicas()
        if kills and now >= kills[0] and len(replicas) == 2:
            kills.pop(0)
            replicas.pop(0).kill()  # what is left of a killed process has no memory
            report.kills += 1
        for process in replicas:
            with contextlib.suppress(psutil.Error):
                resident = process.memory_info().rss
                if resident and now - born.setdefault(process.pid, now) >= seconds * WARM_UP:
                    first.setdefault(process.pid, resident)
                    last[process.pid] = resident
        time.sleep(seconds / 10)
    report.memory_growth = max((last[pid] / first[pid] - 1 for pid in first), default=0.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=GROWTH_SECONDS)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory() as directory:
        report = soak(publish_world(Path(directory) / "world"), Path(directory) / "state", arguments.seconds)
    for name, value in asdict(report).items():
        print(f"{name:<20} {value if name != 'errors' else f'{len(value)} {value[:3]}'}")
    if arguments.out:
        arguments.out.write_text(json.dumps(asdict(report), indent=2) + "\n")
    sys.exit(0 if report.sound() else 1)


if __name__ == "__main__":
    main()
