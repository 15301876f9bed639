"""AW-MoE, our reading: identities its gate, its experts and its contrastive loss must keep, and numbers by hand."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import ranking.layers
import worlds
from ranking.aw_moe import AwMoe, AwMoeConfig, attended, experts_view
from ranking.batch import UNKNOWN, Batch, Candidates, Request
from ranking.contrast import contrastive_loss, masked_view, others, some_of
from ranking.losses import binary_cross_entropy
from recsys.errors import ConfigError, DataError
from recsys.metrics import auc, ndcg, rank
from worlds import ROWS, histories, item_table, normal

seeds = st.integers(0, 2**31)
GATES = ["query", "target", "none"]
SMALL = AwMoeConfig(window=12, width=6, experts=3, item_width=3, category_width=2, unknown_rate=0.0)


def build(seed: int = 0, **changes: Any) -> AwMoe:
    """Return a float64 model in evaluation mode with weights large enough to matter; queries ask for categories."""
    if changes.get("gate") == "query":
        changes = {"query": "category", **changes}
    torch.manual_seed(seed)
    model = AwMoe(replace(SMALL, **changes), item_table()).double()
    for name, parameter in model.named_parameters():
        parameter.data = torch.randn_like(parameter) * 0.7
        if name.startswith(("fields", "queries")):
            parameter.data[0] = 0
    return model.eval()


def make_batch(seed: int, users: int = 5, most: int = 12, candidates: int = 4) -> Batch:
    """Return random requests; the first has the longest history, the second none; some ask for nothing (query 0)."""
    draws = np.random.default_rng(seed)
    lengths = [most, 0, *draws.integers(0, most + 1, users - 2)]
    rows = torch.from_numpy(draws.integers(UNKNOWN, ROWS, (users, candidates)).astype(np.int32))
    label = torch.from_numpy(draws.integers(0, 2, rows.shape)).double()
    return Batch(
        histories([draws.integers(UNKNOWN, ROWS, n).tolist() for n in lengths]),
        Request(torch.full((users,), 10**7), torch.from_numpy(draws.integers(0, 7, users).astype(np.int32))),
        Candidates(rows),
        label,
        torch.ones_like(label),
    )


def draws(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def everything(*shape: int) -> Tensor:
    return torch.ones(shape, dtype=torch.bool)


def gate_of(model: AwMoe, event: Tensor, h: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return g [B, C, K] (C = 1 without candidates) of events [B, T, D] and candidates [B, C, D]."""
    mask = everything(*event.shape[:2]) if mask is None else mask
    return model._attended(*model._gate_units(event, context_of(model, h)), mask)


def context_of(model: AwMoe, h: Tensor) -> Tensor | None:
    """Return what the gate sees of vectors [B, C, D]: all, the first in place of a query, or nothing."""
    return {"target": h, "query": h[:, :1], "none": None}[model.config.gate]


def gate_in(model: AwMoe, batch: Batch) -> Tensor:
    """Return g [B, C, K] of a batch, with its queries where the gate sees them."""
    event, mask = model._events(batch.history, model.items.embedding_row)
    h = model.inner(model.fields.semantic(batch.candidates.item, model.items.embedding_row))
    asked = model._asked(batch.request.query, h)
    return gate_of(model, event, h if asked is None else asked, mask)


def experts_in(model: AwMoe, batch: Batch) -> Tensor:
    """Return s [B, C, K] of a batch."""
    event, mask = model._events(batch.history, model.items.embedding_row)
    h = model.inner(model.fields.semantic(batch.candidates.item, model.items.embedding_row))
    asked = model._asked(batch.request.query, h)
    parts = [pooled_of(model, event, h, mask), h]
    return model.experts(torch.cat(parts if asked is None else [*parts, asked.expand_as(h)], -1))


def pooled_of(model: AwMoe, event: Tensor, h: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return v_u [B, C, D]."""
    assert model.attention is not None
    return experts_view(model.attention(event, h), event, everything(*event.shape[:2]) if mask is None else mask)


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


# The units against the formulas


@settings(max_examples=20, deadline=None)
@given(seeds)
def test_the_units_are_the_networks_of_the_formulas(seed: int) -> None:
    model = build(seed % 100)
    event, h = normal(seed, 2, 5, 6), normal(seed + 1, 2, 3, 6)
    e = event[:, None].expand(-1, 3, -1, -1)  # [B, C, T, D]
    c = h[:, :, None].expand(-1, -1, 5, -1)
    assert model.activation is not None
    assert model.gate_unit is not None
    x = torch.cat([e, c, e * c, e - c], -1)
    expected = model.activation.last(model.activation.middle(model.activation.first(x)))
    close(model.activation(event, h), expected.squeeze(-1))
    close(model.gate_unit(event, h), model.gate_unit.last(model.gate_unit.first(torch.cat([e, c], -1)).relu()))


# Identities


@pytest.mark.parametrize("activation", ["raw", "softmax"])
@pytest.mark.parametrize("gate", GATES)
def test_masking_an_event_is_removing_it(gate: str, activation: str) -> None:
    model = build(1, gate=gate, activation=activation)
    event, h = normal(2, 2, 5, 6), normal(3, 2, 3, 6)
    for j in range(5):
        mask = everything(2, 5)
        mask[:, j] = False
        poisoned = event.clone()
        poisoned[:, j] = 1e6
        rest = torch.cat([event[:, :j], event[:, j + 1 :]], 1)
        close(gate_of(model, poisoned, h, mask), gate_of(model, rest, h))
        close(pooled_of(model, poisoned, h, mask), pooled_of(model, rest, h))


@settings(max_examples=25, deadline=None)
@given(seeds, st.sampled_from(GATES))
def test_neither_order_nor_padding_matters(seed: int, gate: str) -> None:
    model, batch = build(4, gate=gate), make_batch(seed)
    expected = worlds.scores(model, batch)
    h = batch.history
    owner = torch.repeat_interleave(torch.arange(len(batch)), h.lengths)
    order = (owner + torch.rand(len(owner), generator=draws(seed))).argsort()
    close(worlds.scores(model, replace(batch, history=replace(h, item=h.item[order]))), expected)
    for b in range(len(batch)):  # alone there is no padding
        close(worlds.scores(model, worlds.take(batch, [b]))[0], expected[b])


@pytest.mark.parametrize("gate", GATES)
def test_raw_weights_add_up_over_the_history_and_softmax_does_not(gate: str) -> None:
    for activation in ("raw", "softmax"):
        model = build(5, gate=gate, activation=activation)
        one, two, h = normal(6, 2, 4, 6), normal(7, 2, 3, 6), normal(8, 2, 3, 6)
        assert model.base is not None
        g = [gate_of(model, event, h) - model.base for event in (one, two, torch.cat([one, two], 1))]
        twice = gate_of(model, torch.cat([one, one[:, :1]], 1), h) - model.base
        doubled = g[0] + gate_of(model, one[:, :1], h) - model.base
        if activation == "raw":
            close(g[2], g[0] + g[1])
            close(twice, doubled)
        else:
            assert (g[2] - g[0] - g[1]).abs().max() > 1e-3
            assert (twice - doubled).abs().max() > 1e-3


@pytest.mark.parametrize("gate", GATES)
def test_the_gate_of_one_event_is_the_base_plus_its_weighted_unit(gate: str) -> None:
    event, h = normal(9, 2, 1, 6), normal(10, 2, 3, 6)
    for activation in ("raw", "softmax"):
        model = build(11, gate=gate, activation=activation)
        w, unit = model._gate_units(event, context_of(model, h))
        assert model.base is not None
        term = unit[..., 0, :] if activation == "softmax" else w * unit[..., 0, :]
        close(gate_of(model, event, h), model.base + term)


@pytest.mark.parametrize("gate", GATES)
def test_without_events_g0_ranks_and_without_g0_nothing_does(gate: str) -> None:
    batch = replace(make_batch(12), history=histories([[]] * 5))
    assert not worlds.scores(build(13, gate=gate, base=False), batch).any()
    model = build(13, gate=gate)
    assert model.base is not None
    close(worlds.scores(model, batch), experts_in(model, batch) @ model.base)


def test_a_gate_without_context_is_the_users_alone() -> None:
    batch = make_batch(14)
    model = build(15, gate="none")
    state = model.encode(batch.history)
    assert state.gate.shape == (5, 3)
    event, _ = model._events(batch.history, model.items.embedding_row)
    close(gate_of(model, event, event, state.mask)[:, 0], state.gate)
    candidate = normal(16, 5, 4, 6).requires_grad_()
    g = gate_of(model, event, candidate, state.mask)
    assert torch.autograd.grad(g.sum(), candidate, allow_unused=True) == (None,)

    model = build(15, gate="target")
    assert model.encode(batch.history).gate.shape == (5, 0)
    g = gate_of(model, event[:1], candidate[:1], state.mask[:1])
    assert (g[:, 0] - g[:, 1]).abs().max() > 1e-3


@pytest.mark.parametrize("gate", GATES)
def test_experts_have_no_order(gate: str) -> None:
    model, batch = build(17, gate=gate), make_batch(18)
    expected = worlds.scores(model, batch)
    order = [2, 0, 1]
    assert model.gate_unit is not None
    assert model.base is not None
    model.experts.each = torch.nn.ModuleList([model.experts.each[k] for k in order])
    last = model.gate_unit.last
    last.weight.data, last.bias.data = last.weight.data[order], last.bias.data[order]
    model.base.data = model.base.data[order]
    close(worlds.scores(model, batch), expected)


@pytest.mark.parametrize("gate", GATES)
def test_one_expert_makes_a_product_and_constant_units_count_the_events(gate: str) -> None:
    batch = make_batch(19)
    model = build(20, gate=gate, experts=1)
    close(worlds.scores(model, batch), (gate_in(model, batch) * experts_in(model, batch)).squeeze(-1))

    model = build(20, gate=gate)
    assert model.activation is not None
    assert model.gate_unit is not None
    assert model.base is not None
    for unit, value in ((model.activation, 1.0), (model.gate_unit, 0.3)):
        unit.last.weight.data.zero_()
        unit.last.bias.data.fill_(value)
    n = batch.history.padded(12).mask.sum(1)[:, None, None].double()
    close(*torch.broadcast_tensors(gate_in(model, batch), model.base + 0.3 * n))


@pytest.mark.parametrize("gate", GATES)
def test_what_stands_at_padding_is_never_read_and_never_learns(gate: str) -> None:
    model, batch = build(21, gate=gate), make_batch(22)
    expected = worlds.scores(model, batch)
    model.train().loss(batch, draws()).total.backward()
    for table in (model.fields.item, model.fields.category, model.queries):
        if table is None:
            assert gate != "query"
            continue
        assert table.weight.grad is not None
        gradient = table.weight.grad.to_dense()
        assert gradient.any()
        assert not gradient[0].any()
        table.weight.data[0] = math.nan
    assert torch.equal(worlds.scores(model, batch), expected)


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for gate in GATES:
        model, batch = build(23, gate=gate), make_batch(24)
        expected = worlds.scores(model, batch)
        monkeypatch.setattr(ranking.layers, "CHUNK_ELEMENTS", 1)
        found = worlds.scores(model, batch)
        monkeypatch.undo()
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_a_gate_on_the_query_is_the_requests_alone() -> None:
    model, batch = build(15, gate="query"), make_batch(14)
    query = torch.tensor([2, 3, 0, 4, 1], dtype=torch.int32)
    batch = replace(batch, request=replace(batch.request, query=query))
    g = gate_in(model, batch)
    assert g.shape == (5, 1, 3)
    close(worlds.scores(model, batch), (g * experts_in(model, batch)).sum(-1))
    event, mask = model._events(batch.history, model.items.embedding_row)
    other = gate_of(model, event, model._asked(query.roll(1), event), mask)  # type: ignore[arg-type]
    assert ((other - g).abs().amax((1, 2)) > 1e-3).tolist() == mask.any(1).tolist()
    model.fields.requires_grad_(False)
    model.train()
    model._attended(*model._gate_units(event.detach(), model._asked(query, event)), mask).sum().backward()
    assert model.queries is not None
    assert model.queries.weight.grad is not None
    learnt = model.queries.weight.grad.to_dense().any(1)
    assert set(learnt.nonzero().flatten().tolist()) == {int(q) for q in query[mask.any(1)] if q}


def test_without_a_query_its_vector_is_zero_and_in_training_the_mode_that_would_work_is_named() -> None:
    model, batch = build(16, gate="query"), make_batch(17)
    nothing = replace(batch.request, query=torch.zeros(5, dtype=torch.int32))
    expected = worlds.scores(model, replace(batch, request=nothing))
    assert torch.equal(worlds.scores(model, replace(batch, request=replace(nothing, query=None))), expected)
    event, mask = model._events(batch.history, model.items.embedding_row)
    h = model.inner(model.fields.semantic(batch.candidates.item, model.items.embedding_row))
    s = model.experts(torch.cat([pooled_of(model, event, h, mask), h, torch.zeros_like(h)], -1))
    close(expected, (gate_of(model, event, torch.zeros_like(h), mask) * s).sum(-1))
    with pytest.raises(DataError, match=r'query = "category".*use gate = "target"'):
        model.train().loss(replace(batch, request=replace(nothing, query=None)), draws())
    with pytest.raises(ConfigError, match=r'query = "genres".*only category.*use gate = "target"'):
        build(16, gate="query", query="genres")


@pytest.mark.parametrize("gate", ["target", "none", "mixture"])
def test_experts_see_the_query_whatever_the_gate_sees(gate: str) -> None:
    model, batch = build(18, gate=gate, query="category", contrast=0.0), make_batch(19)
    event, mask = model._events(batch.history, model.items.embedding_row)
    if gate == "mixture":
        assert model.mixture is not None
        g = model.mixture(model._asked(batch.request.query, event)).softmax(-1)
    else:
        h = model.inner(model.fields.semantic(batch.candidates.item, model.items.embedding_row))
        g = gate_of(model, event, h, mask)
    close(worlds.scores(model, batch), (g * experts_in(model, batch)).sum(-1))


@pytest.mark.parametrize(
    ("gate", "count", "fields"),
    [
        ("target", 48_654, {"category": None}),
        ("none", 44_558, {"category": None}),
        ("query", 63_086, {"query": "category"}),
    ],
)
def test_parameter_counts_are_the_known_ones(gate: Any, count: int, fields: dict[str, Any]) -> None:
    model = AwMoe(AwMoeConfig(gate=gate, **fields), item_table())
    network = [p for name, p in model.named_parameters() if not name.startswith(("fields", "queries"))]
    assert sum(p.numel() for p in network) == count
    assert model.base is not None
    assert model.base.tolist() == [0.25] * 4


# The contrastive loss


def contrast(gate: Tensor, view: Tensor, negative: Tensor | None = None, **changes: Any) -> float:
    """Return L_cl of requests that all have events, every other one a negative unless said otherwise."""
    rows = len(gate)
    negative = ~torch.eye(rows, dtype=torch.bool) if negative is None else negative
    return float(loss_of(gate, view, negative, everything(rows), **changes))


def loss_of(
    gate: Tensor, view: Tensor, negative: Tensor, real: Tensor, against: Any = "views", similarity: Any = "cosine",
    tau: float = 1.0,
) -> Tensor:  # fmt: skip
    """Return L_cl with the model's defaults."""
    return contrastive_loss(gate, view, negative, real, against, similarity, tau)


@settings(max_examples=50, deadline=None)
@given(seeds, st.integers(1, 6), st.sampled_from([0.1, 0.5, 1.0]))
def test_with_nothing_masked_the_loss_is_that_of_the_gates_among_themselves(
    seed: int, rows: int, temperature: float
) -> None:
    mask = torch.rand(rows, 7, generator=draws(seed)) < 0.6
    assert torch.equal(masked_view(mask, 0.0, draws(seed)), mask)
    g = normal(seed, rows, 4)
    cosine = torch.cosine_similarity(g[:, None], g[None], dim=-1)
    others_only = ((cosine - 1) / temperature).exp() - torch.eye(rows)
    expected = (1 + others_only.sum(1)).log().mean()
    assert contrast(g, g, tau=temperature) == pytest.approx(float(expected), abs=1e-9)
    same = g[:1].expand(rows, -1)
    assert contrast(same, same) == pytest.approx(math.log(rows), abs=1e-9)


def test_equal_gates_lose_the_logarithm_of_their_number() -> None:
    for rows, expected in {1: 0.0, 2: 0.693147, 3: 1.098612, 4: 1.386294}.items():
        g = torch.tensor([[0.3, -0.4, 2.0]]).double().expand(rows, -1)
        assert contrast(g, g) == pytest.approx(expected, abs=1e-6)


@settings(max_examples=100, deadline=None)
@given(seeds, st.integers(1, 6))
def test_the_loss_keeps_its_bounds_and_lengths_change_nothing(seed: int, rows: int) -> None:
    g, view = normal(seed, rows, 3), normal(seed + 1, rows, 3)
    found = contrast(g, view)
    assert math.log(1 + (rows - 1) * math.exp(-2)) - 1e-9 <= found <= math.log(1 + (rows - 1) * math.exp(2)) + 1e-9
    assert contrast(2 * g, 2 * view) == pytest.approx(found, abs=1e-9)


def test_the_bounds_have_their_known_values_and_two_rows_reach_them() -> None:
    for rows, low, high in ((2, 0.126928, 2.126928), (4, 0.340753, 3.142736)):
        assert math.log(1 + (rows - 1) * math.exp(-2)) == pytest.approx(low, abs=1e-6)
        assert math.log(1 + (rows - 1) * math.exp(2)) == pytest.approx(high, abs=1e-6)
    g = torch.tensor([[1.0, 0], [-1, 0]]).double()  # the bounds of two rows are reached
    assert contrast(g, g) == pytest.approx(0.126928, abs=1e-6)
    assert contrast(g, -g) == pytest.approx(2.126928, abs=1e-6)


@pytest.mark.parametrize(
    ("variant", "temperature", "expected"),
    [
        ("views", 1.0, 0.598139),
        ("views", 0.5, 0.513015),
        ("views", 0.1, 0.126928),
        ("gates", 1.0, 0.371101),
        ("gates", 0.5, 0.183901),
        ("gates", 0.1, 0.000335),
    ],
)
def test_the_worked_example_has_its_known_losses(variant: Any, temperature: float, expected: float) -> None:
    g, view = torch.eye(2).double(), torch.tensor([[0.8, 0.6], [0.6, 0.8]]).double()
    assert contrast(g, view, against=variant, tau=temperature) == pytest.approx(expected, abs=1e-6)


def test_the_inner_product_sees_lengths() -> None:
    g, view = torch.eye(2).double(), torch.tensor([[0.8, 0.6], [0.6, 0.8]]).double()
    assert contrast(g, view, similarity="dot") == pytest.approx(0.598139, abs=1e-6)
    assert contrast(2 * g, view, similarity="dot") == pytest.approx(0.513015, abs=1e-6)
    assert contrast(2 * g, 2 * view, similarity="dot") == pytest.approx(0.371101, abs=1e-6)
    assert contrast(2 * g, 2 * view) == pytest.approx(0.598139, abs=1e-6)


def test_equal_histories_that_ask_for_different_things_are_negatives_of_each_other() -> None:
    model = build(33, gate="query", contrast=1.0, masking=0.0).train()
    batch = replace(make_batch(34, users=3), history=histories([[5, 6], [5, 6], [5, 6]]))
    for query, share in (([2, 2, 2], 0.0), ([2, 2, 3], 1.0)):
        request = replace(batch.request, query=torch.tensor(query, dtype=torch.int32))
        found = float(model.loss(replace(batch, request=request), draws()).parts["cl"])
        assert (found > 1e-3) == bool(share), query


def test_who_is_a_negative_of_whom() -> None:
    rows = histories([[3, 4], [4, 3], [], [3, 4], [3, 4, 5]]).padded(12)
    found = others(rows.item, rows.mask).int().tolist()
    assert found == [[0, 0, 0, 0, 1], [0, 0, 0, 0, 1], [0, 0, 0, 0, 0], [0, 0, 0, 0, 1], [1, 1, 0, 1, 0]]


def test_requests_without_events_take_no_part_and_without_negatives_the_loss_is_zero() -> None:
    g, view = normal(1, 3, 4), normal(2, 3, 4)
    real = torch.tensor([True, True, False])
    negative = ~torch.eye(3, dtype=torch.bool) & real[:, None] & real[None, :]
    found = loss_of(g, view, negative, real)
    assert float(found) == pytest.approx(contrast(g[:2], view[:2]))
    nobody = torch.zeros(3, 3, dtype=torch.bool)
    assert float(loss_of(g, view, nobody, real)) == pytest.approx(0, abs=1e-12)
    assert float(loss_of(g, view, nobody, real & False)) == 0


@settings(max_examples=30, deadline=None)
@given(seeds, st.integers(2, 6), st.integers(1, 8))
def test_some_negatives_are_some_of_the_negatives(seed: int, rows: int, wanted: int) -> None:
    """With all cosines 1 the loss of a row is log(1 + its negatives)."""
    negative = torch.rand(rows, rows, generator=draws(seed)) < 0.5
    negative &= ~torch.eye(rows, dtype=torch.bool)
    same = torch.ones(rows, 3).double()
    expected = float((1 + negative.sum(1).clamp(max=wanted)).log().mean())
    some = some_of(negative, wanted, draws(seed))
    assert not (some & ~negative).any()
    assert contrast(same, same, some) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("gate", GATES)
def test_the_contrastive_loss_teaches_the_gate_only(gate: str) -> None:
    model, batch = build(25, gate=gate, masking=0.5, contrast=1.0).train(), make_batch(26)
    plain = build(25, gate=gate, masking=0.5, contrast=0.0).train()
    whole, bce = model.loss(batch, draws()), plain.loss(batch, draws())
    assert torch.equal(whole.parts["bce"], bce.total.detach())  # masking leaves the other loss alone
    assert set(bce.parts) == {"bce"}
    assert float(whole.total.detach()) == pytest.approx(float(whole.parts["bce"] + whole.parts["cl"]))
    whole.total.backward()
    bce.total.backward()
    for (name, mine), other in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert mine.grad is not None, name
        assert other.grad is not None, name
        difference = (mine.grad.to_dense() - other.grad.to_dense()).abs().max()
        if name.startswith(("experts", "attention")):
            assert difference == 0, name
        elif name.startswith(("activation", "gate_unit")):
            assert difference > 0, name
    if gate != "target":  # candidates that are in no history learn nothing from it
        table, other_table = model.fields.item, plain.fields.item
        assert table is not None
        assert other_table is not None
        strangers = sorted(set(range(ROWS)) - set(batch.history.item.tolist()))
        assert table.weight.grad is not None
        assert other_table.weight.grad is not None
        assert torch.equal(table.weight.grad.to_dense()[strangers], other_table.weight.grad.to_dense()[strangers])


def test_the_gate_compared_is_that_of_the_first_positive() -> None:
    model, batch = build(27, masking=0.4, contrast=1.0).train(), make_batch(28)
    first = [int(row.nonzero()[0]) if row.any() else 0 for row in batch.label]
    event, mask = model._events(batch.history, model.items.embedding_row)
    h = model.inner(model.fields.semantic(batch.candidates.item, model.items.embedding_row))
    context = h[torch.arange(len(batch)), first][:, None]
    view = masked_view(mask, 0.4, draws(3))
    g, seen = gate_of(model, event, context, mask)[:, 0], gate_of(model, event, context, view)[:, 0]
    items = batch.history.padded(12).item
    expected = loss_of(g, seen, others(items, mask), mask.any(1))
    assert float(model.loss(batch, draws(3)).parts["cl"]) == pytest.approx(float(expected.detach()), abs=1e-9)


@pytest.mark.parametrize(("p", "n", "share"), [(0.2, 3, 0.802667), (0.2, 1, 1.0), (0.5, 2, 0.625), (1.0, 4, 0.25)])
def test_a_view_keeps_the_expected_share_of_a_history(p: float, n: int, share: float) -> None:
    rows = 100_000
    mask = torch.zeros(rows, 6, dtype=torch.bool)
    mask[:, 6 - n :] = True
    kept = masked_view(mask, p, draws(1))
    assert not (kept & ~mask).any()
    assert kept.any(1).all()
    alone = kept.sum(1) == 1
    if p == 1:
        assert kept[alone, -1].all()  # the newest
    assert (1 - p) + p**n / n == pytest.approx(share, abs=1e-6)
    found = kept.sum() / (rows * n)
    assert float(found) == pytest.approx(share, abs=5 * 0.5 / math.sqrt(rows))
    assert not masked_view(torch.zeros(3, 4, dtype=torch.bool), p, draws(1)).any()


# Numbers worked out by hand

W = torch.tensor([[[0.5, 2, -1]]]).double()
G = torch.tensor([[[[1.0, 0, 2], [0, 1, 1], [3, 1, 0]]]]).double()


def test_raw_weights_give_the_numbers_worked_out_by_hand() -> None:
    mask = everything(1, 3)
    assert attended(W, G, mask).flatten().tolist() == pytest.approx([-2.5, 1, 3])
    assert attended(W, G, torch.tensor([[True, False, True]])).flatten().tolist() == pytest.approx([-2.5, -1, 1])
    first = attended(W, G, torch.tensor([[True, True, False]])).flatten()
    assert first.tolist() == pytest.approx([0.5, 2, 3])
    s = torch.tensor([0.2, -0.4, 1]).double()
    logit = first @ s
    assert float(logit) == pytest.approx(2.3)
    assert float(logit.sigmoid()) == pytest.approx(0.908877, abs=1e-6)
    one = torch.ones(1).double()
    assert float(binary_cross_entropy(logit[None], one, one)) == pytest.approx(0.095545, abs=1e-6)
    with_base = attended(W, G, mask).flatten() + 1 / 3
    assert with_base.tolist() == pytest.approx([-2.166667, 1.333333, 3.333333], abs=1e-6)
    assert float(with_base @ s) == pytest.approx(2.366667, abs=1e-6)


def test_softmax_weights_are_masked_before_the_softmax() -> None:
    found = attended(W, G, everything(1, 3), softmax=True).flatten()
    assert found.tolist() == pytest.approx([0.292628, 0.824710, 1.136178], abs=1e-6)
    found = attended(W, G, torch.tensor([[True, True, False]]), softmax=True).flatten()
    assert found.tolist() == pytest.approx([0.182426, 0.817574, 1.182426], abs=1e-6)
    late = W.softmax(-1)[0, 0] * torch.tensor([1.0, 1, 0]) @ G[0, 0]
    assert (late - found).abs().max() > 1e-3


def test_metrics_of_four_candidates_are_those_worked_out_by_hand() -> None:
    score, label = np.array([0.9, 0.8, 0.7, 0.6]), np.array([0, 1, 0, 1])
    ranking = rank(score, label)
    assert auc(ranking).tolist() == pytest.approx([0.25])
    assert ndcg(ranking, 10).tolist() == pytest.approx([0.650921], abs=1e-6)
    assert auc(rank(score[:3], label[:3])).tolist() == pytest.approx([0.5])


def test_the_experts_see_the_weighted_sum_of_the_unmasked_events() -> None:
    a = torch.tensor([[[0.5, -1, 2]]]).double()
    h = torch.tensor([[[1.0, 0], [0, 2], [3, 1]]]).double()
    assert experts_view(a, h, everything(1, 3)).flatten().tolist() == pytest.approx([6.5, 0])
    assert experts_view(a, h, torch.tensor([[True, False, True]])).flatten().tolist() == pytest.approx([6.5, 2])


# What it is compared with


def test_the_models_it_is_compared_with() -> None:
    batch = make_batch(29)
    off: dict[str, Any] = {"contrast": 0.0}
    mixture = build(30, gate="mixture", **off)
    other = replace(batch, history=histories([[5], [6], [7], [8], [9]]))
    event, mask = mixture._events(batch.history, mixture.items.embedding_row)
    h = mixture.inner(mixture.fields.semantic(batch.candidates.item, mixture.items.embedding_row))
    g = mixture._gate(event, mask, h)
    close(g.sum(-1), torch.ones(5, 4).double())
    assert (worlds.scores(mixture, other) - worlds.scores(mixture, batch)).abs().max() > 1e-3  # the experts read it

    din = build(30, gate="fixed", experts=1, **off)
    event, mask = din._events(batch.history, din.items.embedding_row)
    h = din.inner(din.fields.semantic(batch.candidates.item, din.items.embedding_row))
    s = din.experts(torch.cat([pooled_of(din, event, h, mask), h], -1))
    close(worlds.scores(din, batch), s.squeeze(-1))

    plain = build(30, gate="fixed", experts=1, pooling="mean", **off)
    event, mask = plain._events(batch.history, plain.items.embedding_row)
    h = plain.inner(plain.fields.semantic(batch.candidates.item, plain.items.embedding_row))
    mean = event.sum(1, keepdim=True) / mask.sum(1)[:, None, None].clamp_min(1)
    close(worlds.scores(plain, batch), plain.experts(torch.cat([mean.expand_as(h), h], -1)).squeeze(-1))

    spread = build(30, gate_softmax=True)
    event, mask = spread._events(batch.history, spread.items.embedding_row)
    close(gate_of(spread, event, h, mask).sum(-1), torch.ones(5, 4).double())


def test_masking_alone_shows_the_experts_less_in_training_and_all_when_scoring() -> None:
    batch = make_batch(31)
    model, plain = (build(32, contrast=0.0, masking=0.5, masking_alone=alone) for alone in (True, False))
    assert torch.equal(worlds.scores(model, batch), worlds.scores(plain, batch))
    losses = [float(model.train().loss(batch, draws(seed)).total.detach()) for seed in (1, 1, 2)]
    assert losses[0] == losses[1] != losses[2]
    expected = float(plain.train().loss(batch, draws(1)).total.detach())
    assert losses[0] != expected
    unmasked = build(32, contrast=0.0, masking=0.0, masking_alone=True).train()
    assert float(unmasked.loss(batch, draws(1)).total.detach()) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"gate": "query"}, 'query = "COLUMN".*gate = "target"'),
        ({"experts": 0}, "experts=0"),
        ({"window": 0}, "window=0"),
        ({"temperature": 0.0}, "temperature=0"),
        ({"masking": 1.5}, "masking=1.5"),
        ({"contrast": -0.1}, "contrast=-0.1"),
        ({"negatives": 0}, "negatives=0"),
        ({"gate": "mixture"}, "contrast=0.05 with gate='mixture'"),
        ({"masking_alone": True}, "masking_alone=True"),
    ],
)
def test_impossible_settings_are_refused_by_name(changes: dict[str, Any], names: str) -> None:
    with pytest.raises(ConfigError, match=names):
        AwMoeConfig(**changes)
