"""Small parts that several models share: dropout, the scoring head, attention, search and pooling over a history.

A score must not depend on what is scored with it, or offline and online answers could not be compared. MKL's float32
products depend on the shape of the batch in their last digits: the same candidate, alone and among others, differed by
1.7e-6 with DIN. So layers, attention networks and DARE's search go through `ranking.products.steady`, whose digits do
not; other products are computed in float64 and rounded at the end (`in_float64`: a whole module). Training takes any.
"""

import copy
import math
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ranking.products import steady
from ranking.ranker import NEGATIVE
from ranking.workspace import empty

CHUNK_ELEMENTS = 1 << 20
"""Numbers in the largest temporary of a chunked loop: 4-8 MB, which stays in the last-level cache of one core."""

HEAD_ROWS = 1024
"""Rows a head scores at once."""

LANES = 64
"""Events are padded to a multiple of this."""

GATHER_ABOVE = 16
"""History length, in multiples of K, from which fetching the K rows beats one product with all rows."""


def dropout(x: Tensor, p: float, generator: torch.Generator | None) -> Tensor:
    """Zero each number with probability p and scale the rest by 1 / (1 - p); without a generator give x itself."""
    if p == 0 or generator is None:
        return x
    keep = torch.rand(x.shape, generator=generator, device=generator.device).to(x.device) >= p
    return x * keep / (1 - p)


def masked_softmax(scores: Tensor, mask: Tensor) -> Tensor:
    """Return softmax over the last dimension where mask is True, exactly 0 elsewhere and in rows without any True.

    Scores behind the mask are never read: they may be infinite or NaN.
    """
    weights = scores.masked_fill(~mask, torch.finfo(scores.dtype).min).softmax(-1)
    return weights.masked_fill(~mask, 0.0)


class _Double(NamedTuple):
    """A float64 copy of a module and what it was made from: every part where it hangs, and the numbers."""

    parts: list[tuple[Mapping[str, object], str, object]]
    numbers: list[tuple[Tensor, Tensor]]  # the module's own, and as they were
    copy: nn.Module

    @staticmethod
    def of(module: nn.Module) -> "_Double":
        parts: list[tuple[Mapping[str, object], str, object]] = []
        for one in module.modules():
            for held in (one._modules, one._parameters, one._buffers):
                parts += [(held, name, part) for name, part in held.items()]
        numbers = [(tensor, tensor.detach().clone()) for _, _, tensor in parts if isinstance(tensor, Tensor)]
        return _Double(parts, numbers, copy.deepcopy(module).double().eval().requires_grad_(False))

    @property
    def current(self) -> bool:
        return all(held.get(name) is part for held, name, part in self.parts) and all(
            _same(was, now) for now, was in self.numbers
        )


_doubles: "weakref.WeakKeyDictionary[nn.Module, _Double]" = weakref.WeakKeyDictionary()
_doubles_lock = threading.Lock()


def in_float64(module: nn.Module) -> nn.Module:
    """Return a float64 copy of a module, made anew only when a part was replaced or one of its numbers has changed.

    A copy, because swapping the weights of the module itself would show them to other threads that score with it. The
    numbers are compared, some 20 us for a scoring head: fused optimisers write to weights without counting a version.
    The parts are remembered, because walking through a module took three times as long as comparing its numbers.
    """
    with _doubles_lock:
        known = _doubles.get(module)
        if known is None or not known.current:
            with torch.inference_mode(False), torch.no_grad():
                known = _Double.of(module)
            _doubles[module] = known
    return known.copy


def _same(a: Tensor, b: Tensor) -> bool:
    return a.device == b.device and a.dtype == b.dtype and torch.equal(a, b)


def linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """Return layer(x); unless it is training a row's numbers do not depend on the other rows, and have no gradient."""
    output: Tensor = layer(x) if layer.training else steady(x, layer.weight) + layer.bias.detach()
    return output


class Layers(nn.Sequential):
    """Linear layers, each as `linear` has it, and functions of single numbers between them."""

    def forward(self, x: Tensor) -> Tensor:
        """Return what the last layer says of x [..., width]."""
        for layer in self:
            x = linear(layer, x) if isinstance(layer, nn.Linear) else layer(x)
        return x


def interaction(v: Tensor, h: Tensor) -> Tensor:
    """Return [v ; h ; v * h], [..., 3D]: a candidate, what the history says of it, and where the two agree."""
    return torch.cat([v, h, v * h], -1)


class ScoringHead(nn.Module):
    """BatchNorm -> (Linear -> PReLU)* -> Linear to one logit per row.

    Args:
        width: number of input features.
        hidden: widths of the hidden layers.
    """

    def __init__(self, width: int, hidden: Sequence[int] = (200, 80)) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(width)
        layers: list[nn.Module] = []
        for inner in hidden:
            layers += [nn.Linear(width, inner), nn.PReLU()]
            width = inner
        self.layers = Layers(*layers, nn.Linear(width, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Return logits [R] for features [R, width].

        In training every row counts in the batch statistics, and a single one, which has none, takes those learned so
        far; else a row's logit does not depend on the others and has no gradient.
        """
        if not self.training:
            return self._score(x.to(self.norm.weight.dtype))
        if len(x) < 2:
            norm = self.norm
            x = F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)
        else:
            x = self.norm(x)
        logits: Tensor = self.layers(x).squeeze(-1)
        return logits

    @torch.no_grad()
    def _score(self, x: Tensor) -> Tensor:
        norm = self.norm
        assert norm.running_mean is not None
        assert norm.running_var is not None
        scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
        x = torch.addcmul(norm.bias - norm.running_mean * scale, x, scale)
        logits: Tensor = self.layers(x).squeeze(-1)
        return logits


class AttentionNetwork(nn.Module):
    """w2 . PReLU(W [q ; s ; q - s ; q * s] + b) + c for all pairs of candidates and events: DIN's attention.

    Args:
        width: D of candidates and events.
        hidden: rows of W.
    """

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.inner = nn.Linear(4 * width, hidden)
        self.slope = nn.Parameter(torch.tensor(0.25))
        self.outer = nn.Linear(hidden, 1)

    def forward(self, q: Tensor, s: Tensor) -> Tensor:
        """Return [B, C, T] for candidates q [B, C, D] and events s [B, T, D].

        In training all at once; else a pair's number does not depend on the others and has no gradient.
        """
        if not self.training:
            return self._score(q, s)
        return by_requests(self._weights, q.shape[1] * s.shape[1] * len(self.outer.weight.T), q, s)

    @torch.no_grad()
    def _score(self, q: Tensor, s: Tensor) -> Tensor:
        """Return the same by one product per request, whose rows are scaled by |w2|, those of positive w2 first."""
        inner, outer = self.inner.weight, self.outer.weight[0]  # [hidden, 4 D], [hidden]
        order = (outer < 0).to(torch.uint8).argsort(stable=True)
        plus, scale = int((outer >= 0).sum()), outer.abs()[order]
        wa, wb, wc, wd = (inner[order] * scale[:, None]).view(len(scale), 4, -1).unbind(1)  # [hidden, D] each
        matrix = empty((*q.shape[:2], len(scale), q.shape[2] + 1), q)  # [B, C, hidden, D + 1]
        torch.addcmul(wb - wc, q[:, :, None], wd, out=matrix[..., :-1])
        torch.add(steady(q, wa + wc), self.inner.bias[order] * scale, out=matrix[..., -1])
        # Whole vectors of events: the sums over z take what is left at the end in another order.
        events, slope = F.pad(F.pad(s, (0, 1), value=1.0), (0, 0, 0, -s.shape[1] % LANES)), float(self.slope)
        weight = q.new_empty(*q.shape[:2], events.shape[1])
        for one, m, event in zip(weight, matrix, events, strict=True):
            z = F.leaky_relu_(steady(m.flatten(0, 1), event), slope).view(
                len(one), len(scale), len(event)
            )  # [C, hidden, T]
            torch.sub(z[:, :plus].sum(1), z[:, plus:].sum(1), out=one)
        return weight[..., : s.shape[1]] + self.outer.bias

    def _weights(self, q: Tensor, s: Tensor) -> Tensor:
        batch, count, width = q.shape
        wa, wb, wc, wd = self.inner.weight.view(-1, 4, width).unbind(1)  # [hidden, D] each
        matrix = q[:, :, None, :] * wd + (wb - wc)  # [B, C, hidden, D]
        constant = F.linear(q, wa + wc, self.inner.bias)  # [B, C, hidden]
        w2, events = self.outer.weight, s.mT  # [1, hidden], [B, D, T]
        z = torch.baddbmm(constant.view(batch, -1, 1), matrix.flatten(1, 2), events)  # [B, C * hidden, T]
        z = z.relu_().view(batch * count, len(w2.T), -1)
        bent = torch.bmm(w2.expand(len(z), 1, -1), z).view(batch, count, -1)  # [B, C, T]
        straight = (q * (w2 @ wd) + w2 @ (wb - wc)) @ events + constant @ w2.T  # w2 . z before the bend
        weights: Tensor = self.slope * straight + (1 - self.slope) * bent + self.outer.bias
        return weights


def score_real(head: ScoringHead, features: Tensor, mask: Tensor) -> Tensor:
    """Return logits [B, C] with `NEGATIVE` where mask is False; the head sees the real rows only.

    Args:
        head: what to apply.
        features: [B, C, F].
        mask: bool [B, C], True at real candidates.
    """
    index = mask.flatten().nonzero().squeeze(1)  # [R]
    rows = features.flatten(0, 1)
    if len(index) < len(rows):
        rows = rows.index_select(0, index)
    logits = torch.full((mask.numel(),), NEGATIVE, dtype=head.norm.weight.dtype, device=features.device)
    # Rows meet only in the batch statistics of training; a thousand at a time stay in cache when a catalogue is ranked.
    runs = (rows,) if head.training else torch.split(rows, HEAD_ROWS)
    found = torch.cat([head(run) for run in runs]).to(logits.dtype)
    return logits.index_copy(0, index, found).view(mask.shape)


def search(scores: Tensor, mask: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Find the k best real events of every candidate; among equal scores the newer wins, on every device.

    Args:
        scores: [B, C, T]; what stands at padding is not read.
        mask: bool [B, T], True at real events.
        k: how many to find.

    Returns:
        Slots int64 [B, C, min(k, T)], and bool of that shape: False where fewer than k events exist.

    Cost: one partial selection over [B, C, T].
    """
    real = mask[:, None, :].expand_as(scores)
    length = scores.shape[-1]
    if k >= length:
        return torch.arange(length, device=scores.device).expand_as(scores), real
    lowest = torch.finfo(scores.dtype).min
    scores = scores.detach()
    if not bool(mask.all()):
        scores = scores.masked_fill(~real, lowest)
    if scores.dtype == torch.float32 and scores.device.type == "cpu":
        index = _newest_of_the_best(scores, k)
        return index, real.gather(-1, index)
    best, index = torch.topk(scores, k, sorted=False)
    cut = best.amin(-1, keepdim=True)
    tied = ((scores >= cut).sum(-1) > k) & (cut.squeeze(-1) > lowest)  # more than k reach the cut
    if bool(tied.any()):
        newest_first = scores[tied].flip(-1).sort(stable=True, dim=-1, descending=True).indices[:, :k]
        index[tied] = length - 1 - newest_first
    return index, real.gather(-1, index)


def _newest_of_the_best(scores: Tensor, k: int) -> Tensor:
    """Return the slots of the k largest float32 numbers of each row, ascending, later ones first among equals.

    Score and slot make up one whole number, score first; numpy selects among those in a tenth of the time of topk.
    """
    bits = (scores + 0.0).view(torch.int32)  # -0 becomes 0
    rank = (bits >> 31).bitwise_and_(0x7FFFFFFF).bitwise_xor_(bits)  # whole numbers in the order of the scores
    keys = rank.long().bitwise_left_shift_(32).bitwise_or_(torch.arange(scores.shape[-1])).numpy()
    keys.partition(scores.shape[-1] - k, axis=-1)
    return torch.from_numpy(np.sort(keys[..., -k:] & 0xFFFFFFFF, axis=-1))


def rows_at(value: Tensor, index: Tensor) -> Tensor:
    """Return value[b, index[b, c, k]], [B, C, K, D], for slots int64 [B, C, K] and values [B, T, D]."""
    batch, length, width = value.shape
    flat = index + torch.arange(0, batch * length, length, device=index.device)[:, None, None]
    return value.reshape(-1, width).index_select(0, flat.flatten()).view(*index.shape, width)


def pool_by_gather(weights: Tensor, index: Tensor, value: Tensor) -> Tensor:
    """Return sum_j w_j e_j, [B, C, D], by fetching the found rows: O(C K D), best for long histories.

    Args:
        weights: [B, C, K], 0 where nothing was found.
        index: int64 [B, C, K], slots.
        value: [B, T, D].
    """
    return (weights.unsqueeze(-2) @ rows_at(value, index)).squeeze(-2)


def pool_by_scatter(weights: Tensor, index: Tensor, value: Tensor) -> Tensor:
    """Return the same by spreading the weights over all T slots and one batched product: best in training.

    The slots of a candidate must be distinct.
    """
    spread = weights.new_zeros(*weights.shape[:2], value.shape[1]).scatter(-1, index, weights)  # [B, C, T]
    return spread @ value


def pool_found(weights: Tensor, index: Tensor, value: Tensor) -> Tensor:
    """Return the same by the fastest way; without a gradient each candidate on its own, in the order of `index`."""
    if (
        value.dtype == torch.float32
        and value.device.type == "cpu"
        and not (weights.requires_grad or value.requires_grad)
    ):
        batch, length, width = value.shape
        rows = index + torch.arange(0, batch * length, length)[:, None, None]
        bags = rows.flatten(0, 1), value.reshape(-1, width)
        pooled = F.embedding_bag(*bags, mode="sum", per_sample_weights=weights.flatten(0, 1))
        return pooled.view(*index.shape[:2], width)
    pool = pool_by_gather if value.shape[1] > GATHER_ABOVE * index.shape[-1] else pool_by_scatter
    return pool(weights, index, value)


def attend(query: Tensor, value: Tensor, index: Tensor, found: Tensor) -> Tensor:
    """Return what scaled dot-product attention makes of the found events only, [B, C, D]; 0 where none was found.

    Args:
        query: [B, C, D], candidates.
        value: [B, T, D], events.
        index: int64 [B, C, K], distinct slots of each candidate.
        found: bool [B, C, K], which of them count.
    """
    query = query / math.sqrt(query.shape[-1])
    if value.shape[1] > GATHER_ABOVE * index.shape[-1]:
        rows = rows_at(value, index)  # [B, C, K, D]
        weights = masked_softmax((rows @ query.unsqueeze(-1)).squeeze(-1), found)
        return (weights.unsqueeze(-2) @ rows).squeeze(-2)
    weights = masked_softmax((query @ value.mT).gather(-1, index), found)
    return pool_by_scatter(weights, index, value)


def candidate_chunks(candidates: int, elements_each: int) -> list[slice]:
    """Cut C candidates into runs whose temporaries stay within `CHUNK_ELEMENTS` numbers, at least one at a time.

    Of no candidates there is one run, and it is empty.
    """
    step = max(1, CHUNK_ELEMENTS // max(1, elements_each))
    return [slice(start, min(start + step, candidates)) for start in range(0, max(candidates, 1), step)]


def by_requests(function: Callable[..., Tensor], elements_each: int, *inputs: Tensor) -> Tensor:
    """Return function(*inputs), [B, ...] of inputs [B, ...], a run of requests after the other.

    A run's temporaries, `elements_each` numbers per request, stay in cache, in the backward pass too: DIN's attention
    over 256 x 24 candidates and 200 events trains in 0.4 s where one pass over everything took 0.68 s.
    """
    runs = candidate_chunks(len(inputs[0]), elements_each)
    if len(runs) < 2:
        return function(*inputs)
    parts = (torch.split(x, runs[0].stop) for x in inputs)
    return torch.cat([function(*run) for run in zip(*parts, strict=True)])
