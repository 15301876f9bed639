"""SDIM's sums by bucket as training reads them, and all that its head sees, written a second time as plain loops."""

from typing import Any

import pytest
import torch
from test_sdim import build, make_batch, normal
from torch import Tensor

import worlds
from ranking.batch import Batch
from ranking.bucket_sums import Norm, bucket_rows, pool, read, read_once
from ranking.sdim import Sdim, SdimConfig

every_norm = pytest.mark.parametrize("norm", ["none", "ratio", "l2"])
few_and_many = pytest.mark.parametrize("count", [2, 6])  # fewer candidates than the four buckets, and more
BUCKETS, NEWEST = 4, 3


def bucketed(count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return buckets of events uint8 [2, 7, 3], which are summed, and buckets of candidates [2, count, 3]."""
    draws = torch.Generator().manual_seed(1)
    code = torch.randint(0, BUCKETS, (2, 7, 3), dtype=torch.uint8, generator=draws)
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[0, :2] = mask[1, 5:] = False  # older ones that are padding, newer ones that the table leaves out
    return code, mask, torch.randint(0, BUCKETS, (2, count, 3), dtype=torch.uint8, generator=draws)


@every_norm
@few_and_many
def test_what_is_read_at_once_is_what_is_read_from_the_table(norm: Norm, count: int) -> None:
    code, mask, candidate = bucketed(count)
    value = normal(4, 2, 7, 5)
    long, recent = read_once(value, code, mask, candidate, BUCKETS, norm, NEWEST)
    table, size = pool(value * mask[..., None], code, mask, BUCKETS)
    torch.testing.assert_close(long, read(bucket_rows(table, size, norm), size, candidate, norm))
    assert torch.equal(recent, value[:, -NEWEST:])


@every_norm
@few_and_many
def test_its_gradients_are_those_of_finite_differences(norm: Norm, count: int) -> None:
    """Of what candidates read and of the newest events, which come along, alone and together."""
    code, mask, candidate = bucketed(count)
    value = normal(4, 2, 7, 5).requires_grad_()

    def both(s: Tensor) -> tuple[Tensor, Tensor]:
        return read_once(s, code, mask, candidate, BUCKETS, norm, NEWEST)

    assert torch.autograd.gradcheck(both, (value,))
    long, recent = both(value)
    (gradient,) = torch.autograd.grad((long.square().sum() + recent.square().sum()), value)
    (of_long,) = torch.autograd.grad(both(value)[0].square().sum(), value)
    newest = torch.zeros_like(value)
    newest[:, -NEWEST:] = 2 * value.detach()[:, -NEWEST:]
    torch.testing.assert_close(gradient, of_long + newest)


def written(model: Sdim, batch: Batch) -> Tensor:
    """Return [q ; long ; q*long ; short ; q*short] of each candidate, float64 [B * C, 5 D], one after the other."""
    config, rows = model.config, []
    every = torch.arange(len(model.items), dtype=torch.int32)
    vector = model.fields.semantic(every, model.items.embedding_row).double()
    planes, attention = model.planes.double(), model.attention.double()
    padded = batch.history.padded(config.window)
    for items, mask, candidates in zip(padded.item, padded.mask, batch.candidates.item, strict=True):
        events = vector[items[mask].long()]  # [n, D]
        for q in vector[candidates.long()]:
            long, members = torch.zeros_like(q), 0
            for plane in planes:  # [tau, D]
                same = ((events @ plane.T >= 0) == (q @ plane.T >= 0)).all(dim=1)
                total = events[same].sum(dim=0)
                members += int(same.sum())
                long += total / total.norm() if config.norm == "l2" and same.any() else total
            long = long / (max(members, 1) if config.norm == "ratio" else len(planes))
            short = torch.zeros_like(q)
            for s in events[-config.recent :]:  # raw weights: they need not sum to 1
                z = attention.inner(torch.cat([q, s, q - s, q * s]))
                short += attention.outer(torch.where(z > 0, z, attention.slope * z)) * s
            rows.append(torch.cat([q, long, q * long, short, q * short]))
    attention.float()
    return torch.stack(rows).detach()


@every_norm
@few_and_many
@pytest.mark.parametrize("training", [True, False])
def test_the_head_sees_the_five_blocks_of_the_paper(norm: Norm, count: int, training: bool) -> None:
    model: Any = build(14, norm=norm, bits=2)
    batch, seen = make_batch(15, candidates=count), []
    expected = written(model, batch)
    model.head.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach()))
    if training:
        model.train().loss(batch, torch.Generator())
    else:
        worlds.scores(model, batch)
    for found, block in zip(torch.cat(seen).double().chunk(5, 1), expected.chunk(5, 1), strict=True):
        assert block.abs().max() > 0.1
        torch.testing.assert_close(found, block, rtol=1e-4, atol=1e-4)


def test_the_defaults_are_the_papers() -> None:
    config = SdimConfig()
    assert (config.norm, config.bits, config.groups) == ("l2", 3, 16)
    assert (config.window, config.recent, config.long_includes_short) == (200, 50, True)
    assert (config.item_width, config.category_width, config.hidden, config.center) == (16, 16, 36, False)
