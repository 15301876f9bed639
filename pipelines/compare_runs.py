"""What `recsys compare` compares: training runs, bundles, and scores an evaluation kept.

a name          directory of a run in the workspace
32 digits       an MLflow run id: a run of the workspace, or the bundle that was registered under it
a directory     a bundle
a .safetensors  scores under `predictions/` of an evaluation
"""

import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.tracking import tracking_client
from pipelines.train import trained_run
from pipelines.workspace import Workspace
from ranking.bundle import Bundle
from ranking.manifest import MANIFEST, read_manifest
from ranking.ranker import AnyRanker
from recsys.errors import ConfigError, DataError
from recsys.files import read_json, sha256_json


@dataclass(frozen=True)
class Subject:
    """Something to be compared.

    Attributes:
        name: as it was asked for.
        data_digest: of the prepared set it was trained on.
        method: digest of everything but the seed; None where that is not known (a bundle, kept scores).
        seed: of its training; None likewise.
        model: loads it; None for kept scores.
        scores: file of kept scores; None for the others.
    """

    name: str
    data_digest: str
    method: str | None = None
    seed: int | None = None
    model: Callable[[], AnyRanker] | None = None
    scores: Path | None = None


@contextmanager
def subjects(names: Sequence[str], place: Workspace, uri: str) -> Iterator[list[Subject]]:
    """Find what is meant by each name; bundles fetched from MLflow are kept until the block ends.

    Raises:
        ConfigError: fewer than two names, or one twice.
        DataError: nothing of that name.
    """
    if len(names) < 2 or len(set(names)) < len(names):
        raise ConfigError(f"to be compared: {', '.join(names) or 'nothing'}; expected two or more different runs")
    with tempfile.TemporaryDirectory() as folder:
        yield [_find(name, place, uri, Path(folder)) for name in names]


def _find(name: str, place: Workspace, uri: str, folder: Path) -> Subject:
    if (place.run(name) / "run.json").is_file():
        return _run(name, place.run(name), place)
    path = Path(name)
    if path.suffix == ".safetensors":
        return Subject(name, str(read_json(path.parent.parent / "metrics.json")["data_digest"]), scores=path)
    if (path / MANIFEST).is_file():
        return _bundle(name, path)
    if re.fullmatch(r"[0-9a-f]{32}", name):
        for about in sorted((place.root / "runs").rglob("run.json")):
            if read_json(about).get("run_id") == name:
                return _run(name, about.parent, place)
        return _bundle(name, _registered(name, uri, folder))
    known = ", ".join(sorted(one.parent.name for one in (place.root / "runs").glob("*/run.json"))) or "none"
    raise DataError(
        f"{name}: no run of this workspace (there are {known}), no MLflow run id, no bundle, and no kept scores"
    )


def _run(name: str, directory: Path, place: Workspace) -> Subject:
    about = read_json(directory / "run.json")
    config: dict[str, Any] = dict(about["config"])
    seed = config.pop("seed", None)
    prepared = place.prepared

    def load() -> AnyRanker:
        return trained_run(directory, prepared).model

    return Subject(name, str(about.get("data_digest", prepared.digest)), sha256_json(config), seed, load)


def _bundle(name: str, path: Path) -> Subject:
    manifest, _ = read_manifest(path)
    return Subject(name, manifest.provenance.data_digest, model=lambda: Bundle.load(path).ranker)


def _registered(run_id: str, uri: str, folder: Path) -> Path:
    """Fetch the bundle registered under a run, the newest if there are several."""
    from mlflow.exceptions import MlflowException

    client = tracking_client(uri)
    try:
        found = client.list_artifacts(run_id, "bundle")
        if not found:
            raise DataError(f"{run_id}: this MLflow run is not in the workspace and has no bundle; publish it first")
        return Path(client.download_artifacts(run_id, found[-1].path, str(folder)))
    except MlflowException as error:
        raise DataError(f"{run_id}: MLflow at {uri} gives no bundle of it: {error}") from error
