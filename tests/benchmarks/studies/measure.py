"""One cell: prepare its data if need be, train, read the test split once, write what was found.

results/<study>/<cell>.json    what was run (configuration, data digest, commit, versions) and every figure
results/<study>/<cell>.npz     what paired intervals need: per user, numerator and denominator of each metric, float32;
                               under leave_one_out every user's rank, uint16, 65,535 for that or worse
"""

import dataclasses
import os
import platform
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from benchmarks.studies.plan import DATASETS, Cell, Dataset
from numpy.typing import NDArray

from pipelines import datasets, leave_one_out
from pipelines.environment import environment
from pipelines.evaluate import evaluate
from pipelines.evaluation import ALL_ITEMS, OUTSIDE, EvaluateConfig, Evaluation
from pipelines.ingest import ingest
from pipelines.prepare import PrepareConfig, prepare
from pipelines.prepared import PreparedSet
from pipelines.shipped import find_config
from pipelines.tracking import git_commit
from pipelines.train import Trained, train
from pipelines.train_config import TrainConfig, load_config
from pipelines.workspace import Workspace
from ranking.ranker import AnyRanker
from recsys.bootstrap import Ratio
from recsys.config import parse
from recsys.files import sha256_json, whole_file, write_json
from recsys.metrics import Ranking, auc, groups_of, ndcg, rank, recall
from recsys.progress import Progress, silent

FORMAT = 1
PACKAGES = ("torch", "numpy", "polars", "lightgbm")
WORST = np.iinfo(np.uint16).max
Vectors = dict[str, NDArray[Any]]


def config_of(cell: Cell) -> TrainConfig:
    """Return a cell's training configuration; a wrong setting is an error here, before anything is trained."""
    return load_config(find_config(cell.config), (*cell.settings, f"seed={cell.seed}"))


def prepared_of(name: str, root: Path, wanted: Dataset | None = None) -> PreparedSet:
    """Return a data set, made on first use in the workspace `root / name`."""
    place, wanted = Workspace(root / name), wanted or DATASETS[name]
    if not (place.prepared.directory / "manifest.json").exists():
        raw = datasets.DATASETS[wanted.source](wanted.users)
        ingest(raw if wanted.newest is None else datasets.newest(raw, wanted.newest), place.log)
        prepare(place.log, place.prepared.directory, parse(PrepareConfig, wanted.prepare, name))
    return place.prepared


def run_of(cell: Cell, prepared: PreparedSet) -> str:
    """Return the directory name of a cell's training run: cells of equal configuration and data share one."""
    config = config_of(cell)
    return f"{cell.config}-{sha256_json({'config': config.table(), 'data': prepared.digest})[:12]}"


def measure(cell: Cell, root: Path, results: Path, progress: Progress = silent) -> dict[str, Any]:
    """Run a cell to its end, or go on where it was, and write its two files."""
    prepared = prepared_of(cell.dataset, root)
    place = Workspace(root / cell.dataset)
    trained = train(config_of(cell), prepared, place.run(run_of(cell, prepared)), place.tracking_uri, progress)
    started = time.perf_counter()
    found, vectors = (
        _leave_one_out(trained.model, prepared) if _ranks_all(cell) else _candidates(cell, trained, prepared)
    )
    record = _about(cell, trained, prepared) | found | {"evaluation_seconds": time.perf_counter() - started}
    save_vectors(results / cell.study / f"{cell.name}.npz", vectors)
    write_json(results / cell.study / f"{cell.name}.json", record)  # last: its presence says that the cell is done
    return record


def _ranks_all(cell: Cell) -> bool:
    return cell.protocol == "leave_one_out"


def _about(cell: Cell, trained: Trained, prepared: PreparedSet) -> dict[str, Any]:
    summary = trained.summary.table()
    table = summary.pop("config")
    return {
        "format": FORMAT,
        "cell": dataclasses.asdict(cell),
        "config": table,
        "data": {"digest": prepared.digest, "source": prepared.manifest["source"]},
        "training": summary,
        "commit": git_commit(),
        "versions": {name: version(name) for name in PACKAGES} | {"python": platform.python_version()},
        "machine": {
            "processors": os.cpu_count(),
            "threads": os.environ.get("OMP_NUM_THREADS", "all"),
            "device": environment(summary["device"])["hardware device"],
        },
    }


def _leave_one_out(model: AnyRanker, prepared: PreparedSet) -> tuple[dict[str, Any], Vectors]:
    ranks = leave_one_out.target_ranks(model, prepared, "test")
    return {"metrics": ranks.metrics()}, {"rank": np.minimum(ranks.rank, WORST).astype(np.uint16)}


def _candidates(cell: Cell, trained: Trained, prepared: PreparedSet) -> tuple[dict[str, Any], Vectors]:
    config = parse(EvaluateConfig, cell.evaluate, cell.name)
    evaluation = evaluate({"model": trained.model}, prepared, config)
    found = {
        "metrics": {
            name: value
            for name, value in evaluation.flat("model").items()
            if not name.endswith((".ci_low", ".ci_high"))
        },
        "candidates": {name: dataclasses.asdict(facts) for name, facts in evaluation.candidates.items()},
        "cost": dataclasses.asdict(evaluation.cost["model"]),
        "evaluate": dataclasses.asdict(config),
    }
    return found, by_user(evaluation, config)


def by_user(evaluation: Evaluation, config: EvaluateConfig) -> Vectors:
    """Give, for every metric that is compared, what its mean over any resample of the users is made of."""
    record, scores = evaluation.predictions["requests"], evaluation.predictions["model"]
    users, user = np.unique(record["user"], return_inverse=True)
    ratios: dict[str, Ratio] = {}
    for sampler in config.samplers:
        label, request = record[f"{sampler}.label"] > 0, groups_of(record[f"{sampler}.offsets"])
        kept = record[f"{sampler}.in_history"] == 0
        ratios[f"{sampler}/gauc"] = _gauc(scores[sampler], label, user[request], len(users))
        name = f"{sampler}/segment/{OUTSIDE}/gauc"
        ratios[name] = _gauc(scores[sampler][kept], label[kept], user[request][kept], len(users))
        by_request = rank(scores[sampler], label, request, len(user))
        ratios[f"{sampler}/ndcg_at_10"] = Ratio.of_groups(ndcg(by_request, 10), user, len(users))
    ranked = np.searchsorted(record["index"], record[f"{ALL_ITEMS}.index"])
    if len(ranked):
        label, request = record[f"{config.samplers[0]}.label"] > 0, groups_of(record[f"{config.samplers[0]}.offsets"])
        positives = np.bincount(request[label], minlength=len(user))[ranked]
        block = {key: scores[f"{ALL_ITEMS}.{key}"] for key in ("group", "start", "size", "positive")}
        ranking = Ranking(np.full(len(ranked), 2**31), positives[:, None], **block, gain=block["positive"], depth=50)
        ratios[f"{ALL_ITEMS}/ndcg_at_10"] = Ratio.of_groups(ndcg(ranking, 10), user[ranked], len(users))
        ratios[f"{ALL_ITEMS}/recall_at_50"] = Ratio.of_groups(recall(ranking, 50), user[ranked], len(users))
    vectors: Vectors = {"users": users}
    for name, ratio in ratios.items():
        vectors |= {
            f"{name}|above": ratio.numerator.astype(np.float32),
            f"{name}|below": ratio.denominator.astype(np.float32),
        }
    return vectors


def _gauc(score: NDArray[np.float32], label: NDArray[np.bool_], user: NDArray[np.int64], users: int) -> Ratio:
    ranking = rank(score, label, user, users)
    return Ratio.of_groups(auc(ranking), np.arange(users), users, ranking.candidates.astype(np.float64))


def save_vectors(path: Path, vectors: Vectors) -> None:
    """Write an npz without pickle."""
    with whole_file(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, **vectors)


def load_vectors(path: Path) -> Vectors:
    """Read what `save_vectors` wrote."""
    with np.load(path, allow_pickle=False) as file:
        return dict(file)
