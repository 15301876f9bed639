"""The text studies: first stages, LexSemBridge beside its controls, MVP beside a cross-encoder, and what it costs.

    python tests/benchmarks/text_studies.py run [CELL ...] --data $RECSYS_DATA --work DIR     resumable; cells below
    python tests/benchmarks/text_studies.py table                                           the tables of what has run

A cell is one file under tests/benchmarks/results/text; one that is there is not run again. A cell that has not run
says so in the tables. Figures are percent with 95 % intervals over queries (10,000 resamples).
"""

import argparse
import dataclasses
import json
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from text_reranking import HEADLINE, PLACES, learner, reader, rerank_cost, reranking
from text_reranking import ROWS as ROWS_OF_RERANKERS
from torch import Tensor

from pipelines.encoder_task import State
from pipelines.first_stages import FirstStages, dense_search
from pipelines.head_room import head_room
from pipelines.reranker_task import Pool, rerank_pool
from pipelines.shipped import CONFIGS
from pipelines.text_corpus import Queries, catalogue_corpus, read_corpus, read_queries
from pipelines.text_measures import best_possible, compare, mean_of, measure
from pipelines.text_models import CATALOGUE, load_text_config, train
from pipelines.text_pairs import PairSource, sample
from ranking.dense_encoder import DenseEncoder
from ranking.fusion import COVERED, POOL, Ranking
from ranking.splade import Splade
from ranking.text_models import load_encoder
from recsys.files import write_json

RESULTS = Path(__file__).parent / "results" / "text"
CORPORA = ("cranfield", "med", "scifact")
LENGTHS = (16, 32, 64)
MOST = 300  # queries of a cut task
ROWS = ("off", "c_only", "linear_map", "slr", "llr", "clr")
SEEDS = (0, 1, 2)
DIFFERENCE = {"reranked": "against_", "deep": "deep_against_"}


@dataclasses.dataclass(frozen=True)
class Place:
    """Where the data and the intermediate files are."""

    data: Path
    work: Path

    @property
    def items(self) -> Path:
        return self.work / "log" / "items.parquet"

    def stages(self, name: str, splade: bool = False) -> FirstStages:
        corpus = catalogue_corpus(self.items) if name == CATALOGUE else read_corpus(self.data / name)
        report = lambda done, total: print(f"  {name}: {done}/{total} passages", flush=True)  # noqa: E731
        return FirstStages(
            corpus, DenseEncoder.of(), self.work / "cache", Splade.of() if splade else None, report=report
        )

    def natural_dev(self, stages: FirstStages) -> dict[str, Queries]:
        """Queries that people wrote and that no table is made of: SciFact alone has some."""
        if stages.corpus.name != "scifact":
            return {}
        return {"natural": sample(read_queries(self.data / "scifact", stages.corpus, "train"), MOST, 0)}

    def tasks(self, stages: FirstStages, split: str = "test") -> dict[str, Queries]:
        """Natural queries (test only), and cut ones of one split, all lengths from the same documents."""
        corpus = stages.corpus
        source = PairSource(corpus, stages.encoder.tokenizer)  # type: ignore[attr-defined]
        rows = source.rows(split)  # type: ignore[arg-type]
        if corpus.name == CATALOGUE:
            spans = {f"pop_{n}": source.part_of_passage(rows, n, "word") for n in (2, 4, 8)}
            cut = {"keyword": source.keyword(rows, 3), **spans}
            return {name: sample(queries, MOST, 0) for name, queries in cut.items() if len(queries)}
        long = source.long_enough(rows, max(LENGTHS))
        cut = {"keyword": source.keyword(rows), **{f"pop_{n}": source.part_of_passage(long, n) for n in LENGTHS}}
        cut = {name: sample(queries, MOST, 0) for name, queries in cut.items()}
        return {"natural": read_queries(self.data / corpus.name, corpus, "test"), **cut} if split == "test" else cut


def figures(ranking: Ranking, queries: Queries, corpus: str = "") -> dict[str, Any]:
    """Every measure with its interval; on Cranfield also binary, and with the documents graded 0 taken out."""
    found = {}
    for name, estimate in mean_of(measure(ranking, queries)).items():
        low, high = estimate.interval()
        found[name] = {"value": estimate.value, "ci_low": low, "ci_high": high}
    if corpus == "cranfield":
        binary = measure(ranking, queries, binary=True)["ndcg_at_10"]
        without = measure(ranking, queries, zero_docs="remove", binary=True)
        found["binary"] = {"ndcg_at_10": float(binary.mean())}
        found["zero_docs_removed"] = {name: float(values.mean()) for name, values in without.items()}
    return found


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
    sets = [f"model.weights={kind}", f"train={how}", f"seed={seed}", f"corpus.path={path}", "group=8"]
    if name != CATALOGUE:
        sets += ["corpus.unit=token", "corpus.part_of_passage=[16, 32]", "corpus.terms=5"]
    if how == "full":
        sets += ["group=2", "stop.steps=150", "stop.validate_every=50", "rows=16"]
    if how in ("passages", "among_all"):
        also = [str(place.data / other) for other in CORPORA if other != learned]
        sets = [one for one in sets if not one.startswith("train=")]
        sets += BY_PASSAGES if how == "passages" else AMONG_ALL
        sets += [f"corpus.also={also}", f"optimiser.learning_rate_fresh={FRESH.get(kind, 3e-3)}"]
    elif name == "scifact":
        sets += ["corpus.natural=train"]
    config = load_text_config(CONFIGS / "lexsembridge.toml", sets)
    directory = place.work / "runs" / f"{learned}-{kind}-{how}-{seed}"
    run = train(
        config,
        place.items,
        directory,
        place.work / "cache",
        f"sqlite:///{place.work.resolve()}/mlflow.db",
        lambda done, total, what: print(f"  {done}/{total} {what}", flush=True) if done % 10 == 0 else None,
        states=STATES.setdefault((learned, kind if kind in ("llr", "clr") else "pooled"), {}),
        read=READ,
    )
    model = load_encoder(run.model)
    passages = (
        stages.passage_vectors if how in ("fusion", "among_all") else model.encode_passages(stages.corpus.passages)
    )
    out: dict[str, Any] = {"train": {**run.table(), "curve": run.progress.curve}, "tasks": {}, "per_query": {}}
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


def served(place: Place, name: str) -> dict[str, Any]:
    """What a search gives by default with the reranker at its starting values.

    `hybrid` is the first stage, `reranked` its best 20 reranked whatever the query, `served` what the service answers:
    the first stage where one passage covers the query, the reranked order elsewhere.
    """
    stages = place.stages(name)
    vectors = reader("mvp_apart", stages)
    model, kept = learner("mvp_apart", load_text_config(CONFIGS / "mvp_apart.toml").model, vectors.model)
    own, out = dataclasses.replace(vectors, keep=kept), {}
    tasks = place.tasks(stages)
    for task in ("natural", "keyword", "pop_16"):
        queries = tasks[task]
        first = stages.hybrid(queries.texts)
        head = rerank_pool(model, stages.corpus, Pool(queries, first), PLACES, vectors=own)
        covered = stages.bm25.coverage(queries.texts, stages.bm25.search(queries.texts, POOL)) >= COVERED
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
        found = head_room(stages.query_vectors(queries.texts), stages.passage_vectors, gold)
        out[task] = {"n": len(queries), "bounds": [dataclasses.asdict(one) for one in found]}
    return {"head_room": out}


def cells() -> dict[str, Callable[[Place], dict[str, Any]]]:
    """Every cell by name, the quick ones first."""
    made: dict[str, Callable[[Place], dict[str, Any]]] = {}
    for name in CORPORA:
        made[f"first_stages-{name}"] = lambda p, name=name: first_stages(p, name)
    for name in CORPORA:
        for kind in ROWS:
            for seed in SEEDS if kind != "off" else SEEDS[:1]:  # which trains nothing
                key = f"lexsembridge-{name}-{kind}-fusion-{seed}"
                made[key] = lambda p, name=name, kind=kind, seed=seed: lexsembridge(p, name, kind, seed)
        for kind in ("off", "slr"):
            key = f"lexsembridge-{name}-{kind}-full-0"
            made[key] = lambda p, name=name, kind=kind: lexsembridge(p, name, kind, 0, "full")
        for kind in ("off", "c_only", "linear_map", "slr", "llr"):
            for seed in SEEDS if kind in ("off", "c_only", "slr") else SEEDS[:1]:
                for how in ("passages", "among_all"):
                    key = f"lexsembridge-{name}-{kind}-{how}-{seed}"
                    made[key] = lambda p, a=(name, kind, seed, how): lexsembridge(p, *a)
    for name in ("cranfield", "scifact"):
        for row in ROWS_OF_RERANKERS:
            for seed in SEEDS if row in HEADLINE else SEEDS[:1]:
                made[f"reranking-{name}-{row}-{seed}"] = lambda p, a=(name, row, seed): reranking(
                    p.data, p.stages(a[0]), *a
                )
    made["head_room-cranfield"] = lambda p: ceiling(p, "cranfield")
    for name in ("cranfield", "scifact"):
        made[f"served-{name}"] = lambda p, name=name: served(p, name)
    made["reranking-cost"] = lambda p: rerank_cost(
        read_corpus(p.data / "cranfield").passages, "what similarity laws must be obeyed by aeroelastic models"
    )
    for kind, seed in (("c_only", 0), ("slr", 0)):
        made[f"lexsembridge-catalogue-{kind}-fusion-{seed}"] = lambda p, a=(kind, seed): lexsembridge(p, CATALOGUE, *a)
    made["first_stages-catalogue"] = lambda p: first_stages(p, "catalogue")
    return made


def run_cells(names: list[str], place: Place) -> None:
    known = cells()
    for name in names or list(known):
        path = RESULTS / f"{name}.json"
        if path.exists():
            continue
        print(name, flush=True)
        started = time.perf_counter()
        result = known[name](place)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        write_json(path, {"seconds": round(time.perf_counter() - started, 1), "peak_memory_bytes": peak, **result})


def percent(cell: dict[str, float]) -> str:
    return f"{100 * cell['value']:.1f} [{100 * cell['ci_low']:.1f}, {100 * cell['ci_high']:.1f}]"


def signed(found: dict[str, float]) -> str:
    return f"{100 * found['difference']:+.1f} [{100 * found['ci_low']:+.1f}, {100 * found['ci_high']:+.1f}]"


def control_of(name: str) -> str:
    """Give the pointwise control's cell of the same corpus and seed."""
    cell, corpus, row, seed = name.split("-")
    control = "mvp_apart_pointwise" if row.startswith("mvp_apart") else "cross_encoder"
    return f"{cell}-{corpus}-{control}{'_without_words' if row.endswith('without_words') else ''}-{seed}"


def lines_of(name: str) -> list[str]:
    path = RESULTS / f"{name}.json"
    if not path.exists():
        return [f"| {name} | not run | | |"]
    found = json.loads(path.read_text())
    if "reranked" in found:
        first = found["first_stage"]["ndcg_at_10"]
        control = RESULTS / f"{control_of(name)}.json"
        lines = []
        for part, title in (("reranked", "best 20"), ("deep", "best 100")):
            if part not in found:
                continue
            ours = found[part]
            gain = f"RRF {signed(found[f'{DIFFERENCE[part]}first_stage'])}"
            if f"{DIFFERENCE[part]}hybrid" in found:
                gain += f", hybrid {signed(found[f'{DIFFERENCE[part]}hybrid'])}"
            if control.exists() and control != path:
                pointwise = np.array(json.loads(control.read_text())[part]["per_query"])
                gain += f", pointwise {signed(compare(np.array(ours['per_query']), pointwise).table())}"
            value = f"{100 * ours['ndcg_at_10']:.1f}, RRF {100 * first:.1f}"
            lines.append(f"| {name} {title} | {value} | {100 * ours['hit_at_1']:.1f} | {gain} |")
        return lines
    if "cpu_milliseconds" in found:
        times = ", ".join(f"{key} {value} ms" for key, value in found["cpu_milliseconds"].items())
        over = ", ".join(
            f"{key[:-19]} {value:.2f}" for key, value in found.items() if key.endswith("_over_cross_encoder")
        )
        return [f"| {name} | {times} | times the cross-encoder: {over} | |"]
    if "head_room" in found:
        return [
            f"| {name} {task} R <= {one['bound']} | own {100 * one['gold']:.1f} | wrong {100 * one['wrong']:.1f} | |"
            for task, values in found["head_room"].items()
            for one in values["bounds"]
        ]
    lines = []
    for task, values in found["tasks"].items():
        for system, measures in values["systems"].items():
            gain = values.get("against_plain", {}).get("hit_at_1") if system == "enhanced" else None
            pair = f"{percent(measures['ndcg_at_10'])} | {percent(measures['hit_at_1'])}"
            lines.append(f"| {name} {task} {system} | {pair} | {signed(gain) if gain else ''} |")
    if "spans" in found:
        ours = found["spans"]
        gain = [f"plain {signed(ours['against_plain'])}", *(f"{kind} {signed(one)}" for kind, one in controls(name))]
        lines.append(f"| {name} three spans a document | | {100 * ours['hit_at_1']:.1f} | {', '.join(gain)} |")
    return lines


def controls(name: str) -> list[tuple[str, dict[str, Any]]]:
    """Compare hit@1 on spans, by document, with the controls of the same training and seed that have run."""
    cell, corpus, kind, how, seed = name.split("-")
    ours = np.array(json.loads((RESULTS / f"{name}.json").read_text())["spans"]["per_document"])
    made = []
    for other in ("off", "c_only", "linear_map"):
        path = RESULTS / f"{cell}-{corpus}-{other}-{how}-{seed}.json"
        if other != kind and path.exists() and "spans" in (found := json.loads(path.read_text())):
            made.append((other, compare(ours, np.array(found["spans"]["per_document"])).table()))
    return made


def over_seeds(corpus: str, how: str) -> list[str]:
    """SLR beside c only, the mean of the seeds by document, where all of them have run."""
    paths = [
        [RESULTS / f"lexsembridge-{corpus}-{kind}-{how}-{seed}.json" for seed in SEEDS] for kind in ("slr", "c_only")
    ]
    if not all(path.exists() for kind in paths for path in kind):
        return []
    ours, other = (
        np.mean([json.loads(path.read_text())["spans"]["per_document"] for path in kind], axis=0) for kind in paths
    )
    gain = signed(compare(ours, other).table())
    return [f"| {corpus} slr {how}, mean of {len(SEEDS)} seeds | | {100 * ours.mean():.1f} | c_only {gain} |"]


def tables() -> str:
    """Every cell as lines; those that have not run say so."""
    head = ["| cell | nDCG@10 | hit@1 | difference |", "|---|---|---|---|"]
    return "\n".join(
        [*head, *(line for name in cells() for line in lines_of(name)), *over_seeds("cranfield", "among_all")]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=["run", "table", "list"])
    parser.add_argument("cells", nargs="*")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.verb == "run":
        run_cells(options.cells, Place(options.data, options.work))
    print("\n".join(cells()) if options.verb == "list" else tables())


if __name__ == "__main__":
    main()
