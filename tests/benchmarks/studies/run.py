"""Run the cells that have no result yet, in order of priority; every one goes on where it was stopped.

    RECSYS_DATA=... python tests/benchmarks/studies/run.py --list
    RECSYS_DATA=... python tests/benchmarks/studies/run.py --max-minutes 60 --threads 1
    python tests/benchmarks/studies/tables.py

Runs and prepared sets lie in a workspace (default: runs/studies), results beside this file. A cell that can't be run
(data that are not here, a loss that is no number) is named and passed over.
"""

import os

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # read by torch when it is imported

import argparse
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from benchmarks.studies.measure import measure  # noqa: E402
from benchmarks.studies.plan import STUDIES, Cell, cells  # noqa: E402

from recsys.errors import RecsysError  # noqa: E402


class OutOfTime(Exception):  # noqa: N818 - not an error
    """The time that was given is over; the run's last checkpoint stays."""


def done(cell: Cell, results: Path) -> bool:
    """Whether a cell has its result."""
    return (results / cell.study / f"{cell.name}.json").exists()


def run(grid: Iterable[Cell], root: Path, results: Path, deadline: float = float("inf")) -> list[str]:
    """Run what is missing until the deadline (of time.monotonic); gives the names of the cells that failed."""
    failed = []

    def report(step: int, steps: int, words: str) -> None:
        if time.monotonic() > deadline:
            raise OutOfTime
        if step % 50 == 0:
            print(f"  {step}/{steps} {words}", flush=True)

    for cell in grid:
        if done(cell, results):
            continue
        if time.monotonic() > deadline:
            break
        print(f"{time.strftime('%H:%M:%S')} {cell.study}/{cell.name}", flush=True)
        started = time.monotonic()
        try:
            measure(cell, root, results, report)
        except OutOfTime:
            break
        except RecsysError as error:
            failed.append(f"{cell.study}/{cell.name}")
            print(f"  failed: {error}", flush=True)
            continue
        print(f"  done in {time.monotonic() - started:.0f} s", flush=True)
    return failed


def chosen(study: str | None, cell: str | None) -> list[Cell]:
    """Return the cells of a study, or those whose name holds `cell`; all of them without either."""
    return [one for one in cells() if study in (None, one.study) and (cell is None or cell in one.name)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", choices=tuple(STUDIES))
    parser.add_argument("--cell", help="only cells whose name holds this")
    parser.add_argument("--max-minutes", type=float, default=float("inf"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--workspace", type=Path, default=Path("runs/studies"))
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--list", action="store_true", help="say which cells are done, in order of priority")
    options = parser.parse_args(arguments)
    grid = chosen(options.study, options.cell)
    if options.list:
        for cell in grid:
            print(f"{'done' if done(cell, options.results) else '-':<5}{cell.study}/{cell.name}")
        print(f"{sum(done(cell, options.results) for cell in grid)} of {len(grid)} cells done")
        return 0
    torch.set_num_threads(options.threads)
    deadline = time.monotonic() + 60 * options.max_minutes
    failed = run(grid, options.workspace, options.results, deadline)
    if failed:
        print(f"{len(failed)} cells could not be run: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
