"""The text studies: first stages, LexSemBridge beside its controls, MVP beside a cross-encoder, and what it costs.

    python tests/benchmarks/text_studies.py run [CELL ...] --data $RECSYS_DATA --work DIR     resumable; * in names
    python tests/benchmarks/text_studies.py table                                           the tables of what has run
    python tests/benchmarks/text_studies.py list                                            what has not run, in order

A cell is one file under tests/benchmarks/results/text (`--results`); one that is there is not run again. A cell that
has not run says so in the tables. Figures are percent with 95 % intervals over queries (10,000 resamples). On a GPU
several processes keep it busy: `--jobs 8 --threads 2`; `--max-minutes` ends a run between cells.
"""

import argparse
import math
import sys
import time
from fnmatch import fnmatch
from pathlib import Path

import torch
from text_bridge import prepare
from text_cells import cells, chains, corpora_of
from text_jobs import run_chains
from text_place import Place
from text_tables import tables

from recsys.errors import ConfigError

RESULTS = Path(__file__).parent / "results" / "text"


def chosen(patterns: list[str], results: Path) -> list[list[str]]:
    """Return the cells that patterns name and that have not run, all of them if there is no pattern."""
    known = list(cells())
    for pattern in patterns:
        if not any(fnmatch(name, pattern) for name in known):
            raise ConfigError(f"{pattern}: no cell of this name; `list` shows them")
    named = [name for name in known if not patterns or any(fnmatch(name, pattern) for pattern in patterns)]
    return chains([name for name in named if not (results / f"{name}.json").exists()])


def run(options: argparse.Namespace) -> list[str]:
    """Run the cells that are asked for and give those that failed."""
    began = time.monotonic()
    torch.set_num_threads(options.threads)
    place = Place(options.data, options.work, options.results, options.device, tuple(options.changes))
    wanted = chosen(options.cells, place.results)
    if not place.items.exists():
        wanted = [chain for chain in wanted if "catalogue" not in chain[0].split("-")]
    prepare(place, corpora_of([name for chain in wanted for name in chain]))
    left = options.max_minutes - (time.monotonic() - began) / 60
    return run_chains(wanted, place, options.jobs, left, options.threads)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=["run", "table", "list"])
    parser.add_argument("cells", nargs="*", help="names, or patterns with *; all that have not run if absent")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--jobs", type=int, default=1, help="cells at a time, each in a process of its own")
    parser.add_argument("--max-minutes", type=float, default=math.inf, help="after which no cell begins")
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    parser.add_argument("--device", default="auto", help="auto: cuda where there is one")
    parser.add_argument("--set", dest="changes", action="append", default=[], help="over every training run's settings")
    options = parser.parse_intermixed_args()
    if options.verb == "list":
        print("\n".join(name for chain in chosen(options.cells, options.results) for name in chain))
        return 0
    failed = run(options) if options.verb == "run" else []
    print(tables(options.results))
    if failed:
        print(f"{len(failed)} cells failed: {' '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
