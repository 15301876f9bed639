"""Signatures of vectors under fixed random planes, and sums of events by bucket: what SDIM's table is made of.

    B requests   T events   C candidates   D width   G groups of planes   tau planes per group, 2^tau buckets

Sums by bucket, and reading them, are products with one-hot matrices that are built chunk by chunk while they are in
cache, for the backward pass once more. A scatter-add would go through B * T * G rows one after the other.
"""

import math
from collections.abc import Iterator
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ranking.batch import PAD
from ranking.layers import candidate_chunks

SHORTEST = 1e-6
"""Least length a bucket's sum is divided by."""

Norm = Literal["none", "ratio", "l2"]
"""How a candidate reads the sums u and numbers n of its buckets: mean of u, sum of u / sum of n, mean of u / |u|."""


def collision(cosine: Tensor, bits: int) -> Tensor:
    """Give the chance that two vectors share a bucket of a group: (1 - arccos(cos) / pi)^tau."""
    return (1 - cosine.clamp(-1, 1).arccos() / math.pi) ** bits


def signatures(x: Tensor, planes: Tensor) -> Tensor:
    """Give the bucket of each vector in each group, uint8 [..., G]; plane k sets bit k, a zero projection sets it.

    Args:
        x: [..., D].
        planes: [G, tau, D], tau at most 8.
    """
    projection = x @ planes.flatten(0, 1).T  # [..., G * tau]
    bit = (projection >= 0).to(torch.uint8).view(*x.shape[:-1], *planes.shape[:2])  # [..., G, tau]
    code: Tensor = bit.new_zeros(bit.shape[:-1])
    for k in range(planes.shape[1]):
        code |= bit[..., k] << k
    return code


def pool(value: Tensor, code: Tensor, mask: Tensor, buckets: int) -> tuple[Tensor, Tensor]:
    """Give the sum of the events in each bucket [B, G, 2^tau, D] and their number [B, G, 2^tau].

    Args:
        value: [B, T, D], zero at padding.
        code: uint8 [B, T, G], buckets; what stands at padding is not read.
        mask: bool [B, T], True at real events.
        buckets: 2^tau.

    Cost: O(B T G 2^tau D) as matrix products, forward and backward; memory of one chunk beside the result.
    """
    table, count = _Pooling.apply(value, code, mask, buckets)  # type: ignore[no-untyped-call]
    return table.unflatten(1, (-1, buckets)), count.unflatten(1, (-1, buckets))


class _Pooling(torch.autograd.Function):
    """one_hot^T value by runs of requests; the backward pass builds the one-hot matrices again."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, code: Tensor, mask: Tensor, buckets: int) -> tuple[Tensor, Tensor]:
        batch, _, width = value.shape
        table = value.new_empty(batch, code.shape[-1] * buckets, width)
        count = value.new_empty(table.shape[:2])
        for run, hot in _one_hot_runs(code, mask, buckets, value.dtype):
            torch.bmm(hot.mT, value[run], out=table[run])
            torch.sum(hot, 1, out=count[run])
        ctx.save_for_backward(code, mask)
        ctx.buckets = buckets
        ctx.mark_non_differentiable(count)
        return table, count

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        code, mask = ctx.saved_tensors
        upstream = gradients[0]
        gradient = upstream.new_empty(*mask.shape, upstream.shape[-1])
        for run, hot in _one_hot_runs(code, mask, ctx.buckets, upstream.dtype):
            torch.bmm(hot, upstream[run], out=gradient[run])
        return gradient, None, None, None


def _one_hot_runs(code: Tensor, mask: Tensor, buckets: int, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Yield runs of requests and their one-hot matrices [run, T, G * 2^tau]; each is overwritten by the next."""
    _, length, groups = code.shape
    runs = candidate_chunks(len(code), length * groups * buckets)
    if runs:
        buffer = torch.empty(runs[0].stop, length, groups * buckets, dtype=dtype, device=code.device)
        for run in runs:
            hot = buffer[: run.stop - run.start]
            yield run, _one_hot(hot, code[run], mask[run].to(dtype), buckets)


def _one_hot(out: Tensor, code: Tensor, weight: Tensor, buckets: int) -> Tensor:
    """Fill out [B, R, G * 2^tau] with weight [B, R] in the G columns that code [B, R, G] names, 0 elsewhere."""
    first = torch.arange(0, out.shape[-1], buckets, device=code.device)  # [G]
    column = code.long() + first
    return out.zero_().scatter_(2, column, weight.unsqueeze(-1).expand_as(column))


def bucket_rows(table: Tensor, count: Tensor, norm: Norm) -> Tensor:
    """Give the rows candidates read, [B, G, 2^tau, D]: under `l2` of length 1, zero where a bucket is empty.

    Emptiness is told by the count: a sum of length zero would have a gradient without bound.
    """
    if norm != "l2":
        return table
    square = table.square().sum(-1, keepdim=True).masked_fill((count == 0).unsqueeze(-1), 1.0)
    rows: Tensor = table * square.clamp_min(SHORTEST**2).rsqrt()
    return rows


def read(rows: Tensor, count: Tensor, code: Tensor, norm: Norm) -> Tensor:
    """Give `long` [B, C, D] of candidates with signatures uint8 [B, C, G].

    Args:
        rows: [B, G, 2^tau, D], of `bucket_rows`.
        count: [B, G, 2^tau].
        code: what the candidates hash to.
        norm: the read-out.
    """
    batch, groups, buckets, width = rows.shape
    hot = rows.new_empty(batch, code.shape[1], groups * buckets)
    hot = _one_hot(hot, code, rows.new_ones(code.shape[:2]), buckets)
    total = hot @ rows.reshape(batch, -1, width)  # [B, C, D]
    if norm == "ratio":
        return total / (hot @ count.to(hot.dtype).reshape(batch, -1, 1)).clamp_min(1)
    return total / groups


def read_weights(table: Tensor, event: Tensor, candidate: Tensor, norm: Norm) -> Tensor:
    """Give how much each event counts in what `read` gives, [B, C, T]; under `ratio` up to a factor per candidate.

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
    """Give `collision` of events [B, T, D] and candidates [B, C, D], [B, C, T]; a zero vector is at a right angle."""
    event, candidate = (F.normalize(x, dim=-1) for x in (event, candidate))
    return collision(candidate @ event.mT, bits)


def mean_row(table: Tensor, row: Tensor) -> Tensor:
    """Give the mean of table[row] over all rows, float64 [D], without a gradient and without gathering it."""
    share = torch.bincount(row, minlength=len(table)).double() / max(len(row), 1)
    return share @ table.detach().double()


def left_padded(log: Tensor) -> Tensor:
    """Give [B, T] with padding moved to the left, order kept, cut to the longest row (at least one slot)."""
    real = log != PAD
    order = real.byte().sort(dim=1, stable=True).indices
    width = max(int(real.sum(1).max()), 1) if len(log) else 1
    return log.gather(1, order)[:, -width:]
