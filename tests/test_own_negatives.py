"""Negatives from the user's own past: only what was chosen before and not now, and corrected for how often."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.batches import BatchConfig
from pipelines.own_negatives import OwnItems
from pipelines.samplers import Ragged
from ranking.batch import FIRST_ITEM, PAD
from recsys.errors import ConfigError
from recsys.randomness import generator

ROWS = 12
lists = st.lists(st.integers(0, ROWS - 1), max_size=9)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(lists, lists), min_size=1, max_size=4), st.integers(0, 5))
def test_only_known_items_of_the_history_outside_the_basket_are_drawn(
    requests: list[tuple[list[int], list[int]]], seed: int
) -> None:
    history, basket = (Ragged.of(part) for part in zip(*requests, strict=True))
    own = OwnItems.of(history, ROWS)
    drawn = own.draw(generator(seed, 0, "test"), basket, 40)
    everything = np.tile(np.arange(ROWS, dtype=np.int32), (len(requests), 1))
    density = own.density(everything)
    for row, (before, now) in enumerate(requests):
        known = {item for item in before if item >= FIRST_ITEM}
        assert set(drawn[row].tolist()) <= (known - set(now) or {PAD})
        expected = [1 / len(known) if item in known else 0.0 for item in range(ROWS)]
        assert density[row].tolist() == pytest.approx(expected)


def test_own_items_are_drawn_alike() -> None:
    own = OwnItems.of(Ragged.of([[5, 5, 5, 7, 9, 3]]), ROWS)
    drawn = own.draw(generator(0, 0, "test"), Ragged.of([[3]]), 6000)
    assert np.bincount(drawn[0], minlength=ROWS)[[5, 7, 9]] == pytest.approx(2000, rel=0.1)


def test_less_than_none_is_refused() -> None:
    with pytest.raises(ConfigError, match="own_negatives must not be negative, found -1"):
        BatchConfig(own_negatives=-1)
