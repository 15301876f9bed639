"""Grows the trees of `ranking.gradient_boosting` on the requests and sampled negatives that the other rankers train on.

The training loop takes its steps by gradients; trees have none. They are grown once, from as many of the loop's batches
as another model would see, and from then on the model is validated, saved and published like any other.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipelines.batches import TrainingBatches
from pipelines.prepared import Requests
from ranking.batch import Batch
from ranking.embeddings import take
from ranking.followers import Held
from ranking.gradient_boosting import LAST_ACTION, RISING, GradientBoosting, Training, lightgbm
from recsys.errors import DataError
from recsys.history import DAY
from recsys.progress import Progress, silent
from recsys.randomness import derive


@dataclass(frozen=True)
class Recent:
    """Training events of the last days of the training period."""

    count: Tensor  # int64 [V]
    since: int  # events after this moment count


def recent_counts(requests: Requests, rows: int, days: float) -> Recent:
    """Count the positives of the last `days` of training requests by item row."""
    if not len(requests):
        return Recent(torch.zeros(rows, dtype=torch.int64), 0)
    since = int(requests.at.max() - days * DAY)
    kept = np.repeat(requests.at > since, np.diff(requests.offsets))
    return Recent(torch.from_numpy(np.bincount(requests.positive[kept], minlength=rows)), since)


def grow_from(
    model: GradientBoosting, batches: TrainingBatches, steps: int, seed: int, progress: Progress = silent
) -> None:
    """Grow the trees of a model in place from the batches that a model with gradients would take `steps` steps on."""
    sizes = torch.from_numpy(np.diff(batches.requests.offsets))
    seen = ((batches.batch(step), sizes[batches.chosen(step)]) for step in range(steps))
    grow(model, seen, recent_counts(batches.requests, len(model.items), model.config.recent_days), seed, progress)


def grow(
    model: GradientBoosting,
    batches: Iterable[tuple[Batch, Tensor]],
    recent: Recent,
    seed: int,
    progress: Progress = silent,
) -> None:
    """Grow the trees of a model in place.

    Args:
        model: its `recent` and `trees` are replaced.
        batches: requests with sampled negatives, all of them part of the training counts; beside each batch int64 [B],
            the distinct items of each request's whole basket.
        recent: training events of the last days.
        seed: of the trees.
        progress: called after every tree.

    Raises:
        ConfigError: the package `lightgbm` is not installed.
        DataError: the labels are all alike.

    Cost: all rows are held as float32, 52 bytes each (56 with actions). The same rows, seed and version of LightGBM
    give the same trees.
    """
    module, config = lightgbm(), model.config
    model.recent = recent.count.to(model.recent.device)
    rows = _rows(model, batches, recent.since)
    positive = int(rows.label.sum())
    if not 0 < positive < len(rows.label):
        raise DataError(f"lightgbm: {positive} of {len(rows.label)} training rows are positive; expected both kinds")
    parameters = {
        "objective": "binary",
        "num_leaves": config.leaves,
        "learning_rate": config.learning_rate,
        "min_data_in_leaf": config.least_rows,
        "monotone_constraints": [int(name in RISING) for name in config.features],
        "seed": derive(seed, 0, "trees") & 0x7FFFFFFF,
        "num_threads": torch.get_num_threads(),
        "deterministic": True,
        "force_row_wise": True,  # what LightGBM would choose by timing, and so differently from run to run
        "verbosity": -1,
    }
    data = module.Dataset(
        rows.features,
        rows.label,
        init_score=rows.start,
        feature_name=list(config.features),
        categorical_feature=[LAST_ACTION] if config.actions else [],
        params=parameters,
    )
    grown = module.train(parameters, data, num_boost_round=config.trees, callbacks=[_watching(progress, config.trees)])
    text = bytearray(grown.model_to_string().encode())
    model.trees = torch.frombuffer(text, dtype=torch.uint8).to(model.recent.device)


class Rows(NamedTuple):
    """Candidates to learn from."""

    features: NDArray[np.float32]  # [R, F]
    label: NDArray[np.float32]  # [R]
    start: NDArray[np.float32]  # [R], logit before the first tree: minus the log_q, as in `binary_cross_entropy`


def _rows(model: GradientBoosting, batches: Iterable[tuple[Batch, Tensor]], since: int) -> Rows:
    """Return the rows to learn from.

    A positive whose only training event is this very request is left out: no negative has a count of 0 (samplers draw
    trained items), so every item new after training would look like a positive.
    """
    nothing = np.empty(0, np.float32)
    parts = [Rows(np.empty((0, len(model.config.features)), np.float32), nothing, nothing)]
    device = model.recent.device
    with torch.inference_mode():
        for batch, size in ((batch.to(device), size.to(device)) for batch, size in batches):
            request = batch.request
            mask = batch.candidates.mask & (take(model.items.count, batch.candidates.item) > batch.label)
            training = Training(Held(batch.label, size), request.at > since)
            features = model.features(model.encode(batch.history), request, batch.candidates, training)
            log_q = torch.zeros_like(batch.label) if batch.log_q is None else batch.log_q
            parts.append(Rows(*(x[mask].cpu().numpy() for x in (features, batch.label, -log_q))))
    return Rows(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def _watching(progress: Progress, trees: int) -> Callable[[object], None]:
    done = 0

    def after_a_tree(_: object) -> None:
        nonlocal done
        done += 1
        progress(done, trees, f"lightgbm tree {done}")

    return after_a_tree
