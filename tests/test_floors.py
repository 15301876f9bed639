"""The floors of the grocery set, which everything measured on it stands on.

Test requests are each user's last basket (`last_request`); figures are exact expectations over the negatives, averaged
over a basket's items and then over the 2,438 users who have an earlier event. What reproduces the published figures:

    counts      all lines except those of the test baskets, so the validation baskets count
    negatives   `uniform`: every one of the 68,509 items with an event; `popular`: in proportion to the counts
    POP         score = count; negatives may be items of the current basket (excluded ones give .860 / .476)
    flag        score = "among the newest W lines of the history"; negatives are not in the current basket
    ties        count half
"""

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from pipelines.datasets import completejourney
from pipelines.ingest import ingest
from pipelines.prepare import PrepareConfig, prepare
from pipelines.prepared import PreparedSet, Requests
from pipelines.splits import SplitConfig
from recsys.errors import DataError

Counts = NDArray[np.int64]


@pytest.fixture(scope="module")
def grocery(tmp_path_factory: pytest.TempPathFactory) -> PreparedSet:
    folder: Path = tmp_path_factory.mktemp("grocery")
    try:
        log = completejourney()
    except DataError as error:
        pytest.skip(str(error))
    ingest(log, folder / "source")
    config = PrepareConfig(split=SplitConfig("last_request"), transitions_top_n=1, workers=1)
    return prepare(folder / "source", folder / "set", config)


@pytest.fixture(scope="module")
def tests(grocery: PreparedSet) -> Requests:
    """Return the test requests that have a history."""
    requests = grocery.requests("test")
    return requests.take(np.flatnonzero(requests.end > grocery.histories.offsets[requests.user]))


@pytest.fixture(scope="module")
def counts(grocery: PreparedSet) -> Counts:
    """Return the lines of each item key outside the test baskets."""
    everything = np.bincount(grocery.histories.events.item, minlength=len(grocery.key_to_row))
    return everything - np.bincount(grocery.requests("test").positive - 2, minlength=len(everything))


def baskets(requests: Requests) -> list[NDArray[np.int64]]:
    """Return the item keys of each request's basket."""
    return [part.astype(np.int64) - 2 for part in np.split(requests.positive, requests.offsets[1:-1])]


def test_the_set_is_the_one_the_floors_were_measured_on(grocery: PreparedSet, tests: Requests) -> None:
    found = grocery.manifest["counts"]
    assert (found["users"], found["items"], found["events"]) == (2469, 68509, 1469307)
    assert sum(found["requests"].values()) == 155_848 - found["requests_straddling"]
    assert found["requests_straddling"] <= 84  # baskets that share their moment with the user's last but one
    assert round(found["repeated_share"], 3) == 0.409
    assert grocery.manifest["history_length"] == {
        "p10": 55,
        "p25": 164,
        "p50": 407,
        "p75": 848,
        "p90": 1379,
        "p100": 4193,
    }
    assert len(tests) == 2438


@pytest.mark.parametrize(("sampler", "floor"), [("uniform", 0.860), ("popularity", 0.474)])
def test_popularity(tests: Requests, counts: Counts, sampler: str, floor: float) -> None:
    order = np.sort(counts)
    weight = np.ones(len(order)) if sampler == "uniform" else order.astype(float)
    below = np.concatenate([[0], np.cumsum(weight)]) / weight.sum()
    users = []
    for basket in baskets(tests):
        less, at_most = (np.searchsorted(order, counts[basket], side=side) for side in ("left", "right"))
        users.append(((below[less] + below[at_most]) / 2).mean())
    assert np.mean(users) == pytest.approx(floor, abs=0.001)


@pytest.mark.parametrize(
    ("window", "positives", "uniform", "popular"),
    [(50, 0.195, 0.597, 0.589), (200, 0.309, 0.654, 0.635), (1000, 0.383, 0.689, 0.656), (None, 0.391, 0.693, 0.658)],
)
def test_the_flag_item_in_history(
    grocery: PreparedSet, tests: Requests, counts: Counts, window, positives: float, uniform: float, popular: float
) -> None:
    users = []
    starts = grocery.histories.offsets[tests.user]
    if window is not None:
        starts = np.maximum(starts, tests.end - window)
    for basket, start, end in zip(baskets(tests), starts, tests.end, strict=True):
        seen = np.unique(grocery.histories.events.item[start:end])
        hit = np.isin(basket, seen).mean()
        other = np.setdiff1d(seen, basket)
        false = len(other) / (len(counts) - len(basket))
        false_popular = counts[other].sum() / (counts.sum() - counts[basket].sum())
        users.append((hit, 0.5 + (hit - false) / 2, 0.5 + (hit - false_popular) / 2))
    assert np.mean(users, axis=0) == pytest.approx([positives, uniform, popular], abs=0.001)


@pytest.mark.parametrize("sampler", ["uniform", "popularity"])
def test_sampled_candidates_give_the_expectation_of_their_sampler(
    grocery: PreparedSet, tests: Requests, sampler: str
) -> None:
    """POP on the stored candidates, against the exact expectation under what the sampler says it draws from.

    The stored candidates' conventions are the system's own: training counts (validation baskets do not count), trained
    items only, none of the current basket. They move POP from .860 / .474 to .856 / .475.
    """
    requests, sets = grocery.requests("test"), grocery.candidates("test", sampler)
    count = grocery.items.count.numpy()
    pool = np.flatnonzero(grocery.items.trained.numpy())
    weight = np.ones(len(pool)) if sampler == "uniform" else count[pool].astype(float)
    order = np.argsort(count[pool], kind="stable")
    ascending, below = count[pool][order], np.concatenate([[0], np.cumsum(weight[order])])
    weight_of = np.zeros(len(count))
    weight_of[pool] = weight
    expected, sampled = [], []
    for index in np.flatnonzero(requests.end > grocery.histories.offsets[requests.user]):
        basket = requests.positive[requests.offsets[index] : requests.offsets[index + 1]]
        item = sets.item[sets.offsets[index] + len(basket) : sets.offsets[index + 1]]
        score = count[basket][:, None]
        less, at_most = (np.searchsorted(ascending, count[basket], side=side) for side in ("left", "right"))
        beaten = (below[less] + below[at_most]) / 2
        own = ((score > count[basket]) + (score == count[basket]) / 2) @ weight_of[basket]
        expected.append(((beaten - own) / (below[-1] - weight_of[basket].sum())).mean())
        sampled.append(((score > count[item]) + (score == count[item]) / 2).mean())
    assert np.mean(expected) == pytest.approx({"uniform": 0.856, "popularity": 0.475}[sampler], abs=0.001)
    # 2,438 users x 100 negatives: the standard error of the difference is below .001.
    assert np.mean(sampled) == pytest.approx(np.mean(expected), abs=0.003)
    assert not np.isnan(sampled).any()
