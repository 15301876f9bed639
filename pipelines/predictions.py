"""Scores of one model on fixed candidates, and the check that several models answered the very same questions.

R requests   N candidates over all of them
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file

from recsys.errors import DataError
from recsys.files import read_json


@dataclass(frozen=True)
class Predictions:
    """What one model gave for the candidates of one sampler.

    Attributes:
        name: of the model or run.
        data_digest: of the prepared set the requests come from.
        index: int64 [R], places of the requests in their split, ascending.
        user: int64 [R], whose they are.
        offsets: int64 [R + 1], where each request's candidates start.
        item: int32 [N] model rows.
        label: uint8 [N].
        score: float32 [N].
    """

    name: str
    data_digest: str
    index: NDArray[np.int64]
    user: NDArray[np.int64]
    offsets: NDArray[np.int64]
    item: NDArray[np.int32]
    label: NDArray[np.uint8]
    score: NDArray[np.float32]


def saved_predictions(path: Path, sampler: str) -> Predictions:
    """Read what an evaluation kept of one model, `<evaluation>/predictions/<model>.safetensors`.

    Raises:
        DataError: no such file, another sampler, or not beside the `requests.safetensors` it belongs to.
    """
    beside, metrics = path.parent / "requests.safetensors", path.parent.parent / "metrics.json"
    for wanted in (path, beside):
        if not wanted.is_file():
            raise DataError(f"{wanted}: no such file; expected what `recsys evaluate` keeps under predictions/")
    asked, given = load_file(beside), load_file(path)
    if sampler not in given or f"{sampler}.offsets" not in asked:
        known = ", ".join(sorted(name for name in given if "." not in name)) or "none"
        raise DataError(f"{path}: no scores for sampler {sampler!r}; there are those for {known}")
    return Predictions(
        path.stem,
        str(read_json(metrics)["data_digest"]),
        asked["index"],
        asked["user"],
        asked[f"{sampler}.offsets"],
        asked[f"{sampler}.item"],
        asked[f"{sampler}.label"],
        given[sampler],
    )


def same_data(digests: dict[str, str]) -> None:
    """Refuse runs of different prepared sets; raises `DataError` naming one run of each and both digests."""
    first, *others = digests
    for other in others:
        if digests[other] != digests[first]:
            raise DataError(
                f"{first} is of data {digests[first][:12]}, {other} of data {digests[other][:12]}; a comparison needs "
                "one prepared set: train or evaluate one of them again on the other's"
            )


def same_questions(predictions: Sequence[Predictions]) -> None:
    """Refuse predictions that cannot be paired request by request.

    Raises:
        DataError: other data, requests that one of them lacks (with their number), other candidates (with the number of
            requests), scores that do not fit the candidates, or a score that is not a number (the first row named).
    """
    same_data({one.name: one.data_digest for one in predictions})
    asked = np.unique(np.concatenate([one.index for one in predictions]))
    for one in predictions:
        _refuse_missing(one, asked)
        if len(one.score) != len(one.item):
            raise DataError(
                f"{one.name}: {len(one.score):,} scores for {len(one.item):,} candidates; expected one each"
            )
        _refuse_nan(one)
    first = predictions[0]
    for other in predictions[1:]:
        different = _different(first, other)
        if len(different):
            raise DataError(
                f"{first.name} and {other.name} scored different candidates in {len(different):,} of "
                f"{len(asked):,} requests, first in request {first.index[different[0]]}; score both on the same"
            )


def _refuse_missing(one: Predictions, asked: NDArray[np.int64]) -> None:
    missing = np.setdiff1d(asked, one.index)
    if len(missing):
        raise DataError(
            f"{one.name}: predictions are missing for {len(missing):,} of {len(asked):,} requests, first for request "
            f"{missing[0]}; a comparison needs every request scored by every model"
        )


def _refuse_nan(one: Predictions) -> None:
    wrong = np.isnan(one.score)
    if wrong.any():
        row = int(np.argmax(wrong))
        request = int(one.index[np.searchsorted(one.offsets, row, "right") - 1])
        raise DataError(
            f"{one.name}: {int(wrong.sum()):,} scores are NaN, the first at row {row} (request {request}, item row "
            f"{one.item[row]}); a model must give numbers"
        )


def _different(first: Predictions, other: Predictions) -> NDArray[np.int64]:
    """Return the places of the requests whose candidates or labels differ."""
    sizes = np.diff(first.offsets) != np.diff(other.offsets)
    if sizes.any():
        return np.flatnonzero(sizes)
    changed = (first.item != other.item) | (first.label != other.label)
    return np.unique(np.searchsorted(first.offsets, np.flatnonzero(changed), "right") - 1)
