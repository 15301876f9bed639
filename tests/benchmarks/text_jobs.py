"""Cells side by side: each worker is a process of its own that takes one cell after the other.

A cell that fails is named and the others go on; a worker that dies takes the cell it was at with it and is replaced.
"""

import gc
import multiprocessing
import time
import traceback
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import redirect_stdout
from threading import Lock, Thread

import torch
from text_cells import run_cell
from text_place import Place


class Schedule:
    """Chains of cells that wait, shared by the threads that feed the workers.

    Args:
        chains: cells by what they share; those of one chain run one after the other in one worker.
        seconds: after which no cell begins.
    """

    def __init__(self, chains: Sequence[Sequence[str]], seconds: float) -> None:
        self.waiting, self.lock = deque(chains), Lock()
        self.started, self.seconds = time.monotonic(), seconds
        self.failed: list[str] = []
        self.left: list[str] = []

    @property
    def over(self) -> bool:
        return time.monotonic() - self.started > self.seconds

    def next(self) -> Sequence[str]:
        with self.lock:
            return self.waiting.popleft() if self.waiting else ()

    def say(self, what: str) -> None:
        with self.lock:
            print(f"{time.monotonic() - self.started:6.0f} s  {what}", flush=True)


def run_chains(chains: Sequence[Sequence[str]], place: Place, jobs: int, minutes: float, threads: int) -> list[str]:
    """Run cells, as many at a time as there are jobs, and give the names of those that failed."""
    schedule = Schedule(chains, 60 * minutes)
    feeders = [Thread(target=_feed, args=(schedule, place, threads)) for _ in range(min(jobs, len(chains)))]
    for feeder in feeders:
        feeder.start()
    for feeder in feeders:
        feeder.join()
    if schedule.left:
        print(f"no minutes left for: {' '.join(schedule.left)}")
    return schedule.failed


def _feed(schedule: Schedule, place: Place, threads: int) -> None:
    worker: ProcessPoolExecutor | None = None
    while chain := schedule.next():
        for name in chain:
            if schedule.over:
                schedule.left.append(name)
                continue
            worker = worker or ProcessPoolExecutor(
                1, multiprocessing.get_context("spawn"), torch.set_num_threads, (threads,)
            )
            try:
                schedule.say(f"{name}: {worker.submit(work, name, place).result():.0f} s")
            except Exception as error:
                schedule.failed.append(name)
                schedule.say(f"{name}: FAILED, {type(error).__name__}: {error}")
                traceback.print_exception(error)
                worker = None if isinstance(error, BrokenProcessPool) else worker
    if worker is not None:
        worker.shutdown()


def work(name: str, place: Place) -> float:
    """Measure a cell in a worker, what it says going to a file of its own."""
    path = place.work / "logs" / f"{name}.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as log, redirect_stdout(log):
        try:
            return run_cell(name, place)
        finally:
            gc.collect()
            if place.device.type == "cuda":
                torch.cuda.empty_cache()
