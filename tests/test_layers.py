"""The shared parts that no model's own test would catch alone."""

import pytest
import torch
from torch import nn

from ranking.layers import ScoringHead, exact, in_float64


@pytest.mark.parametrize(
    "optimiser",
    [
        lambda p: torch.optim.Adam(p, lr=0.1, fused=True),
        lambda p: torch.optim.Adam(p, lr=0.1, foreach=True),
        lambda p: torch.optim.SGD(p, lr=0.1),
    ],
)
def test_scores_follow_the_weights_after_every_kind_of_update(optimiser):
    torch.manual_seed(0)
    head, rows = ScoringHead(4, (8,)), torch.randn(16, 4)
    step = optimiser(head.parameters())
    for _ in range(3):
        head.train()
        head(rows).square().sum().backward()
        step.step()
        step.zero_grad()
        head.eval()
        reference = ScoringHead(4, (8,)).double()
        reference.load_state_dict(head.state_dict())
        expected = reference.eval()(rows.double())
        assert torch.equal(exact(head, rows), expected)
        assert in_float64(head) is in_float64(head)  # and is not copied again while nothing changes
    with torch.no_grad():
        next(head.parameters()).data = next(head.parameters()).data + 1
    assert not torch.equal(exact(head, rows), expected)


def test_a_float64_copy_shares_nothing_with_its_module():
    module = nn.Linear(3, 2).eval()
    copy = in_float64(module)
    assert {p.data_ptr() for p in copy.parameters()}.isdisjoint(p.data_ptr() for p in module.parameters())
    assert all(not p.requires_grad for p in copy.parameters())
    assert all(p.requires_grad for p in module.parameters())
