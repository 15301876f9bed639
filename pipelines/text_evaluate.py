"""Evaluation of text models on a corpus: every system beside every first stage, on the same queries.

    NAME                an encoder alone, or a reranker over the best 100 of reciprocal ranks, as its paper has it
    NAME, fusion off    the same encoder without its fusion; NAME is compared with it
    NAME + bm25         an encoder in the hybrid, compared with the plain encoder in it
    NAME, as served     a reranker as a search does it: the hybrid's best 20, and not where a passage covers the query

Writes `metrics.json`, `report.html` and `report.md`: measures with intervals over queries, the paired difference to the
first stage a model starts from, how many queries it won and lost, and which.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipelines.first_stages import NATURAL, FirstStages, dense_search, windows_search
from pipelines.logged import log_report
from pipelines.pair_vectors import PairVectors
from pipelines.reranker_task import Pool, rerank_pool
from pipelines.text_config import CorpusConfig
from pipelines.text_corpus import Queries, read_queries
from pipelines.text_measures import Comparison, best_possible, compare, mean_of, measure
from pipelines.text_models import CATALOGUE, DEV, cut_queries, open_corpus
from pipelines.text_page import write_page
from pipelines.text_pairs import PairSource, sample
from pipelines.text_publish import tuning_queries
from pipelines.text_train import finished_run
from pipelines.workspace import Workspace
from ranking.dense_encoder import DenseEncoder
from ranking.devices import pick_device
from ranking.fusion import COVERED, POOL, WEIGHT, Ranking
from ranking.lexsembridge import LexSemBridge
from ranking.searched import SearchConfig
from ranking.text_models import ENCODERS, Vectors, load_encoder, load_reranker, read_config
from ranking.windows import Windows
from recsys.config import parse
from recsys.errors import ConfigError, DataError
from recsys.files import read_json, write_json
from recsys.metrics import Floats
from recsys.progress import Progress, silent, titled

RERANKED = 100
CUT_QUERIES = 300
"""Most queries of a kind that are cut from test documents."""


@dataclass(frozen=True)
class TextModelRun:
    """A finished text run, loaded."""

    name: str
    model: Any
    is_encoder: bool
    frozen: bool  # passage vectors are those of the plain encoder

    @staticmethod
    def load(name: str, directory: Path, device: torch.device | str = "cpu") -> "TextModelRun":
        """Load a run's model, to run on a device."""
        _, place = finished_run(directory)
        is_encoder = read_config(place)["kind"] in ENCODERS
        config = read_json(directory / "run.json")["config"]
        model: Any = load_encoder(place) if is_encoder else load_reranker(place)
        return TextModelRun(name, model.to(device), is_encoder, config["train"] == "fusion")

    def without_fusion(self) -> LexSemBridge | None:
        """Return the same encoder with its fusion off; None where there is none, or none in its queries."""
        if not isinstance(self.model, LexSemBridge) or not self.model.config.fusion_at_test:
            return None
        plain = copy.copy(self.model)
        plain.config = replace(plain.config, fusion_at_test=False)
        return plain


@dataclass(frozen=True)
class TaskResult:
    """Every system on one set of queries."""

    name: str
    queries: Queries
    values: dict[str, dict[str, Floats]]  # system -> measure -> [Q]
    baseline: dict[str, str]  # model -> the first stage it is compared with
    best_possible: float  # nDCG@10 of the best order of the pool

    def against_baseline(self) -> dict[str, Comparison]:
        """Compare each model's nDCG@10 with that of its first stage."""
        values = {name: value["ndcg_at_10"] for name, value in self.values.items()}
        return {name: compare(values[name], values[base]) for name, base in self.baseline.items()}

    def flat(self, name: str) -> dict[str, float]:
        """Return a model's measures as `test/<task>/<measure>`, ready to be logged."""
        return {f"test/{self.name}/{key}": float(value.mean()) for key, value in self.values[name].items()}

    def table(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        systems: dict[str, dict[str, dict[str, float | None]]] = {}
        for name, values in self.values.items():
            systems[name] = {}
            for key, estimate in mean_of(values).items():
                value, low, high = estimate.told()
                systems[name][key] = {"value": value, "ci_low": low, "ci_high": high}
        differences = {
            name: {"baseline": self.baseline[name], **found.table()} for name, found in self.against_baseline().items()
        }
        return {
            "n_queries": len(self.queries),
            "best_possible_ndcg_at_10": self.best_possible,
            "systems": systems,
            "ndcg_at_10_against_baseline": differences,
        }


def evaluate_text(
    runs: Sequence[TextModelRun],
    stages: FirstStages,
    tasks: Mapping[str, Queries],
    weight: float,
    places: int = RERANKED,
    progress: Progress = silent,
) -> list[TaskResult]:
    """Rank every task's queries with every first stage and every model.

    Args:
        runs: trained models.
        stages: over the corpus.
        tasks: queries by name of the task.
        weight: of BM25 in the hybrid, chosen on natural dev queries.
        places: how many passages of the RRF pool a reranker reads.
        progress: called with a system and how many queries are done.
    """
    results: list[TaskResult] = []
    for name, queries in tasks.items():
        rankings = stages.all(queries.texts, weight)
        pool = Pool(queries, rankings["rrf"])
        baseline: dict[str, str] = {}
        for run in runs:
            progress(len(results), len(tasks), f"{name}: {run.name}")
            if run.is_encoder:
                asked, (vectors, windows) = run.model.encode_queries(queries.texts), encoded(run, stages)
                rankings[run.name] = dense_search(asked, vectors[: len(stages.corpus)])
                near = windows_search(asked, vectors, windows, POOL)
                rankings[f"{run.name} + bm25"] = stages.hybrid(queries.texts, weight, near)
                baseline |= {run.name: "dense", f"{run.name} + bm25": "hybrid"}
                if (plain := run.without_fusion()) is not None:
                    off = f"{run.name}, fusion off"
                    rankings[off] = dense_search(plain.encode_queries(queries.texts), vectors[: len(stages.corpus)])
                    baseline |= {run.name: off, off: "dense"}
            else:
                rankings[run.name] = reranked(run, stages, pool, places)
                served = f"{run.name}, as served"
                rankings[served] = as_served(run, stages, Pool(queries, rankings["hybrid"]))
                baseline |= {run.name: "rrf", served: "hybrid"}
        values = {system: measure(ranking, queries) for system, ranking in rankings.items()}
        results.append(TaskResult(name, queries, values, baseline, best_possible(rankings["rrf"], queries)))
    return results


def encoded(run: TextModelRun, stages: FirstStages) -> tuple[Vectors, Windows]:
    """Return the passages' windows and a run's vectors of them, the first stage's where that has the same backbone."""
    if run.frozen and isinstance(stages.encoder, DenseEncoder) and isinstance(run.model, LexSemBridge):
        ours, plain = run.model.config, stages.encoder.config
        same = ("backbone", "pool", "max_passage_len")
        if not ours.fusion_passages and all(getattr(ours, name) == getattr(plain, name) for name in same):
            return stages.window_vectors, stages.windows
    windows = run.model.windows(stages.corpus.passages)
    return stages.of_windows(run.model, windows), windows


def reranked(run: TextModelRun, stages: FirstStages, pool: Pool, places: int) -> Ranking:
    """Rerank the first places of a pool, each pair read once and kept, and keep the rest of it below them."""
    head = rerank_pool(run.model, stages.corpus, pool, places, vectors=PairVectors.of(run.model, stages.cache))
    tail = pool.ranking.rows[:, places:]
    low = np.full(tail.shape, -np.inf, np.float32)
    return Ranking(np.concatenate([head.rows, tail], axis=1), np.concatenate([head.scores, low], axis=1))


def as_served(run: TextModelRun, stages: FirstStages, pool: Pool) -> Ranking:
    """Rerank a hybrid's head as `ranking.searcher` does without a limit of time, and keep the rest of it below."""
    found = reranked(run, stages, pool, SearchConfig().rerank)
    covered = stages.coverage(pool.queries.texts, stages.bm25.search(pool.queries.texts, 1)) >= COVERED
    rows = np.where(covered[:, None], pool.ranking.rows, found.rows)
    return Ranking(rows, np.where(covered[:, None], pool.ranking.scores, found.scores))


def write_text_report(results: Sequence[TaskResult], about: Mapping[str, Any], directory: Path) -> Path:
    """Write `metrics.json`, `report.html` and `report.md`; gives the path of the page."""
    write_json(directory / "metrics.json", {**about, "tasks": {result.name: result.table() for result in results}})
    return write_page(results, about, directory)


def evaluate_runs(
    names: Sequence[str],
    place: Workspace,
    uri: str,
    corpus: str | None = None,
    split: str = "",
    say: Callable[[str], None] = lambda _: None,
    progress: Progress = silent,
) -> Path:
    """Evaluate finished runs of a workspace, write the report and log it; gives the path of the page.

    Judged are queries of `split` and those cut from test documents, as the first run's corpus and tokenizer say.

    Args:
        names: of the runs.
        place: the workspace.
        uri: MLflow tracking URI.
        corpus: a folder in BEIR's layout; what the first run was trained on if absent.
        split: of its judged queries; `test` where there is one if absent.
        say: takes what the user should know beside the report.
        progress: told as work goes on.

    Raises:
        ConfigError: there is no query to judge by, or a split of the catalogue is named.
        DataError: a run or the corpus is not as it should be.
    """
    about = {name: read_json(place.run(name) / "run.json") for name in names}
    first = about[names[0]]["config"]
    options = parse(CorpusConfig, first["corpus"] | ({"path": corpus} if corpus else {}), "run.json [corpus]")
    folder = Path(options.path)
    if not split and (folder / "qrels/test.tsv").is_file():
        split = "test"
    if split and options.path == CATALOGUE:
        raise ConfigError("the catalogue has no judged queries; leave --split out, or give --corpus a folder")
    opened = open_corpus(options.path, place.items)
    device = pick_device(first.get("device", "auto"))
    models = [TextModelRun.load(name, place.run(name), device) for name in names]
    encoder = DenseEncoder.of().to(device)
    tasks = _tasks(options, PairSource(opened, models[0].model.tokenizer), folder, split)
    facts: dict[str, Any] = {"corpus": opened.name, "passages": len(opened)}
    learned = [name for name in names if split and _learned_from(about[name]["config"]["corpus"], folder, split)]
    if learned:
        say(f"{', '.join(learned)} learned from the queries of {split}: figures say nothing of new ones.")
        facts["learned from these queries"] = ", ".join(learned)
    stages = FirstStages(opened, encoder, place.text_vectors, progress=titled(progress, "passages encoded"))
    tuned = tuning_queries(folder, opened, but=split) if folder.is_dir() else None
    weight = stages.choose_weight({} if tuned is None else {NATURAL: tuned})
    chosen = "shipped" if tuned is None or weight == WEIGHT else f"by {len(tuned)} of the corpus' dev or train queries"
    facts["weight of words"] = f"{weight:g}, {chosen}"
    results = evaluate_text(models, stages, tasks, weight, progress=progress)
    directory = place.evaluation / "text"
    page = write_text_report(results, facts, directory)
    measured = {name: {key: value for one in results for key, value in one.flat(name).items()} for name in names}
    log_report(measured, directory, {name: one["run_id"] for name, one in about.items()}, uri)
    return page


def _learned_from(corpus: Mapping[str, Any], folder: Path, split: str) -> bool:
    """Whether a run learned from a split of a folder, or chose its best step by it, as it does by a dev split."""
    if folder.resolve() not in (Path(path).resolve() for path in (corpus["path"], *corpus["also"])):
        return False
    return split in ((corpus["natural"], DEV) if corpus["natural"] else ())


def _tasks(options: CorpusConfig, source: PairSource, folder: Path, split: str) -> dict[str, Queries]:
    """Return the queries to judge by, by name: natural ones first."""
    tasks = {} if not split else {f"natural {split}": read_queries(folder, source.corpus, split)}
    if any(not len(queries) for queries in tasks.values()):
        raise DataError(f"{folder / 'qrels' / split}.tsv: 0 judged queries; expected a line for each judged document")
    for kind, queries in cut_queries(options, source, "test").items():
        tasks[kind] = sample(queries, CUT_QUERIES, 0)
    if not tasks:
        raise ConfigError(f"{options.path}: 0 queries to judge by; give --split, one of its qrels/*.tsv")
    return tasks
