"""The papers' protocol: ranks against a plain sort, and the reference points of the four sets to four digits."""

import os
from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from typer.testing import CliRunner

from pipelines.datasets import RawLog, newest, sequence_set
from pipelines.ingest import ingest
from pipelines.leave_one_out import MASK, Ranks, evaluate, rank_of, ranks_by, target_ranks
from pipelines.prepare import PrepareConfig, prepare
from pipelines.shipped import find_config
from pipelines.splits import SplitConfig
from pipelines.train import train
from pipelines.train_config import load_config
from pipelines.workspace import Workspace
from ranking.batch import FIRST_ITEM
from ranking.popularity import Popularity, PopularityConfig
from ranking.transitions_ranker import TransitionsConfig, TransitionsRanker
from recsys.cli import app
from recsys.errors import ConfigError, DataError
from recsys.files import read_json

SPLIT = SplitConfig("last_request")


def test_metrics_by_arithmetic():
    ranks = Ranks(np.arange(4), np.array([0, 3, 5, 25]))
    assert ranks.metrics()["hr_at_5"] == 2 / 4
    assert ranks.metrics()["ndcg_at_5"] == pytest.approx((1 + 0.430677) / 4, abs=1e-6)  # 1 / log2(3 + 2)
    assert ranks.metrics()["ndcg_at_20"] == pytest.approx((1 + 1 / np.log2(5) + 1 / np.log2(7)) / 4)


@given(arrays(np.int8, (5, 7), elements=st.integers(0, 3)), st.permutations(range(7)))
def test_rank_is_the_place_in_a_stable_sort_by_score_and_id(scores, order):
    target = np.array([0, 3, 6, 2, 2])
    got = rank_of(torch.tensor(scores).float(), torch.tensor(target), torch.tensor(order))
    for row, one, rank in zip(scores, target, got.tolist(), strict=True):
        by_rule = sorted(range(7), key=lambda item: (-row[item], order[item]))
        assert by_rule.index(one) == rank


def tiny_log():
    """Five users of nine events over twelve items, whose ids in order of first sight are not in order of number."""
    draws = np.random.default_rng(3)
    item = np.concatenate([draws.permutation(12)[:9] for _ in range(5)])
    user = np.repeat(np.arange(5), 9).astype(str)
    table = {"user_id": user, "item_id": item.astype(str), "timestamp": [*range(9)] * 5}
    return RawLog("tiny", pl.DataFrame(table).lazy(), order="position")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    ingest(tiny_log(), folder / "log")
    return prepare(folder / "log", folder / "set", PrepareConfig(split=SPLIT, negatives=1, workers=1))


@pytest.mark.parametrize("split", ["valid", "test"])
def test_seen_items_are_masked_and_ties_go_to_the_lowest_id(tiny, split):
    """Against the protocol written down as a loop over users and items."""
    model = Popularity(PopularityConfig(), tiny.items)
    got = target_ranks(model, tiny, split)
    log = tiny_log().events.collect()
    place = {user: at for at, user in enumerate(tiny.users["user_id"])}
    training = log.filter(pl.col("timestamp") < 7)
    count = dict(training.group_by("item_id").len().iter_rows())
    for user, rank in zip(got.user, got.rank, strict=True):
        name = next(name for name, at in place.items() if at == user)
        items = log.filter(pl.col("user_id") == name)["item_id"].to_list()
        target, seen = (items[7], items[:7]) if split == "valid" else (items[8], items[:8])
        order = sorted(map(str, range(12)), key=lambda i: (-count.get(i, 0) + MASK * (i in seen), int(i)))
        assert order.index(target) == rank
    assert evaluate({"pop": model}, tiny, split, resamples=50).metrics["pop"]["hr_at_20"] == 1.0


@pytest.mark.parametrize("row", [2, 7])
def test_a_score_that_is_no_number_is_refused_with_item_and_user(tiny, row):
    """A NaN is above nothing and below nothing: as a target's score it would be the best."""

    def scorer(part):
        scores = torch.zeros(len(part), 12)
        scores[torch.from_numpy(part.requests.user == 3), row - FIRST_ITEM] = float("nan")
        return scores

    with pytest.raises(DataError, match=f"the score of item row {row} for user 3 is NaN"):
        ranks_by(scorer, tiny, "test")


def test_evaluate_judges_runs_by_the_protocol_also_those_of_a_sweep(tmp_path, mlflow_uri):
    place = Workspace(tmp_path)
    ingest(tiny_log(), place.log)
    prepare(place.log, place.prepared.directory, PrepareConfig(split=SPLIT, negatives=1, workers=1))
    watched = ["stop.protocol=leave_one_out", "stop.metric=ndcg_at_20"]
    config = load_config(find_config("popularity"), watched)
    train(config, place.prepared, place.run("sweep/popularity-1"), mlflow_uri)
    verb = ["evaluate", "sweep/popularity-1", "--workspace", str(tmp_path), "--set", "protocol=leave_one_out"]
    assert "| popularity-1 | " in CliRunner().invoke(app, verb, catch_exceptions=False).output
    found = read_json(place.evaluation / "leave_one_out.json")
    expected = target_ranks(Popularity(PopularityConfig(), place.prepared.items), place.prepared, "test").metrics()
    assert found["metrics"]["popularity-1"].items() >= expected.items()
    with pytest.raises(ConfigError, match="must differ in their last part"):
        CliRunner().invoke(app, [*verb, "popularity-1"], catch_exceptions=False)


def test_newest_keeps_the_newest_events_and_counts_the_rest(tmp_path):
    card = ingest(newest(tiny_log(), 4), tmp_path / "log")
    assert (card.events, card.read) == (20, 45)
    assert pl.read_parquet(tmp_path / "log" / "events.parquet")["timestamp"].min() == 5
    assert list(card.filtered.values()) == [25]


def test_another_split_is_refused(tmp_path):
    log = tiny_log()
    timed = SimpleNamespace(**{**vars(log), "order": "time"})
    spread = log.events.with_columns(timestamp=pl.col("timestamp").cast(pl.Int64) * 20 * 86_400_000_000)
    timed.events = spread
    ingest(RawLog(**vars(timed)), tmp_path / "log")
    by_time = prepare(tmp_path / "log", tmp_path / "set", PrepareConfig(negatives=1, workers=1))
    with pytest.raises(DataError, match=r"split by time.*split.kind=last_request"):
        target_ranks(Popularity(PopularityConfig(), by_time.items), by_time, "test")


FACTS = {  # users, items; pairs of consecutive training items, distinct edges, heads; pairs with one item between
    "beauty": ((22_363, 12_101), (127_895, 112_191, 11_996), 105_532),
    "sports": ((35_598, 18_357), (187_866, 179_048, 18_129), 152_268),
    "toys": ((19_412, 11_924), (106_484, 99_664, 11_765), 87_072),
    "yelp": ((30_431, 20_033), (217_423, 212_269, 19_975), 186_992),
}
REFERENCES = {  # HR@5, NDCG@5, HR@10, NDCG@10, HR@20, NDCG@20 of popularity and of transitions
    "beauty": ((0.0074, 0.0041, 0.0115, 0.0055, 0.0209, 0.0077), (0.0517, 0.0392, 0.0669, 0.0441, 0.0821, 0.0480)),
    "sports": ((0.0057, 0.0041, 0.0090, 0.0052, 0.0151, 0.0067), (0.0285, 0.0207, 0.0368, 0.0234, 0.0462, 0.0258)),
    "toys": ((0.0055, 0.0038, 0.0090, 0.0049, 0.0138, 0.0061), (0.0587, 0.0439, 0.0708, 0.0478, 0.0814, 0.0505)),
    "yelp": ((0.0056, 0.0036, 0.0095, 0.0049, 0.0156, 0.0064), (0.0132, 0.0088, 0.0201, 0.0110, 0.0280, 0.0130)),
}


@pytest.fixture(scope="module", params=FACTS)
def real(request, tmp_path_factory):
    if "RECSYS_DATA" not in os.environ:
        pytest.skip("RECSYS_DATA is not set: the paper's four sets are not here, so its reference points go unchecked")
    folder = tmp_path_factory.mktemp(request.param)
    ingest(newest(sequence_set(request.param), 52), folder / "log")
    config = PrepareConfig(split=SPLIT, negatives=1, transitions_top_n=0, workers=1, appendable=False)
    return request.param, prepare(folder / "log", folder / "set", config)


def test_the_real_sets_have_as_many_transitions_as_is_known(real):
    name, prepared = real
    edges = prepared.items.transitions
    heads = int((edges.offsets.diff() > 0).sum())
    found = (len(prepared.users), len(prepared.items) - FIRST_ITEM), (int(edges.weight.sum()), len(edges.target), heads)
    training = np.diff(prepared.histories.offsets) - 2  # events of each user
    targets, skipping = (int(np.maximum(training - back, 0).sum()) for back in (1, 2))
    assert (*found, skipping) == FACTS[name]
    assert targets == found[1][0]  # valid targets of the training sequences


@pytest.mark.slow
def test_the_protocol_gives_the_reference_points_to_four_digits(real):
    name, prepared = real
    count, edges = prepared.items.count[FIRST_ITEM:].double(), prepared.items.transitions

    def popular(part):
        return count.expand(len(part), -1).clone()

    def followers(part):
        """C[newest item, j] + 1e-6 POP(j), edge by edge."""
        scores = 1e-6 * popular(part)
        newest_row = prepared.key_to_row[np.asarray(prepared.histories.events.item[part.requests.end - 1])]
        for at, row in enumerate(newest_row.tolist()):
            first, last = edges.offsets[row : row + 2].tolist()
            scores[at, edges.target[first:last].long() - FIRST_ITEM] += edges.weight[first:last].double()
        return scores

    for scorer, expected in zip((popular, followers), REFERENCES[name], strict=True):
        got = ranks_by(scorer, prepared, "test").metrics()
        assert tuple(round(value, 4) for value in got.values()) == expected
    shipped = TransitionsRanker(TransitionsConfig(prior=0.1), prepared.items)
    some, same = (
        of(scorer, prepared, "test", max_requests=300)
        for of, scorer in ((target_ranks, shipped), (ranks_by, followers))
    )  # masked items tie in float32, so that places beyond the cuts may differ
    assert np.array_equal(np.minimum(some.rank, 20), np.minimum(same.rank, 20))
