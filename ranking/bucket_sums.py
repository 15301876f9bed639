"""Signatures of vectors under fixed random planes, and sums of events by bucket: what SDIM's table is made of.

    B requests   T events   C candidates   D width   G groups of planes   tau planes per group, 2^tau buckets

Sums by bucket are products with matrices of zeros and ones that are built chunk by chunk while they are in cache; a
scatter-add would go through B * T * G rows one after the other. Their gradients are bags of G rows per event.
"""

import math
from collections.abc import Iterator
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ranking.batch import PAD
from ranking.layers import candidate_chunks
from ranking.products import product
from ranking.workspace import empty

HASHED_AT_ONCE = 8192
"""Vectors whose projections are held at once."""

SHORTEST = 1e-6
"""Least length a bucket's sum is divided by."""

Norm = Literal["none", "ratio", "l2"]
"""How a candidate reads the sums u and numbers n of its buckets: mean of u, sum of u / sum of n, mean of u / |u|."""


def collision(cosine: Tensor, bits: int) -> Tensor:
    """Return the chance that two vectors share a bucket of a group: (1 - arccos(cos) / pi)^tau."""
    return (1 - cosine.clamp(-1, 1).arccos() / math.pi) ** bits


def signatures(x: Tensor, planes: Tensor) -> Tensor:
    """Return the bucket of each vector in each group, uint8 [..., G]; plane k sets bit k, a zero projection sets it.

    Args:
        x: [..., D].
        planes: [G, tau, D], tau at most 8.
    """
    groups, bits, width = planes.shape
    flat, normals = x.detach().reshape(-1, width), planes.transpose(0, 1).reshape(-1, width)
    code = torch.zeros(
        groups, len(flat), dtype=torch.uint8, device=x.device
    )  # by group, so that events lie side by side
    for start in range(0, len(flat) if bits else 0, HASHED_AT_ONCE):
        run = code[:, start : start + HASHED_AT_ONCE]
        projection = product(normals, flat[start : start + HASHED_AT_ONCE])  # [tau * G, run]
        for k, bit in enumerate((projection >= 0).view(torch.uint8).view(bits, groups, -1)):
            run |= bit << k
    return code.T.view(*x.shape[:-1], groups)


def pool(value: Tensor, code: Tensor, mask: Tensor, buckets: int) -> tuple[Tensor, Tensor]:
    """Return the sum of the events in each bucket [B, G, 2^tau, D] and their number [B, G, 2^tau].

    Args:
        value: [B, T, D], zero at padding.
        code: uint8 [B, T, G], buckets; what stands at padding is not read.
        mask: bool [B, T], True at real events.
        buckets: 2^tau.

    Cost: O(B T G 2^tau D) as matrix products, O(B T G D) for the gradient; memory of one chunk beside the result.
    """
    event = _bucket_of(code, mask)
    if not (value.requires_grad and torch.is_grad_enabled()):
        return _sums(value, event, _all_buckets(event, buckets))
    table, count, _ = _Pooling.apply(value, event, None, buckets, 0)  # type: ignore[no-untyped-call]
    return table, count


def read_once(
    value: Tensor, code: Tensor, mask: Tensor, candidate: Tensor, buckets: int, norm: Norm, newest: int
) -> tuple[Tensor, Tensor]:
    """Return `long` [B, C, D] of candidates, as `read` does from `pool`, and the newest events [B, newest, D].

    Args:
        value: [B, T, D], zero at padding.
        code: uint8 [B, T, G], buckets; what stands at padding is not read.
        mask: bool [B, T], True at events that are summed.
        candidate: uint8 [B, C, G], buckets.
        buckets: 2^tau.
        norm: the read-out.
        newest: how many events to give; here, since two gradients of `value` would have to be added.

    Cost: where there are fewer candidates than buckets, only the buckets that candidates read are summed.
    """
    event = _bucket_of(code, mask)
    if candidate.shape[1] >= buckets:
        table, count, recent = _Pooling.apply(value, event, None, buckets, newest)  # type: ignore[no-untyped-call]
        return read(bucket_rows(table, count, norm), count, candidate, norm), recent
    wanted = candidate.mT.to(event.dtype)  # [B, G, C]
    total, count, recent = _Pooling.apply(value, event, wanted, buckets, newest)  # type: ignore[no-untyped-call]
    long = bucket_rows(total, count, norm).sum(1)  # [B, C, D]
    return long / (count.sum(1).clamp_min(1).unsqueeze(-1) if norm == "ratio" else wanted.shape[1]), recent


def _bucket_of(code: Tensor, mask: Tensor) -> Tensor:
    """Return the bucket of each event in each group, int16 [B, G, T], -1 where there is none."""
    return code.mT.to(torch.int16).masked_fill_(~mask[:, None], -1)


class _Pooling(torch.autograd.Function):
    """Sums of events [B, T, D] over the slots with event[b, g, t] == wanted[b, g, k]: [B, G, K, D], and their number.

    `wanted` int16 [B, G, K]; None stands for all buckets, K = 2^tau. The newest events come along.
    """

    @staticmethod
    def forward(
        ctx: Any, value: Tensor, event: Tensor, wanted: Tensor | None, buckets: int, newest: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        total, count = _sums(value, event, _all_buckets(event, buckets) if wanted is None else wanted)
        ctx.save_for_backward(event, wanted)
        ctx.mark_non_differentiable(count)
        return total, count, value[:, value.shape[1] - newest :].clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None, None]:
        event, wanted = ctx.saved_tensors
        upstream, _, recent = gradients
        width, length = upstream.shape[-1], event.shape[2]
        if wanted is None:
            gradient = _spread(upstream, event)
        else:
            gradient = empty((len(event), length, width), upstream)
            for run, hot in _match_runs(event, wanted, upstream.dtype):
                torch.bmm(hot.mT, upstream[run].flatten(1, 2), out=gradient[run])
        gradient[:, length - recent.shape[1] :] += recent
        return gradient, None, None, None, None


def _all_buckets(event: Tensor, buckets: int) -> Tensor:
    return torch.arange(buckets, dtype=event.dtype, device=event.device).expand(*event.shape[:2], -1)


def _sums(value: Tensor, event: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    total, count = value.new_empty(*wanted.shape, value.shape[-1]), value.new_empty(wanted.shape)
    for run, hot in _match_runs(event, wanted, value.dtype):
        sums, events = total[run].flatten(1, 2), value[run]
        if value.dtype == torch.float32 and value.device.type == "cpu":
            for one, match, each in zip(sums, hot, events, strict=True):
                one.copy_(product(match, each.T))
        else:
            torch.bmm(hot, events, out=sums)
        torch.sum(hot, 2, out=count[run].flatten(1))
    return total, count


def _match_runs(event: Tensor, wanted: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Yield runs of requests and event[b, g, t] == wanted[b, g, k] as 0 and 1, [run, G * K, T], in one place."""
    shape = (*wanted.shape, event.shape[2])  # [B, G, K, T]
    runs = candidate_chunks(len(event), math.prod(shape[1:]))
    if runs:
        buffer = empty((runs[0].stop, *shape[1:]), torch.empty(0, dtype=dtype, device=event.device))
        for run in runs:
            hot = buffer[: run.stop - run.start]
            torch.eq(event[run].unsqueeze(2), wanted[run].unsqueeze(3), out=hot)
            yield run, hot.flatten(1, 2)


def _spread(upstream: Tensor, event: Tensor) -> Tensor:
    """Return each event the sum of its buckets' gradients, [B, T, D], of upstream [B, G, 2^tau, D]."""
    batch, groups, buckets, width = upstream.shape
    row = event.mT.clamp_min(0) + _first_rows(batch, groups, buckets, event.device)  # int32 [B, T, G]
    rows = row.reshape(-1, groups)
    gradient = F.embedding_bag(rows, upstream.reshape(-1, width), mode="sum").view(batch, -1, width)
    nowhere = event[:, :1].mT < 0  # [B, T, 1]
    return gradient.masked_fill_(nowhere, 0.0) if bool(nowhere.any()) else gradient


def _one_hot(out: Tensor, code: Tensor, weight: Tensor, buckets: int) -> Tensor:
    """Fill out [B, R, G * 2^tau] with weight [B, R] in the G columns that code [B, R, G] names, 0 elsewhere."""
    first = torch.arange(0, out.shape[-1], buckets, device=code.device)  # [G]
    column = code.long() + first
    return out.zero_().scatter_(2, column, weight.unsqueeze(-1).expand_as(column))


def bucket_rows(table: Tensor, count: Tensor, norm: Norm) -> Tensor:
    """Return the rows candidates read, [B, G, 2^tau, D]: under `l2` of length 1, zero where a bucket is empty.

    Emptiness is told by the count: a sum of length zero would have a gradient without bound.
    """
    if norm != "l2":
        return table
    square = table.square().sum(-1, keepdim=True).masked_fill((count == 0).unsqueeze(-1), 1.0)
    rows: Tensor = table * square.clamp_min(SHORTEST**2).rsqrt()
    return rows


def read(rows: Tensor, count: Tensor, code: Tensor, norm: Norm) -> Tensor:
    """Return `long` [B, C, D] of candidates with signatures uint8 [B, C, G].

    Args:
        rows: [B, G, 2^tau, D], of `bucket_rows`.
        count: [B, G, 2^tau].
        code: what the candidates hash to.
        norm: the read-out.
    """
    batch, groups, buckets, width = rows.shape
    if rows.requires_grad:
        hot = rows.new_empty(batch, code.shape[1], groups * buckets)
        hot = _one_hot(hot, code, rows.new_ones(code.shape[:2]), buckets)
        total = hot @ rows.reshape(batch, -1, width)  # [B, C, D]
        number = hot @ count.to(hot.dtype).reshape(batch, -1, 1)
    else:  # each candidate on its own, so that none sees how many there are
        index = code.int() + _first_rows(batch, groups, buckets, code.device)  # [B, C, G]
        bags = [
            F.embedding_bag(index.flatten(0, 1), part.to(rows.dtype).reshape(-1, part.shape[-1]), mode="sum")
            for part in (rows, count.unsqueeze(-1))[: 2 if norm == "ratio" else 1]
        ]
        total, number = (bag.view(*code.shape[:2], bag.shape[1]) for bag in (bags[0], bags[-1]))
    return total / (number.clamp_min(1) if norm == "ratio" else groups)


def _first_rows(batch: int, groups: int, buckets: int, device: torch.device) -> Tensor:
    """Return where each group of each request begins in its rows, int32 [B, 1, G]."""
    first = torch.arange(0, batch * groups * buckets, buckets, dtype=torch.int32, device=device)
    return first.view(batch, 1, groups)


def read_weights(table: Tensor, event: Tensor, candidate: Tensor, norm: Norm) -> Tensor:
    """Return how much each event counts in what `read` gives, [B, C, T]; under `ratio` up to a factor per candidate.

    Args:
        table: [B, G, 2^tau, D], sums.
        event: uint8 [B, T, G], buckets.
        candidate: uint8 [B, C, G], buckets.
        norm: the read-out.
    """
    same = event[:, None] == candidate[:, :, None]  # [B, C, T, G]
    if norm != "l2":
        return same.to(table.dtype).mean(-1)
    length = table.norm(dim=-1).clamp_min(SHORTEST).reciprocal()  # [B, G, 2^tau]
    own = length.gather(2, candidate.long().mT).mT  # [B, C, G]
    weight: Tensor = (same * own[:, :, None]).mean(-1)
    return weight


def collision_chance(event: Tensor, candidate: Tensor, bits: int) -> Tensor:
    """Return `collision` of events [B, T, D] and candidates [B, C, D], [B, C, T]; a zero vector is at a right angle."""
    event, candidate = (F.normalize(x, dim=-1) for x in (event, candidate))
    return collision(candidate @ event.mT, bits)


def mean_row(table: Tensor, row: Tensor) -> Tensor:
    """Return the mean of table[row] over all rows, float64 [D], without a gradient and without gathering it."""
    share = torch.bincount(row, minlength=len(table)).double() / max(len(row), 1)
    return share @ table.detach().double()


def left_padded(log: Tensor) -> Tensor:
    """Return [B, T] with padding moved to the left, order kept, cut to the longest row (at least one slot)."""
    real = log != PAD
    order = real.byte().sort(dim=1, stable=True).indices
    width = max(int(real.sum(1).max()), 1) if len(log) else 1
    return log.gather(1, order)[:, -width:]
