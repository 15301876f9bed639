"""Every cell of the text studies by name, in what order they run, and which have a training run in common."""

import dataclasses
import re
import resource
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from text_bridge import ROWS, SEEDS, lexsembridge
from text_place import CORPORA, Place, figures
from text_reranking import HEADLINE, HEADLINE_SCIFACT, PLACES, family, learner, reader, rerank_cost, reranking
from text_reranking import ROWS as ROWS_OF_RERANKERS

from pipelines.head_room import head_room
from pipelines.reranker_task import Pool, rerank_pool
from pipelines.shipped import CONFIGS
from pipelines.text_corpus import read_corpus
from pipelines.text_measures import best_possible, compare, measure
from pipelines.text_models import CATALOGUE, load_text_config
from ranking.fusion import COVERED, POOL, Ranking
from recsys.files import write_json


def first_stages(place: Place, name: str) -> dict[str, Any]:
    """BM25, dense, SPLADE, RRF, the convex fusion at one weight, and the shipped hybrid, on every task of a corpus."""
    stages = place.stages(name, splade=name != "scifact")  # whose 5,183 abstracts cost minutes of SPLADE
    weight = stages.choose_weight(place.natural_dev(stages))
    out: dict[str, Any] = {"weight": weight, "tasks": {}}
    for task, queries in place.tasks(stages).items():
        rankings = stages.all(queries.texts, weight)
        systems = {system: figures(ranking, queries, name) for system, ranking in rankings.items()}
        best = {system: best_possible(ranking, queries) for system, ranking in rankings.items()}
        out["tasks"][task] = {"n": len(queries), "systems": systems, "best_possible": best}
    return out


def splade(place: Place, name: str) -> dict[str, Any]:
    """SPLADE, and its fusion with BM25 and dense, on every task of a corpus whose cell of first stages left it out."""
    stages, tasks = place.stages(name, splade=True), {}
    for task, queries in place.tasks(stages).items():
        rankings = stages.all(queries.texts)
        systems = {system: figures(rankings[system], queries, name) for system in ("splade", "rrf3")}
        tasks[task] = {"n": len(queries), "systems": systems}
    return {"tasks": tasks}


def served(place: Place, name: str) -> dict[str, Any]:
    """What a search gives by default with the reranker at its starting values.

    `hybrid` is the first stage, `reranked` its best 20 reranked whatever the query, `served` what the service answers:
    the first stage where one passage covers the query, the reranked order elsewhere.
    """
    stages = place.stages(name)
    options = load_text_config(CONFIGS / "mvp_apart.toml").model
    model, own = learner("mvp_apart", options, reader("mvp_apart", place, stages))
    out, tasks = {}, place.tasks(stages)
    for task in ("natural", "keyword", "pop_16"):
        queries = tasks[task]
        first = stages.hybrid(queries.texts)
        head = rerank_pool(model, stages.corpus, Pool(queries, first), PLACES, vectors=own)
        covered = stages.coverage(queries.texts, stages.bm25.search(queries.texts, POOL)) >= COVERED
        rows = np.where(covered[:, None], first.top(PLACES).rows, head.rows)
        by_query = Ranking(rows, np.zeros(rows.shape, np.float32))
        rankings = {"hybrid": first, "reranked": head, "served": by_query}
        gain = {
            key: compare(measure(by_query, queries)[key], measure(first, queries)[key]).table()
            for key in ("ndcg_at_10", "hit_at_1")
        }
        out[task] = {
            "n": len(queries),
            "covered": int(covered.sum()),
            "systems": {system: figures(ranking, queries, name) for system, ranking in rankings.items()},
            "against_hybrid": gain,
        }
    return {"tasks": out}


def ceiling(place: Place, name: str) -> dict[str, Any]:
    """How far a bounded re-weighting could go for the own passage, and for a wrong one, per task of cut queries."""
    stages, out = place.stages(name), {}
    for task, queries in place.tasks(stages).items():
        if task == "natural":
            continue
        gold = np.array([next(iter(grades)) for grades in queries.grades])
        asked = stages.query_vectors(queries.texts)
        found = head_room(asked, stages.passage_vectors, gold, device=place.device)
        out[task] = {"n": len(queries), "bounds": [dataclasses.asdict(one) for one in found]}
    return {"head_room": out}


def cells() -> dict[str, Callable[[Place], dict[str, Any]]]:
    """Every cell by name, as the tables show them."""
    made: dict[str, Callable[[Place], dict[str, Any]]] = {}
    for name in CORPORA:
        made[f"first_stages-{name}"] = lambda p, name=name: first_stages(p, name)
    made["splade-scifact"] = lambda p: splade(p, "scifact")
    for name in CORPORA:
        for kind, how, seed in bridges(name):
            made[f"lexsembridge-{name}-{kind}-{how}-{seed}"] = lambda p, a=(name, kind, seed, how): lexsembridge(p, *a)
    for name in ("cranfield", "scifact"):
        for row in ROWS_OF_RERANKERS:
            headline = HEADLINE_SCIFACT if name == "scifact" else HEADLINE
            for seed in SEEDS if row in headline else SEEDS[:1]:
                made[f"reranking-{name}-{row}-{seed}"] = lambda p, a=(name, row, seed): reranking(p, *a)
    for name in CORPORA:
        made[f"head_room-{name}"] = lambda p, name=name: ceiling(p, name)
    for name in ("cranfield", "scifact"):
        made[f"served-{name}"] = lambda p, name=name: served(p, name)
    made["reranking-cost"] = lambda p: rerank_cost(
        read_corpus(p.data / "cranfield").passages, "what similarity laws must be obeyed by aeroelastic models"
    )
    for kind, seed in (("c_only", 0), ("slr", 0)):
        made[f"lexsembridge-catalogue-{kind}-fusion-{seed}"] = lambda p, a=(kind, seed): lexsembridge(p, CATALOGUE, *a)
    made["first_stages-catalogue"] = lambda p: first_stages(p, "catalogue")
    return made


def bridges(name: str) -> list[tuple[str, str, int]]:
    """Row, training and seed of LexSemBridge's cells on one corpus."""
    made = [(kind, "fusion", seed) for kind in ROWS for seed in (SEEDS if kind != "off" else SEEDS[:1])]
    made += [(kind, "full", 0) for kind in (("off", "slr") if name != "cranfield" else ROWS[:-1])]
    for kind in ROWS[:-1]:
        for seed in SEEDS if kind in ("off", "c_only", "slr") else SEEDS[:1]:
            made.append((kind, "passages", seed))
            if kind != "off":  # which trains nothing
                made.append((kind, "among_all", seed))
    return made


ORDER = (
    r"reranking-\w+-(mvp|cross_encoder)_full-0",
    r"lexsembridge-\w+-\w+-passages-0",
    r"lexsembridge-(cranfield|scifact)-(off|slr)-full-0",
    r"reranking-scifact-(mvp|cross_encoder)_full-\d",
    r"lexsembridge-\w+-(off|slr)-passages-\d",
    r"lexsembridge-cranfield-(llr|clr)-fusion-0",
    r"(splade|served|head_room)-\w+",
    r"lexsembridge-med-\w+-full-0",
    r"lexsembridge-(med|scifact)-\w+-fusion-0",
    r"reranking-scifact-\w+-\d",
    r"lexsembridge-cranfield-\w+-full-0",
    r"lexsembridge-\w+-c_only-passages-\d",
    r"lexsembridge-\w+-(linear_map|llr|slr)-among_all-0",
    r"lexsembridge-catalogue-\w+-fusion-0",
    r"lexsembridge-\w+-(llr|clr)-fusion-\d",
)
"""What runs first, the most important and of those the longest first; what none of them names comes last."""


def chains(names: Sequence[str]) -> list[list[str]]:
    """Cells in the order they run, those that share a training run or pairs that were read in one list."""
    rank = {name: next((at for at, one in enumerate(ORDER) if re.fullmatch(one, name)), len(ORDER)) for name in names}
    made: dict[str, list[str]] = {}
    for name in sorted(names, key=lambda name: rank[name]):
        made.setdefault(shared(name), []).append(name)
    return list(made.values())


def shared(name: str) -> str:
    """What a cell shares with others: its own name if nothing."""
    kind, *parts = name.split("-")
    if kind == "lexsembridge" and parts[2] in ("passages", "among_all"):
        return "-".join(parts[1:])
    if kind == "reranking" and len(parts) == 3 and family(parts[1]) != "full":
        return f"{parts[0]}-{family(parts[1])}"
    return name


def corpora_of(names: Sequence[str]) -> set[str]:
    """Corpora whose passages cells need encoded."""
    return {one for name in names for one in (*CORPORA, CATALOGUE) if one in name.split("-")}


def run_cell(name: str, place: Place) -> float:
    """Measure a cell, write its file, whole or not at all, and give the seconds it took."""
    started = time.perf_counter()
    result = cells()[name](place)
    seconds = time.perf_counter() - started
    device = torch.cuda.get_device_name() if place.device.type == "cuda" else "cpu"
    about = {
        "seconds": round(seconds, 1),
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "device": device,
    }
    write_json(place.results / f"{name}.json", about | result)
    return seconds
