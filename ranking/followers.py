"""What followed a basket in the training period: transition probabilities from its items to given candidates.

    B requests   M items of the newest basket   C candidates   V item rows

Where every moment has one event, a basket is an item and these are first-order transitions.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ranking.batch import PAD, History
from ranking.embeddings import take
from ranking.items import Transitions
from ranking.layers import candidate_chunks


@dataclass(frozen=True)
class Held:
    """What the transitions hold of a training request itself: the step from its newest basket to its own items.

    Whoever learns from training requests must take it out: it would make every positive a follower of the basket before
    it, which no positive of a later request need be.
    """

    label: Tensor  # [B, C], 1 at positives
    size: Tensor  # int64 [B], distinct items of the request's whole basket


def newest_basket(history: History, window: int | None = None) -> Tensor:
    """Return the distinct items of each history's newest moment, int32 [B, M], ascending after the padding (0).

    Of a moment with more than `window` events the newest so many are read.
    """
    newest = history.padded(1).time  # [B, 1]
    owner = torch.repeat_interleave(torch.arange(len(history), device=history.item.device), history.lengths)
    kept = history.time == take(newest[:, 0], owner)  # [N], the last events of each history
    lengths = torch.bincount(owner[kept], minlength=len(history))
    offsets = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    last = History(history.item[kept], history.action[kept], history.time[kept], offsets)
    most = int(lengths.max()) if len(history) else 0
    item = last.padded(window or max(most, 1)).item.sort(dim=1).values
    again = item[:, 1:] == item[:, :-1]
    item[:, 1:] = item[:, 1:].masked_fill(again, PAD)
    return item.sort(dim=1).values


def out_weights(transitions: Transitions) -> Tensor:
    """Return the sum of the weights out of each row, float64 [V]."""
    running = torch.nn.functional.pad(transitions.weight.double().cumsum(0), (1, 0))
    return running[transitions.offsets[1:]] - running[transitions.offsets[:-1]]


def edge_weights(transitions: Transitions, source: Tensor, target: Tensor) -> Tensor:
    """Return the weight of every edge source -> target, float32, 0 where there is none.

    Args:
        transitions: targets ascending within a row.
        source: item rows of any shape.
        target: item rows of a shape that fits it.

    Cost: a binary search in the source's row; 160,000 pairs take as many gathers as a row has binary digits.
    """
    shape = torch.Size(np.broadcast_shapes(source.shape, target.shape))
    source, target = source.expand(shape).reshape(-1).long(), target.expand(shape).reshape(-1)
    last = len(transitions.target) - 1
    if last < 0 or not len(source):
        return torch.zeros(shape, device=source.device)
    low = transitions.offsets.index_select(0, source)
    end = transitions.offsets.index_select(0, source + 1)
    size = end - low  # edges that may still hold the target start at `low`
    for _ in range(int(size.max()).bit_length()):
        half = size >> 1
        middle = low + half
        below = (transitions.target.index_select(0, middle.clamp(max=last)) < target) & (size > 0)
        low = torch.where(below, middle + 1, low)
        size = torch.where(below, size - half - 1, half)
    place = low.clamp(max=last)
    found = (low < end) & (transitions.target.index_select(0, place) == target)
    return transitions.weight.index_select(0, place).masked_fill(~found, 0.0).view(shape)


def followed(transitions: Transitions, total: Tensor, basket: Tensor, item: Tensor, held: Held | None = None) -> Tensor:
    """Return mean over the basket's items i of C[i, j] / sum_j C[i, j] for candidates j, float64 [B, C] in 0..1.

    Args:
        transitions: C, by rows; a step from basket a to basket b adds 1 / (|a| |b|) for each pair of their items.
        total: what `out_weights` gave of it.
        basket: int32 [B, M], 0 = padding; an empty basket gives 0.
        item: int32 [B, C] candidates.
        held: what C holds of these very requests; it is taken out.

    Cost: one look-up per item of a basket and candidate, in chunks of candidates.
    """
    request, place = basket.nonzero(as_tuple=True)  # [P], the real items of all baskets
    source = basket[request, place].long()
    size = (basket != PAD).sum(1).index_select(0, request).double()  # [P]
    most = total.index_select(0, source)
    if held is not None:
        most = _less(most, 1 / size)
    share = (1 / (most * size)).masked_fill(most == 0, 0.0)  # [P]
    result = torch.zeros(item.shape, dtype=torch.float64, device=item.device)
    for chunk in candidate_chunks(item.shape[1], len(source)):
        wanted = item[:, chunk].index_select(0, request)  # [P, c]
        weight = edge_weights(transitions, source[:, None], wanted).double()
        if held is not None:
            own = held.label[:, chunk].double() / held.size[:, None]  # [B, c]
            weight = _less(weight, own.index_select(0, request) / size[:, None])
        result[:, chunk] = torch.zeros_like(result[:, chunk]).index_add_(0, request, weight * share[:, None])
    return result


def _less(value: Tensor, own: Tensor) -> Tensor:
    """Return value - own, 0 where nothing but rounding is left of it."""
    rest = value - own
    return rest.masked_fill(rest < 1e-3 * own, 0.0)
