"""The shared parts that no model's own test would catch alone."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import ranking.layers
from ranking.gate_units import ActivationUnit, GateUnit
from ranking.layers import AttentionNetwork, Layers, ScoringHead, in_float64
from ranking.losses import binary_cross_entropy, listwise_cross_entropy, with_positives


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
        assert torch.equal(in_float64(head)(rows.double()), expected)
        assert in_float64(head) is in_float64(head)  # and is not copied again while nothing changes
    with torch.no_grad():
        next(head.parameters()).data = next(head.parameters()).data + 1
    assert not torch.equal(in_float64(head)(rows.double()), expected)


def test_a_part_that_was_replaced_is_copied_anew():
    head = ScoringHead(3, hidden=(4,)).eval()
    x = torch.randn(5, 3)
    for replaced in range(2):
        before = in_float64(head)(x.double())
        weights = [part for part in head.modules() if isinstance(part, nn.Linear)]
        if replaced:
            weights[0].weight = nn.Parameter(weights[0].weight.detach() + 1)
        else:
            head.double().float()  # the same numbers in new tensors
        after = in_float64(head)(x.double())
        assert torch.equal(before, after) is not bool(replaced)
        torch.testing.assert_close(after, copy.deepcopy(head).double()(x.double()))


def test_a_float64_copy_shares_nothing_with_its_module():
    module = nn.Linear(3, 2).eval()
    copy = in_float64(module)
    assert {p.data_ptr() for p in copy.parameters()}.isdisjoint(p.data_ptr() for p in module.parameters())
    assert all(not p.requires_grad for p in copy.parameters())
    assert all(p.requires_grad for p in module.parameters())


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 40), st.integers(1, 30))
def test_layers_give_a_row_alone_what_they_give_it_among_others(seed, width, rows):
    torch.manual_seed(seed)
    layers, x = Layers(nn.Linear(width, 20), nn.ReLU(), nn.Linear(20, 3)), torch.randn(rows, width)
    trained = layers(x)
    assert trained.requires_grad
    found = layers.eval()(x)
    assert not found.requires_grad
    torch.testing.assert_close(found, trained.detach(), rtol=1e-5, atol=1e-5)
    for row in range(rows):
        assert torch.equal(layers(x[row : row + 1]), found[row : row + 1])


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 30), st.integers(1, 9), st.integers(0, 40))
def test_units_give_a_pair_of_event_and_context_the_same_in_any_company(seed, length, contexts, padding):
    torch.manual_seed(seed)
    event, context = torch.randn(2, length, 8), torch.randn(2, contexts, 8)
    for unit in (ActivationUnit(8, 8), GateUnit(8, 8, 3)):
        trained, whole = unit(event, context), unit.eval()(event, context)
        torch.testing.assert_close(whole, trained.detach(), rtol=1e-5, atol=1e-5)
        longer = torch.cat([torch.zeros(2, padding, 8), event], 1)
        for c in {0, contexts - 1}:
            alone = unit(longer[1:], context[1:, c : c + 1])
            assert torch.equal(alone[:, :, padding:], whole[1:, c : c + 1])


@pytest.mark.parametrize("q", [[0.2] * 5, [0.7, 0.1, 0.1, 0.05, 0.05], [0.05, 0.05, 0.1, 0.1, 0.7]])
def test_with_the_offset_logits_learn_log_p_whatever_draws_the_negatives(q):
    """Of items taken with p against negatives drawn by q the logits become log p - log q; with the offset, log p."""
    p, q = torch.tensor([0.5, 0.2, 0.15, 0.1, 0.05]).double(), torch.tensor(q).double()
    logits = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    label = torch.tensor([[1.0], [0.0]]).double().expand(2, 5)
    weight = torch.stack([p, q])  # the expectation over both kinds of draws
    optimiser = torch.optim.LBFGS([logits], max_iter=200)

    def loss():
        optimiser.zero_grad()
        value = binary_cross_entropy(logits.expand(2, 5), label, weight, q.log().expand(2, 5))
        value.backward()
        return value

    optimiser.step(loss)
    assert torch.allclose(logits.detach().log_softmax(0), p.log(), atol=1e-4)


@pytest.mark.parametrize("q", [[0.2] * 5, [0.7, 0.1, 0.1, 0.05, 0.05]])
def test_listwise_with_the_offset_learns_log_p_whatever_draws_the_negatives(q):
    """All pairs of a positive drawn by p and a negative drawn by q: the best logits are log p, up to a constant."""
    p, q = torch.tensor([0.5, 0.2, 0.15, 0.1, 0.05]).double(), torch.tensor(q).double()
    logits = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    pairs = torch.cartesian_prod(torch.arange(5), torch.arange(5))
    label = torch.tensor([1.0, 0.0]).double().expand(1, 2)
    optimiser = torch.optim.LBFGS([logits], max_iter=200)

    def loss():
        optimiser.zero_grad()
        value = torch.stack(
            [
                p[a]
                * q[b]
                * listwise_cross_entropy(logits[None, [a, b]], label, torch.ones(1, 2), q.log()[None, [a, b]])
                for a, b in pairs.tolist()
            ]
        ).sum()
        value.backward()
        return value

    optimiser.step(loss)
    assert torch.allclose(logits.detach().log_softmax(0), p.log(), atol=1e-3)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 5), st.integers(1, 6))
def test_listwise_is_the_softmax_of_each_positive_among_its_own_negatives(seed, requests, candidates):
    draws = torch.Generator().manual_seed(seed)
    logits, offset = torch.randn(2, requests, candidates, generator=draws, dtype=torch.float64)
    logits.requires_grad_()
    label, weight = (torch.rand(2, requests, candidates, generator=draws) < 0.5).double()
    found = listwise_cross_entropy(logits, label, weight, offset)
    each = []
    for b in range(requests):
        row = (logits - offset)[b]
        negatives = [row[c] for c in range(candidates) if weight[b, c] and not label[b, c]]
        taken = [
            -torch.log_softmax(torch.stack([row[c], *negatives]), 0)[0]
            for c in range(candidates)
            if weight[b, c] and label[b, c]
        ]
        if taken:
            each.append(torch.stack(taken).mean())
    expected = torch.stack(each).mean() if each else torch.zeros((), dtype=torch.float64)
    torch.testing.assert_close(found, expected)
    (gradient,) = torch.autograd.grad(found, logits)
    assert gradient.isfinite().all()
    assert not gradient[weight == 0].any()


@pytest.mark.parametrize(
    ("network", "candidates_first"),
    [(AttentionNetwork(4, 6), True), (ActivationUnit(4, 4), False), (GateUnit(4, 4, 3), False)],
)
def test_runs_of_requests_change_nothing(network, candidates_first, monkeypatch):
    draws = torch.Generator().manual_seed(0)
    candidates, events = (torch.randn(7, n, 4, generator=draws, requires_grad=True) for n in (3, 5))
    inputs = (candidates, events) if candidates_first else (events, candidates)
    found = []
    for elements in (1 << 20, 2 * 3 * 5 * 32):  # all at once; two requests at a time
        monkeypatch.setattr(ranking.layers, "CHUNK_ELEMENTS", elements)
        result = network(*inputs)
        found.append([result, *torch.autograd.grad(result.square().sum(), [*inputs, *network.parameters()])])
    for whole, in_runs in zip(*found, strict=True):
        torch.testing.assert_close(in_runs, whole, rtol=1e-5, atol=1e-6)


def test_shares_of_a_batch_weighed_by_their_requests_give_the_gradient_of_the_whole():
    """What a team of processes computes; the numbers of candidates of its shares differ."""
    logits = torch.randn(4, 6, requires_grad=True, generator=torch.Generator().manual_seed(0))
    weight = torch.tensor([[1.0] * 6, [1.0] * 2 + [0.0] * 4] * 2)
    label = torch.zeros(4, 6)
    label[:, 0] = 1
    (whole,) = torch.autograd.grad(listwise_cross_entropy(logits, label, weight), logits)
    together = torch.zeros(4, 6)
    for rank in range(2):
        mine = slice(rank, None, 2)
        loss = listwise_cross_entropy(logits[mine], label[mine], weight[mine])
        (found,) = torch.autograd.grad(loss, logits)
        together += found * with_positives(label[mine], weight[mine]) / with_positives(label, weight)
    torch.testing.assert_close(together, whole)


def test_a_request_counts_if_it_has_a_positive_that_is_real():
    label = torch.tensor([[1.0, 0.0], [0.0, 0.0], [1.0, 0.0]])
    weight = torch.tensor([[1.0, 1.0], [1.0, 1.0], [0.0, 1.0]])
    assert float(with_positives(label, weight)) == 1
