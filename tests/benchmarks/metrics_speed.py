"""Time of the metrics, AUC beside scikit-learn.

    OMP_NUM_THREADS=1 python tests/benchmarks/metrics_speed.py --json metrics_speed.json

Every figure is the best of three on one thread. The rows are normal scores in random order of groups of about 100
candidates, one in ten positive; the bootstrap line has 100 times fewer users than rows and 1,000 resamples.
"""

import argparse
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from sklearn.metrics import roc_auc_score

from recsys.bootstrap import PooledAuc, bootstrap
from recsys.metrics import auc, gauc, mean, ndcg, rank


def best_of(repeats: int, work: Callable[[], object]) -> float:
    """Give the seconds of the fastest run."""
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def measure(rows: int) -> dict[str, float]:
    """Give seconds by what was measured, for one number of rows."""
    rng = np.random.default_rng(0)
    groups = rows // 100
    score = rng.standard_normal(rows).astype(np.float32)
    label = (rng.random(rows) < 0.1).astype(np.uint8)
    group = rng.integers(0, groups, rows)
    wide = score + rng.standard_normal(rows) * 1e-9  # float64 that float32 cannot hold
    ranking = rank(score, label, group, groups)
    some = slice(0, min(rows, 250_000))  # what 2,500 requests with 100 candidates are
    pooled = PooledAuc.build(score[some], label[some], group[some])
    return {
        "GAUC": best_of(3, lambda: gauc(rank(score, label, group, groups))),
        "GAUC, float64 scores": best_of(3, lambda: gauc(rank(wide, label, group, groups))),
        "NDCG@10 after GAUC (ranked already)": best_of(3, lambda: mean(ndcg(ranking, 10))),
        "NDCG@10 alone": best_of(3, lambda: mean(ndcg(rank(score, label, group, groups), 10))),
        "AUC": best_of(3, lambda: auc(rank(score, label))),
        "AUC, scikit-learn": best_of(3, lambda: roc_auc_score(label, score)),
        f"interval of AUC, 1,000 resamples, {len(pooled.negative_user) + len(pooled.positive_user):,} rows": best_of(
            1, lambda: bootstrap({"auc": pooled}, groups, 1000, seed=0)
        ),
    }


def main() -> None:
    """Print a table and write it as JSON if asked to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000_000, 10_000_000])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    results = {rows: measure(rows) for rows in options.rows}
    for rows, found in results.items():
        print(f"{rows:,} rows in {rows // 100:,} groups")
        for name, seconds in found.items():
            print(f"  {name:<60} {seconds:8.3f} s")
    if options.json:
        about = {"machine": platform.processor() or platform.machine(), "numpy": np.__version__, "seconds": results}
        options.json.write_text(json.dumps(about, indent=2) + "\n")


if __name__ == "__main__":
    main()
