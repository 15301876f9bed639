"""Samplers draw what they say: never a forbidden item, with the stated probabilities, fixed by the request."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.mixing import mix
from pipelines.samplers import ROUNDS, SAMPLERS, Ragged, log_density
from ranking.batch import PAD
from ranking.items import ItemTable
from recsys.errors import ConfigError, DataError
from recsys.randomness import derive, generator

ROWS = 14
rows = st.lists(st.integers(1, ROWS - 1), unique=True, max_size=8).map(sorted)


def table(seed: int, categories: int = 3) -> ItemTable:
    draw = np.random.default_rng(seed)
    category = draw.integers(1, categories + 2, ROWS).astype(np.int32)
    category[:2] = 0, 1
    count = draw.integers(0, 30, ROWS) * (draw.random(ROWS) < 0.8)
    count[3] = 5  # never a table without a trained item
    return ItemTable(["category"], torch.from_numpy(category[:, None]), [categories + 2], torch.from_numpy(count))


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_draws_follow_the_stated_probabilities(name: str, fixed: bool, seed: int) -> None:
    items = table(seed)
    sampler = SAMPLERS[name](items)
    draw = np.random.default_rng(seed + 100)
    basket, history = np.sort(draw.choice(np.arange(2, ROWS), 3, replace=False)), draw.integers(1, ROWS, 4)
    expected = sampler.probabilities(basket, history)
    assert expected.sum() == pytest.approx(1.0)
    requests, per_request = 200, 100
    baskets, histories = Ragged.of([basket] * requests), Ragged.of([history] * requests)
    if fixed:
        drawn = sampler.draw_fixed(seed, np.arange(requests, dtype=np.uint64), baskets, per_request, histories)
    else:
        drawn = sampler.draw(generator(seed, 0, "test"), baskets, per_request, histories)
    assert drawn.shape == (requests, per_request)
    assert drawn.dtype == np.int32
    found = np.bincount(drawn.ravel(), minlength=ROWS)
    assert not found[expected == 0].any()
    possible = expected > 0
    wanted = expected[possible] * drawn.size
    chi2 = float(((found[possible] - wanted) ** 2 / wanted).sum())
    freedom = int(possible.sum()) - 1
    # Beyond the mean by six standard deviations of chi-square: once in more than a million fair samplers.
    assert chi2 < freedom + 6 * np.sqrt(2 * freedom) + 6


@given(seed=st.integers(0, 50), baskets=st.lists(rows, min_size=1, max_size=5), data=st.data())
@settings(max_examples=150, deadline=None)
def test_never_a_forbidden_item_and_padding_only_where_nothing_is_allowed(seed: int, baskets, data) -> None:
    histories = [data.draw(st.lists(st.integers(1, ROWS - 1), max_size=30)) for _ in baskets]
    for name, build in SAMPLERS.items():
        sampler = build(table(seed))
        drawn = sampler.draw(generator(seed, 1, name), Ragged.of(baskets), 7, Ragged.of(histories))
        for basket, history, items in zip(baskets, histories, drawn, strict=True):
            probable = sampler.probabilities(np.array(basket, np.int32), np.array(history, np.int32))
            if probable.any():
                assert (probable[items] > 0).all()
                assert not set(items.tolist()) & set(basket)
                if name == "never_so_far":
                    assert not set(items.tolist()) & set(history)
            else:
                assert (items == PAD).all()


@given(seed=st.integers(0, 50), baskets=st.lists(rows, min_size=2, max_size=9), data=st.data())
@settings(max_examples=100, deadline=None)
def test_fixed_draws_belong_to_the_request_whatever_stands_beside_it(seed: int, baskets, data) -> None:
    keys = np.array(data.draw(st.lists(st.integers(0, 2**64 - 1), min_size=len(baskets), max_size=len(baskets))), "u8")
    chosen = data.draw(st.permutations(range(len(baskets))))[: data.draw(st.integers(1, len(baskets)))]
    for build in SAMPLERS.values():
        sampler = build(table(seed))
        everything = Ragged.of(baskets)
        together = sampler.draw_fixed(seed, keys, everything, 5, everything)
        some = Ragged.of([baskets[index] for index in chosen])
        assert np.array_equal(sampler.draw_fixed(seed, keys[chosen], some, 5, some), together[chosen])


def test_every_fixed_draw_has_a_number_of_its_own() -> None:
    """Draw j of round r takes number r * count + j of its request's stream: a repeated round repeats no other draw."""
    items = ItemTable([], torch.zeros(4, 0, dtype=torch.int32), [], torch.tensor([0, 0, 5, 5]))
    sampler, count, seed = SAMPLERS["uniform"](items), 7, 3
    keys = np.arange(1, 200, dtype=np.uint64)
    found = sampler.draw_fixed(seed, keys, Ragged.of([[2]] * len(keys)), count)
    assert (found == 3).all()
    # Of four items one is allowed, so that most draws take several rounds; replay them by the stated formula.
    items = ItemTable([], torch.zeros(6, 0, dtype=torch.int32), [], torch.tensor([0, 0, 5, 5, 5, 5]))
    sampler = SAMPLERS["uniform"](items)
    found = sampler.draw_fixed(seed, keys, Ragged.of([[2, 3]] * len(keys)), count)
    base = mix(keys ^ np.uint64(derive(seed, 0, "candidates/uniform")))
    for request in range(len(keys)):
        for j in range(count):
            for attempt in range(ROUNDS):
                word = mix(base[request : request + 1] + np.uint64(attempt * count + j)) >> np.uint64(11)
                row = 2 + int(float(word[0]) * 2.0**-53 * 4)
                if row in (4, 5):
                    assert found[request, j] == row
                    break


def test_popularity_is_by_training_count_and_uniform_is_by_trained_item() -> None:
    count = torch.tensor([0, 9, 6, 0, 2, 2, 0])  # row 1 stands for the unknown item and is never drawn
    items = ItemTable([], torch.zeros(7, 0, dtype=torch.int32), [], count)
    basket = np.array([5], np.int32)
    assert SAMPLERS["popularity"](items).probabilities(basket) == pytest.approx([0, 0, 6 / 8, 0, 2 / 8, 0, 0])
    assert SAMPLERS["uniform"](items).probabilities(basket) == pytest.approx([0, 0, 1 / 2, 0, 1 / 2, 0, 0])


def test_what_cannot_be_sampled_is_said() -> None:
    empty = ItemTable([], torch.zeros(4, 0, dtype=torch.int32), [], torch.zeros(4, dtype=torch.int64))
    with pytest.raises(DataError, match="no item has a training event"):
        SAMPLERS["uniform"](empty)
    with pytest.raises(ConfigError, match="'category'"):
        SAMPLERS["in_category"](empty)
    with pytest.raises(ValueError, match=r"never_so_far.*histories"):
        SAMPLERS["never_so_far"](table(0)).draw(generator(0, 0, "test"), Ragged.of([[2]]), 3)


def test_log_density_is_the_log_of_how_often_rows_are_drawn():
    items = ItemTable([], torch.zeros(7, 0, dtype=torch.int32), [], torch.tensor([0, 0, 8, 4, 2, 2, 0]))
    uniform, popularity = SAMPLERS["uniform"](items), SAMPLERS["popularity"](items)
    trained = np.array([2, 3, 4, 5])
    assert np.allclose(log_density([uniform]), 0)
    assert np.allclose(log_density([popularity])[trained], np.log(np.array([8, 4, 2, 2]) / 4))
    both = (np.array([8, 4, 2, 2]) / 16 + 1 / 4) / 2
    assert np.allclose(log_density([uniform, popularity])[trained], np.log(both * 4))
    of_the_same = SAMPLERS["in_category"](table(0))  # whose requests differ has no say
    assert not log_density([of_the_same]).any()
    alone = SAMPLERS["popularity"](table(0))
    assert np.array_equal(log_density([alone, of_the_same]), log_density([alone]))
    assert log_density([popularity])[6] == log_density([popularity])[5]  # never drawn: as the rarest
