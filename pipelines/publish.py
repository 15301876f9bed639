"""Publishing: trained models and a prepared set become a bundle, a user snapshot, and a version in MLflow."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray

from pipelines.cold_start import features_of, item_names, vectors_of
from pipelines.prepared import PreparedSet
from pipelines.reference import score_reference
from pipelines.tracking import git_commit, tracking_client
from pipelines.train import Trained
from ranking.batch import FIRST_ITEM, assemble
from ranking.bundle import Contents, write_bundle
from ranking.bundle_models import NamedModel
from ranking.calibration import Calibration
from ranking.content import match_content
from ranking.index import SAMPLE, IndexConfig
from ranking.manifest import MANIFEST, Provenance, read_manifest
from ranking.search_part import SearchContents
from ranking.snapshot import write_snapshot
from ranking.users import MAX_MOMENT
from recsys.columns import ITEM_ID, USER_ID
from recsys.errors import ConfigError, DataError
from recsys.files import read_json
from recsys.stores import LogMark

MODEL_NAME = "recsys"
"""Name of the registered model in MLflow."""


def publish(
    prepared: PreparedSet,
    ranker: Trained,
    retriever: Trained | None,
    out: Path,
    snapshot: Path,
    metrics: Mapping[str, Any],
    logs: Sequence[LogMark],
    index: IndexConfig | None = None,
    text: SearchContents | None = None,
    calibration: Calibration | None = None,
) -> str:
    """Write the bundle and the user snapshot, each whole or not at all, and give the bundle's version.

    Items without training events are matched by their content, and get vectors from it where content tells those of
    held-out items; how well it does is recorded with the metrics.

    Args:
        prepared: the set the models were trained on.
        ranker: scores the candidates.
        retriever: proposes candidates through the index; None leaves retrieval out.
        out: the bundle's directory.
        snapshot: the snapshot's directory.
        metrics: what is known of the ranker; numbers are kept.
        logs: what the set contains of a service's event log (`pipelines.from_serving.contained`, `pipelines.repeats`).
        index: how item vectors are indexed.
        text: what search needs; None publishes no search.
        calibration: makes the ranker's scores probabilities in answers; None leaves them as they are.

    Raises:
        DataError: the set's catalogue does not fit its item table.
        GateError: the index finds too little of what an exhaustive search finds; nothing is written.
    """
    contents = contents_of(prepared, ranker, retriever)
    features = features_of(prepared)
    contents = replace(
        contents, content=match_content(features, prepared.items.count), text=text, calibration=calibration
    )
    if retriever is not None:
        vectors, told = vectors_of(retriever.model, features)
        contents = replace(contents, content_vectors=vectors)
        metrics = {**metrics, **({f"content/{name}": value for name, value in asdict(told).items()} if told else {})}
    provenance = Provenance(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        commit=git_commit(),
        data_digest=prepared.digest,
        metrics=_numbers(metrics),
    )
    queries = None if retriever is None else _user_vectors(prepared, retriever.model)
    version = write_bundle(out, contents, provenance, index, queries=queries, reference=score_reference(prepared))
    user_ids = prepared.users[USER_ID].cast(pl.String).to_list()
    write_snapshot(snapshot, user_ids, prepared.histories, prepared.digest, logs)
    return version


def contents_of(prepared: PreparedSet, ranker: Trained, retriever: Trained | None) -> Contents:
    """Return what goes into the bundle: models, item ids and names by model row, keys and vocabulary."""
    rows = prepared.key_to_row
    catalogue = prepared.catalogue
    if len(catalogue) != len(rows) or int(rows.max(initial=0)) >= len(prepared.items):
        raise DataError(
            f"{prepared.directory}: {len(catalogue)} catalogue rows, {len(rows)} keys up to model row "
            f"{int(rows.max(initial=0))} of {len(prepared.items)}; prepare the set again"
        )
    ids = catalogue[ITEM_ID].cast(pl.String)
    item_ids = [""] * len(prepared.items)
    for row, item_id in zip(rows.tolist(), ids.to_list(), strict=True):
        if row >= FIRST_ITEM:
            item_ids[row] = item_id
    return Contents(
        items=prepared.items,
        item_ids=item_ids,
        names=item_names(prepared),
        key_to_row=rows,
        vocabulary=read_json(prepared.directory / "vocabulary.json"),
        actions=["", *prepared.manifest["actions"]],
        ranker=_named(ranker),
        retriever=_named(retriever) if retriever is not None else None,
    )


def register(
    bundle: Path, run_id: str, uri: str, model_name: str = MODEL_NAME, alias: str = "champion", client: Any = None
) -> str:
    """Put a bundle under a run in MLflow, as a new version of a registered model that carries `alias`.

    A bundle that is registered already is not copied again; it only takes the alias.

    Args:
        bundle: directory of the bundle.
        run_id: the run that trained its ranker.
        uri: tracking URI.
        model_name: name of the registered model.
        alias: `champion`, `challenger` or `shadow`.
        client: an MLflow client to use instead of a new one.

    Returns:
        The version in MLflow.

    Raises:
        ConfigError: MLflow refuses or cannot be reached.
    """
    from mlflow.exceptions import MlflowException

    manifest, digest = read_manifest(bundle)
    client = client or tracking_client(uri)
    try:
        if not client.search_registered_models(filter_string=f"name = '{model_name}'"):
            client.create_registered_model(model_name, description="Bundles: retriever, ranker, items and index.")
        known = [
            version
            for version in client.search_model_versions(f"name = '{model_name}'")
            if version.tags.get("bundle") == digest and version.run_id == run_id
        ]
        if known:
            version = str(known[0].version)
        else:
            place = f"bundle/{digest}"  # by digest, so that a later bundle of the run does not overwrite this one
            client.log_artifacts(run_id, str(bundle), place)
            tags: dict[str, str] = {"bundle": digest, "data": manifest.provenance.data_digest[:12]}
            tags |= {str(role): entry.name for role, entry in manifest.models.items()}
            source = f"runs:/{run_id}/{place}"
            version = str(client.create_model_version(model_name, source, run_id=run_id, tags=tags).version)
        client.set_registered_model_alias(model_name, alias, version)
    except MlflowException as error:
        raise ConfigError(f"MLflow at {uri}: cannot register {bundle / MANIFEST}: {error}") from error
    return version


def _user_vectors(prepared: PreparedSet, model: Any) -> NDArray[np.float32]:
    """Return the retriever's vectors of up to `SAMPLE` users, spread evenly: what its index will be asked."""
    histories = prepared.histories
    users = np.linspace(0, len(histories) - 1, min(SAMPLE, len(histories))).astype(np.int64)
    starts, ends = histories.offsets[users], histories.offsets[users + 1]
    users = users[ends > starts]
    starts, ends = histories.offsets[users], histories.offsets[users + 1]
    at = np.full(len(users), MAX_MOMENT, np.int64)
    nothing = np.empty((len(users), 0), np.int32)
    batch = assemble(histories.events, starts, ends, at, nothing, prepared.key_to_row, window=model.window)
    device = model.items.count.device
    with torch.inference_mode():
        vectors: NDArray[np.float32] = model.user_vectors(batch.to(device).history).float().cpu().numpy()
    return vectors


def _named(trained: Trained) -> NamedModel:
    return NamedModel(trained.config.name, trained.config.model, trained.model)


def _numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    return {
        name: float(value)
        for name, value in metrics.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    }
