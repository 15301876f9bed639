"""Sampled softmax against arithmetic; the chunked form is tested with its model."""

import itertools
import math

import pytest
import torch

from ranking.softmax import Positives, Proposal, log_partition, sampled_log_partition

LOGITS = torch.tensor([2.0, 1.0, 0.0, -1.0], dtype=torch.float64)  # the first is the target
Q = Proposal(torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64))
ONE = Positives(torch.tensor([0]), torch.tensor([0]))


def estimate(draws, corrected=True, positives=ONE, query=1.0):
    """Return log Z from draws; items are one-dimensional, so that the table is the logits."""
    query = torch.full((int(positives.row.max()) + 1, 1), query, dtype=torch.float64)
    return sampled_log_partition(query, LOGITS[:, None], positives, torch.tensor(draws), Q, True, corrected)


def test_full_and_sampled_losses_are_those_worked_out_by_hand():
    full = log_partition(torch.ones(1, 1).double(), LOGITS[:, None], pad_class=True)
    assert full.exp().item() == pytest.approx(12.475217, abs=1e-6)  # e^2 + e + 1 + 1/e + e^0 of the padding class
    assert full.item() - 2 == pytest.approx(0.523744, abs=1e-6)
    assert estimate([1, 2]).item() - 2 == pytest.approx(0.534279, abs=1e-6)
    assert estimate([1, 2], corrected=False).item() - 2 == pytest.approx(0.493812, abs=1e-6)


def test_the_partition_is_unbiased_and_its_logarithm_low():
    partition = loss = 0.0
    for draws in itertools.product([1, 2, 3], repeat=2):
        probability = math.prod(Q.probability[draw].item() / 0.6 for draw in draws)
        partition += probability * estimate(list(draws)).exp().item()
        loss += probability * (estimate(list(draws)).item() - 2)
    assert partition == pytest.approx(12.475217, abs=1e-6)
    assert loss == pytest.approx(0.520670, abs=1e-6)


def test_draws_that_hit_a_positive_do_not_count():
    assert estimate([0, 1, 0, 2]).item() == pytest.approx(estimate([1, 2]).item())
    only = estimate([0, 0]).item()  # no negative is left: the target and the padding class
    assert only == pytest.approx(math.log(math.exp(2) + 1))


def test_several_positives_of_a_row_enter_exactly_and_rows_keep_apart():
    positives = Positives(torch.tensor([0, 1, 0]), torch.tensor([0, 3, 2]))
    first, second = estimate([1, 3, 2], positives=positives).tolist()
    # Row 0: e^2 + e^0 exactly; draws 1 and 3 are left, Q' = Q / (1 - .6): e^1 / (2 .75) + e^-1 / (2 .25), and e^0.
    assert first == pytest.approx(math.log(math.exp(2) + 1 + math.e / 1.5 + math.exp(-1) / 0.5 + 1))
    # Row 1: e^-1 exactly; draws 1 and 2 are left, Q' = Q / .9: e^1 / (2 / 3) + e^0 / (4 / 9), and e^0.
    assert second == pytest.approx(math.log(math.exp(-1) + math.e * 1.5 + 9 / 4 + 1))


def test_the_proposal_is_half_uniform_half_popular_and_drawn_as_it_says():
    proposal = Proposal.mixed(torch.tensor([6, 3, 1, 0]))
    expected = [0.125 + 0.3, 0.125 + 0.15, 0.125 + 0.05, 0.125]
    assert proposal.probability.tolist() == pytest.approx(expected)
    drawn = torch.bincount(proposal.draw(100_000, torch.Generator().manual_seed(0)), minlength=4) / 100_000
    assert drawn.tolist() == pytest.approx(expected, abs=0.008)  # five standard errors of the largest
    assert Proposal.mixed(torch.zeros(5, dtype=torch.int64)).probability.tolist() == pytest.approx([0.2] * 5)
