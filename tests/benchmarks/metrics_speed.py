"""Time of AUC, GAUC and NDCG beside the machine's own sorts, of 1,000 resamples of them, and of peers.

    OMP_NUM_THREADS=1 python tests/benchmarks/metrics_speed.py --out metrics_speed.json

10 M rows in 100,000 groups in random order, normal float32 scores, one in ten positive. AUC needs one sort of 10 M
64-bit keys, GAUC and NDCG share another; `numpy.sort` of those very keys is the yardstick. What is compared is timed in
turns, in one process and on one thread; a figure is the fastest of its turns.

Peers are timed on their own number of rows, as most would take hours on 10 M, and compared per row. scikit-learn is
here anyway; FuxiCTR (its GAUC) and ranx (its NDCG) are timed where they can be imported:

    pip install --no-deps --target peers fuxictr ranx numba llvmlite cbor2 orjson ir_datasets seaborn tabulate lz4
    OMP_NUM_THREADS=1 PYTHONPATH=peers python tests/benchmarks/metrics_speed.py
"""

import argparse
import importlib.util
import json
import platform
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import ndcg_score, roc_auc_score

from recsys.bootstrap import Ratio, bootstrap, pooled_auc
from recsys.metrics import auc, gauc, mean, ndcg, ordered_bits, rank

PEER_ROWS = 1_000_000
FUXICTR_ROWS = 100_000
RESAMPLES = 1000


class Rows(NamedTuple):
    """Scored candidates: float32, uint8 and int64 [rows], and the number of groups."""

    score: NDArray[np.float32]
    label: NDArray[np.uint8]
    group: NDArray[np.int64]
    groups: int


def draw(rows: int) -> Rows:
    """Draw the rows of one size: a group per 100 of them."""
    rng = np.random.default_rng(0)
    score, label = rng.standard_normal(rows).astype(np.float32), (rng.random(rows) < 0.1).astype(np.uint8)
    return Rows(score, label, rng.integers(0, rows // 100, rows), rows // 100)


def in_turns(work: Mapping[str, Callable[[], object]], turns: int = 3) -> dict[str, float]:
    """Return the seconds of each one's fastest turn."""
    found = dict.fromkeys(work, float("inf"))
    for _ in range(turns):
        for name, one in work.items():
            started = time.perf_counter()
            one()
            found[name] = min(found[name], time.perf_counter() - started)
    return found


def beside_the_sorts(rows: Rows) -> dict[str, float]:
    """Time all three metrics from raw scores, and the two sorts they cannot do without."""
    key = (ordered_bits(rows.score).astype(np.uint64) << np.uint64(1)) | rows.label
    keys = [key, key | (rows.group.astype(np.uint64) << np.uint64(33))]
    place = np.empty_like(key)
    copies = in_turns({"copy": lambda: np.copyto(place, key)})["copy"]

    def sorts() -> None:
        for one in keys:
            np.copyto(place, one)
            place.sort()

    def metrics() -> None:
        auc(rank(rows.score, rows.label))
        ranking = rank(rows.score, rows.label, rows.group, rows.groups)
        gauc(ranking)
        mean(ndcg(ranking, 10))

    found = in_turns({"two 64-bit sorts": sorts, "AUC + GAUC + NDCG@10": metrics})
    found["two 64-bit sorts"] -= 2 * copies
    return found


def resampled(rows: Rows) -> dict[str, float]:
    """Time the intervals of all three, groups being users: what is prepared once, and the resamples."""
    ranking = rank(rows.score, rows.label, rows.group, rows.groups)
    user = np.arange(rows.groups)
    started = time.perf_counter()
    statistics = {
        "auc": pooled_auc(rows.score, rows.label, rows.group, rows.groups),
        "gauc": Ratio.of_groups(auc(ranking), user, rows.groups, ranking.candidates),
        "ndcg": Ratio.of_groups(ndcg(ranking, 10), user, rows.groups),
    }
    prepared = time.perf_counter()
    bootstrap(statistics, rows.groups, RESAMPLES, seed=0)
    ended = time.perf_counter()
    return {"prepared once": prepared - started, f"{RESAMPLES:,} resamples": ended - prepared}


def per_row(
    rows: int, name: str, ours: Callable[[Rows], object], theirs: Callable[[Rows], Callable[[], object]]
) -> str:
    """Return a table row: microseconds per row of ours and a peer's, both on the same rows in turns."""
    found = draw(rows)
    seconds = in_turns({"ours": lambda: ours(found), "theirs": theirs(found)}, turns=2)
    mine, other = (1e6 * seconds[key] / rows for key in ("ours", "theirs"))
    return f"| {name} | {rows:,} | {mine:.3f} | {other:.3f} | {other / mine:,.0f}x |"


def our_gauc(rows: Rows) -> float:
    """Return GAUC from raw scores."""
    return gauc(rank(rows.score, rows.label, rows.group, rows.groups))


def our_ndcg(rows: Rows) -> float:
    """Return NDCG@10 from raw scores."""
    return mean(ndcg(rank(rows.score, rows.label, rows.group, rows.groups), 10))


def by_scikit(rows: Rows) -> Callable[[], object]:
    """Prepare a loop of scikit-learn's NDCG over groups that are cut out beforehand."""
    parts = np.split(np.argsort(rows.group, kind="stable"), np.cumsum(np.bincount(rows.group, minlength=rows.groups)))
    cut = [(rows.label[one][None], rows.score[one][None]) for one in parts if len(one) > 1]
    return lambda: [ndcg_score(label, score, k=10) for label, score in cut]


def by_fuxictr(rows: Rows) -> Callable[[], object]:
    """Prepare FuxiCTR's GAUC, with the worker processes it takes by itself."""
    from fuxictr.metrics import evaluate_metrics

    return lambda: evaluate_metrics(rows.label, rows.score, ["gAUC"], rows.group)


def by_ranx(rows: Rows) -> Callable[[], object]:
    """Prepare ranx's NDCG; its own form of the rows is built and its code compiled beforehand."""
    from ranx import Qrels, Run, evaluate

    qrels: dict[str, dict[str, int]] = {}
    run: dict[str, dict[str, float]] = {}
    for place, (owner, label, score) in enumerate(zip(rows.group, rows.label, rows.score, strict=True)):
        run.setdefault(str(owner), {})[str(place)] = float(score)
        if label:
            qrels.setdefault(str(owner), {})[str(place)] = 1
    known, scored = Qrels(qrels), Run({name: run[name] for name in qrels})
    evaluate(known, scored, "ndcg@10")
    return lambda: evaluate(known, scored, "ndcg@10")


def peers() -> list[str]:
    """Return a table row per peer that can be imported."""
    found = [
        per_row(PEER_ROWS, "AUC, scikit-learn", lambda r: auc(rank(r.score, r.label)),
                lambda r: lambda: roc_auc_score(r.label, r.score)),
        per_row(FUXICTR_ROWS, "NDCG@10, scikit-learn group by group", our_ndcg, by_scikit),
    ]  # fmt: skip
    for package, name, ours, theirs, rows in (
        ("fuxictr", "GAUC, FuxiCTR", our_gauc, by_fuxictr, FUXICTR_ROWS),
        ("ranx", "NDCG@10, ranx (rows converted beforehand)", our_ndcg, by_ranx, FUXICTR_ROWS),
    ):
        there = importlib.util.find_spec(package) is not None
        found.append(per_row(rows, name, ours, theirs) if there else f"| {name} | not installed | | | |")
    return found


def main() -> None:
    """Print the tables and write them as JSON if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rows = draw(options.rows)
    seconds = beside_the_sorts(rows)
    sorts, metrics = seconds.values()
    seconds |= resampled(rows)
    print(f"{options.rows:,} rows in {rows.groups:,} groups\n\n| | seconds |\n|---|---|")
    for name, value in seconds.items():
        print(f"| {name} | {value:.2f} |")
    print(f"| metrics / sorts | {metrics / sorts:.2f} |\n")
    beside = peers()
    print("| beside | rows | us per row, ours | theirs | ratio |\n|---|---|---|---|---|")
    print("\n".join(beside))
    if options.out:
        about = {"machine": platform.processor() or platform.machine(), "numpy": np.__version__}
        content = {**about, "rows": options.rows, "seconds": seconds, "ratio": metrics / sorts, "peers": beside}
        options.out.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
