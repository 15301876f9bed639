"""What `train` and `evaluate` do for text models: same verbs, another kind of data."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from recsys.errors import ConfigError
from recsys.terminal import Terminal, print_result

if TYPE_CHECKING:
    from pipelines.workspace import Workspace

TEXT_MODELS = ("lexsembridge", "mvp", "mvp_apart", "cross_encoder")
"""of `pipelines.text_models`, which is imported only for one of them"""
ITEMS = "items.parquet"


def train_text(
    path: Path, place: "Workspace", name: str | None, mlflow: str | None, assignments: Sequence[str], as_json: bool
) -> None:
    """Train a text model on the catalogue of a workspace or on a corpus folder."""
    from pipelines.text_models import load_text_config
    from pipelines.text_models import train as run

    options = load_text_config(path, assignments)
    if options.corpus.path == "catalogue":
        place.require(place.log / ITEMS, "ingest")
    place.root.mkdir(parents=True, exist_ok=True)
    directory = place.run(name or path.stem)
    with Terminal().bar(f"train {options.name}") as bar:
        trained = run(
            options, place.log / ITEMS, directory, place.text_vectors, mlflow or place.tracking_uri, report=bar
        )
    print_result(trained.table(), as_json)


def evaluate_text(
    runs: Sequence[str], place: "Workspace", corpus: str | None, split: str, mlflow: str | None, as_json: bool
) -> None:
    """Rank test queries with text models and every first stage; write and log metrics.json and the report."""
    from pipelines.first_stages import NATURAL, FirstStages
    from pipelines.logged import log_report
    from pipelines.text_corpus import read_queries
    from pipelines.text_evaluate import TextModelRun, require_corpus, write_text_report
    from pipelines.text_evaluate import evaluate_text as run
    from pipelines.text_models import cut_queries, open_corpus
    from pipelines.text_pairs import PairSource, sample
    from pipelines.text_publish import tuning_queries
    from pipelines.text_train import CorpusConfig
    from ranking.dense_encoder import DenseEncoder
    from ranking.devices import pick_device
    from recsys.config import parse
    from recsys.files import read_json

    about: dict[str, Any] = read_json(place.run(runs[0]) / "run.json")["config"]
    options = parse(CorpusConfig, {**about["corpus"], **({"path": corpus} if corpus else {})}, "run.json [corpus]")
    folder = Path(options.path)
    if not split and (folder / "qrels/test.tsv").is_file():
        split = "test"
    require_corpus(options.path, split)
    opened = open_corpus(options.path, place.log / ITEMS)
    learned = [name for name in runs if read_json(place.run(name) / "run.json")["config"]["corpus"]["natural"] == split]
    if split and learned and not corpus:
        Terminal().say(f"{', '.join(learned)} learned from the queries of {split}: figures say nothing of new ones.")
    device = pick_device(about.get("device", "auto"))
    loaded = [TextModelRun.load(name, place.run(name), device) for name in runs]
    encoder = DenseEncoder.of().to(device)
    cut = cut_queries(options, PairSource(opened, encoder.tokenizer), "test")
    tasks = {kind: sample(queries, 300, 0) for kind, queries in cut.items()}
    if split:
        tasks = {f"natural {split}": read_queries(folder, opened, split), **tasks}
    if not tasks:
        raise ConfigError(f"{options.path}: 0 queries to judge by; give --split, one of its qrels/*.tsv")
    with Terminal().bar("evaluate") as bar:
        stages = FirstStages(
            opened, encoder, place.text_vectors, report=lambda done, total: bar(done, total, "passages encoded")
        )
        tuned = tuning_queries(folder, opened, but=split) if folder.is_dir() else None
        weight = stages.choose_weight({} if tuned is None else {NATURAL: tuned})
        results = run(loaded, stages, tasks, weight, report=lambda words, done, total: bar(done, total, words))
    chosen = "shipped" if tuned is None else f"by {len(tuned)} of the corpus' dev or train queries"
    facts = {"corpus": opened.name, "passages": len(opened), "weight of words": f"{weight:g}, {chosen}"}
    if learned and not corpus:
        facts["learned from these queries"] = ", ".join(learned)
    directory = place.evaluation / "text"
    report = write_text_report(results, facts, directory)
    run_ids = {name: read_json(place.run(name) / "run.json")["run_id"] for name in runs}
    measured = {name: {key: value for one in results for key, value in one.flat(name).items()} for name in runs}
    log_report(measured, directory, run_ids, mlflow or place.tracking_uri)
    Terminal().say(f"Report: {report.resolve()}")
    if as_json:
        typer.echo((directory / "metrics.json").read_text())


def is_text_config(path: Path) -> bool:
    """Return whether a training TOML names a text model."""
    from recsys.config import read_toml

    return read_toml(path).get("model", {}).get("name") in TEXT_MODELS


def all_text(place: "Workspace", runs: Sequence[str]) -> bool:
    """Return whether runs are text runs; raises `ConfigError` for a mixture."""
    from recsys.files import read_json

    known = [place.run(name) / "run.json" for name in runs]
    kinds = {read_json(path).get("kind") == "text" for path in known if path.exists()}
    if len(kinds) > 1:
        raise ConfigError(f"{', '.join(runs)}: text runs and rankers have no queries in common; evaluate them apart")
    return kinds == {True}
