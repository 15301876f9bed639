"""SDIM against its paper: what hashing estimates, what a table is, and numbers worked out by hand."""

import hashlib
import math
import subprocess
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

import worlds
from ranking.batch import PAD, UNKNOWN, Batch, Candidates, History, Request
from ranking.bucket_sums import Norm, bucket_rows, collision, pool, read, signatures
from ranking.sdim import GRID, Sdim, SdimConfig, SdimState
from recsys.errors import ConfigError, DataError
from worlds import ROWS, histories, item_table, normal

seeds = st.integers(0, 2**31)
Seen = tuple[int, int]
"""An item row and an action."""
NO_ACTION = torch.zeros(1, dtype=torch.uint8)
"""What an event was is not read."""
norms = st.sampled_from(["none", "ratio", "l2"])
SMALL = SdimConfig(window=8, recent=3, groups=4, item_width=3, category_width=2, hidden=4, unknown_rate=0.0)


def build(seed: int = 0, rows: int = ROWS, **changes: Any) -> Sdim:
    """Return a float32 model in evaluation mode with weights large enough to matter."""
    torch.manual_seed(seed)
    model = Sdim(replace(SMALL, **changes), item_table(rows))
    for name, parameter in model.named_parameters():
        if "norm" not in name and "bias" not in name:
            parameter.data = torch.randn_like(parameter)
        if name.startswith("fields"):
            parameter.data[0] = 0
    return model.eval()


def make_batch(seed: int, users: int = 4, most: int = 12, candidates: int = 5) -> Batch:
    """Return random requests; the first has the longest history, the second none."""
    draws = np.random.default_rng(seed)
    lengths = [most, 0, *draws.integers(0, most + 1, users - 2)]
    rows = torch.from_numpy(draws.integers(UNKNOWN, ROWS, (users, candidates)).astype(np.int32))
    label = torch.from_numpy(draws.integers(0, 2, rows.shape)).float()
    return Batch(
        histories([draws.integers(UNKNOWN, ROWS, n).tolist() for n in lengths]),
        Request(torch.full((users,), 10**7)),
        Candidates(rows),
        label,
        torch.ones_like(label),
    )


def random_mask(seed: int, *shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.7


def pooled(s: Tensor, mask: Tensor, q: Tensor, planes: Tensor, norm: Norm) -> Tensor:
    """Return `long` [B, C, D] of candidates q [B, C, D] and events s [B, T, D]."""
    table, count = pool(s.masked_fill(~mask[..., None], 0), signatures(s, planes), mask, 1 << planes.shape[1])
    return read(bucket_rows(table, count, norm), count, signatures(q, planes), norm)


def pooled_one(s: Tensor, q: Tensor, planes: Tensor, norm: Norm) -> Tensor:
    """Return `long` [D] of one candidate q [D] and events s [T, D]."""
    return pooled(s[None], torch.ones(1, len(s), dtype=torch.bool), q[None, None], planes, norm)[0, 0]


def matches(s: Tensor, q: Tensor, planes: Tensor) -> Tensor:
    """Return p, float64 [T, G]: which events share the bucket of one candidate."""
    return (signatures(s, planes) == signatures(q, planes)).double()


def weights(s: Tensor, q: Tensor, bits: int) -> Tensor:
    """Return c [T]."""
    return collision(torch.cosine_similarity(s, q[None], dim=1), bits)


def long_of(model: Sdim, state: SdimState, item: list[int]) -> Tensor:
    """Return what items [C] read from the table of the first user, [C, D]."""
    code = model.item_signatures()[item][None]
    rows = bucket_rows(state.table[:1].double() * GRID, state.size[:1], model.config.norm)
    return read(rows, state.size[:1], code, model.config.norm)[0]


# What hashing estimates


@pytest.mark.parametrize("bits", [1, 2, 3])
@pytest.mark.parametrize("cosine", [0.9, 0.5, 0.0, -0.5])
def test_vectors_collide_as_often_as_their_angle_says(cosine: float, bits: int) -> None:
    trials = 200_000
    q = torch.tensor([1.0, 0, 0]).double()
    s = torch.tensor([cosine, math.sqrt(1 - cosine**2), 0]).double()
    planes = normal(bits, trials, bits, 3)
    c = float(collision(torch.tensor(cosine), bits))
    found = float((signatures(s, planes) == signatures(q, planes)).double().mean())
    assert abs(found - c) < 5 * math.sqrt(c * (1 - c) / trials)
    assert (signatures(3.5 * q, planes) == signatures(q, planes)).all()
    assert (signatures(-q, planes) == (1 << bits) - 1 - signatures(q, planes)).all()
    assert float(collision(torch.tensor(0.0), bits)) == pytest.approx(2.0**-bits)


def test_collision_probabilities_are_the_known_ones() -> None:
    cosine = torch.tensor([1, 0.9, 0.5, 0, -0.5, -1], dtype=torch.float64)
    for bits, expected in {
        1: [1, 0.856434, 0.666667, 0.5, 0.333333, 0],
        2: [1, 0.733479, 0.444444, 0.25, 0.111111, 0],
        3: [1, 0.628176, 0.296296, 0.125, 0.037037, 0],
        5: [1, 0.460754, 0.131687, 0.03125, 0.004115, 0],
        10: [1, 0.212294, 0.017342, 0.000977, 0.000017, 0],
    }.items():
        assert collision(cosine, bits).tolist() == pytest.approx(expected, abs=1e-6)
    softmax = ((cosine / 0.5).exp() / math.e**2).tolist()  # what tau = 3 resembles
    assert softmax == pytest.approx([1, 0.818731, 0.367879, 0.135335, 0.049787, 0.018316], abs=1e-6)


def test_more_bits_attend_more_sharply() -> None:
    cosine = torch.tensor([1, 0.9, 0.5, 0, -0.5, -1], dtype=torch.float64)
    entropy = []
    for bits in (0, 1, 2, 3, 5, 10):
        share = collision(cosine, bits) / collision(cosine, bits).sum()
        entropy.append(float(-torch.special.xlogy(share, share).sum()))
    assert entropy == pytest.approx([1.791759, 1.543320, 1.395925, 1.231284, 0.950996, 0.537664], abs=1e-6)


def test_the_plain_read_out_is_unbiased_and_its_error_falls_with_the_root_of_g() -> None:
    s, q, planes = normal(1, 12, 6), normal(2, 6), normal(3, 1 << 16, 3, 6)
    expected = weights(s, q, 3) @ s
    u = matches(s, q, planes).mT @ s  # [G, D]
    found = pooled_one(s, q, planes, "none")
    torch.testing.assert_close(found, u.mean(0))
    assert ((found - expected).abs() < 5 * u.std(0) / math.sqrt(len(u))).all()
    sizes = [4**n for n in range(1, 6)]
    errors = [float((u.view(-1, g, 6).mean(1) - expected).square().sum(1).mean().sqrt()) for g in sizes]
    bound = float((s.norm(dim=1) * (weights(s, q, 3) * (1 - weights(s, q, 3))).sqrt()).sum())
    assert all(error <= bound / math.sqrt(g) for g, error in zip(sizes, errors, strict=True))
    slope = np.polyfit(np.log(sizes), np.log(errors), 1)[0]
    assert slope == pytest.approx(-0.5, abs=0.1)


def test_the_ratio_read_out_tends_to_attention_by_collision() -> None:
    s, q, planes = normal(4, 12, 6), normal(5, 6), normal(6, 1 << 14, 3, 6)
    c = weights(s, q, 3)
    share = matches(s, q, planes).mean(1)
    assert ((share - c).abs() < 5 * (c * (1 - c) / len(planes)).sqrt()).all()
    found, expected = pooled_one(s, q, planes, "ratio"), c @ s / c.sum()
    torch.testing.assert_close(found, share @ s / share.sum())
    assert float((found - expected).norm()) < 0.1 * float(s.norm(dim=1).max())


def test_the_l2_read_out_of_one_event_is_its_direction_times_its_share() -> None:
    s, q, planes = normal(7, 1, 6), normal(8, 6), normal(9, 1000, 3, 6)
    torch.testing.assert_close(pooled_one(s, q, planes, "l2"), matches(s, q, planes).mean() * s[0] / s[0].norm())


@settings(max_examples=50, deadline=None)
@given(seeds)
def test_the_l2_read_out_is_never_longer_than_one(seed: int) -> None:
    s, q, planes = normal(seed, 3, 9, 5), normal(seed + 1, 3, 4, 5), normal(seed + 2, 6, 2, 5)
    long = pooled(s, random_mask(seed, 3, 9), q, planes, "l2")
    assert float(long.norm(dim=-1).max()) <= 1 + 1e-6


@pytest.mark.parametrize(
    ("bits", "plain", "ratio", "l2"),
    [
        (1, (1, 0.5), (0.666667, 0.333333), (0.853553, 0.353553)),
        (3, (1, 0.125), (0.888889, 0.111111), (0.963388, 0.088388)),
    ],
)
def test_each_read_out_tends_to_its_known_vector(bits: int, plain: Any, ratio: Any, l2: Any) -> None:
    s, planes = torch.eye(2, dtype=torch.float64), normal(bits, 1 << 17, bits, 2)
    expected: dict[Norm, Any] = {"none": plain, "ratio": ratio, "l2": l2}
    for norm, values in expected.items():  # 0.007: five standard deviations of a coin thrown 2^17 times
        assert pooled_one(s, s[0], planes, norm).tolist() == pytest.approx(values, abs=0.007)


# What a table is


@settings(max_examples=60, deadline=None)
@given(seeds, st.integers(0, 4), st.integers(1, 5), norms, st.booleans())
def test_the_table_equals_the_direct_masked_sum_and_a_scatter(
    seed: int, bits: int, groups: int, norm: Norm, double: bool
) -> None:
    dtype, tolerance = (torch.float64, 1e-12) if double else (torch.float32, 1e-5)
    s, q = normal(seed, 3, 9, 5, dtype=dtype), normal(seed + 1, 3, 4, 5, dtype=dtype)
    planes, mask = normal(seed + 2, groups, bits, 5, dtype=dtype), random_mask(seed, 3, 9)
    code = signatures(s, planes)  # [B, T, G]
    match = (signatures(q, planes)[:, :, None] == code[:, None]) & mask[:, None, :, None]  # [B, C, T, G]
    u = torch.einsum("bctg,btd->bcgd", match.to(dtype), s)
    n = match.sum(2)  # [B, C, G]
    if norm == "l2":
        expected = (u / u.norm(dim=-1, keepdim=True).clamp_min(1e-6)).mean(2)
    elif norm == "ratio":
        expected = u.sum(2) / n.sum(2).clamp_min(1)[..., None]
    else:
        expected = u.mean(2)
    torch.testing.assert_close(pooled(s, mask, q, planes, norm), expected, rtol=tolerance, atol=tolerance)

    table, count = pool(s.masked_fill(~mask[..., None], 0), code, mask, 1 << bits)
    b, t, g = (match.new_ones(3, 9, groups) & mask[..., None]).nonzero(as_tuple=True)
    place = (b * groups + g) * (1 << bits) + code[b, t, g].long()
    scattered = s.new_zeros(3 * groups << bits, 5).index_add_(0, place, s[b, t])
    torch.testing.assert_close(table.flatten(0, 2), scattered, rtol=tolerance, atol=tolerance)
    assert torch.equal(count.flatten().long(), torch.bincount(place, minlength=len(scattered)))


@settings(max_examples=30, deadline=None)
@given(seeds, st.integers(0, 5))
def test_every_group_parts_the_history(seed: int, bits: int) -> None:
    model, batch = build(seed % 100, bits=bits), make_batch(seed)
    state = model.encode(batch.history)
    padded = batch.history.padded(8)
    total = (model._events(padded.item, model.items.embedding_row).double() / GRID).round().sum(1)  # [B, D]
    assert torch.equal(state.table.long().sum(2), total.long()[:, None].expand(-1, 4, -1))
    assert (state.size.sum(2) == padded.mask.sum(1, keepdim=True)).all()
    assert not state.table[(state.size == 0)].any()


@settings(max_examples=40, deadline=None)
@given(seeds, norms)
def test_order_padding_turning_and_the_length_of_a_candidate_change_nothing(seed: int, norm: Norm) -> None:
    s, q, mask = normal(seed, 2, 9, 5), normal(seed + 1, 2, 4, 5), random_mask(seed, 2, 9)
    planes = normal(seed + 2, 6, 3, 5)
    expected = pooled(s, mask, q, planes, norm)

    def same(found: Tensor) -> None:
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)

    order = torch.randperm(9, generator=torch.Generator().manual_seed(seed))
    same(pooled(s[:, order], mask[:, order], q, planes, norm))
    same(pooled(s, mask, 7.5 * q, planes, norm))
    nothing = torch.full((2, 3, 5), math.nan, dtype=torch.float64)
    same(pooled(torch.cat([nothing, s], 1), torch.cat([mask[:, :3] & False, mask], 1), q, planes, norm))
    turn, _ = torch.linalg.qr(normal(seed + 3, 5, 5))
    same(pooled(s @ turn, mask, q @ turn, planes @ turn, norm) @ turn.mT)
    twice = pooled(torch.cat([s, s], 1), torch.cat([mask, mask], 1), q, planes, norm)
    same(twice / 2 if norm == "none" else twice)
    assert (signatures(-q, planes) == 7 - signatures(q, planes)).all()


@settings(max_examples=30, deadline=None)
@given(seeds, norms)
def test_without_bits_it_is_mean_or_sum_pooling(seed: int, norm: Norm) -> None:
    s, q, mask = normal(seed, 2, 9, 5), normal(seed + 1, 2, 4, 5), random_mask(seed, 2, 9)
    found = pooled(s, mask, q, normal(seed, 3, 0, 5), norm)
    total, n = (s * mask[..., None]).sum(1), mask.sum(1)[:, None]
    scale = {"none": torch.ones(2, 1), "ratio": n.clamp_min(1), "l2": total.norm(dim=1)[:, None].clamp_min(1e-6)}[norm]
    torch.testing.assert_close(found, (total / scale)[:, None].expand(2, 4, 5))


def test_empty_buckets_and_sums_of_zero_give_zero_and_no_nan_gradient() -> None:
    s = torch.tensor([[[1.0, 2], [-1, -2], [0, 0]], [[0, 0], [0, 0], [0, 0]]], requires_grad=True)
    mask = torch.tensor([[True, True, False], [False, False, False]])
    planes = normal(1, 4, 2, 2, dtype=torch.float32)
    planes[3] = 0  # everything lies in one bucket of this group: a sum of zero, not an empty one
    table, count = pool(s, signatures(s.detach(), planes), mask, 4)
    rows = bucket_rows(table, count, "l2")
    assert (count[0, 3] == torch.tensor([0, 0, 0, 2])).all()
    assert not rows[0, 3].any()
    assert not rows[1].any()
    (gradient,) = torch.autograd.grad((rows * normal(2, *rows.shape, dtype=torch.float32)).sum(), s)
    assert gradient.isfinite().all()
    model = build(2)
    state = model.encode(histories([[]]))
    assert not long_of(model, state, list(range(2, ROWS))).any()
    found = model.score(state, Request(torch.tensor([9])), Candidates(torch.arange(2, ROWS, dtype=torch.int32)[None]))
    assert found.isfinite().all()


# Gradients


def test_events_learn_from_the_candidates_they_meet_and_candidates_do_not_learn_through_the_hash() -> None:
    s, q, planes = normal(1, 1, 9, 5).requires_grad_(), normal(2, 1, 1, 5).requires_grad_(), normal(3, 6, 3, 5)
    mask = torch.tensor([[False, *[True] * 8]])
    long = pooled(s, mask, q, planes, "none")[0, 0]
    share = matches(s[0], q[0, 0], planes).mean(1) * mask[0]
    assert 0 < (share > 0).sum() < 8
    for d in range(5):
        by_event, by_candidate = torch.autograd.grad(long[d], (s, q), retain_graph=True, allow_unused=True)
        expected = torch.zeros(9, 5, dtype=torch.float64)
        expected[:, d] = share
        torch.testing.assert_close(by_event[0], expected)
        assert by_candidate is None


@pytest.mark.parametrize("norm", ["none", "ratio", "l2"])
def test_gradients_of_the_table_are_those_of_finite_differences(norm: Norm) -> None:
    code = torch.randint(0, 4, (2, 7, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    q_code, mask = code[:, :3], torch.ones(2, 7, dtype=torch.bool)

    def long(s: Tensor) -> Tensor:
        table, count = pool(s, code, mask, 4)
        return read(bucket_rows(table, count, norm), count, q_code, norm)

    assert torch.autograd.gradcheck(long, (normal(4, 2, 7, 5).requires_grad_(),))


def test_planes_are_saved_and_never_trained_and_the_padding_row_never_moves() -> None:
    model, batch = build(3).train(), make_batch(5)
    assert "planes" in model.state_dict()
    assert all(parameter is not model.planes for parameter in model.parameters())
    model.loss(batch, torch.Generator()).total.backward()
    for table in (model.fields.item, model.fields.category):
        assert table is not None
        assert table.weight.grad is not None
        gradient = table.weight.grad.to_dense()
        assert not gradient[0].any()
        assert gradient.any()


# The exact state


def same_state(found: SdimState, expected: SdimState) -> None:
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        assert not a.is_floating_point()
        assert torch.equal(a, b)


def past(rows: list[list[Seen]]) -> History:
    """Return histories of (item row, action)."""
    plain = histories([[item for item, _ in row] for row in rows])
    actions = [action for row in rows for _, action in row]
    return replace(plain, action=torch.tensor(actions, dtype=torch.int32))


LAST_ACTION = 255
seen = st.tuples(st.integers(UNKNOWN, ROWS - 1), st.sampled_from([0, 1, 2, LAST_ACTION]))
MODEL = build(11, center=True)
TABLES = {
    "all events": MODEL,
    "before the newest": build(11, long_includes_short=False),
    "never any": build(11, long_includes_short=False, recent=8),
    "actions": build(11, actions=True),
    "actions before the newest": build(11, actions=True, long_includes_short=False),
}
steps = st.lists(st.tuples(st.sampled_from(["append", "evict", "merge"]), seeds), max_size=12)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(seen, max_size=12), min_size=2, max_size=3), steps, st.sampled_from([*TABLES]))
def test_append_evict_and_merge_in_any_order_equal_a_rebuild_bit_for_bit(
    rows: list[list[Seen]], changes: list[tuple[str, int]], table: str
) -> None:
    model = TABLES[table]
    window = model.config.window
    state = model.encode(past(rows))
    logs = [history[-window:] for history in rows]
    for change, seed in changes:
        draws = np.random.default_rng(seed)

        def some(number: int, draws: np.random.Generator = draws) -> list[Seen]:
            return list(zip(draws.integers(UNKNOWN, ROWS, number).tolist(), draws.integers(0, 3, number), strict=True))

        if change == "append":
            new = some(len(logs))
            items, actions = (torch.tensor(column, dtype=torch.int32) for column in zip(*new, strict=True))
            state = model.append(state, items, torch.zeros(len(new)), actions)
            logs = [[*log, event] for log, event in zip(logs, new, strict=True)]
        elif change == "evict":
            gone = [log[draws.integers(len(log))][0] if log and draws.random() < 0.8 else PAD for log in logs]
            state = model.evict(state, torch.tensor(gone, dtype=torch.int32))
            for log, item in zip(logs, gone, strict=True):
                if item != PAD:
                    log.pop(next(place for place, event in enumerate(log) if event[0] == item))  # the oldest of it
        else:
            newer = [some(draws.integers(0, 12)) for _ in logs]
            state = model.merge(state, model.encode(past(newer)))
            logs = [log + other[-window:] for log, other in zip(logs, newer, strict=True)]
        logs = [log[-window:] for log in logs]
        same_state(state, model.encode(past(logs)))


def test_an_action_moves_what_an_event_adds_and_not_where_it_is_hashed_to() -> None:
    model = build(12, actions=True)
    assert model.action is not None
    one, other = (model.encode(past([[(5, action)]])) for action in (1, LAST_ACTION))
    assert torch.equal(one.size, other.size)
    added = (model.action.weight[LAST_ACTION + 1] - model.action.weight[2]).detach()
    moved = (other.table - one.table)[one.size > 0] * GRID
    torch.testing.assert_close(moved, added.double().expand_as(moved).float(), atol=GRID, rtol=0)
    key = model.key
    with torch.no_grad():
        model.action.weight[2] += 1
    assert model.key != key
    model.action.weight.data[2, 0] = 5000.0
    with pytest.raises(DataError, match="could overflow"):
        model.encode(past([[(5, 1)] * 8]))


def test_weights_with_actions_are_those_the_read_out_gives() -> None:
    model = build(12, actions=True, norm="none", long_includes_short=True)
    batch = make_batch(3)
    history = replace(batch.history, action=(batch.history.item * 5 % 3).to(torch.int32))
    found = model.attention_of(history, batch.candidates)
    state = model.encode(history)
    rows = bucket_rows(state.table.double() * GRID, state.size, "none")
    expected = read(rows, state.size, model._codes(batch.candidates.item), "none")
    torch.testing.assert_close(found.weight @ found.event, expected, atol=1e-3, rtol=0)
    assert not torch.allclose(found.event, model.attention_of(batch.history, batch.candidates).event)


@settings(max_examples=30, deadline=None)
@given(seeds)
def test_the_grid_is_fine_enough(seed: int) -> None:
    batch = make_batch(seed)
    state = MODEL.encode(batch.history)
    padded = batch.history.padded(8)
    s = MODEL._events(padded.item, MODEL.items.embedding_row).double()
    table, count = pool(s, MODEL._signatures(s), padded.mask, 8)
    assert torch.equal(count.int(), state.size)
    assert ((state.table * GRID - table).abs() <= count[..., None] * GRID / 2 + 1e-12).all()


def test_an_event_that_is_not_there_cannot_be_taken_out() -> None:
    with pytest.raises(DataError, match=r"request 1: item row 7 is not in its window"):
        MODEL.evict(MODEL.encode(histories([[7], [6, 5]])), torch.tensor([7, 7], dtype=torch.int32))


def test_embeddings_that_could_overflow_the_table_are_refused() -> None:
    model = build(1)
    assert model.fields.item is not None
    model.fields.item.weight.data[5, 1] = 4095.9
    model.encode(histories([[5] * 8]))
    model.fields.item.weight.data[5, 1] = -4096.5
    model.train().eval()
    with pytest.raises(DataError, match=r"4096\.5, a window of 8 .* expected below 4096"):
        model.encode(histories([[5] * 8]))


def test_signatures_follow_the_weights() -> None:
    model, other = build(1), build(2)
    first = model.item_signatures()
    assert model.item_signatures() is first
    with torch.no_grad():
        for mine, theirs in zip(model.fields.parameters(), other.fields.parameters(), strict=True):
            mine.copy_(theirs)
    assert torch.equal(model.item_signatures(), other.item_signatures())
    assert not torch.equal(model.item_signatures(), first)
    optimiser = torch.optim.SGD(model.train().parameters(), lr=1.0)
    model.loss(make_batch(1), torch.Generator()).total.backward()
    optimiser.step()
    assert not torch.equal(model.eval().item_signatures(), other.item_signatures())


def test_the_center_is_the_mean_over_all_known_items() -> None:
    model = build(5, center=True)
    vectors = model.fields.semantic(torch.arange(ROWS), model.items.embedding_row).double()
    torch.testing.assert_close(model._mean(), vectors[2:].mean(0), rtol=1e-6, atol=1e-6)
    assert torch.equal(model.item_signatures(), signatures(vectors - model._mean(), model.planes.double()))


def test_another_process_finds_the_same_signatures(tmp_path: Any) -> None:
    model = build(6)
    model.items.save(tmp_path / "items.safetensors")
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    script = (
        "import hashlib, sys; from pathlib import Path; from safetensors.torch import load_file\n"
        "from ranking.items import ItemTable; from ranking.sdim import Sdim, SdimConfig\n"
        "place = Path(sys.argv[1])\n"
        "config = SdimConfig(window=8, recent=3, groups=4, item_width=3, category_width=2, hidden=4)\n"
        "model = Sdim(config, ItemTable.load(place / 'items.safetensors'))\n"
        "model.load_state_dict(load_file(place / 'model.safetensors'), assign=True)\n"
        "print(model.key, hashlib.sha256(model.item_signatures().numpy().tobytes()).hexdigest())\n"
    )
    done = subprocess.run([sys.executable, "-c", script, tmp_path], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [model.key, hashlib.sha256(model.item_signatures().numpy().tobytes()).hexdigest()]


def test_scores_after_append_and_evict_are_those_of_the_history() -> None:
    model, batch = build(7), make_batch(8)
    before = [[5, 6, 7], [8, 9], [10, 11, 12, 13], [14] * 9]
    state = model.encode(histories(before))
    state = model.append(state, torch.tensor([3, 4, 3, 4], dtype=torch.int32), torch.zeros(4), NO_ACTION)
    state = model.evict(state, torch.tensor([6, 0, 13, 14], dtype=torch.int32))
    after = histories([[5, 7, 3], [8, 9, 4], [10, 11, 12, 3], [14] * 6 + [4]])
    found = model.score(state, batch.request, batch.candidates)
    assert torch.equal(found, worlds.scores(model, replace(batch, history=after)))


def test_a_table_of_another_model_is_refused() -> None:
    model = build(7)
    model.refuse_other(build(7).key)
    others = [build(8), build(7, center=True), build(7, window=9), build(7, rows=ROWS + 1), build(7, planes_seed=1)]
    moved = build(7)
    moved.items.categorical[4, 0] = 3
    for other in [*others, moved]:
        with pytest.raises(DataError, match=f"{other.key[:12]}.*{model.key[:12]}"):
            model.refuse_other(other.key)
    state = model.encode(make_batch(1).history).recent_only()
    assert not long_of(model, state, [3, 4]).any()


def test_bytes_of_a_table_are_those_of_the_formula_however_long_the_history() -> None:
    model = Sdim(SdimConfig(window=5000), item_table()).eval()
    for length in (1, 5000):
        state = model.encode(histories([[5] * length]))
        assert state.table.nbytes == 16 * 8 * 32 * 4 == 16_384
        assert state.size.nbytes == 512
        assert state.log.nbytes == 4 * length
    assert model.item_signatures().nbytes == ROWS * 16


def test_scoring_reads_the_table_and_the_newest_events_only() -> None:
    model, batch = build(9), make_batch(10)
    state = model.encode(batch.history)
    log = state.log.clone()
    log[:, :-3] = 17
    expected = model.score(state, batch.request, batch.candidates)
    assert torch.equal(model.score(state._replace(log=log), batch.request, batch.candidates), expected)
    other = model.score(state.recent_only(), batch.request, batch.candidates)
    assert (other - expected).abs().max() > 1e-3


def test_a_table_without_the_newest_events_is_that_of_the_history_before_them() -> None:
    rows = [[5, 6, 7, 8, 9, 10], [11, 12], [], [13] * 8]
    whole, apart = build(9), build(9, long_includes_short=False)
    state, before = apart.encode(histories(rows)), whole.encode(histories([row[:-3] for row in rows]))
    assert torch.equal(state.table, before.table)
    assert torch.equal(state.size, before.size)
    assert torch.equal(state.log, whole.encode(histories(rows)).log)
    assert apart.key != whole.key


def test_what_stands_at_padding_is_never_read() -> None:
    model, batch = build(12), make_batch(13)
    expected = worlds.scores(model, batch)
    assert model.fields.item is not None
    model.fields.item.weight.data[0] = 1e3
    model.train().eval()
    assert torch.equal(worlds.scores(model, batch), expected)


@pytest.mark.parametrize("whole", [True, False])
def test_training_reads_what_scoring_reads(whole: bool) -> None:
    model, batch = build(14, norm="none", long_includes_short=whole), make_batch(15)
    seen = []
    model.head.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach()))
    model.train().loss(batch, torch.Generator())
    (trained,) = seen
    state = model.eval().encode(batch.history)
    expected = torch.cat(
        [long_of(model, SdimState(*(t[b : b + 1] for t in state)), batch.candidates.item[b].tolist()) for b in range(4)]
    )
    torch.testing.assert_close(trained[:, 5:10].double(), expected, rtol=1e-4, atol=1e-4)


# Numbers worked out by hand

EVENTS = [[2.0, 1], [1, 3], [-1, 2], [3, -1], [-2, -2]]
QUERIES = [[1.0, 2], [1, -2], [-1, -2], [-1, -2], [-1, 2], [1, 2]]


def by_hand(norm: Norm) -> Sdim:
    """Return the model of the worked example: items 2..6 are events, 7..9 candidates, 10..12 their opposites."""
    config = SdimConfig(
        window=4, recent=1, bits=2, groups=2, norm=norm, item_width=2, category=None, hidden=2, unknown_rate=0.0
    )
    model = Sdim(config, item_table(13)).eval()
    assert model.fields.item is not None
    model.fields.item.weight.data[2:] = torch.tensor(EVENTS + QUERIES)
    model.planes.copy_(torch.tensor([[[1, 0], [0, 1]], [[1, 1], [1, -1]]]))
    return model


def test_the_table_is_that_worked_out_by_hand() -> None:
    model = by_hand("none")
    code = model.item_signatures().tolist()
    assert code[2:7] == [[3, 3], [3, 1], [2, 1], [1, 3], [0, 2]]
    assert code[7:13] == [[3, 1], [1, 2], [0, 2], [0, 2], [2, 1], [3, 1]]
    state = model.encode(histories([[2, 3, 4, 5]]))
    table = state.table[0] * GRID
    assert table[0].tolist() == [[0, 0], [3, -1], [-1, 2], [3, 4]]
    assert table[1].tolist() == [[0, 0], [0, 5], [0, 0], [5, 0]]
    assert state.size[0].tolist() == [[0, 1, 1, 2], [0, 2, 0, 2]]
    later = model.append(
        state, torch.tensor([6], dtype=torch.int32), torch.zeros(1), NO_ACTION
    )  # (2, 1) leaves the window
    table = later.table[0] * GRID
    assert table[0].tolist() == [[-2, -2], [3, -1], [-1, 2], [1, 3]]
    assert table[1].tolist() == [[0, 0], [0, 5], [-2, -2], [3, -1]]


@pytest.mark.parametrize(
    ("norm", "before", "after"),
    [
        ("none", [[1.5, 4.5], [1.5, -0.5], [0, 0]], [[0.5, 4], [0.5, -1.5], [-2, -2]]),
        ("ratio", [[0.75, 2.25], [3, -1], [0, 0]], [[0.333333, 2.666667], [0.5, -1.5], [-2, -2]]),
        (
            "l2",
            [[0.3, 0.9], [0.474342, -0.158114], [0, 0]],
            [[0.158114, 0.974342], [0.120788, -0.511667], [-0.707107, -0.707107]],
        ),
    ],
)
def test_candidates_read_what_was_worked_out_by_hand(
    norm: Norm, before: list[list[float]], after: list[list[float]]
) -> None:
    model = by_hand(norm)
    state = model.encode(histories([[2, 3, 4, 5]]))
    np.testing.assert_allclose(long_of(model, state, [7, 8, 9]), before, atol=1e-6)
    state = model.append(state, torch.tensor([6], dtype=torch.int32), torch.zeros(1), NO_ACTION)
    np.testing.assert_allclose(long_of(model, state, [7, 8, 9]), after, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"recent": 12, "window": 10}, "recent=12, window=10"),
        ({"bits": 9}, "bits=9"),
        ({"groups": 0}, "groups=0"),
        ({"hidden": 0}, "hidden=0"),
        ({"unknown_rate": 1.0}, "unknown_rate=1.0"),
        ({"item_width": 0, "category_width": 0}, "item=0"),
    ],
)
def test_impossible_settings_are_refused_by_name(changes: dict[str, Any], names: str) -> None:
    with pytest.raises(ConfigError, match=names):
        Sdim(SdimConfig(**changes), item_table())
