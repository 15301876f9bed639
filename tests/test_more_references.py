"""ETA, SIM, transitions and gradient boosting, held to definitions written out the slow way."""

import itertools
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

import ranking.gradient_boosting
import ranking.layers
import worlds
from pipelines import boost
from pipelines.publish import publish
from pipelines.train import train, trained_run
from pipelines.train_config import load_config
from ranking.batch import FIRST_ITEM, UNKNOWN, Batch, Candidates, History, Request
from ranking.bundle import Bundle
from ranking.embeddings import FieldWidths
from ranking.eta import BITS, Eta, EtaConfig, hamming, nearness
from ranking.followers import Held, edge_weights, followed, newest_basket, out_weights
from ranking.gradient_boosting import FEATURES, RISING, GradientBoosting, GradientBoostingConfig
from ranking.items import ItemTable, Transitions
from ranking.layers import attend, search
from ranking.ranker import NEGATIVE
from ranking.sim_hard import SimHard, SimHardConfig, newest_of
from ranking.transitions_ranker import TransitionsConfig, TransitionsRanker
from recsys.errors import ConfigError, DataError, RecsysError

CONFIGS = Path("pipelines/configs")
DAY = worlds.DAY
ROWS = 14
SMALL = FieldWidths(3, 2, 2)
seeds = st.integers(0, 2**31)


def item_table(transitions: Transitions | None = None) -> ItemTable:
    """Return a table of rows 0, 1 and 12 items in 4 categories; the last two were never trained."""
    code = torch.tensor([0, 1, *(2 + i % 4 for i in range(ROWS - 2))], dtype=torch.int32)
    count = torch.tensor([0, 0, *range(3, ROWS - 1), 0, 0])
    return ItemTable(["category"], code[:, None], [6], count, transitions)


def make_batch(seed: int, users: int = 4, most: int = 14, candidates: int = 6) -> Batch:
    """Return random requests on day 400: several events a day, the first history full, the last one empty."""
    draws = np.random.default_rng(seed)
    lengths = draws.integers(0, most + 1, users)
    lengths[0], lengths[-1] = most, 0
    day = np.concatenate([np.sort(draws.integers(1, 8, n)) * 40 for n in lengths])
    item = torch.from_numpy(draws.integers(UNKNOWN, ROWS, lengths.sum()).astype(np.int32))
    offsets = torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]))
    history = History(item, torch.zeros_like(item), torch.from_numpy(day * DAY), offsets)
    rows = torch.from_numpy(draws.integers(UNKNOWN, ROWS, (users, candidates)).astype(np.int32))
    label = torch.from_numpy(draws.integers(0, 2, rows.shape)).float()
    return Batch(history, Request(torch.full((users,), 400 * DAY)), Candidates(rows), label, torch.ones_like(label))


def own_events(batch: Batch, b: int) -> tuple[list[int], list[float]]:
    """Return the item rows and the ages in days of one request's history."""
    h = batch.history
    kept = slice(int(h.offsets[b]), int(h.offsets[b + 1]))
    return h.item[kept].tolist(), ((batch.request.at[b] - h.time[kept]) / DAY).tolist()


def randomised(model: Any) -> Any:
    """Return the model in float64 with weights large enough to matter, in evaluation mode."""
    torch.manual_seed(0)
    for name, parameter in model.double().named_parameters():
        if "norm" not in name and "bias" not in name:
            parameter.data = torch.randn_like(parameter)
        if name.endswith(("item.weight", "category.weight")):
            parameter.data[0] = 0
    return model.eval()


def by_definition(model: Any, batch: Batch, b: int, c: int, kept: list[int]) -> Tensor:
    """Return the logit of a candidate whose attention reads only the slots `kept` of a history, oldest first."""
    rows = model.items.embedding_row
    item = batch.history.item[batch.history.offsets[b] : batch.history.offsets[b + 1]][-model.config.window :]
    fields = model.fields
    back = torch.arange(len(item), 0, -1)
    e = torch.cat([fields.semantic(item, rows), fields.position.weight[back]], -1)[kept]  # [K, D]
    v = fields.candidate(batch.candidates.item[b, c : c + 1], rows)[0]
    h = torch.softmax(e @ v / math.sqrt(len(v)), 0) @ e if kept else torch.zeros_like(v)
    logit: Tensor = model.head(torch.cat([v, h, v * h])[None])[0]
    return logit


# ETA


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=6), seeds)
def test_hamming_counts_the_bits_that_differ(codes: list[int], seed: int) -> None:
    other = np.random.default_rng(seed).integers(-(2**31), 2**31, 3).tolist()
    event, candidate = (torch.tensor([values], dtype=torch.int32) for values in (codes, [*other, codes[0], ~codes[0]]))
    found = hamming(event, candidate)[0]
    for c, mine in enumerate(candidate[0].tolist()):
        assert found[c].tolist() == [((mine ^ code) & 0xFFFFFFFF).bit_count() for code in codes]
    assert (found[3, 0], found[4, 0]) == (0, BITS)


@settings(max_examples=60, deadline=None)
@given(seeds, st.integers(1, 30), st.integers(1, 12))
def test_eta_finds_the_nearest_codes_and_the_newer_of_equals(seed: int, length: int, k: int) -> None:
    draws = torch.Generator().manual_seed(seed)
    event = torch.randint(0, 8, (3, length), generator=draws, dtype=torch.int32)  # few codes, so many ties
    candidate = torch.randint(0, 8, (3, 5), generator=draws, dtype=torch.int32)
    mask = torch.rand(3, length, generator=draws) < 0.7
    index, found = search(nearness(event, candidate), mask, k)
    for b in range(3):
        real = mask[b].nonzero().flatten().tolist()
        for c in range(5):
            far = [(int(event[b, t]) ^ int(candidate[b, c])).bit_count() for t in range(length)]
            best = sorted(real, key=lambda t: (far[t], -t))[:k]
            assert sorted(index[b, c][found[b, c]].tolist()) == sorted(best)


def test_eta_codes_are_signs_of_fixed_directions_whatever_the_length_of_a_vector() -> None:
    model = randomised(Eta(EtaConfig(window=9, retrieved=3, widths=SMALL), item_table()))
    x = torch.randn(50, model.fields.width, dtype=torch.float64)
    code = model._code(x)
    for bit in (0, 7, BITS - 1):
        assert torch.equal((code >> bit) & 1 == 1, x @ model.planes[:, bit].double() > 0)
    assert torch.equal(model._code(17 * x), code)
    assert (hamming(model._code(-x)[None], code[None])[0].diagonal() == BITS).all()
    other = Eta(EtaConfig(window=5, retrieved=2, widths=SMALL), item_table())
    assert torch.equal(other.planes.double(), model.planes)  # fixed: no seed, no weight decides them


@pytest.mark.parametrize("retrieved", [3, 9])
def test_eta_is_attention_over_what_the_codes_find(retrieved: int) -> None:
    model = randomised(Eta(EtaConfig(window=9, retrieved=retrieved, widths=SMALL), item_table()))
    for seed in range(5):
        batch = make_batch(seed)
        scores, state = worlds.scores(model, batch), model.encode(batch.history)
        far = hamming(state.code, model._code(model.fields.candidate(batch.candidates.item, model.items.embedding_row)))
        for b in range(len(batch)):
            real = state.mask[b].nonzero().flatten().tolist()
            for c in range(6):
                best = sorted(real, key=lambda t: (int(far[b, c, t]), -t))[:retrieved]
                kept = [t - (state.mask.shape[1] - len(real)) for t in best]
                torch.testing.assert_close(scores[b, c], by_definition(model, batch, b, c, kept), rtol=0, atol=1e-10)


# SIM


@settings(max_examples=60, deadline=None)
@given(seeds, st.integers(1, 12), st.integers(1, 15))
def test_the_newest_of_a_number_are_the_last_of_its_run(seed: int, length: int, k: int) -> None:
    draws = np.random.default_rng(seed)
    ordered = np.sort(draws.integers(0, 4, (3, length)))
    wanted = draws.integers(0, 6, (3, 5))
    place, found = newest_of(*(torch.from_numpy(x.astype(np.int32)) for x in (ordered, wanted)), k)
    for b in range(3):
        for c in range(5):
            assert place[b, c][found[b, c]].tolist() == np.flatnonzero(ordered[b] == wanted[b, c])[::-1][:k].tolist()
            assert len(set(place[b, c].tolist())) == min(k, length)


@pytest.mark.parametrize("retrieved", [2, 9])
def test_sim_is_attention_over_the_newest_events_of_the_category_and_never_fills_up(retrieved: int) -> None:
    model = randomised(SimHard(SimHardConfig(window=9, retrieved=retrieved, widths=SMALL), item_table()))
    category, nothing_found = model.items.column("category"), 0
    for seed in range(5):
        batch = make_batch(seed)
        scores = worlds.scores(model, batch)
        for b in range(len(batch)):
            own = own_events(batch, b)[0][-9:]
            for c, wanted in enumerate(batch.candidates.item[b].tolist()):
                same = [t for t, item in enumerate(own) if category[item] == category[wanted]][-retrieved:]
                nothing_found += not same
                torch.testing.assert_close(scores[b, c], by_definition(model, batch, b, c, same), rtol=0, atol=1e-10)
    assert nothing_found > 10


@pytest.mark.parametrize(
    ("model", "config"),
    [(Eta, EtaConfig(window=20, retrieved=4)), (SimHard, SimHardConfig(window=20, retrieved=4))],
)
def test_chunks_and_pooling_paths_change_no_score(model: Any, config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    world = worlds.make_world(users=30)
    model = model(config, world.items)
    worlds.fit(model, world.requests("train"), 30)
    (batch,) = world.requests("test", 30, 9)
    expected = worlds.scores(model, batch)
    for name, value in (("GATHER_ABOVE", 0), ("GATHER_ABOVE", 10**9), ("CHUNK_ELEMENTS", 1)):
        monkeypatch.setattr(ranking.layers, name, value)
        torch.testing.assert_close(worlds.scores(model, batch), expected, rtol=0, atol=1e-6)


def test_attention_over_the_found_has_the_same_gradients_on_both_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    draws = torch.Generator().manual_seed(1)
    q, e = (torch.randn(2, n, 4, generator=draws, dtype=torch.float64, requires_grad=True) for n in (3, 7))
    index = torch.rand(2, 3, 7, generator=draws).argsort(-1)[..., :4]
    found = torch.rand(2, 3, 4, generator=draws) < 0.6
    found[0, 0] = False
    results = []
    for above in (0, 10**9):
        monkeypatch.setattr(ranking.layers, "GATHER_ABOVE", above)
        h = attend(q, e, index, found)
        assert not h[0, 0].any()
        results.append((h, *torch.autograd.grad(h.square().sum(), [q, e])))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


# Transitions


def count_steps(baskets: list[list[list[int]]]) -> np.ndarray:
    """Count transitions between consecutive baskets of each user the slow way, float64 [V, V]."""
    counts = np.zeros((ROWS, ROWS))
    for own in baskets:
        for a, b in itertools.pairwise(own):
            for i in a:
                for j in b:
                    counts[i, j] += 1 / (len(a) * len(b))
    return counts


def sparse(counts: np.ndarray) -> Transitions:
    """Return a dense matrix as `Transitions`."""
    source, target = np.nonzero(counts)
    offsets = np.concatenate([[0], np.cumsum(np.bincount(source, minlength=len(counts)))])
    weight = counts[source, target].astype(np.float32)
    return Transitions(*(torch.from_numpy(x) for x in (offsets, target.astype(np.int32), weight)))


def random_baskets(seed: int) -> list[list[list[int]]]:
    """Return some baskets of distinct items for each of five users."""
    draws = np.random.default_rng(seed)

    def basket() -> list[int]:
        return sorted(draws.choice(np.arange(FIRST_ITEM, ROWS), draws.integers(1, 5), replace=False).tolist())

    return [[basket() for _ in range(draws.integers(2, 5))] for _ in range(5)]


@settings(max_examples=40, deadline=None)
@given(seeds, st.floats(0, 1))
def test_edges_are_looked_up_as_in_the_dense_matrix(seed: int, density: float) -> None:
    draws = np.random.default_rng(seed)
    counts = draws.random((ROWS, ROWS)) * (draws.random((ROWS, ROWS)) < density)
    transitions, every = sparse(counts), torch.arange(ROWS, dtype=torch.int32)
    found = edge_weights(transitions, every[:, None], every[None, :])
    assert np.array_equal(found.numpy(), counts.astype(np.float32))
    np.testing.assert_allclose(out_weights(transitions).numpy(), counts.sum(1), rtol=1e-6, atol=1e-9)


@settings(max_examples=40, deadline=None)
@given(seeds)
def test_the_newest_basket_is_what_happened_last_without_repeats(seed: int) -> None:
    batch = make_batch(seed)
    found = newest_basket(batch.history)
    for b in range(len(batch)):
        item, age = own_events(batch, b)
        newest = {row for row, days in zip(item, age, strict=True) if days == min(age)}
        assert sorted(newest) == [row for row in found[b].tolist() if row]


@settings(max_examples=40, deadline=None)
@given(seeds)
def test_followed_is_the_mean_transition_probability_and_a_request_can_be_taken_out(seed: int) -> None:
    users = random_baskets(seed)
    counts = count_steps(users)
    transitions = sparse(counts)
    total, items = out_weights(transitions), list(range(FIRST_ITEM, ROWS))
    basket = torch.zeros(len(users), 4, dtype=torch.int32)
    for b, own in enumerate(users):
        basket[b, 4 - len(own[-2]) :] = torch.tensor(own[-2])
    candidates = torch.tensor([items] * len(users), dtype=torch.int32)
    label = torch.tensor([[float(j in own[-1]) for j in items] for own in users])
    held = Held(label, torch.tensor([len(own[-1]) for own in users]))

    def probabilities(counts: np.ndarray, own: list[int]) -> np.ndarray:
        rows = counts[own]
        return (rows / np.maximum(rows.sum(1, keepdims=True), 1e-9)).mean(0)[FIRST_ITEM:]

    plain = followed(transitions, total, basket, candidates)
    without = followed(transitions, total, basket, candidates, held)
    for b, own in enumerate(users):
        np.testing.assert_allclose(plain[b].numpy(), probabilities(counts, own[-2]), atol=1e-5)
        others = counts - count_steps([own[-2:]])
        others[others < 1e-9] = 0
        np.testing.assert_allclose(without[b].numpy(), probabilities(others, own[-2]), atol=1e-4)


def test_with_single_items_the_order_is_that_of_the_published_baseline() -> None:
    draws = np.random.default_rng(3)
    counts = np.floor(draws.random((ROWS, ROWS)) ** 3 * 5) * (np.arange(ROWS) >= FIRST_ITEM)
    table = item_table(sparse(counts))
    model, popular = TransitionsRanker(TransitionsConfig(prior=1e-6), table), table.count.double()
    candidates = torch.arange(FIRST_ITEM, ROWS, dtype=torch.int32)
    for newest in range(FIRST_ITEM, ROWS):
        item = torch.tensor([5, newest], dtype=torch.int32)
        history = History(item, torch.zeros_like(item), torch.tensor([1, 2]), torch.tensor([0, 2]))
        (found,) = model.score(model.encode(history), Request(torch.tensor([3])), Candidates(candidates[None]))
        baseline = torch.from_numpy(counts[newest])[FIRST_ITEM:] + 1e-6 * popular[FIRST_ITEM:]
        follow = torch.from_numpy(counts[newest])[FIRST_ITEM:]
        assert (found[:, None] >= found)[baseline[:, None] > baseline].all()
        assert (found[:, None] > found)[follow[:, None] > follow].all()


def test_transitions_by_hand() -> None:
    # Items 2 and 3 in the newest basket: 2 was followed by 4 (3 times of 4), 3 by 5 (once of once). 14 rows, 75 events.
    counts = np.zeros((ROWS, ROWS))
    counts[2, 4], counts[2, 6], counts[3, 5] = 3, 1, 1
    table = item_table(sparse(counts))
    item = torch.tensor([7, 3, 2], dtype=torch.int32)
    history = History(item, torch.zeros_like(item), torch.tensor([1, 2, 2]), torch.tensor([0, 3]))
    model = TransitionsRanker(TransitionsConfig(prior=0.5), table)
    rows = torch.tensor([[4, 5, 6, 7, 0]], dtype=torch.int32)
    (found,) = model.score(model.encode(history), Request(torch.tensor([3])), Candidates(rows))
    share = [0.5 * (int(table.count[row]) + 1) / (int(table.count.sum()) + ROWS) for row in (4, 5, 6, 7)]
    expected = [p + s for p, s in zip([0.5 * 3 / 4, 0.5, 0.5 / 4, 0], share, strict=True)]
    assert found[:4].exp().tolist() == pytest.approx(expected)
    assert found[4] == NEGATIVE


# Gradient boosting


@settings(max_examples=25, deadline=None)
@given(seeds)
def test_features_equal_their_definitions(seed: int) -> None:
    table = item_table(sparse(count_steps(random_baskets(seed))))
    model = GradientBoosting(GradientBoostingConfig(short_days=30, long_days=90), table)
    model.recent = torch.arange(ROWS) % 3
    batch, category = make_batch(seed), table.column("category")
    state = model.encode(batch.history)
    found = dict(zip(FEATURES, model.features(state, batch.request, batch.candidates).unbind(-1), strict=True))
    basket = followed(table.transitions, model.total, newest_basket(batch.history), batch.candidates.item)
    for b in range(len(batch)):
        item, age = own_events(batch, b)
        for c, wanted in enumerate(batch.candidates.item[b].tolist()):
            own = [days for row, days in zip(item, age, strict=True) if row == wanted]
            same = [days for row, days in zip(item, age, strict=True) if category[row] == category[wanted]]
            decayed = [sum(2 ** (-days / half) for days in own) for half in (30, 90)]
            everything = sum(2 ** (-days / 90) for days in age)
            expected = {
                "own_count": len(own),
                "own_short": decayed[0],
                "own_long": decayed[1],
                "own_age_days": min(own, default=math.nan),
                "category_share": sum(2 ** (-days / 90) for days in same) / everything if age else 0,
                "category_age_days": min(same, default=math.nan),
                "popularity": math.log1p(table.count[wanted]),
                "popularity_recent": math.log1p(wanted % 3),
                "followed": float(basket[b, c]),
                "events": len(item),
                "user_age_days": min(age, default=math.nan),
            }
            ours = {name: float(found[name][b, c]) for name in FEATURES}
            assert ours == pytest.approx(expected, nan_ok=True, rel=1e-5)


def test_training_requests_are_left_out_of_the_counts_they_are_part_of() -> None:
    users = random_baskets(5)
    table = item_table(sparse(count_steps(users)))
    model, batch = GradientBoosting(GradientBoostingConfig(), table), make_batch(5)
    model.recent = torch.full((ROWS,), 4)
    held = Held(batch.label, torch.full((len(batch),), 3))
    recent = torch.tensor([True, False, True, False])
    state = model.encode(batch.history)

    def column(name: str, training: Any = None) -> Tensor:
        return model.features(state, batch.request, batch.candidates, training)[..., FEATURES.index(name)]

    training = ranking.gradient_boosting.Training(held, recent)
    counted = table.count[batch.candidates.item.long()]
    expected = (counted - batch.label.long()).clamp_min(0)
    torch.testing.assert_close(column("popularity", training), expected.double().log1p().float())
    less = 4 - batch.label * recent[:, None]
    torch.testing.assert_close(column("popularity_recent", training), less.log1p())
    assert torch.equal(column("own_count", training), column("own_count"))


@pytest.fixture(scope="module")
def grown() -> tuple[worlds.World, GradientBoosting]:
    world = worlds.make_world(users=100)
    model = GradientBoosting(GradientBoostingConfig(trees=30, leaves=7, least_rows=20), world.items)
    worlds.grow(model, world)
    return world, model


def test_trees_are_a_function_of_their_rows_and_travel_as_plain_bytes(grown: Any, tmp_path: Path) -> None:
    world, model = grown
    again = GradientBoosting(model.config, world.items)
    with pytest.raises(RecsysError, match="no trees yet"):
        worlds.scores(again, world.requests("test", 10)[0])
    worlds.grow(again, world)
    assert torch.equal(again.trees, model.trees)
    assert bytes(model.trees.numpy()).startswith(b"tree\n")

    save_file(model.state_dict(), tmp_path / "model.safetensors")
    (batch,) = world.requests("test", 100)
    for assign in (False, True):
        other = GradientBoosting(model.config, world.items)
        other.load_state_dict(load_file(tmp_path / "model.safetensors"), assign=assign)
        assert torch.equal(worlds.scores(other, batch), worlds.scores(model, batch))


def test_more_of_a_rising_count_never_lowers_the_score(grown: Any) -> None:
    world, model = grown
    (batch,) = world.requests("test", 100)
    plain = model.features(model.encode(batch.history), batch.request, batch.candidates)[batch.candidates.mask].numpy()
    before = model._sums(plain)
    for name in RISING:
        more = plain.copy()
        more[:, FEATURES.index(name)] *= 3
        assert (model._sums(more) >= before).all()
    assert before.std() > 0.1


def test_replaced_trees_are_the_ones_that_score(grown: Any) -> None:
    world, model = grown
    (batch,) = world.requests("test", 100)
    before, state = worlds.scores(model, batch), {key: tensor.clone() for key, tensor in model.state_dict().items()}
    other = GradientBoosting(replace(model.config, trees=3), world.items)
    worlds.grow(other, world)
    model.load_state_dict(other.state_dict())
    assert torch.equal(worlds.scores(model, batch), worlds.scores(other, batch))
    model.load_state_dict(state)
    assert torch.equal(worlds.scores(model, batch), before)


def test_without_the_package_the_message_says_what_to_install(grown: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    world, model = grown
    monkeypatch.setitem(sys.modules, "lightgbm", None)
    fresh = GradientBoosting(model.config, world.items)
    fresh.load_state_dict(model.state_dict())
    with pytest.raises(ConfigError, match="pip install lightgbm"):
        worlds.scores(fresh, world.requests("test", 10)[0])
    with pytest.raises(ConfigError, match="pip install lightgbm"):
        worlds.grow(fresh, world)


def test_rows_of_one_kind_grow_no_trees() -> None:
    world = worlds.make_world(users=10)
    model = GradientBoosting(GradientBoostingConfig(), world.items)
    batches = [(replace(batch, label=batch.weight), torch.ones(len(batch))) for batch in world.requests("train")]
    with pytest.raises(DataError, match="expected both kinds"):
        boost.grow(model, batches, boost.Recent(world.items.count, 0), 0)
    with pytest.raises(RecsysError, match="not trained by gradient steps"):
        model.loss(batches[0][0], torch.Generator())


def test_lightgbm_trains_is_found_again_and_serves_from_a_bundle(prepared, mlflow_uri, tmp_path) -> None:
    quick = ["model.trees=20", "stop.max_steps=4", "stop.requests=40", "batches.rows=64"]
    config = load_config(CONFIGS / "lightgbm.toml", quick)
    seen: list[int] = []
    trained = train(config, prepared, tmp_path / "run", mlflow_uri, lambda done, *_: seen.append(done))
    assert seen == list(range(1, 21))
    assert trained.summary.seconds > 0
    assert 0.5 < trained.summary.curve[0]["valid/gauc"] <= 1

    bytes_of = trained.model.trees.clone()  # type: ignore[attr-defined]
    again = train(config, prepared, tmp_path / "run", mlflow_uri, lambda done, *_: seen.append(done))
    found = trained_run(tmp_path / "run", prepared)
    assert len(seen) == 20  # a finished run is not grown again
    assert torch.equal(again.model.trees, bytes_of)  # type: ignore[attr-defined]
    assert torch.equal(found.model.trees, bytes_of)  # type: ignore[attr-defined]

    publish(prepared, found, None, tmp_path / "bundle", tmp_path / "snapshot", {}, ())
    bundle = Bundle.load(tmp_path / "bundle")  # replays the golden requests
    assert bundle.manifest.models["ranker"].name == "lightgbm"


# Configurations


def test_shipped_cases_are_what_their_names_say() -> None:
    twin, dare = (load_config(CONFIGS / f"{name}.toml") for name in ("twin", "dare"))
    assert twin.model.tied
    assert replace(twin, model=replace(twin.model, tied=False)) == dare
    sasrec, mqsa = (load_config(CONFIGS / f"{name}.toml") for name in ("sasrec", "mqsa_ted"))
    assert (sasrec.model.alpha, sasrec.model.lambda_kd) == (1.0, 0.0)
    assert replace(sasrec, model=replace(sasrec.model, alpha=mqsa.model.alpha, lambda_kd=mqsa.model.lambda_kd)) == mqsa
    short, din = (load_config(CONFIGS / f"{name}.toml") for name in ("din_50", "din"))
    assert replace(short, model=replace(short.model, window=din.model.window)) == din
    assert short.model.window == 50


@pytest.mark.parametrize(
    ("build", "names"),
    [
        (lambda: EtaConfig(window=10, retrieved=11), "retrieved=11, window=10"),
        (lambda: EtaConfig(window=10**6), "window=1000000"),
        (lambda: SimHardConfig(window=10, retrieved=11), "retrieved=11, window=10"),
        (lambda: SimHardConfig(unknown_rate=1.0), "unknown_rate=1.0"),
        (lambda: SimHard(SimHardConfig(category="colour"), item_table()), "'colour'; there are category"),
        (lambda: TransitionsConfig(prior=0), "prior=0"),
        (lambda: GradientBoostingConfig(leaves=1), "leaves=1"),
        (lambda: GradientBoostingConfig(short_days=60, long_days=7), "short_days=60, long_days=7"),
        (lambda: GradientBoosting(GradientBoostingConfig(category="colour"), item_table()), "'colour'"),
    ],
)
def test_impossible_settings_are_refused_by_name(build: Any, names: str) -> None:
    with pytest.raises(ConfigError, match=names):
        build()
