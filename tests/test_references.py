"""The reference rankers and the parts all models share, held to definitions written out the slow way."""

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import ranking.layers
import worlds
from ranking.batch import Batch, Candidates, History, Padded, Request
from ranking.din import AttentionNetwork, Din, DinConfig
from ranking.embeddings import (
    Fields,
    FieldWidths,
    ItemEmbedding,
    hide_items,
    network_weights,
    positions,
    sparse_parameters,
)
from ranking.items import ItemTable
from ranking.layers import ScoringHead, dropout, masked_softmax, score_real
from ranking.losses import binary_cross_entropy
from ranking.mean_pooling import MeanPooling, MeanPoolingConfig
from ranking.own_counts import decayed_counts
from ranking.personal_frequency import PersonalFrequency, PersonalFrequencyConfig
from ranking.popularity import Popularity, PopularityConfig
from ranking.ranker import NEGATIVE
from recsys.errors import ConfigError, RecsysError

DAY = worlds.DAY
seeds = st.integers(0, 2**31)


def table(count: list[int], categories: list[int] | None = None) -> ItemTable:
    """Return an item table of rows 0, 1 and one for each count."""
    code = [0, 1, *(categories or [2] * len(count))]
    column = torch.tensor(code, dtype=torch.int32)[:, None]
    return ItemTable(["category"], column, [max(code) + 1], torch.tensor([0, 0, *count]))


def request(events: list[tuple[int, int]], at: int, candidates: list[int]) -> Batch:
    """Return a batch of one request: events are (item row, day)."""
    item = torch.tensor([row for row, _ in events], dtype=torch.int32)
    time = torch.tensor([day * DAY for _, day in events], dtype=torch.int64)
    history = History(item, torch.zeros_like(item), time, torch.tensor([0, len(events)]))
    rows = torch.tensor([candidates], dtype=torch.int32)
    nothing = torch.zeros(rows.shape)
    return Batch(history, Request(torch.tensor([at * DAY])), Candidates(rows), nothing, nothing)


# Popularity and personal frequency


def test_popularity_is_the_log_of_the_training_count_and_ties_stay_ties() -> None:
    model = Popularity(PopularityConfig(), table([5, 0, 5, 99]))
    (found,) = worlds.scores(model, request([], 0, [2, 3, 4, 5, 1, 0]))
    assert found.tolist() == pytest.approx([math.log(6), 0, math.log(6), math.log(100), 0, NEGATIVE])
    assert found[0] == found[2]
    with pytest.raises(RecsysError, match="no parameters"):
        model.loss(request([], 0, [2]), torch.Generator())


def test_personal_frequency_by_hand() -> None:
    # Half-life 10 days, now day 30; item 2 on days 30 - 0 and 10, item 3 on day 20, item 4 never.
    model = PersonalFrequency(PersonalFrequencyConfig(half_life_days=10, prior=2.0), table([3, 1, 0]))
    batch = request([(2, 10), (3, 20), (2, 30)], 30, [2, 3, 4, 0])
    share = [(3 + 1) / (4 + 5), (1 + 1) / (4 + 5), (0 + 1) / (4 + 5)]  # 4 events, 5 rows
    own = [0.25 + 1, 0.5, 0]
    (found,) = worlds.scores(model, batch)
    assert found[:3].tolist() == pytest.approx([math.log(f + 2 * p) for f, p in zip(own, share, strict=True)])
    assert found[3] == NEGATIVE


@settings(max_examples=40, deadline=None)
@given(seeds, st.integers(1, 6), st.integers(0, 40), st.floats(0.1, 300))
def test_decayed_counts_equal_the_sum_over_all_pairs(seed: int, users: int, most: int, half_life: float) -> None:
    draws = np.random.default_rng(seed)
    lengths = draws.integers(0, most + 1, users)
    offsets = torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]))
    days = np.concatenate([np.sort(draws.integers(0, 365, n)) for n in lengths]) if lengths.sum() else np.empty(0)
    item = torch.from_numpy(draws.integers(1, 9, lengths.sum()).astype(np.int32))
    history = History(item, torch.zeros_like(item), torch.from_numpy(days.astype(np.int64) * DAY), offsets)
    at = torch.full((users,), 365 * DAY)
    candidates = torch.from_numpy(draws.integers(1, 12, (users, 15)).astype(np.int32))
    model = PersonalFrequency(PersonalFrequencyConfig(), table([1] * 10))
    found = decayed_counts(model.encode(history), at, candidates, half_life)
    for user in range(users):
        rows = slice(int(offsets[user]), int(offsets[user + 1]))
        for c, candidate in enumerate(candidates[user].tolist()):
            own = days[rows][item[rows].numpy() == candidate]
            expected = float(np.exp2(-(365 - own) / half_life).sum())
            assert float(found[user, c]) == pytest.approx(expected, rel=1e-9, abs=1e-12)
            assert len(own) or found[user, c] == 0  # exactly: no residue of the running sums


def test_personal_frequency_scores_a_whole_catalogue_against_a_long_history() -> None:
    rows, events = 68_511, 10_000
    draws = np.random.default_rng(0)
    own, day = draws.integers(2, rows, events), np.sort(draws.integers(0, 365, events))
    model = PersonalFrequency(PersonalFrequencyConfig(half_life_days=60), table([1] * (rows - 2)))
    batch = request(list(zip(own.tolist(), day.tolist(), strict=True)), 365, list(range(2, rows)))
    found = decayed_counts(model.encode(batch.history), batch.request.at, batch.candidates.item, 60)[0]
    expected = np.bincount(own, np.exp2(-(365 - day) / 60), minlength=rows)[2:]
    assert np.allclose(found.numpy(), expected, rtol=1e-9, atol=1e-10)


def test_personal_frequency_wins_where_people_repeat_themselves() -> None:
    world = worlds.make_world(order=0.1, category=0.1, repeats=0.7)
    test = world.requests("test", 300, 20)
    personal = worlds.auc(PersonalFrequency(PersonalFrequencyConfig(), world.items), test)
    assert personal > worlds.auc(Popularity(PopularityConfig(), world.items), test) + 0.2


# DIN and mean pooling


@settings(max_examples=30, deadline=None)
@given(seeds, st.integers(1, 4), st.integers(1, 7), st.integers(1, 9))
def test_din_attention_equals_its_definition_with_gradients(seed: int, b: int, c: int, t: int) -> None:
    draws = torch.Generator().manual_seed(seed)
    network = AttentionNetwork(5, 6).double()
    for parameter in network.parameters():
        parameter.data = torch.randn(parameter.shape, generator=draws, dtype=torch.float64)
    q = torch.randn(b, c, 5, generator=draws, dtype=torch.float64, requires_grad=True)
    s = torch.randn(b, t, 5, generator=draws, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(b, c, t, generator=draws, dtype=torch.float64)

    qq, ss = q[:, :, None, :].expand(-1, -1, t, -1), s[:, None, :, :].expand(-1, c, -1, -1)
    hidden = network.inner(torch.cat([qq, ss, qq - ss, qq * ss], -1))  # [B, C, T, hidden]
    expected = network.outer(F.prelu(hidden, network.slope)).squeeze(-1)
    found = network(q, s)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    inputs = [q, s, *network.parameters()]
    for ours, theirs in zip(
        torch.autograd.grad((found * upstream).sum(), inputs),
        torch.autograd.grad((expected * upstream).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(network.eval()(q, s), expected.detach(), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("weights", ["raw", "softmax"])
def test_din_pools_real_events_only_and_chunks_change_nothing(weights: str, monkeypatch: pytest.MonkeyPatch) -> None:
    world = worlds.make_world(users=20)
    model = Din(DinConfig(window=12, weights=weights), world.items)  # type: ignore[arg-type]
    worlds.fit(model, world.requests("train"), 30)
    (batch,) = world.requests("test", 20, 9)
    state = model.encode(batch.history)
    v = model.fields.candidate(batch.candidates.item, world.items.embedding_row)
    raw = model.attention.double()(v.double(), state.event.double())
    model.attention.float()
    for b, real in enumerate(state.mask):
        own = raw[b][:, real]
        own = torch.softmax(own / v.shape[-1], -1) if weights == "softmax" else own
        expected = own @ state.event[b][real].double()
        torch.testing.assert_close(model._pool(state, v)[b].double(), expected, rtol=1e-5, atol=1e-5)
    together = worlds.scores(model, batch)
    monkeypatch.setattr(ranking.layers, "CHUNK_ELEMENTS", 1)
    torch.testing.assert_close(worlds.scores(model, batch), together, rtol=0, atol=1e-6)


def test_mean_pooling_is_the_mean_of_the_newest_events() -> None:
    world = worlds.make_world(users=20)
    model = MeanPooling(MeanPoolingConfig(window=9), world.items)
    (batch,) = world.requests("test", 20)
    h, item = batch.history, world.items.embedding_row
    user = model.encode(h).user
    assert model.fields.position is not None
    for b in range(len(batch)):
        newest = h.item[max(int(h.offsets[b]), int(h.offsets[b + 1]) - 9) : int(h.offsets[b + 1])]
        own = model.fields.semantic(newest, item)
        back = model.fields.position.weight[torch.arange(len(newest), 0, -1)]
        torch.testing.assert_close(user[b], torch.cat([own, back], -1).mean(0))
    nothing = History(h.item[:0], h.action[:0], h.time[:0], torch.zeros(3, dtype=torch.int64))
    assert not model.encode(nothing).user.any()


# Embeddings


def test_only_rows_read_get_a_gradient_and_padding_never() -> None:
    embedding = ItemEmbedding(50, 4)
    assert not embedding.weight[0].any()
    embedding(torch.tensor([[0, 7, 7], [0, 0, 49]], dtype=torch.int32)).sum().backward()
    gradient = embedding.weight.grad
    assert gradient is not None
    assert gradient.is_sparse
    assert set(gradient.coalesce().indices()[0].tolist()) == {7, 49}
    assert gradient.to_dense()[7].tolist() == [2.0] * 4


def test_an_untrained_item_is_the_unknown_item_of_its_own_category() -> None:
    items = table([4, 0, 0, 4], [2, 3, 3, 2])
    fields = Fields(items, FieldWidths(3, 2, 1), "category", 5)
    e = fields.semantic(torch.arange(6, dtype=torch.int32), items.embedding_row)
    assert not e[0].any()
    assert torch.equal(e[3], e[4])  # untrained items of one category are one
    assert torch.equal(e[3, :3], e[1, :3])  # and read row 1
    assert not torch.equal(e[3, 3:], e[1, 3:])
    assert not torch.equal(e[2, :3], e[5, :3])


def test_hiding_hides_an_item_everywhere_or_nowhere_and_never_padding() -> None:
    items = table([1] * 5000)
    drawn = hide_items(items, 0.05, torch.Generator().manual_seed(1))
    hidden = drawn != items.embedding_row
    assert 0.04 < float(hidden.float().mean()) < 0.06
    assert (drawn[hidden] == 1).all()
    assert drawn[0] == 0
    assert torch.equal(drawn, hide_items(items, 0.05, torch.Generator().manual_seed(1)))
    assert hide_items(items, 0.0, torch.Generator()) is items.embedding_row


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(0, 6), max_size=8), min_size=1, max_size=4))
def test_positions_count_back_from_the_newest(times: list[list[int]]) -> None:
    ordered = [sorted(own) for own in times]
    flat = torch.tensor([t for own in ordered for t in own], dtype=torch.int64)
    item = torch.full(flat.shape, 2, dtype=torch.int32)
    offsets = torch.tensor([0, *np.cumsum([len(own) for own in ordered])])
    padded: Padded = History(item, item, flat, offsets).padded(6)
    slot, group = (positions(padded.time, padded.mask, mode) for mode in ("slot", "group"))
    for b, own in enumerate(ordered):
        kept = own[-6:]
        real = padded.mask[b]
        assert slot[b][real].tolist() == list(range(len(kept), 0, -1))
        assert group[b][real].tolist() == [1 + len({newer for newer in kept if newer > t}) for t in kept]
        assert not slot[b][~real].any()
        assert not group[b][~real].any()


def test_parameters_are_sorted_into_tables_weights_and_biases() -> None:
    world = worlds.make_world(users=5)
    model = MeanPooling(MeanPoolingConfig(), world.items)
    assert {id(p) for p in sparse_parameters(model)} == {
        id(model.fields.item.weight),  # type: ignore[union-attr]
        id(model.fields.category.weight),  # type: ignore[union-attr]
    }
    weights = {id(p) for p in network_weights(model)}
    assert weights == {id(p) for name, p in model.head.named_parameters() if not name.endswith("bias")}


@pytest.mark.parametrize(
    ("build", "names"),
    [
        (lambda: FieldWidths(item=-1), "item=-1"),
        (lambda: FieldWidths(0, 0, 4), "category=0"),
        (lambda: MeanPoolingConfig(window=0), "window=0"),
        (lambda: DinConfig(unknown_rate=1.0), "unknown_rate=1.0"),
        (lambda: PersonalFrequencyConfig(half_life_days=0), "half_life_days=0"),
        (lambda: Fields(table([1]), FieldWidths(0, 4, 4), None, 5), "no category"),
        (lambda: Fields(table([1]), FieldWidths(), "colour", 5), "'colour'; there are category"),
    ],
)
def test_impossible_settings_are_refused_by_name(build: object, names: str) -> None:
    with pytest.raises(ConfigError, match=names):
        build()  # type: ignore[operator]


# Layers


def test_dropout_keeps_the_mean_and_is_off_without_a_generator() -> None:
    x = torch.ones(200_000)
    dropped = dropout(x, 0.3, torch.Generator().manual_seed(3))
    assert dropped.unique().tolist() == pytest.approx([0, 1 / 0.7])
    assert abs(float(dropped.mean()) - 1) < 0.01
    assert torch.equal(dropped, dropout(x, 0.3, torch.Generator().manual_seed(3)))
    assert dropout(x, 0.3, None) is x


@given(st.lists(st.lists(st.floats(-50, 50), min_size=4, max_size=4), min_size=1, max_size=5), seeds)
def test_masked_softmax_reads_nothing_behind_the_mask(rows: list[list[float]], seed: int) -> None:
    x = torch.tensor(rows, dtype=torch.float64)
    mask = torch.rand(x.shape, generator=torch.Generator().manual_seed(seed)) < 0.6
    for poison in (math.nan, math.inf, -math.inf):
        found = masked_softmax(x.masked_fill(~mask, poison), mask)
        for weights, row, real in zip(found, x, mask, strict=True):
            assert not weights[~real].any()
            torch.testing.assert_close(weights[real], torch.softmax(row[real], -1))


def losses_and_statistics(batches: Iterator[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    """Return logits at real candidates and the learned mean, for one fresh head each."""
    results = []
    for features, mask in batches:
        torch.manual_seed(0)
        head = ScoringHead(6).train()
        results.append((score_real(head, features, mask)[mask], head.norm.running_mean.clone()))  # type: ignore[union-attr]
    return results


def test_batch_statistics_see_real_candidates_only() -> None:
    draws = torch.Generator().manual_seed(4)
    features, mask = torch.randn(5, 3, 6, generator=draws), torch.ones(5, 3, dtype=torch.bool)
    padding = torch.full((5, 2, 6), 1e6)
    wider = torch.cat([features, padding], 1), torch.cat([mask, torch.zeros(5, 2, dtype=torch.bool)], 1)
    (logits, mean), (same_logits, same_mean) = losses_and_statistics(iter([(features, mask), wider]))
    torch.testing.assert_close(logits, same_logits)
    torch.testing.assert_close(mean, same_mean)


def test_a_batch_of_one_candidate_can_be_trained_on() -> None:
    head = ScoringHead(6).train()
    assert score_real(head, torch.randn(2, 1, 6), torch.tensor([[True], [False]])).isfinite().all()
    assert head.norm.num_batches_tracked == 0  # one row teaches nothing about a variance


def test_cross_entropy_is_the_mean_over_real_candidates() -> None:
    logits = torch.tensor([[2.0, -1.0, NEGATIVE], [0.5, NEGATIVE, NEGATIVE]])
    label = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    weight = torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    expected = (math.log1p(math.exp(-2)) + math.log1p(math.exp(-1)) + math.log1p(math.exp(0.5))) / 3
    assert float(binary_cross_entropy(logits, label, weight)) == pytest.approx(expected)
    assert float(binary_cross_entropy(logits, label, weight * 0)) == 0
