"""The protocol of papers on leave-one-out sets: all items ranked, what the user has had masked, ties to the lowest id.

Each user's last event is the test target and the one before it the validation target (the split `last_request`). A
target's rank among all N items gives HR and NDCG (1 / log2(rank + 2), one target) at 5, 10 and 20, means over users.
The authors' code takes 2^32 off the score of what the user has had, so an item that comes again can't be found: yelp
has 2,020 such test targets. Which of two equal scores comes first is arbitrary there; here it is the lower item id.

The paper of MQSA-TED reads the newest 50 training items of each user, everywhere: `recsys ingest --dataset beauty
--newest 52` keeps those and the two targets. An item without training events scores as the model scores such items.

    R requests, one target each    N items
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipelines.prepared import PreparedSet, Split
from pipelines.samplers import Ragged
from pipelines.scoring import (
    GPU_SCORE_MATRIX,
    SCORE_MATRIX,
    Sample,
    all_scores,
    assemble_requests,
    draw_requests,
    evaluation_mode,
    is_retriever,
)
from ranking.batch import FIRST_ITEM, rows_of
from ranking.ranker import AnyRanker
from recsys.bootstrap import Estimate, Ratio, Statistic, bootstrap
from recsys.errors import DataError
from recsys.files import write_json
from recsys.progress import Progress, silent, titled

Protocol = Literal["candidates", "leave_one_out"]
"""How models are judged: on fixed sampled candidates and a sample of full rankings, or by this file's rules."""
CUTS = (5, 10, 20)
MASK = 2.0**32
"""Taken off the score of what the user has had."""


@dataclass(frozen=True)
class Ranks:
    """Where each user's target came among all items: user int64 [R], ascending, and rank int64 [R] from 0."""

    user: NDArray[np.int64]
    rank: NDArray[np.int64]

    def gains(self) -> dict[str, NDArray[np.float64]]:
        """Return HR and NDCG at each cut, float64 [R] each."""
        gain = 1 / np.log2(self.rank + 2.0)
        values: dict[str, NDArray[np.float64]] = {}
        for cut in CUTS:
            found = self.rank < cut
            values |= {f"hr_at_{cut}": found.astype(np.float64), f"ndcg_at_{cut}": np.where(found, gain, 0.0)}
        return values

    def metrics(self) -> dict[str, float]:
        """Return the means over users."""
        return {name: float(values.mean()) for name, values in self.gains().items()}

    def estimates(self, resamples: int, seed: int) -> dict[str, Estimate]:
        """Return the same with resamples of the users; equal seeds give equal resamples, so differences are paired."""
        ones, everybody = np.ones(len(self.rank)), np.arange(len(self.rank))
        statistics: dict[str, Statistic] = {
            name: Ratio.of_groups(values, everybody, len(ones), ones) for name, values in self.gains().items()
        }
        return bootstrap(statistics, len(ones), resamples, seed)


Scorer = Callable[[Sample], Tensor]
"""Gives the scores of all items, rows 2..V-1, for requests: [B, N]; what it gives is written to."""


def target_ranks(
    model: AnyRanker,
    prepared: PreparedSet,
    split: Split,
    max_requests: int | None = None,
    seed: int = 2023,
    progress: Progress = silent,
) -> Ranks:
    """Rank all items by a model for the requests of a split and find each one's target.

    Args:
        model: any ranker; a retriever's scores are inner products of its vectors, which is one matrix product.
        prepared: a set split by `last_request`.
        split: `valid` or `test`.
        max_requests: size of a sample of the requests, chosen by seed; all of them if absent.
        seed: of that sample.
        progress: told of requests after each batch.

    Raises:
        DataError: another split, or a request with several targets (baskets): the protocol knows one.

    Cost: N scores per request; of a retriever with 12,101 items on one thread 0.2 ms a request.
    """
    with evaluation_mode(model):
        on_cpu = model.items.count.device.type == "cpu"
        most = SCORE_MATRIX if on_cpu else GPU_SCORE_MATRIX
        return ranks_by(_scorer(model, prepared), prepared, split, max_requests, seed, progress, most)


def ranks_by(
    scorer: Scorer,
    prepared: PreparedSet,
    split: Split,
    max_requests: int | None = None,
    seed: int = 2023,
    progress: Progress = silent,
    most: int = SCORE_MATRIX,
) -> Ranks:
    """Rank all items by any scorer, at most `most` scores at a time; see `target_ranks`.

    Raises:
        DataError: as there, or a score that is not a number.
    """
    sample = _requests(prepared, split, max_requests, seed)
    place = _id_places(prepared)
    order = torch.from_numpy(place)
    rank, done = np.empty(len(sample), np.int64), 0
    for chosen in _batches(sample, len(place), most):
        part = sample.take(chosen)
        scores = scorer(part)  # [B, N]
        _refuse_nan(scores, part)
        scores.view(-1)[torch.from_numpy(_seen(prepared, part, len(place))).to(scores.device)] -= MASK
        target = torch.from_numpy(part.requests.positive.astype(np.int64) - FIRST_ITEM)
        rank[chosen] = rank_of(scores, target.to(scores.device), order.to(scores.device)).cpu().numpy()
        done += len(chosen)
        progress(done, len(sample))
    return Ranks(sample.requests.user.astype(np.int64), rank)


def rank_of(scores: Tensor, target: Tensor, order: Tensor | None = None) -> Tensor:
    """Return the rank of one item per row of scores [B, N], int64 [B] from 0.

    Args:
        scores: any float type.
        target: int64 [B], columns.
        order: int64 [N], which of two equal columns comes first (the smaller); the column itself if absent.
    """
    own = scores.gather(1, target[:, None])
    ahead = _count(scores > own)
    tied = _count(scores >= own) > ahead + 1
    if tied.any():
        places = torch.arange(scores.shape[1], device=scores.device) if order is None else order
        below = places[None, :] < places[target[tied]][:, None]
        ahead[tied] += _count((scores[tied] == own[tied]) & below)
    return ahead.long()


def validate(model: AnyRanker, prepared: PreparedSet, max_requests: int, seed: int = 2023) -> dict[str, float]:
    """Return what a training loop watches: HR and NDCG of the validation targets under the protocol."""
    return target_ranks(model, prepared, "valid", max_requests, seed).metrics()


@dataclass(frozen=True)
class Judged:
    """The metrics of several models on the same users, with intervals, and all paired differences."""

    split: str
    data_digest: str
    users: int
    metrics: dict[str, dict[str, float | None]]  # model -> name, name.ci_low, name.ci_high; None: no interval
    differences: list[dict[str, Any]]  # of NDCG, every two models

    def save(self, directory: Path) -> None:
        """Write leave_one_out.json."""
        write_json(directory / "leave_one_out.json", {"protocol": "leave_one_out", **vars(self)})

    def markdown(self) -> str:
        """Return the table that a paper prints, with intervals over resampled users for NDCG@10."""
        heads = [f"{name}@{cut}" for cut in CUTS for name in ("HR", "NDCG")]
        lines = [f"| model | {' | '.join(heads)} | 95 % of NDCG@10 |", "|---" * (len(heads) + 2) + "|"]
        for model, values in self.metrics.items():
            cells = [f"{values[f'{name}_at_{cut}']:.4f}" for cut in CUTS for name in ("hr", "ndcg")]
            low, high = (values[f"ndcg_at_10.{end}"] for end in ("ci_low", "ci_high"))
            interval = "–" if low is None or high is None else f"[{low:.4f}, {high:.4f}]"
            lines.append(f"| {model} | {' | '.join(cells)} | {interval} |")
        return "\n".join(lines) + "\n"


def evaluate(
    models: Mapping[str, AnyRanker],
    prepared: PreparedSet,
    split: Split = "test",
    resamples: int = 1000,
    level: float = 0.95,
    seed: int = 2023,
    progress: Progress = silent,
) -> Judged:
    """Judge models by the protocol on all users of a split; see `target_ranks` for what it needs."""
    total = len(prepared.requests(split))
    found: dict[str, dict[str, Estimate]] = {}
    for name, model in models.items():
        told = titled(progress, f"{name}: ranking all items")
        found[name] = target_ranks(model, prepared, split, progress=told).estimates(resamples, seed)
    metrics: dict[str, dict[str, float | None]] = {}
    for name, estimates in found.items():
        metrics[name] = {}
        for key, estimate in estimates.items():
            value, low, high = estimate.told(level)
            metrics[name] |= {key: value, f"{key}.ci_low": low, f"{key}.ci_high": high}
    names = list(models)
    pairs = [(one, two) for place, one in enumerate(names) for two in names[place + 1 :]]
    return Judged(split, prepared.digest, total, metrics, [_difference(one, two, found, level) for one, two in pairs])


def _difference(one: str, two: str, found: Mapping[str, Mapping[str, Estimate]], level: float) -> dict[str, Any]:
    difference = found[one]["ndcg_at_10"].minus(found[two]["ndcg_at_10"])
    value, low, high = difference.told(level)
    return {
        "metric": "ndcg_at_10",
        "model": one,
        "other": two,
        "difference": value,
        "ci_low": low,
        "ci_high": high,
    }


def _requests(prepared: PreparedSet, split: Split, most: int | None, seed: int) -> Sample:
    kind = prepared.manifest["config"]["split"]["kind"]
    if kind != "last_request":
        raise DataError(
            f"{prepared.directory}: split by {kind}; the protocol leave_one_out needs each user's last events: "
            "recsys prepare --set split.kind=last_request"
        )
    sample = draw_requests(prepared, split, len(prepared.requests(split)) if most is None else most, seed)
    sizes = np.diff(sample.requests.offsets)
    if not len(sample) or sizes.min() != 1 or sizes.max() != 1:
        found = "none" if not len(sample) else f"{sizes.min()} to {sizes.max()} targets in a request"
        raise DataError(f"{prepared.directory}: the protocol leave_one_out needs one target per request, found {found}")
    return sample


def _id_places(prepared: PreparedSet) -> NDArray[np.int64]:
    """Return the place of each item in the order of ids, int64 [N]: as numbers if all are, else as text."""
    rows = prepared.key_to_row
    ids = prepared.catalogue["item_id"].to_numpy()[np.argsort(rows, kind="stable")][np.sort(rows) >= FIRST_ITEM]
    text = pl.Series(ids)
    numbers = text.cast(pl.Int64, strict=False)
    keys = text if numbers.null_count() else numbers
    place = np.empty(len(ids), np.int64)
    place[keys.arg_sort().to_numpy()] = np.arange(len(ids))
    return place


def _batches(sample: Sample, items: int, most: int) -> Iterator[NDArray[np.int64]]:
    """Yield requests with histories of like length together, as many as keep their scores within bounds."""
    order = np.argsort(sample.length, kind="stable")
    size = min(max(most // max(items, 1), 1), 256 * (most // SCORE_MATRIX))
    for start in range(0, len(order), size):
        yield order[start : start + size]


def _scorer(model: AnyRanker, prepared: PreparedSet) -> Scorer:
    """Return what scores rows 2..V-1 for requests, float32 [B, N]."""
    rows = len(prepared.items) - FIRST_ITEM
    device = model.items.count.device
    none = np.zeros((1, 0), np.int32)

    def by_scores(part: Sample) -> Tensor:
        batch = assemble_requests(model, prepared, part, none.repeat(len(part), 0)).to(device)
        return all_scores(model, batch, rows)

    if not is_retriever(model):
        return by_scores
    vectors: Tensor = model.item_vectors()[FIRST_ITEM:]  # type: ignore[attr-defined]

    def by_vectors(part: Sample) -> Tensor:
        batch = assemble_requests(model, prepared, part, none.repeat(len(part), 0)).to(device)
        scores: Tensor = model.user_vectors(batch.history) @ vectors.T  # type: ignore[attr-defined]
        return scores

    return by_vectors


def _refuse_nan(scores: Tensor, part: Sample) -> None:
    if not scores.amin().isnan():  # which is NaN if any score is, at a tenth of the cost of looking at each
        return
    row, column = scores.isnan().nonzero()[0].tolist()
    raise DataError(f"the score of item row {column + FIRST_ITEM} for user {part.requests.user[row]} is NaN")


def _seen(prepared: PreparedSet, part: Sample, items: int) -> NDArray[np.int64]:
    """Return where, in scores [B, N] laid flat, the items of each request's whole history stand; each once."""
    keys = prepared.histories.events.item.view(np.int32)
    packed = Ragged.slices(keys, part.start, part.requests.end)
    row = rows_of(packed.values.view(np.uint32), prepared.key_to_row).astype(np.int64)
    owner = np.repeat(np.arange(len(part)), packed.lengths)
    known = row >= FIRST_ITEM
    return np.unique(owner[known] * items + row[known] - FIRST_ITEM)


def _count(mask: Tensor) -> Tensor:
    """Return the number of True per row; eight times as fast as summing bools."""
    return mask.view(torch.int8).sum(1, dtype=torch.int32)
