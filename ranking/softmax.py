"""Softmax over a whole catalogue: exact in full, exact in chunks of rows, or estimated from sampled negatives.

All three give log-partitions, log sum_j exp(q_r . e_j), the one expensive part of a cross-entropy over N items. The
rest of it, minus the expected logit under the target distribution, is one inner product: sum_j p_j (q . e_j) =
q . (sum_j p_j e_j). So one row may have one target, a basket of targets, or a whole teacher distribution.

    R query rows    N classes    D width    M drawn negatives

`pad_class` adds one more class whose logit is constantly 0, the padding row of a tied output layer.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ranking.products import product

LOG2E = 1 / math.log(2)
CHUNK_BYTES = 8 * 2**20
"""Logits held at once by the chunked form: 8 MiB stay in a processor's cache (160 rows of 12,101 classes)."""
GPU_CHUNK_BYTES = 512 * 2**20
"""On a GPU: few launches, in memory that is small beside what it has."""
CHUNK_ROWS = 32
"""Rows at once are a multiple of this: whole vectors of the processor."""
FEW_ROWS = 96
"""Where fewer rows' logits fit, above 21,000 classes or so, classes are cut too."""
CALM = 100.0
"""Powers of two below this, and sums of a million of them, are numbers of float32."""
TILE_ROWS = 1024
"""Rows at once then."""


def log_partition(query: Tensor, table: Tensor, pad_class: bool = False) -> Tensor:
    """Return log sum_j exp(query_r . table_j), [R].

    Cost: [R, N] logits are kept for the backward pass, and several copies live in it. The plain form, for small
    catalogues and as the reference of `chunked_log_partition`.
    """
    logits = query @ table.T  # [R, N]
    if pad_class:
        logits = torch.cat([logits.new_zeros(len(query), 1), logits], dim=1)
    return torch.logsumexp(logits, dim=1)


def chunked_log_partition(query: Tensor, table: Tensor, weight: Tensor, pad_class: bool = False) -> Tensor:
    """Return sum_r weight_r log sum_j exp(query_r . table_j), a scalar, exact, in memory that does not grow with R N.

    Args:
        query: [R, D].
        table: [N, D].
        weight: [R], constants: no gradient flows to them.
        pad_class: add a class whose logit is 0.

    Cost: three matrix products, the least there is for loss and gradients: since the weights are known, each chunk of
    rows makes its gradients while its logits are in cache, so nothing is kept and nothing is computed twice. Four for
    large tables.
    """
    total: Tensor = _ChunkedLogPartition.apply(query, table, weight, pad_class)  # type: ignore[no-untyped-call]
    return total


class _ChunkedLogPartition(torch.autograd.Function):
    """Loss and gradients in one go; the backward pass only scales them.

    Logits lie by class, [N, r], so that all products read them as they are; they are powers of two, which cost a
    quarter of what powers of e do.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, table: Tensor, weight: Tensor, pad_class: bool) -> Tensor:
        real, more = len(query), -len(query) % CHUNK_ROWS
        query, weight = F.pad(query, (0, 0, 0, more)), F.pad(weight, (0, more))  # whole vectors, few shapes
        rows = _chunk_bytes(table) // max(1, len(table) * table.element_size() * CHUNK_ROWS) * CHUNK_ROWS
        wanted = any(ctx.needs_input_grad[:2])
        if rows < FEW_ROWS:
            total, gradients = _by_tiles(query, table, weight, pad_class, wanted)
        else:
            total, gradients = _by_rows(query, table, weight, pad_class, rows, wanted)
        ctx.save_for_backward(*(gradient[:size] for gradient, size in zip(gradients, (real, len(table)), strict=True)))
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        grad_query, grad_table = ctx.saved_tensors
        return grad_query * gradients[0], grad_table * gradients[0], None, None


def _chunk_bytes(table: Tensor) -> int:
    return CHUNK_BYTES if table.device.type == "cpu" else GPU_CHUNK_BYTES


def _calm(query: Tensor, table: Tensor) -> bool:
    """Whether no logit can be so large, as a power of two, that it has to be made smaller first."""
    if not len(query) or not len(table):
        return False
    bound = LOG2E * torch.linalg.vector_norm(query, dim=1).amax() * torch.linalg.vector_norm(table, dim=1).amax()
    return bool(bound < CALM)


def _by_rows(
    query: Tensor, table: Tensor, weight: Tensor, pad_class: bool, rows: int, wanted: bool
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Return the sum and both gradients, some rows against all classes at a time: three products."""
    grad_query, grad_table, total = torch.empty_like(query), torch.zeros_like(table), query.new_zeros(())
    columns, calm = table.T.contiguous(), _calm(query, table)  # [D, N]
    for start in range(0, len(query), rows):
        part, share = query[start : start + rows], weight[start : start + rows]  # [r, D], [r]
        logits = product(table, part * LOG2E)  # [N, r], in powers of two
        largest = torch.zeros_like(share) if calm else logits.amax(0)  # [r]
        if pad_class:
            largest = largest.clamp(min=0)
        powers = (logits if calm else logits.sub_(largest)).exp2_()
        partition = powers.sum(0)
        if pad_class:
            partition += (-largest).exp2()
        total += ((largest + partition.log2()) * share).sum() / LOG2E
        if wanted:
            scale = (share / partition)[:, None]  # normalising the thin side spares a pass over the logits
            torch.mul(product(columns, powers.T).T, scale, out=grad_query[start : start + rows])
            grad_table += product(powers, (part * scale).T)
    return total, (grad_query, grad_table)


def _by_tiles(
    query: Tensor, table: Tensor, weight: Tensor, pad_class: bool, wanted: bool
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Return the same, some rows against some classes at a time, twice: four products.

    Of a large table few rows' logits fit in cache, and adding their share to the gradient of the whole table would cost
    more than the products.
    """
    block = max(1, min(len(query), TILE_ROWS))
    tile = max(1, _chunk_bytes(table) // (block * query.element_size()))
    scaled = query * LOG2E  # logits and partition in powers of two
    partition = torch.cat([_partition(part, table, pad_class, tile) for part in torch.split(scaled, block)])
    grad_query, grad_table = torch.zeros_like(query).T.contiguous(), torch.zeros_like(table)  # [D, R], [N, D]
    if wanted:
        shifted = torch.cat([scaled, (weight.log2() - partition)[:, None]], 1)  # one column more takes off the rest
        for first in range(0, len(table), tile):
            classes, gradient = table[first : first + tile], grad_table[first : first + tile]
            longer, columns = F.pad(classes, (0, 1), value=1.0), classes.T.contiguous()
            for start in range(0, len(query), block):
                share = product(longer, shifted[start : start + block]).exp2_()  # [tile, block] weighted probabilities
                grad_query[:, start : start + block] += product(columns, share.T)
                gradient += product(share, query[start : start + block].T)
    return (partition * weight).sum() / LOG2E, (grad_query.T, grad_table)


def _partition(part: Tensor, table: Tensor, pad_class: bool, tile: int) -> Tensor:
    """Return log2 sum_j 2^(part_r . table_j), [r], some classes at a time."""
    calm = _calm(part / LOG2E, table)
    largest = part.new_full((len(part),), 0.0 if pad_class or calm else -torch.inf)
    total = torch.full_like(largest, float(pad_class))
    for classes in torch.split(table, tile):
        logits = product(classes, part)  # [tile, r]
        if not calm:
            higher = torch.maximum(largest, logits.amax(0))
            total, logits, largest = total * (largest - higher).exp2(), logits.sub_(higher), higher
        total = total + logits.exp2_().sum(0)
    return largest + total.log2()


@dataclass(frozen=True)
class Proposal:
    """The distribution negatives are drawn from, by class: float64 [N], sums to 1."""

    probability: Tensor

    @staticmethod
    def mixed(count: Tensor) -> "Proposal":
        """Return half uniform, half proportional to the training counts [N] (all uniform if there are none)."""
        count = count.double()
        uniform = torch.full_like(count, 1 / len(count))
        total = count.sum()
        return Proposal(torch.where(total > 0, 0.5 * uniform + 0.5 * count / total.clamp(min=1), uniform))

    def draw(self, negatives: int, generator: torch.Generator) -> Tensor:
        """Return classes drawn with replacement, int64 [M], of any number of classes (torch.multinomial: 2^24)."""
        cumulative = self.probability.cumsum(0)
        uniform = torch.rand(negatives, dtype=torch.float64, generator=generator, device=generator.device)
        place = uniform.to(cumulative.device) * cumulative[-1]
        return torch.searchsorted(cumulative, place, right=True).clamp_(max=len(cumulative) - 1)


@dataclass(frozen=True)
class Positives:
    """P distinct (row, class) pairs, int64 [P] each: the targets of the query rows."""

    row: Tensor
    item: Tensor


def sampled_log_partition(
    query: Tensor,
    table: Tensor,
    positives: Positives,
    draws: Tensor,
    proposal: Proposal,
    pad_class: bool = False,
    corrected: bool = True,
) -> Tensor:
    """Return an estimate of log sum_j exp(query_r . table_j) from shared draws, [R].

    A row's positives Y enter exactly. Draws that hit Y are removed; the m' left are draws from Q'_j = Q_j / (1 - Q(Y)),
    so each counts exp(s_j) / (m' Q'_j): the logQ correction, by which the estimate of the partition (not of its
    logarithm, which is low by an amount that shrinks with M) is unbiased.

    Args:
        query: [R, D].
        table: [N, D].
        positives: the targets of each row.
        draws: int64 [M] classes drawn from `proposal`, shared by all rows.
        proposal: what they were drawn from.
        pad_class: add a class whose logit is 0.
        corrected: False leaves the correction out: another loss, for comparison only.

    Cost: one [R, M] product, three copies of it in the backward pass.
    """
    negative = query @ table.index_select(0, draws).T  # [R, M]
    hit = _hits(positives, draws, len(query))  # [R, M]
    if corrected:
        probability = proposal.probability.to(query.device)
        mass = probability.new_zeros(len(query)).index_add_(0, positives.row, probability[positives.item])  # [R] Q(Y)
        left = (~hit).sum(1).double()  # [R] m'
        correction = probability[draws].log()[None, :] + (left.clamp(min=1).log() - (1 - mass).log())[:, None]
        negative = negative - correction.to(negative.dtype)
    negative = negative.masked_fill(hit, -torch.inf)
    positive = (query.index_select(0, positives.row) * table.index_select(0, positives.item)).sum(1)  # [P]
    parts = [negative, _ragged(positive, positives.row, len(query))]
    if pad_class:
        parts.append(negative.new_zeros(len(query), 1))
    return torch.logsumexp(torch.cat(parts, dim=1), dim=1)


def _hits(positives: Positives, draws: Tensor, rows: int) -> Tensor:
    """Mark the draws that are a row's own positives, bool [R, M]; only pairs that were drawn at all are compared."""
    hit = torch.zeros(rows, len(draws), dtype=torch.bool, device=draws.device)
    drawn = torch.isin(positives.item, draws).nonzero().squeeze(1)
    pair, column = (positives.item[drawn][:, None] == draws[None, :]).nonzero(as_tuple=True)
    hit[positives.row[drawn][pair], column] = True
    return hit


def _ragged(value: Tensor, row: Tensor, rows: int) -> Tensor:
    """Lay values [P] of given rows out as a rectangle [R, largest number per row], -inf where there is none."""
    order = torch.argsort(row, stable=True)
    number = torch.bincount(row, minlength=rows)
    place = torch.arange(len(row), device=row.device) - (number.cumsum(0) - number)[row[order]]
    width = int(number.max()) if len(row) else 0
    return value.new_full((rows, width), -torch.inf).index_put((row[order], place), value[order])
