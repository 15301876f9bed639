"""The text studies: first stages, LexSemBridge beside its controls, MVP beside the cross-encoder, and what they cost.

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

from pipelines.first_stages import FirstStages, dense_search
from pipelines.reranker_task import Pool, RerankerTask, rerank_pool
from pipelines.shipped import CONFIGS
from pipelines.text_corpus import Queries, catalogue_corpus, read_corpus, read_queries
from pipelines.text_measures import best_possible, compare, mean_of, measure
from pipelines.text_models import build_model, load_text_config, train
from pipelines.text_pairs import PairSource, sample, split_of
from pipelines.text_train import TextLoop
from ranking.dense_encoder import DenseEncoder
from ranking.fusion import Ranking, convex_fusion
from ranking.splade import Splade
from ranking.text_backbone import in_passes
from ranking.text_models import load_encoder
from recsys.files import write_json

RESULTS = Path(__file__).parent / "results" / "text"
CORPORA = ("cranfield", "med", "scifact")
LENGTHS = (16, 32, 64)
MOST = 300  # queries of a cut task
ROWS = ("off", "c_only", "linear_map", "slr", "llr", "clr")
SEEDS = (0, 1, 2)
FOLDS = 5


@dataclasses.dataclass(frozen=True)
class Place:
    """Where the data and the intermediate files are."""

    data: Path
    work: Path

    def stages(self, name: str, splade: bool = False) -> FirstStages:
        if name == "catalogue":
            corpus = catalogue_corpus(self.work / "log" / "items.parquet")
        else:
            corpus = read_corpus(self.data / name)
        report = lambda done, total: print(f"  {name}: {done}/{total} passages", flush=True)  # noqa: E731
        return FirstStages(
            corpus, DenseEncoder.of(), self.work / "cache", Splade.of() if splade else None, report=report
        )

    def tasks(self, stages: FirstStages, split: str = "test") -> dict[str, Queries]:
        """Natural queries (test only), and cut ones of one split, all lengths from the same documents."""
        corpus = stages.corpus
        source = PairSource(corpus, stages.encoder.tokenizer)  # type: ignore[attr-defined]
        rows = source.rows(split)  # type: ignore[arg-type]
        if corpus.name == "catalogue":
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
    """BM25, dense, SPLADE, RRF and the convex fusion on every task of a corpus."""
    stages = place.stages(name, splade=True)
    weight = stages.choose_weight(place.tasks(stages, "dev"))
    out: dict[str, Any] = {"weight": weight, "tasks": {}}
    for task, queries in place.tasks(stages).items():
        rankings = stages.all(queries.texts, weight)
        systems = {system: figures(ranking, queries, name) for system, ranking in rankings.items()}
        best = {system: best_possible(ranking, queries) for system, ranking in rankings.items()}
        out["tasks"][task] = {"n": len(queries), "systems": systems, "best_possible": best}
    return out


def lexsembridge(place: Place, name: str, kind: str, seed: int, how: str = "fusion") -> dict[str, Any]:
    """One row of the main table: trained on the training documents, judged beside the plain encoder."""
    stages = place.stages(name)
    sets = [f"model.weights={kind}", f"train={how}", f"seed={seed}", f"corpus.path={place.data / name}"]
    sets += ["corpus.unit=token", "corpus.part_of_passage=[16, 32]", "corpus.terms=5", "group=8"]
    if how == "full":
        sets += ["group=2", "stop.steps=150", "stop.validate_every=50", "rows=16"]
    if name == "scifact":
        sets += ["corpus.natural=train"]
    config = load_text_config(CONFIGS / "lexsembridge.toml", sets)
    directory = place.work / "runs" / f"{name}-{kind}-{how}-{seed}"
    run = train(config, place.work, directory, place.work / "cache", f"sqlite:///{place.work.resolve()}/mlflow.db")
    model = load_encoder(run.model)
    passages = stages.passage_vectors if how == "fusion" else model.encode_passages(stages.corpus.passages)
    weight = stages.choose_weight(place.tasks(stages, "dev"))
    out: dict[str, Any] = {"train": run.table(), "weight": weight, "tasks": {}, "per_query": {}}
    for task, queries in place.tasks(stages).items():
        found = dense_search(model.encode_queries(queries.texts), passages)
        plain = stages.dense(queries.texts)
        hybrid = convex_fusion(stages.bm25.search(queries.texts), found, weight)
        gain = {}
        for key in ("ndcg_at_10", "hit_at_1"):
            gain[key] = compare(measure(found, queries)[key], measure(plain, queries)[key]).table()
        systems = {"enhanced": figures(found, queries, name), "hybrid": figures(hybrid, queries, name)}
        out["tasks"][task] = {"n": len(queries), "systems": systems, "against_plain": gain}
        out["per_query"][task] = [round(float(value), 5) for value in measure(found, queries)["hit_at_1"]]
    return out


def reranker(
    place: Place, name: str, model: str, seed: int, backbone: str = "splade-tiny", **options: Any
) -> dict[str, Any]:
    """MVP or the cross-encoder over the RRF top 100: SciFact trained on its train split, Cranfield in five folds."""
    stages = place.stages(name)
    sets = [f"model.backbone={backbone}", f"seed={seed}", "stop.steps=400", "stop.validate_every=100"]
    sets += ["optimiser.learning_rate=1e-4", "optimiser.learning_rate_fresh=5e-4"]
    if model == "mvp":
        sets += [f"model.views={options.get('views', 4)}", f"orthogonal={options.get('orthogonal', 1.0)}"]
        sets += ["model.decoder_heads=4"] if backbone == "splade-tiny" else []
    config = load_text_config(CONFIGS / f"{model}.toml", sets)
    queries = read_queries(place.data / name, stages.corpus, "test")
    folds = [[*range(len(queries))]]
    if name == "cranfield":
        folds = [list(range(fold, len(queries), FOLDS)) for fold in range(FOLDS)]
    order = np.full((len(queries), 100), -1, np.int32)
    seconds, identical = 0.0, True
    for number, test in enumerate(folds):
        built = build_model(config)
        learn, dev = natural_pools(place, stages, name, queries, test)
        task = RerankerTask(config, built, stages.corpus, learn, dev)
        path = place.work / "runs" / f"{name}-{model}-{seed}-{number}-{json.dumps(options)}.safetensors"
        loop = TextLoop(task, path, "study", config.optimiser, config.stop, seed)
        loop.run_to_end(
            lambda done, total, words: print(f"  {done}/{total} {words}", flush=True) if done % 50 == 0 else None
        )
        seconds += loop.progress.seconds
        pool = make_pool(stages, queries.only(test))
        order[test] = rerank_pool(built, stages.corpus, pool, 100).rows
        few = Pool(pool.queries.only(range(10)), Ranking(pool.ranking.rows[:10], pool.ranking.scores[:10]))
        shuffled = np.random.default_rng(seed).permutation(100).tolist()
        identical &= bool((rerank_pool(built, stages.corpus, few, 100, shuffled).rows == order[test[:10]]).all())
        path.unlink(missing_ok=True)
    ranking = Ranking(order, np.zeros(order.shape, np.float32))
    first = stages.all(queries.texts)["rrf"]
    ours, theirs = measure(ranking, queries), measure(first, queries)
    return {
        "train_seconds": seconds,
        "shuffled_order_identical": identical,
        "reranked": figures(ranking, queries, name),
        "first_stage": figures(first, queries, name),
        "best_possible": best_possible(first, queries),
        "against_first_stage": compare(ours["ndcg_at_10"], theirs["ndcg_at_10"]).table(),
        "per_query": [round(float(value), 5) for value in ours["ndcg_at_10"]],
    }


def make_pool(stages: FirstStages, queries: Queries) -> Pool:
    return Pool(queries, stages.all(queries.texts)["rrf"])


def natural_pools(place: Place, stages: FirstStages, name: str, queries: Queries, test: list[int]) -> tuple[Pool, Pool]:
    """Training and dev pools: SciFact's train split, or the queries of the other folds; a tenth is for dev."""
    known = read_queries(place.data / name, stages.corpus, "train") if name == "scifact" else queries
    held = set() if name == "scifact" else set(test)
    free = [place_ for place_ in range(len(known)) if place_ not in held]
    dev = [p for p in free if split_of(name, f"query/{known.ids[p]}") == "dev"][:60]
    return make_pool(stages, known.only([p for p in free if p not in dev])), make_pool(stages, known.only(dev))


def cost(place: Place) -> dict[str, Any]:
    """Passages per second of a fixed-length loop and of length-batched encoding, at equal vectors, in one run."""
    encoder = DenseEncoder.of()
    texts = read_corpus(place.data / "cranfield").passages[:200]
    rows = encoder.tokenizer.encode(texts, 256)
    fixed = [row + [encoder.tokenizer.pad] * (256 - len(row)) for row in rows]
    pad = encoder.tokenizer.pad

    def plain() -> np.ndarray:
        out = []
        for first in range(0, len(fixed), 16):
            with torch.inference_mode():
                ids = torch.tensor(fixed[first : first + 16])
                mask = torch.tensor([[1] * len(r) + [0] * (256 - len(r)) for r in rows[first : first + 16]])
                out.append(encoder(ids, mask).numpy())
        return np.concatenate(out)

    def batched() -> np.ndarray:
        return in_passes(rows, pad, torch.device("cpu"), encoder)

    seconds: dict[str, list[float]] = {"fixed_length": [], "by_length": []}
    vectors = {}
    for _ in range(3):
        for name, run in (("fixed_length", plain), ("by_length", batched)):
            started = time.perf_counter()
            vectors[name] = run()
            seconds[name].append(time.perf_counter() - started)
    median = {name: float(np.median(values)) for name, values in seconds.items()}
    return {
        "passages": len(texts),
        "median_tokens": float(np.median([len(row) for row in rows])),
        "passages_per_second": {name: len(texts) / value for name, value in median.items()},
        "ratio": median["fixed_length"] / median["by_length"],
        "largest_difference": float(np.abs(vectors["fixed_length"] - vectors["by_length"]).max()),
    }


def cells() -> dict[str, Callable[[Place], dict[str, Any]]]:
    """Every cell by name, the quick ones first."""
    made: dict[str, Callable[[Place], dict[str, Any]]] = {"cost": cost}
    for name in CORPORA:
        made[f"first_stages-{name}"] = lambda p, name=name: first_stages(p, name)
    for name in CORPORA:
        for kind in ROWS:
            for seed in SEEDS:
                key = f"lexsembridge-{name}-{kind}-fusion-{seed}"
                made[key] = lambda p, name=name, kind=kind, seed=seed: lexsembridge(p, name, kind, seed)
        for kind in ("off", "slr"):
            key = f"lexsembridge-{name}-{kind}-full-0"
            made[key] = lambda p, name=name, kind=kind: lexsembridge(p, name, kind, 0, "full")
    for name in ("scifact", "cranfield"):
        for backbone in ("splade-tiny", "minilm"):
            for model in ("mvp", "cross_encoder"):
                for seed in SEEDS:
                    key = f"{model}-{name}-{backbone}-{seed}"
                    made[key] = lambda p, a=(name, model, seed, backbone): reranker(p, *a)
        for views, orthogonal in ((1, 1.0), (2, 1.0), (4, 0.0)):
            key = f"mvp-{name}-splade-tiny-views{views}-orthogonal{orthogonal}"
            made[key] = lambda p, name=name, o={"views": views, "orthogonal": orthogonal}: reranker(
                p, name, "mvp", 0, **o
            )
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


def lines_of(name: str) -> list[str]:
    path = RESULTS / f"{name}.json"
    if not path.exists():
        return [f"| {name} | not run | | |"]
    found = json.loads(path.read_text())
    if "reranked" in found:
        first, ours = (percent(found[key]["ndcg_at_10"]) for key in ("first_stage", "reranked"))
        return [f"| {name} | {ours} | RRF {first} | {signed(found['against_first_stage'])} |"]
    if "ratio" in found:
        speed = ", ".join(f"{key} {value:.1f}/s" for key, value in found["passages_per_second"].items())
        return [f"| {name} | {speed} | ratio {found['ratio']:.2f} | difference {found['largest_difference']:.1e} |"]
    lines = []
    for task, values in found["tasks"].items():
        for system, measures in values["systems"].items():
            gain = values.get("against_plain", {}).get("hit_at_1") if system == "enhanced" else None
            pair = f"{percent(measures['ndcg_at_10'])} | {percent(measures['hit_at_1'])}"
            lines.append(f"| {name} {task} {system} | {pair} | {signed(gain) if gain else ''} |")
    return lines


def tables() -> str:
    """Every cell as lines; those that have not run say so."""
    head = ["| cell | nDCG@10 | hit@1, of rerankers the first stage's nDCG@10 | difference |", "|---|---|---|---|"]
    return "\n".join([*head, *(line for name in cells() for line in lines_of(name))])


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
