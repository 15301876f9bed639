"""Blocks of memory are used again, and never while anybody holds a part of them."""

import gc

import pytest
import torch

from ranking import workspace
from ranking.workspace import MOST, SMALLEST, empty

LIKE = torch.empty(0)
LARGE = (SMALLEST // 4 // 8, 8)


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    monkeypatch.setattr(workspace, "_blocks", [])


def test_a_block_is_used_again_when_nobody_holds_it():
    first = empty(LARGE, LIKE)
    place = first.data_ptr()
    assert empty(LARGE, LIKE).data_ptr() != place
    del first
    again = empty(LARGE, LIKE)
    assert again.data_ptr() == place
    assert again.shape == LARGE
    assert again.dtype == torch.float32


def test_views_detached_tensors_and_saved_ones_hold_a_block():
    whole = empty(LARGE, LIKE).fill_(1.0)
    part = whole[3:5].detach()
    del whole
    assert empty(LARGE, LIKE).data_ptr() != part.data_ptr() - 3 * 8 * 4
    weight = torch.full((8,), 2.0, requires_grad=True)
    product = (empty(LARGE, LIKE).fill_(3.0) * weight).sum()  # saves the block for the backward pass
    for _ in range(3):
        empty(LARGE, LIKE).fill_(0.0)
    product.backward()
    assert weight.grad is not None
    assert (weight.grad == 3.0 * LARGE[0]).all()
    assert (part == 1.0).all()


def test_little_is_not_kept_and_much_is_not_kept_for_ever(monkeypatch):
    empty((4, 4), LIKE)
    assert not workspace._blocks
    monkeypatch.setattr(workspace, "MOST", 3 * SMALLEST)
    held = [empty(LARGE, LIKE) for _ in range(9)]
    assert len({one.data_ptr() for one in held}) == 9
    assert sum(block.nbytes for block in workspace._blocks) <= 3 * SMALLEST
    del held
    gc.collect()
    empty((3 * LARGE[0], 8), LIKE)  # the small ones make room
    assert [block.nbytes for block in workspace._blocks] == [3 * SMALLEST]
    assert MOST > SMALLEST
