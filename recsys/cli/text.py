"""What `train` and `evaluate` do for text models: same verbs, another kind of data."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from recsys.errors import ConfigError
from recsys.terminal import Terminal, print_result

if TYPE_CHECKING:
    from pipelines.workspace import Workspace


def train_text(
    path: Path, place: "Workspace", name: str | None, mlflow: str | None, assignments: Sequence[str], as_json: bool
) -> None:
    """Train a text model on the catalogue of a workspace or on a corpus folder."""
    from pipelines import text_models

    options = text_models.load_text_config(path, assignments)
    if options.corpus.path == "catalogue":
        place.require(place.items, "ingest")
    place.root.mkdir(parents=True, exist_ok=True)
    directory = place.run(name or path.stem)
    with Terminal().bar(f"train {options.name}") as bar:
        trained = text_models.train(
            options, place.items, directory, place.text_vectors, mlflow or place.tracking_uri, progress=bar
        )
    print_result(trained.table(), as_json)


def evaluate_text(
    runs: Sequence[str], place: "Workspace", corpus: str | None, split: str, mlflow: str | None, as_json: bool
) -> None:
    """Rank test queries with text models and every first stage; write and log metrics.json and the report."""
    from pipelines.text_evaluate import evaluate_runs

    with Terminal().bar("evaluate") as bar:
        report = evaluate_runs(
            runs,
            place,
            mlflow or place.tracking_uri,
            corpus,
            split,
            Terminal().say,
            bar,
        )
    Terminal().say(f"Report: {report.resolve()}")
    if as_json:
        typer.echo((report.parent / "metrics.json").read_text())


def is_text_config(path: Path) -> bool:
    """Return whether a training TOML names a text model."""
    from pipelines.text_config import TEXT_MODELS
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
