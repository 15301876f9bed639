"""How well DARE's search finds the events that tell something: its order of a history against an oracle's.

    python tests/benchmarks/studies/dare_search.py --run DARE=runs/studies/completejourney/runs/dare-<digest> \\
        --run TWIN=runs/studies/completejourney/runs/twin-<digest>

The oracle is counted, not learned: how much "the history holds an event of category b at distance p" tells of a
purchase in category g, the mutual information of the two over pairs of a request and a candidate of that category,
distances in powers of two. It is counted on the validation requests of one half of the users; the models order the
histories of the other half, for positives and negatives alike. NDCG@20 has the information as gain and the history's
own best order as ideal; users are resampled for the intervals. `newest first` and `any order` need no search.

    R requests    G categories    P distances    S = G P signs of a history
"""

import argparse
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from benchmarks.studies.tables import table  # noqa: E402

from pipelines.prepared import CandidateSets, PreparedSet  # noqa: E402
from pipelines.scoring import Sample, assemble_requests, draw_requests  # noqa: E402
from pipelines.train import trained_run  # noqa: E402
from ranking.batch import Batch  # noqa: E402
from ranking.dare import Dare, DareState  # noqa: E402
from recsys.bootstrap import Ratio, Statistic, bootstrap  # noqa: E402
from recsys.errors import DataError  # noqa: E402
from recsys.files import write_json  # noqa: E402

DISTANCES = 8
"""1, 2-3, 4-7, ... 128 and more baskets ago."""
CUT = 20
Order = Callable[[Dare, DareState, Batch], Tensor]
"""Gives scores [B, C, T] of a history's events, the higher the sooner found."""


@dataclass(frozen=True)
class Oracle:
    """Mutual information in nats of each (category of the candidate, sign of the history), float64 [G, S]."""

    information: Tensor

    def gains(self, category: Tensor, sign: Tensor) -> Tensor:
        """Return the gain of every event for every candidate, [B, C, T], of int64 [B, C] and [B, T]."""
        return self.information[category[:, :, None], sign[:, None, :]]


def mutual_information(both: Tensor, positives: Tensor, shown: Tensor, total: Tensor) -> Tensor:
    """Return I(sign; label) in nats from counts: positives with the sign, positives, pairs with the sign, all pairs."""
    cells = {
        (1, 1): both,
        (1, 0): shown - both,
        (0, 1): positives - both,
        (0, 0): total - positives - shown + both,
    }
    of_sign, of_label = {1: shown, 0: total - shown}, {1: positives, 0: total - positives}
    information = torch.zeros_like(both)
    for (sign, label), count in cells.items():
        expected = of_sign[sign] * of_label[label] / total.clamp(min=1)
        ratio = torch.where(count > 0, count / expected.clamp(min=1e-12), torch.ones_like(count))
        information += count / total.clamp(min=1) * ratio.log()
    return information.clamp(min=0)


def signs(state: DareState, category: Tensor) -> Tensor:
    """Return the sign each event shows, int64 [B, T]: its category and how far back it lies."""
    distance = torch.log2(state.position.clamp(min=1).double()).floor().long().clamp(max=DISTANCES - 1)
    return category * DISTANCES + distance


def count_oracle(
    model: Dare, prepared: PreparedSet, sample: Sample, sets: CandidateSets, categories: int, least: int = 50
) -> Oracle:
    """Count the oracle on requests; a category with fewer than `least` positives tells nothing."""
    shown = torch.zeros(len(sample), categories * DISTANCES, dtype=torch.float64)
    pairs = {label: torch.zeros(len(sample), categories, dtype=torch.float64) for label in (0, 1)}
    for rows, batch, label in batches(model, prepared, sample, sets):
        state = model.encode(batch.history)
        sign = signs(state, category_of(model, batch.history.padded(model.config.window).item))
        for at, row in enumerate(rows.tolist()):
            shown[row, sign[at, state.mask[at]]] = 1.0
        category = category_of(model, batch.candidates.item)
        for kind, found in pairs.items():
            one = ((label == kind) & batch.candidates.mask).double()
            found[torch.from_numpy(rows)] = torch.zeros(len(rows), categories, dtype=torch.float64).scatter_add_(
                1, category, one
            )
    both = pairs[1].T @ shown  # [G, S]
    total = pairs[0] + pairs[1]
    positives = pairs[1].sum(0)[:, None].expand_as(both)
    information = mutual_information(both, positives, total.T @ shown, total.sum(0)[:, None].expand_as(both))
    return Oracle(information.masked_fill(positives < least, 0.0))


def ndcg(scores: Tensor, gains: Tensor, mask: Tensor) -> Tensor:
    """Return NDCG@20 of each candidate's order of the events, [B, C]; NaN where no event tells anything."""
    depth = min(CUT, scores.shape[-1])
    discount = 1 / torch.log2(torch.arange(depth, dtype=torch.float64) + 2)
    real = mask[:, None, :].expand_as(scores)
    found = scores.masked_fill(~real, -torch.inf).topk(depth).indices
    gains = gains.masked_fill(~real, 0.0)
    ideal = (gains.topk(depth).values * discount).sum(-1)
    return torch.where(ideal > 0, (gains.gather(-1, found) * discount).sum(-1) / ideal, torch.nan)


def batches(model: Dare, prepared: PreparedSet, sample: Sample, sets: CandidateSets, size: int = 64):
    """Yield (places of the requests, Batch, labels int64 [B, C], -1 = padding), 64 requests at a time."""
    for start in range(0, len(sample), size):
        rows = np.arange(start, min(start + size, len(sample)))
        part = sets.take(rows)
        inside = np.arange(np.diff(part.offsets).max())[None, :] < np.diff(part.offsets)[:, None]
        item, label = np.zeros(inside.shape, np.int32), np.full(inside.shape, -1, np.int64)
        item[inside], label[inside] = part.item, part.label
        yield rows, assemble_requests(model, prepared, sample.take(rows), item), torch.from_numpy(label)


def category_of(model: Dare, item: Tensor) -> Tensor:
    """Return the category code of item rows, int64 of the same shape."""
    if model.config.category is None:
        raise DataError("the oracle is counted by category; expected a DARE that reads one")
    return model.items.column(model.config.category).long()[item.long()]


def by_search(model: Dare, state: DareState, batch: Batch) -> Tensor:
    """Order events as the model's search does."""
    fields = model.representation if model.attention is None else model.attention
    return model.search_scores(state, fields.semantic(batch.candidates.item, model.items.embedding_row))


def newest_first(model: Dare, state: DareState, batch: Batch) -> Tensor:
    """Order events by time alone."""
    return -state.position.double()[:, None, :].expand(-1, batch.candidates.item.shape[1], -1)


def any_order(model: Dare, state: DareState, batch: Batch) -> Tensor:
    """Order events by chance."""
    shape = (*batch.candidates.item.shape, state.mask.shape[1])
    return torch.rand(shape, generator=torch.Generator().manual_seed(2023))


def quality(
    orders: Mapping[str, tuple[Dare, Order]], oracle: Oracle, prepared: PreparedSet, sample: Sample, sets: CandidateSets
) -> dict[str, Ratio]:
    """Return NDCG@20 of each order as a mean over candidates, by user."""
    users, user = np.unique(sample.requests.user, return_inverse=True)
    found = {}
    for name, (model, order) in orders.items():
        above, below = (np.zeros(len(sample)) for _ in range(2))
        for rows, batch, _ in batches(model, prepared, sample, sets):
            state = model.encode(batch.history)
            sign = signs(state, category_of(model, batch.history.padded(model.config.window).item))
            gains = oracle.gains(category_of(model, batch.candidates.item), sign)
            values = ndcg(order(model, state, batch).double(), gains, state.mask)
            values = values.masked_fill(~batch.candidates.mask, torch.nan)
            above[rows], below[rows] = values.nansum(1).numpy(), (~values.isnan()).sum(1).numpy()
        found[name] = Ratio(np.bincount(user, above, len(users)), np.bincount(user, below, len(users)))
    return found


def halves(sample: Sample) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the places of the requests of every other user, and of the rest."""
    odd = sample.requests.user % 2 == 1
    return np.flatnonzero(odd), np.flatnonzero(~odd)


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--run", action="append", required=True, metavar="NAME=DIRECTORY", help="a trained DARE or TWIN"
    )
    parser.add_argument("--requests", type=int, default=2000, help="of the validation period")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "dare_search.json")
    options = parser.parse_args()
    named = {name: Path(directory) for name, _, directory in (text.partition("=") for text in options.run)}
    prepared = PreparedSet(next(iter(named.values())).parent.parent / "prepared")
    models = {name: trained_run(directory, prepared).model for name, directory in named.items()}
    first = next(iter(models.values()))
    sample = draw_requests(prepared, "valid", options.requests, 2023)
    sets = prepared.candidates("valid", "uniform").take(sample.index)
    counted, judged = halves(sample)
    with torch.inference_mode():
        categories = int(first.items.column(first.config.category).max()) + 1
        oracle = count_oracle(first, prepared, sample.take(counted), sets.take(counted), categories)
        orders = {name: (model, by_search) for name, model in models.items()}
        orders |= {"newest first": (first, newest_first), "any order": (first, any_order)}
        found = quality(orders, oracle, prepared, sample.take(judged), sets.take(judged))
    statistics: dict[str, Statistic] = dict(found)
    estimates = bootstrap(statistics, len(next(iter(found.values())).numerator), 1000, 2023)
    values = {name: {"ndcg_at_20": one.value, "interval": one.interval()} for name, one in estimates.items()}
    leader = next(iter(named))
    for name, one in estimates.items():
        gap = estimates[leader].minus(one)
        values[name]["below_" + leader] = {"difference": gap.value, "interval": gap.interval()}
    write_json(options.out, {"runs": {k: v.name for k, v in named.items()}, "data": prepared.digest, "orders": values})
    rows = (
        [name, f"{one.value:.4f} [{one.interval()[0]:.4f}, {one.interval()[1]:.4f}]"] for name, one in estimates.items()
    )
    print("\n".join(table(["order", "NDCG@20 [95 %]"], rows)))


if __name__ == "__main__":
    main()
