"""LexSemBridge beside its controls: cells of text_studies.py.

A cell is a row (what turns the query), how it learned, a seed and a corpus it is judged on:

    fusion      the fusion alone, on the corpus' own documents, seven BM25 negatives each
    among_all   the fusion alone, each query asked among all training documents of all three corpora
    full        both towers and the fusion, in-batch, one hard negative each: the paper's form
    passages    the top two layers of both towers and the fusion, by neighbouring passages of all three corpora
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from text_place import CORPORA, LENGTHS, Place, figures
from torch import Tensor

from pipelines.encoder_task import State
from pipelines.first_stages import FirstStages, dense_search
from pipelines.shipped import CONFIGS
from pipelines.text_measures import compare, measure
from pipelines.text_models import CATALOGUE, load_text_config, train
from pipelines.text_pairs import PairSource
from pipelines.text_train import TextRun
from pipelines.tracking import tracking_client
from ranking.fusion import POOL, Ranking
from ranking.text_models import load_encoder

DATABASE = "mlflow.db"
ROWS = ("off", "c_only", "linear_map", "slr", "llr", "clr")
SEEDS = (0, 1, 2)
BY_PASSAGES = [
    *("train=full", "batches=passages", "layers=2", "rows=24", "cuts=3", "train_tokens=160", "bfloat16=true"),
    *("corpus.natural=train", "optimiser.learning_rate=1e-4", "stop.steps=140", "stop.validate_every=35"),
]
"""Full training by neighbouring passages of all three corpora: the top two layers of both towers, and the fusion."""
AMONG_ALL = [
    *("train=fusion", "batches=passages", "rows=24", "cuts=4", "bfloat16=true", "corpus.natural=train"),
    *("stop.steps=240", "stop.validate_every=40", "stop.patience=6"),
]
"""Fusion alone, each query asked among all training documents of all three corpora."""
IN_BATCH = [
    *("rows=64", "group=2", "optimiser.learning_rate=5e-5"),
    *("stop.steps=300", "stop.validate_every=100"),
]
"""Full training in-batch: all layers of both towers."""
FRESH = {"linear_map": 1e-4}
"""Rate of the fusion's parameters in it where it is not 3e-3: a matrix of small entries moves faster than a vector."""
READ: dict[tuple[int, ...], Tensor] = {}
"""What the layers below the top two made of passages: runs in one process share it."""

STATES: dict[tuple[str, str], dict[str, State]] = {}
"""What the frozen backbone made of queries, by corpus and what is kept of it: runs in one process share it."""


def lexsembridge(place: Place, name: str, kind: str, seed: int, how: str = "fusion") -> dict[str, Any]:
    """One row of the main table: trained on the training documents, judged beside the plain encoder.

    `passages` and `among_all` train on all three corpora, one model for all of them, its steps chosen on Cranfield's
    dev documents and SciFact's dev queries.
    """
    stages = place.stages(name)
    learned = CORPORA[0] if how in ("passages", "among_all") else name
    path = CATALOGUE if learned == CATALOGUE else str(place.data / learned)
    sets = [f"model.weights={kind}", f"train={how}", f"seed={seed}", f"corpus.path={path}"]
    if name != CATALOGUE:
        sets += ["corpus.unit=token", "corpus.part_of_passage=[16, 32]", "corpus.terms=5"]
    sets += [*IN_BATCH, f"bfloat16={place.half}"] if how == "full" else ["group=8"]
    if how in ("passages", "among_all"):
        also = [str(place.data / other) for other in CORPORA if other != learned]
        sets = [one for one in sets if not one.startswith(("train=", "group="))]
        sets += BY_PASSAGES if how == "passages" else AMONG_ALL
        sets += [f"corpus.also={also}", f"optimiser.learning_rate_fresh={FRESH.get(kind, 3e-3)}"]
    elif name == "scifact":
        sets += ["corpus.natural=train"]
    sets += place.changes
    run = trained(place, sets, place.work / "runs" / f"{learned}-{kind}-{how}-{seed}")
    model: Any = load_encoder(run.model)
    model.to(place.device)
    passages = (
        stages.passage_vectors if how in ("fusion", "among_all") else model.encode_passages(stages.corpus.passages)
    )
    settings = [one for one in sets if not one.startswith(("corpus.path", "corpus.also"))]
    learning = {**run.table(), "curve": run.state.curve, "settings": settings}
    out: dict[str, Any] = {"train": learning, "tasks": {}, "per_query": {}}
    for task, queries in place.tasks(stages).items():
        dense = dense_search(model.encode_queries(queries.texts), passages, POOL)
        found, plain = dense.top(100), stages.dense(queries.texts)
        gain = {}
        for key in ("ndcg_at_10", "hit_at_1"):
            gain[key] = compare(measure(found, queries)[key], measure(plain, queries)[key]).table()
        hybrid = stages.hybrid(queries.texts, dense=dense)
        systems = {"enhanced": figures(found, queries, name), "hybrid": figures(hybrid, queries, name)}
        out["tasks"][task] = {"n": len(queries), "systems": systems, "against_plain": gain}
        out["per_query"][task] = [round(float(value), 5) for value in measure(found, queries)["hit_at_1"]]
    if name != CATALOGUE:
        out["spans"] = spans(place, stages, lambda texts: dense_search(model.encode_queries(texts), passages))
    return out


def trained(place: Place, sets: list[str], directory: Path) -> TextRun:
    """Train a row, or go on with its run; each has an MLflow file of its own, since cells run side by side."""
    config = load_text_config(CONFIGS / "lexsembridge.toml", [*sets, f"device={place.device.type}"])
    directory.mkdir(parents=True, exist_ok=True)
    if not (directory / DATABASE).exists() and (place.work / DATABASE).exists():
        shutil.copy(place.work / DATABASE, directory / DATABASE)
    kind, path = config.model.weights, config.corpus.path
    return train(
        config,
        place.items,
        directory,
        place.work / "cache",
        f"sqlite:///{directory.resolve()}/{DATABASE}",
        lambda done, total, what: print(f"  {done}/{total} {what}", flush=True) if done % 10 == 0 else None,
        states=STATES.setdefault((path, kind if kind in ("llr", "clr") else "pooled"), {}),
        read=READ,
    )


def prepare(place: Place, names: set[str]) -> None:
    """Encode the passages of corpora and make an empty MLflow file, once, before cells ask for them side by side."""
    for name in sorted(names):
        _ = place.stages(name).passage_vectors
    if not (place.work / DATABASE).exists():
        tracking_client(f"sqlite:///{place.work.resolve()}/{DATABASE}").search_experiments()


def spans(place: Place, stages: FirstStages, search: Callable[[list[str]], Ranking]) -> dict[str, Any]:
    """hit@1 on three spans of 16 tokens of each held-out document, as a mean by document: intervals are over those."""
    source = PairSource(stages.corpus, stages.encoder.tokenizer)  # type: ignore[attr-defined]
    rows = source.long_enough(source.rows("test"), max(LENGTHS))
    made = [source.part_of_passage(rows, 16, seed=seed) for seed in SEEDS]
    ours, plain = (
        np.mean([measure(ranked(one.texts), one)["hit_at_1"] for one in made], axis=0)
        for ranked in (search, stages.dense)
    )
    return {
        "documents": len(rows),
        "hit_at_1": float(ours.mean()),
        "plain": float(plain.mean()),
        "against_plain": compare(ours, plain).table(),
        "per_document": [round(float(value), 5) for value in ours],
    }
