"""Runs in MLflow: sqlite in the workspace by default, any tracking URI by configuration."""

import os
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recsys.errors import ConfigError
from recsys.files import alone, read_json

EXPERIMENT = "recsys"
SQLITE = "sqlite:///"


def default_uri(workspace: Path) -> str:
    """Return the tracking URI of a workspace: its own sqlite file."""
    return f"{SQLITE}{(workspace / 'mlflow.db').resolve()}"


def git_commit() -> str:
    """Return the commit of the running code, `unknown` outside a checkout, with `-dirty` if files differ from it."""
    here = Path(__file__).parent
    try:
        commit = subprocess.run(
            ["git", "rev-parse", "--short=12", "HEAD"], cwd=here, capture_output=True, text=True, check=True
        ).stdout.strip()
        dirty = subprocess.run(["git", "diff", "--quiet", "HEAD"], cwd=here, capture_output=True, check=False)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{commit}-dirty" if dirty.returncode else commit


def known_run(directory: Path, inputs: str) -> str | None:
    """Return the id of the run that `directory` holds, if it is one of these inputs (a digest)."""
    about = directory / "run.json"
    known = read_json(about) if about.exists() else {}
    return str(known["run_id"]) if known.get("inputs") == inputs else None


@dataclass(frozen=True)
class Run:
    """One MLflow run, written to in batches: a call costs some 30 ms, so metrics are never sent singly."""

    run_id: str
    uri: str
    client: Any

    def params(self, values: Mapping[str, Any]) -> None:
        """Log parameters; nested tables become dotted names."""
        from mlflow.entities import Param

        flat = [Param(key, str(value)[:6000]) for key, value in _flatten(values).items()]
        self.client.log_batch(self.run_id, params=flat)

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Log the metrics of one step in one call; the characters MLflow refuses in names become underscores."""
        from mlflow.entities import Metric

        now = time.time_ns() // 1_000_000
        self.client.log_batch(self.run_id, metrics=[Metric(key, float(v), now, step) for key, v in values.items()])

    def tags(self, values: Mapping[str, str]) -> None:
        """Set tags."""
        from mlflow.entities import RunTag

        self.client.log_batch(self.run_id, tags=[RunTag(key, value) for key, value in values.items()])

    def artifacts(self, path: Path, name: str | None = None) -> None:
        """Copy a file or a directory into the run."""
        if path.is_dir():
            self.client.log_artifacts(self.run_id, str(path), name)
        else:
            self.client.log_artifact(self.run_id, str(path), name)


@contextmanager
def run(uri: str, name: str, run_id: str | None = None, experiment: str = EXPERIMENT) -> Iterator[Run]:
    """Open a run, or go on with `run_id`; it ends as FINISHED, FAILED or, on an interrupt, KILLED.

    Raises:
        ConfigError: the tracking server cannot be reached or the URI is not one MLflow understands.
    """
    client = tracking_client(uri)
    try:
        experiment_id = _experiment(client, uri, experiment)
        if run_id is None:
            run_id = client.create_run(experiment_id, run_name=name).info.run_id
        else:
            client.update_run(run_id, status="RUNNING")
    except Exception as error:
        raise ConfigError(f"MLflow at {uri}: {error}; check the tracking URI") from error
    status = "FINISHED"
    try:
        yield Run(run_id, uri, client)
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    except BaseException:
        status = "FAILED"
        raise
    finally:
        client.set_terminated(run_id, status)


def _experiment(client: Any, uri: str, name: str) -> str:
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return str(client.create_experiment(name, artifact_location=_artifact_location(uri)))
        except MlflowException:  # another process may have created it meanwhile
            found = client.get_experiment_by_name(name)
            if found is None:
                raise
    return str(found.experiment_id)


def _sqlite_file(uri: str) -> Path | None:
    return Path(uri.removeprefix(SQLITE).partition("?")[0]) if uri.startswith(SQLITE) else None


def _artifact_location(uri: str) -> str | None:
    """Keep artifacts beside a sqlite file; a tracking server decides for itself."""
    database = _sqlite_file(uri)
    return (database.parent / "mlartifacts").resolve().as_uri() if database else None


def tracking_client(uri: str) -> Any:
    """Return an MLflow client with telemetry off; raises `ConfigError` for a URI MLflow does not understand."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    import logging

    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    logging.getLogger("alembic").setLevel(logging.WARNING)
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    database = _sqlite_file(uri)
    writable = database is not None and os.access(database.parent, os.W_OK)
    # MLflow creates the tables step by step, which two processes can't do at once.
    lock = alone(database.with_suffix(".lock")) if database is not None and writable else nullcontext()
    try:
        with lock:
            return MlflowClient(tracking_uri=uri, registry_uri=uri)
    except MlflowException as error:
        raise ConfigError(f"MLflow at {uri}: {error}; check the tracking URI") from error


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
