"""What an evaluation leaves in MLflow: each model's metrics in its own run, with the report."""

from collections.abc import Mapping
from pathlib import Path

from pipelines.evaluation import Evaluation
from pipelines.tracking import Run, tracking_client
from recsys.errors import ConfigError

FILES = ("report.html", "report.md", "metrics.json")


def log_evaluation(evaluation: Evaluation, directory: Path, run_ids: Mapping[str, str], uri: str) -> None:
    """Log metrics and report to the run of each model.

    Args:
        evaluation: what was found.
        directory: holds the report.
        run_ids: MLflow run of each model.
        uri: tracking URI.

    Raises:
        ConfigError: MLflow does not know a run, or cannot be reached.
    """
    log_report({name: evaluation.flat(name) for name in run_ids}, directory, run_ids, uri)


def log_report(
    metrics: Mapping[str, Mapping[str, float]], directory: Path, run_ids: Mapping[str, str], uri: str
) -> None:
    """Log each model's metrics by name, and the report in `directory`, to its run; raises as `log_evaluation` does."""
    from mlflow.exceptions import MlflowException

    client = tracking_client(uri)
    for name, run_id in run_ids.items():
        run = Run(run_id, uri, client)
        try:
            run.metrics(metrics[name], 0)
            for file in FILES:
                run.artifacts(directory / file)
        except MlflowException as error:
            raise ConfigError(f"MLflow at {uri}: cannot log to run {run_id} of {name}: {error}") from error
