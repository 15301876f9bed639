"""DARE against its paper: the facts every implementation must show, and numbers worked out by hand."""

import itertools
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score
from torch import Tensor

import ranking.layers
import worlds
from ranking.batch import UNKNOWN, Batch, Candidates, History, Request
from ranking.dare import Dare, DareConfig, DareState
from ranking.din import Din, DinConfig
from ranking.embeddings import FieldWidths
from ranking.layers import masked_softmax, pool_by_gather, pool_by_scatter, score_real, search
from ranking.losses import binary_cross_entropy
from ranking.mean_pooling import MeanPooling, MeanPoolingConfig
from recsys.errors import ConfigError, DataError
from worlds import ROWS, item_table

seeds = st.integers(0, 2**31)
SMALL, WITH_ACTION = FieldWidths(3, 2, 2), FieldWidths(3, 2, 2, 2)


def build(seed: int = 0, config: DareConfig | None = None, **changes: Any) -> Dare:
    """Return a float64 model in evaluation mode with weights large enough to matter."""
    config = config or DareConfig(window=12, retrieved=4, attention=SMALL, representation=SMALL, unknown_rate=0.0)
    torch.manual_seed(seed)
    model = Dare(replace(config, **changes), item_table()).double()
    for name, parameter in model.named_parameters():
        if "norm" not in name and "bias" not in name:
            parameter.data = torch.randn_like(parameter)
        if name.endswith(("item.weight", "category.weight")):
            parameter.data[0] = 0
    return model.eval()


def make_batch(
    seed: int, users: int = 4, least: int = 0, most: int = 12, candidates: int = 5, baskets: bool = True
) -> Batch:
    """Return random requests; the first user has a full history, and times repeat if there are baskets."""
    draws = np.random.default_rng(seed)
    lengths = draws.integers(least, most + 1, users)
    lengths[0] = most
    offsets = torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]))
    times = [
        np.sort(draws.integers(1, 6, n)) if baskets else np.sort(draws.choice(10**6, n, replace=False)) for n in lengths
    ]
    item = torch.from_numpy(draws.integers(UNKNOWN, ROWS, lengths.sum()).astype(np.int32))
    rows = torch.from_numpy(draws.integers(UNKNOWN, ROWS, (users, candidates)).astype(np.int32))
    label = torch.from_numpy(draws.integers(0, 2, rows.shape)).double()
    return Batch(
        History(item, item * 7 % 4, torch.from_numpy(np.concatenate(times)), offsets),  # actions 0 to 3
        Request(torch.full((users,), 10**7)),
        Candidates(rows),
        label,
        torch.ones_like(label),
    )


def queries(model: Dare, batch: Batch) -> Tensor:
    """Return the candidates' semantic attention vectors [B, C, a_sem]."""
    return model._attention.semantic(batch.candidates.item, model.items.embedding_row)


def weights_over_slots(scores: Tensor, mask: Tensor, k: int) -> Tensor:
    """Return the weights after search, spread over all slots [B, C, T]."""
    index, found = search(scores, mask, k)
    weights = masked_softmax(scores.gather(-1, index), found)
    return torch.zeros_like(scores).scatter(-1, index, weights)


def train_logits(model: Dare, batch: Batch, hold_weights: bool, hold_values: bool) -> Tensor:
    """Return the training loss with one of the two paths cut, written apart from `Dare.loss`."""
    state = model.encode(batch.history)
    v = model.representation.candidate(batch.candidates.item, model.items.embedding_row)
    scores = model.search_scores(state, queries(model, batch))
    w = weights_over_slots(scores, state.mask, model.config.retrieved)
    w = w.detach() if hold_weights else w
    e, v = (state.value.detach(), v.detach()) if hold_values else (state.value, v)
    h = w @ e
    return binary_cross_entropy(
        score_real(model.head, torch.cat([v, h, v * h], -1), batch.candidates.mask), batch.label, batch.weight
    )


def gradients(model: Dare, loss: Tensor) -> dict[str, Tensor]:
    """Return the gradients of the embedding tables, dense; zero where there is none."""
    model.zero_grad()
    loss.backward()
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad.to_dense() if p.grad.is_sparse else p.grad.clone()
        for name, p in model.named_parameters()
        if name.startswith(("attention.", "representation."))
    }


def main_loss(model: Dare, batch: Batch) -> Tensor:
    """Return the whole training loss, nothing random in it."""
    return model.loss(batch, torch.Generator()).total


# Search and pooling


@settings(max_examples=100, deadline=None)
@given(seeds, st.integers(1, 14), st.integers(1, 12), st.booleans())
def test_search_finds_what_brute_force_finds_and_the_newer_of_equals(
    seed: int, length: int, k: int, ties: bool
) -> None:
    draws = torch.Generator().manual_seed(seed)
    scores = torch.randn(3, 4, length, generator=draws, dtype=torch.float64)
    scores = scores.round() if ties else scores
    mask = torch.rand(3, length, generator=draws) < 0.7
    index, found = search(scores.masked_fill(~mask[:, None, :], math.nan), mask, k)
    for b in range(3):
        real = mask[b].nonzero().flatten().tolist()
        for c in range(4):
            best = sorted(real, key=lambda t: (-float(scores[b, c, t]), -t))[:k]
            assert sorted(index[b, c][found[b, c]].tolist()) == sorted(best)


@settings(max_examples=50, deadline=None)
@given(seeds, st.integers(1, 14), st.integers(1, 20))
def test_weights_are_a_distribution_over_the_found_and_ordered_as_the_scores(seed: int, length: int, k: int) -> None:
    draws = torch.Generator().manual_seed(seed)
    scores = torch.randn(3, 4, length, generator=draws, dtype=torch.float64)
    mask = torch.rand(3, length, generator=draws) < 0.7
    w = weights_over_slots(scores, mask, k)
    count = mask.sum(1).clamp(max=k)
    assert (w >= 0).all()
    assert ((w > 0).sum(-1) == count[:, None]).all()
    torch.testing.assert_close(w.sum(-1), (count > 0).double()[:, None].expand(3, 4))
    kept = w > 0
    assert ((w[..., None] > w[..., None, :]) == (scores[..., None] > scores[..., None, :]))[
        kept[..., None] & kept[..., None, :]
    ].all()
    torch.testing.assert_close(weights_over_slots(scores + 7.25, mask, k), w)


@settings(max_examples=50, deadline=None)
@given(seeds, st.integers(1, 14), st.integers(1, 20))
def test_both_ways_of_pooling_agree(seed: int, length: int, k: int) -> None:
    draws = torch.Generator().manual_seed(seed)
    scores, value = torch.randn(3, 4, length, generator=draws), torch.randn(3, length, 5, generator=draws)
    mask = torch.rand(3, length, generator=draws) < 0.7
    index, found = search(scores, mask, k)
    weights = masked_softmax(scores.gather(-1, index), found)
    torch.testing.assert_close(
        pool_by_gather(weights, index, value), pool_by_scatter(weights, index, value), rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("scaling", ["split", "single"])
def test_with_k_past_the_history_the_search_is_plain_attention(scaling: str, tied: bool) -> None:
    model = build(1, retrieved=12, scaling=scaling, tied=tied)
    batch = make_batch(2)
    attention, row_of = model._attention, model.items.embedding_row
    h = batch.history
    for b in range(len(batch)):
        item = h.item[h.offsets[b] : h.offsets[b + 1]]
        back = torch.arange(len(item), 0, -1)
        k_sem, q_sem = attention.semantic(item, row_of), queries(model, batch)[b]
        k_pos, q_pos = attention.position.weight[back], attention.position.weight[0]  # type: ignore[union-attr]
        if scaling == "split":
            s = q_sem @ k_sem.T / math.sqrt(5) + k_pos @ q_pos / math.sqrt(2)
        else:
            s = (q_sem @ k_sem.T + k_pos @ q_pos) / math.sqrt(7)
        e = torch.cat([model.representation.semantic(item, row_of), model.representation.position.weight[back]], -1)  # type: ignore[union-attr]
        v = model.representation.candidate(batch.candidates.item[b], row_of)
        pooled = torch.softmax(s, -1) @ e
        expected = model.head(torch.cat([v, pooled, v * pooled], -1))
        torch.testing.assert_close(worlds.scores(model, batch)[b], expected, rtol=1e-10, atol=1e-10)


def test_padding_is_never_read_and_an_empty_history_pools_to_zero() -> None:
    model, batch = build(3), make_batch(4)
    expected = worlds.scores(model, batch)
    for b in range(len(batch)):  # alone there is no padding
        torch.testing.assert_close(worlds.scores(model, worlds.take(batch, [b]))[0], expected[b], rtol=0, atol=1e-12)
    for table in (model.attention, model.representation):
        for poison in (math.nan, 1e30):
            table.item.weight.data[0] = poison  # type: ignore[union-attr]
            table.category.weight.data[0] = poison  # type: ignore[union-attr]
            assert torch.equal(worlds.scores(model, batch), expected)
    h = batch.history
    nothing = History(h.item[:0], h.action[:0], h.time[:0], torch.zeros_like(h.offsets))
    empty = replace(batch, history=nothing)
    state = model.encode(empty.history)
    state = state._replace(key=state.key.double(), value=state.value.double())
    assert not model._pool(state, queries(model, empty)).any()
    assert worlds.scores(model, empty).isfinite().all()


def test_the_padding_row_gets_no_gradient() -> None:
    model, batch = build(3), make_batch(4)
    found = gradients(model.train(), main_loss(model, batch))
    assert not any(g[0].any() for name, g in found.items() if "position" not in name)
    assert all(g.any() for g in found.values())


def shuffle_state(state: DareState, order: Tensor, with_position: bool, semantic: int) -> DareState:
    """Return the state with its slots in another order, all at one request."""
    value = state.value[:, order]
    position = state.position[:, order]
    if not with_position:
        position = state.position
        value = torch.cat([value[..., :semantic], state.value[..., semantic:]], -1)
    return state._replace(
        key=state.key[:, order],
        value=value,
        item=state.item[:, order],
        position=position,
        time=state.time[:, order],
        mask=state.mask[:, order],
    )


@pytest.mark.parametrize("retrieved", [4, 12])
def test_order_matters_through_positions_only(retrieved: int) -> None:
    model, batch = build(5, retrieved=retrieved), worlds.take(make_batch(6, baskets=False), [0])
    state = model.encode(batch.history)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))

    def scored(with_position: bool) -> Tensor:
        moved = shuffle_state(state, order, with_position, model.representation.semantic_width)
        return model.score(moved, batch.request, batch.candidates)

    expected = worlds.scores(model, batch)
    torch.testing.assert_close(scored(True), expected, rtol=0, atol=1e-12)
    assert (scored(False) - expected).abs().max() > 1e-3


@settings(max_examples=25, deadline=None)
@given(seeds)
def test_the_order_inside_a_basket_changes_nothing(seed: int) -> None:
    batch = make_batch(seed)
    h = batch.history
    owner = torch.repeat_interleave(torch.arange(len(batch)), h.lengths)
    group = owner * 100 + h.time
    jumbled = torch.rand(len(h.item), generator=torch.Generator().manual_seed(seed)) + group
    other = replace(batch, history=replace(h, item=h.item[jumbled.argsort()]))
    model = build(7, retrieved=12, pos_mode="group")
    torch.testing.assert_close(worlds.scores(model, other), worlds.scores(model, batch), rtol=0, atol=1e-12)


def test_pooling_the_products_is_the_product_of_the_pooled() -> None:
    draws = torch.Generator().manual_seed(0)
    w, e, v = (torch.rand(shape, generator=draws, dtype=torch.float64) for shape in ((4, 9), (9, 6), (4, 6)))
    products = torch.einsum("ct,ctd->cd", w, e[None] * v[:, None])
    torch.testing.assert_close(products, (w @ e) * v, rtol=0, atol=1e-12)


# The point of the paper: what each table's gradient comes from


def test_each_path_trains_its_own_table() -> None:
    model, batch = build(8, auxiliary=False, l2=0.0).train(), make_batch(9)
    whole = gradients(model, main_loss(model, batch))
    for name, g in gradients(model, train_logits(model, batch, hold_weights=True, hold_values=False)).items():
        torch.testing.assert_close(g, torch.zeros_like(g) if name.startswith("attention") else whole[name])
    for name, g in gradients(model, train_logits(model, batch, hold_weights=False, hold_values=True)).items():
        torch.testing.assert_close(g, torch.zeros_like(g) if name.startswith("representation") else whole[name])
    storages = [p.untyped_storage().data_ptr() for p in model.parameters()]
    assert len(set(storages)) == len(storages)


@pytest.mark.parametrize("auxiliary", [False, True])
def test_rows_trained_are_the_found_ones_and_all_with_the_auxiliary_head(auxiliary: bool) -> None:
    # One event alone has weight 1 whatever its score: attention learns nothing from histories that short.
    model, batch = build(10, auxiliary=auxiliary, l2=0.0).train(), make_batch(11, users=2, least=6)
    state = model.encode(batch.history)
    index, found = search(model.search_scores(state, queries(model, batch)), state.mask, 4)
    item = batch.history.padded(12).item
    winners = item[:, None, :].expand(-1, 5, -1).gather(-1, index)[found]
    expected = set((batch.history.item if auxiliary else winners).tolist()) | set(
        batch.candidates.item.flatten().tolist()
    )
    g = gradients(model, main_loss(model, batch))
    for table in ("attention.item.weight", "representation.item.weight"):
        trained = set(g[table].abs().sum(1).nonzero().flatten().tolist())
        assert trained == expected
        assert (set(batch.history.item.tolist()) <= trained) == auxiliary


def test_with_equal_tables_the_model_is_tied_and_gradients_add_up() -> None:
    apart, tied = build(12).train(), build(12, tied=True).train()
    tied.load_state_dict(apart.state_dict(), strict=False)
    apart.attention.load_state_dict(apart.representation.state_dict())  # type: ignore[union-attr]
    batch = make_batch(13)
    torch.testing.assert_close(main_loss(apart, batch), main_loss(tied, batch), rtol=0, atol=1e-12)
    torch.testing.assert_close(worlds.scores(apart, batch), worlds.scores(tied, batch), rtol=0, atol=1e-12)
    parts, whole = (gradients(m.train(), main_loss(m, batch)) for m in (apart, tied))
    for name, g in whole.items():
        both = parts[name] + parts[name.replace("representation", "attention")]
        torch.testing.assert_close(g, both, rtol=1e-6, atol=1e-9)


def test_attention_knows_angles_only_representation_does_not() -> None:
    model, batch = build(14), make_batch(15)
    expected = worlds.scores(model, batch)

    def turn(weight: Tensor) -> None:
        q, _ = torch.linalg.qr(torch.randn(weight.shape[1], weight.shape[1], dtype=weight.dtype))
        weight.data = weight.data @ q

    for part in (model.attention.item, model.attention.category, model.attention.position):  # type: ignore[union-attr]
        turn(part.weight)  # type: ignore[union-attr]
    torch.testing.assert_close(worlds.scores(model, batch), expected, rtol=0, atol=1e-10)
    turn(model.representation.item.weight)  # type: ignore[union-attr]
    assert (worlds.scores(model, batch) - expected).abs().max() > 1e-3


def test_attention_may_be_narrower_and_empty_columns_are_nothing() -> None:
    batch = make_batch(16)
    narrow = build(17, attention=FieldWidths(1, 2, 1))
    assert worlds.scores(narrow, batch).isfinite().all()
    wide = build(17, attention=FieldWidths(4, 2, 1))
    wide.load_state_dict(narrow.state_dict() | {"attention.item.weight": torch.zeros(ROWS, 4)})
    wide.attention.item.weight.data[:, :1] = narrow.attention.item.weight.data  # type: ignore[union-attr]
    state, other = (m.encode(batch.history) for m in (narrow, wide))
    bias = narrow.search_scores(state, 0 * queries(narrow, batch))
    scores = narrow.search_scores(state, queries(narrow, batch)) - bias
    found = (wide.search_scores(other, queries(wide, batch)) - bias) * math.sqrt(6) / math.sqrt(3)
    torch.testing.assert_close(found, scores, rtol=0, atol=1e-12)


@pytest.mark.parametrize("auxiliary", [False, True])
def test_gradients_equal_finite_differences(auxiliary: bool) -> None:
    model, batch = build(18, auxiliary=auxiliary).train(), make_batch(19)
    g = gradients(model, main_loss(model, batch))
    draws = np.random.default_rng(0)
    for name in ("attention.item.weight", "attention.category.weight", "attention.position.weight"):
        weight = dict(model.named_parameters())[name].data
        for row in draws.permutation(g[name].abs().sum(1).nonzero().flatten().numpy())[:5]:
            column, step = int(draws.integers(weight.shape[1])), 1e-6
            kept = float(weight[row, column])
            sides = []
            for move in (step, -step):
                weight[row, column] = kept + move
                sides.append(main_loss(model, batch).item())
            weight[row, column] = kept
            slope = (sides[0] - sides[1]) / (2 * step)
            assert slope == pytest.approx(float(g[name][row, column]), rel=1e-5, abs=1e-8)


# Serving


@pytest.mark.parametrize("widths", [SMALL, WITH_ACTION], ids=["", "actions"])
@pytest.mark.parametrize("own_counts", [False, True])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("pos_mode", ["slot", "group"])
def test_appending_an_event_equals_encoding_the_longer_history(
    pos_mode: str, tied: bool, own_counts: bool, widths: FieldWidths
) -> None:
    model = build(20, pos_mode=pos_mode, tied=tied, own_counts=own_counts, attention=widths, representation=widths)
    for seed in range(20):
        batch = make_batch(seed, most=seed, users=3)
        h = batch.history
        item = torch.tensor([7, 8, UNKNOWN], dtype=torch.int32)
        own = [slice(int(h.offsets[b]), int(h.offsets[b + 1])) for b in range(3)]
        newest = torch.stack([torch.cat([torch.ones(1, dtype=torch.int64), h.time[rows]]).amax() for rows in own])
        time = newest + torch.tensor([0, 1, seed % 2])  # into the newest basket, or a new one
        items = torch.cat([torch.cat([h.item[rows], item[b : b + 1]]) for b, rows in enumerate(own)])
        times = torch.cat([torch.cat([h.time[rows], time[b : b + 1]]) for b, rows in enumerate(own)])
        action = torch.tensor([3, 0, seed % 4], dtype=torch.int32)
        actions = torch.cat([torch.cat([h.action[rows], action[b : b + 1]]) for b, rows in enumerate(own)])
        longer = History(items, actions, times, h.offsets + torch.arange(4))
        for ours, rebuilt in zip(model.append(model.encode(h), item, time, action), model.encode(longer), strict=True):
            assert ours.dtype == rebuilt.dtype
            assert torch.equal(ours, rebuilt)


@pytest.mark.parametrize("widths", [SMALL, WITH_ACTION], ids=["", "actions"])
@pytest.mark.parametrize("own_counts", [False, True])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("pos_mode", ["slot", "group"])
def test_evicting_an_event_equals_encoding_what_is_left(
    pos_mode: str, tied: bool, own_counts: bool, widths: FieldWidths
) -> None:
    model = build(20, pos_mode=pos_mode, tied=tied, own_counts=own_counts, attention=widths, representation=widths)
    refused = 0
    for seed in range(40):
        h, draws = make_batch(seed, most=seed % 20, users=3).history, np.random.default_rng(seed)
        gone, left, lost = [], [], False
        for start, end in itertools.pairwise(h.offsets.tolist()):
            events = list(range(start if own_counts else max(start, end - 12), end))
            item = int(h.item[draws.choice(events)]) if events and draws.random() < 0.8 else 0
            oldest = next((e for e in events if int(h.item[e]) == item), None)
            lost |= oldest is not None and own_counts and end - 12 <= oldest and end - start > 12
            gone.append(item)
            left.append([e for e in events if e != oldest])
        refused += lost
        if lost:  # the window of a longer history: who takes the place is not in the state
            with pytest.raises(DataError, match=r"item row \d+ can't leave its state"):
                model.evict(model.encode(h), torch.tensor(gone, dtype=torch.int32))
            continue
        index = torch.tensor([e for events in left for e in events], dtype=torch.int64)
        offsets = torch.tensor([0, *np.cumsum([len(events) for events in left])])
        shorter = History(h.item[index], h.action[index], h.time[index], offsets)
        state = model.evict(model.encode(h), torch.tensor(gone, dtype=torch.int32))
        for ours, rebuilt in zip(state, model.encode(shorter), strict=True):
            assert ours.dtype == rebuilt.dtype
            assert torch.equal(ours, rebuilt)
    assert (refused > 0) == own_counts
    with pytest.raises(DataError, match=r"request 1: item row 99 can't leave"):
        model.evict(model.encode(h), torch.tensor([0, 99, 0], dtype=torch.int32))


@pytest.mark.parametrize("gather_above", [0, 10**9])
def test_chunks_and_pooling_paths_change_no_score(gather_above: int, monkeypatch: pytest.MonkeyPatch) -> None:
    world = worlds.make_world(users=30)
    model = Dare(DareConfig(window=20, retrieved=4), world.items)
    worlds.fit(model, world.requests("train"), 30)
    (batch,) = world.requests("test", 30, 9)
    expected = worlds.scores(model, batch)
    monkeypatch.setattr(ranking.layers, "GATHER_ABOVE", gather_above)
    torch.testing.assert_close(worlds.scores(model, batch), expected, rtol=1e-6, atol=1e-6)
    monkeypatch.setattr(ranking.layers, "CHUNK_ELEMENTS", 1)
    torch.testing.assert_close(worlds.scores(model, batch), expected, rtol=1e-6, atol=1e-6)


# Numbers worked out by hand

KEYS = [[1.0, 0], [0, 1], [1, 1], [2, -1], [-1, 0]]
VALUES = [[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0], [5, 5, 5]]
QUERY, TARGET = [2.0, 1], [1.0, 2, 3]


def by_hand(retrieved: int, position: int = 0, scaling: str = "split") -> tuple[Dare, DareState, Tensor]:
    """Return the model of the worked example, its state and the query: items 2..6 are the history, item 7 is scored."""
    config = DareConfig(
        window=5, retrieved=retrieved, scaling=scaling, category=None,  # type: ignore[arg-type]
        attention=FieldWidths(2, 0, position), representation=FieldWidths(3, 0, 0),
    )  # fmt: skip
    model = Dare(config, item_table(8)).double().eval()
    model.attention.item.weight.data[2:] = torch.tensor([*KEYS, QUERY])  # type: ignore[union-attr]
    model.representation.item.weight.data[2:] = torch.tensor([*VALUES, TARGET])  # type: ignore[union-attr]
    if position:
        model.attention.position.weight.data[:, 0] = torch.tensor([2, 1.5, 1, 0.5, 0, -1])  # type: ignore[union-attr]
    item = torch.arange(2, 7, dtype=torch.int32)
    state = model.encode(History(item, item, torch.arange(5), torch.tensor([0, 5])))
    return model, state, model._attention.semantic(torch.tensor([[7]], dtype=torch.int32), model.items.embedding_row)


@pytest.mark.parametrize(
    ("retrieved", "weights", "pooled"),
    [
        (2, [0, 0, 0.5, 0.5, 0], [0.5, 0.5, 0.5]),
        (3, [0.197776, 0, 0.401112, 0.401112, 0], [0.598888, 0.401112, 0.401112]),
        (5, [], [0.592618, 0.502231, 0.414315]),
    ],
)
def test_the_worked_example_has_its_known_scores_weights_and_products(
    retrieved: int, weights: list[float], pooled: list[float]
) -> None:
    model, state, query = by_hand(retrieved)
    scores = model.search_scores(state, query)
    assert (scores * math.sqrt(2)).flatten().tolist() == pytest.approx([2, 1, 3, 3, -2])
    w = weights_over_slots(scores, state.mask, retrieved)[0, 0]
    assert (
        w.tolist() == pytest.approx(weights, abs=1e-6) if weights else w[4].item() == pytest.approx(0.010539, abs=1e-6)
    )
    h = model._pool(state, query)
    assert h.flatten().tolist() == pytest.approx(pooled, abs=1e-6)
    product = model._features(torch.tensor([[TARGET]]).double(), h)[0, 0, 6:]
    assert product.tolist() == pytest.approx([p * t for p, t in zip(pooled, TARGET, strict=True)], abs=2e-6)


def test_positions_enter_the_search_as_a_bias() -> None:
    model, state, query = by_hand(3, position=1)
    assert state.position.tolist() == [[5, 4, 3, 2, 1]]
    scores = model.search_scores(state, query)
    assert scores.flatten().tolist() == pytest.approx([-0.585786, 0.707107, 3.121320, 4.121320, 1.585786], abs=1e-6)
    w = weights_over_slots(scores, state.mask, 3)[0, 0]
    assert w.tolist() == pytest.approx([0, 0, 0.254219, 0.691038, 0.054744], abs=1e-6)
    assert model._pool(state, query).flatten().tolist() == pytest.approx([0.964756, 0.964756, 0.527937], abs=1e-6)
    model, state, query = by_hand(3, position=1, scaling="single")
    expected = [0, 0.577350, 2.309401, 2.886751, 0.577350]
    assert model.search_scores(state, query).flatten().tolist() == pytest.approx(expected, abs=1e-6)


def test_padding_takes_no_weight_when_the_history_is_shorter_than_k() -> None:
    scores = torch.tensor([[[0.2, 0.2, 1.0, 0.0]]])
    mask = torch.tensor([[False, False, True, True]])
    expected = [0, 0, 0.731059, 0.268941]
    for k in (4, 3, 2):
        assert weights_over_slots(scores, mask, k).flatten().tolist() == pytest.approx(expected, abs=1e-6)
    leak = torch.softmax(scores, -1).flatten()  # what padding would take if it were let in
    assert leak.tolist() == pytest.approx([0.198245, 0.198245, 0.441202, 0.162309], abs=1e-6)


def test_a_cached_user_costs_32_000_bytes_in_half_precision() -> None:
    item = torch.full((200,), 2, dtype=torch.int32)
    model = Dare(DareConfig(), item_table())
    state = model.encode(History(item, item, torch.arange(200), torch.tensor([0, 200])))
    assert state.key.half().nbytes == 12_800
    assert state.value.half().nbytes == 19_200


def test_a_model_that_says_nothing_loses_ln_2_twice() -> None:
    model, batch = build(21).train(), make_batch(22)
    assert model.auxiliary_head is not None
    for head in (model.head, model.auxiliary_head):
        for parameter in head.layers[-1].parameters():
            parameter.data.zero_()
    loss = model.loss(batch, torch.Generator())
    assert float(loss.parts["main"]) == pytest.approx(0.693147, abs=1e-6)
    assert float(loss.parts["auxiliary"]) == pytest.approx(0.693147, abs=1e-6)
    weights = [p for n, p in model.named_parameters() if "head" in n and not n.endswith("bias")]
    assert float(loss.parts["l2"]) == pytest.approx(1e-6 * sum(p.square().sum().item() for p in weights))
    assert float(loss.total.detach()) == pytest.approx(sum(float(part) for part in loss.parts.values()))


def test_parameter_counts_are_the_known_ones() -> None:
    model = Dare(DareConfig(), item_table())
    assert model.auxiliary_head is not None
    assert sum(p.numel() for p in model.head.parameters()) == 45_451
    assert sum(p.numel() for p in model.auxiliary_head.parameters()) == 29_490
    names = {name: p.shape for name, p in model.named_parameters() if "head" not in name}
    assert names == {
        f"{role}.{field}.weight": torch.Size([rows, 16])
        for role in ("attention", "representation")
        for field, rows in (("item", ROWS), ("category", 7), ("position", 201))
    }


@pytest.mark.parametrize(("features", "width"), [("full", 21), ("only", 7), ("none", 14)])
def test_what_the_head_sees(features: str, width: int) -> None:
    model, batch = build(23, features=features), make_batch(24)
    assert model.head.norm.num_features == width
    assert worlds.scores(model, batch).isfinite().all()
    assert main_loss(model.train(), batch).isfinite()


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"retrieved": 0}, "retrieved=0"),
        ({"retrieved": 21, "window": 20}, "retrieved=21, window=20"),
        ({"window": 0}, "window=0"),
        ({"l2": -1.0}, "l2=-1"),
        ({"half_life_days": 0.0}, "half_life_days=0"),
        ({"tied": True, "attention": FieldWidths(8, 8, 8)}, "item=8"),
    ],
)
def test_impossible_settings_are_refused_by_name(changes: dict[str, Any], names: str) -> None:
    with pytest.raises(ConfigError, match=names):
        DareConfig(**changes)


def test_own_counts_tell_the_head_what_the_window_does_not_hold() -> None:
    model = build(25, window=3, retrieved=3, own_counts=True, half_life_days=10.0)
    day = 86_400_000_000
    item = torch.tensor([7, 7, 9, 5, 5, 5], dtype=torch.int32)  # both 7s are older than the newest three events
    time = torch.tensor([0, 10, 19, 20, 20, 20]) * day
    state = model.encode(History(item, item, time, torch.tensor([0, 6])))
    candidates = Candidates(torch.tensor([[7, 9, 4, UNKNOWN]], dtype=torch.int32))
    nothing = torch.empty(1, 4, 0, dtype=torch.float64)
    found = model._with_counts(nothing, state, Request(torch.tensor([20 * day])), candidates, model.items.embedding_row)
    shown = found[0].T.tolist()
    never = math.log(1 + 100)  # 10 half-lives
    assert shown[0] == pytest.approx([math.log(count + 1e-3) for count in (0.25 + 0.5, 2**-0.1, 0, 0)])
    assert shown[1] == pytest.approx(
        [math.log(count + 1e-3) for count in (2 ** (-2 / 3) + 2 ** (-1 / 3), 2 ** (-1 / 30), 0, 0)]
    )
    assert shown[2] == pytest.approx([math.log(1 + 10), math.log(1 + 1), never, never])
    assert shown[3] == pytest.approx([0, 0, 0, 0])  # 10 days after the second 7, which came 10 days after the first
    assert shown[4] == pytest.approx([math.log(2), math.log(2), math.log(2), 0])
    later = Request(torch.tensor([54 * day]))
    found = model._with_counts(nothing, state, later, candidates, model.items.embedding_row)
    assert found[0, :, 3].tolist() == pytest.approx([math.log((1 + 44) / (1 + 10)), 0, 0, 0])  # a single 9 is not late
    hidden = model.items.embedding_row.masked_fill(torch.arange(ROWS) == 7, UNKNOWN)
    found = model._with_counts(nothing, state, later, candidates, hidden)
    assert found[0, :, 4].tolist() == pytest.approx([0, math.log(2), math.log(2), 0])
    assert model.window is None


# A planted task (`worlds.make_planted`)


def test_dare_finds_what_is_planted_far_back() -> None:
    steps, size = 100, 64
    world = worlds.make_planted(size * steps + 400)
    batches = [world.requests(i, i + size) for i in range(0, size * steps, size)]
    test, slots = world.requests(size * steps), world.slots[size * steps :]
    torch.manual_seed(2023)
    models: dict[str, Any] = {
        "dare": Dare(DareConfig(), world.items),
        "mean_pooling": MeanPooling(MeanPoolingConfig(), world.items),
        "din_short": Din(DinConfig(window=20), world.items),
    }
    auc = {}
    for name, model in models.items():
        worlds.fit(model, batches, steps)
        auc[name] = roc_auc_score(test.label.flatten(), worlds.scores(model, test).flatten())
    assert auc["din_short"] < 0.55  # the control: nothing that tells is within reach
    assert auc["mean_pooling"] < 0.75  # it cannot tell far from near
    assert auc["dare"] > 0.85

    dare = models["dare"]
    state = dare.encode(test.history)
    index, _ = search(dare.search_scores(state, queries(dare, test)), state.mask, 20)
    planted_events, hits = slots.sum(-1), slots.gather(-1, index).sum(-1)
    recall = (hits / planted_events.clamp(1, 20))[planted_events > 0].mean()
    assert float(recall) > 0.9  # K / N = 0.1 by chance
