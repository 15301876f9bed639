"""Evaluation of tiny hand-made sets against plain Python, and of scorers whose answer is known."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from sklearn.metrics import roc_auc_score

from pipelines.evaluate import SINGLE_REQUESTS, evaluate, validate
from pipelines.evaluation import ALL_ITEMS, EvaluateConfig, Evaluation, TrainingSummary
from pipelines.prepared import CandidateSets, PreparedSet, Requests
from pipelines.scoring import distinct_items, draw_requests, in_history, join_sets, rank_all_items, score_sets
from ranking.items import ItemTable, identity_rows
from recsys.config import parse
from recsys.errors import ConfigError, DataError
from recsys.files import write_json
from recsys.history import Events, Histories
from recsys.metrics import auc, hit_rate, mrr, ndcg, rank, recall
from worlds import Fake

USERS, ITEMS, NEGATIVES = 12, 60, 15
CONFIG = EvaluateConfig(resamples=40, full_ranking_requests=7, history_edges=(5, 12))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A prepared set of 12 users; each event is a request of its own, whose history is what came before it."""
    directory = tmp_path_factory.mktemp("prepared")
    rng = np.random.default_rng(5)
    offsets = np.r_[0, np.cumsum(rng.integers(2, 25, USERS))]
    count = int(offsets[-1])
    events = Events(rng.integers(0, ITEMS, count).astype(np.uint32), np.zeros(count, np.uint8), np.arange(count) * 10)
    (directory / "histories").mkdir()
    Histories(events, offsets).save(directory / "histories")
    np.save(directory / "key_to_row.npy", identity_rows(ITEMS))
    items = ItemTable([], torch.zeros(ITEMS + 2, 0, dtype=torch.int32), [], torch.ones(ITEMS + 2, dtype=torch.int64))
    items.save(directory / "items.safetensors")
    user = np.repeat(np.arange(USERS), np.diff(offsets))
    for split in ("valid", "test"):
        chosen = np.sort(rng.choice(count, 50, replace=False))
        positives = [np.unique(rng.integers(2, ITEMS + 2, rng.integers(1, 4))).astype(np.int32) for _ in chosen]
        for row, event in enumerate(chosen[::2]):  # every other request takes up an item of its history
            if event > offsets[user[event]]:
                positives[2 * row] = np.unique(np.append(positives[2 * row], np.int32(events.item[event - 1] + 2)))
        ends = np.r_[0, np.cumsum([len(p) for p in positives])]
        requests = Requests(user[chosen], events.time[chosen], chosen, ends, np.concatenate(positives))
        (directory / "requests").mkdir(exist_ok=True)
        requests.save(directory / "requests" / f"{split}.safetensors")
        (directory / "candidates").mkdir(exist_ok=True)
        for sampler in ("uniform", "popularity"):
            lists, labels = [], []
            for own in positives:
                rest = rng.choice(np.setdiff1d(np.arange(2, ITEMS + 2), own), NEGATIVES, replace=False)
                lists.append(np.r_[own, rest])
                labels.append(np.r_[np.ones(len(own)), np.zeros(NEGATIVES)])
            sets = CandidateSets(
                np.r_[0, np.cumsum([len(x) for x in lists])],
                np.concatenate(lists).astype(np.int32),
                np.concatenate(labels).astype(np.uint8),
            )
            sets.save(directory / "candidates" / f"{split}_{sampler}.safetensors")
    write_json(directory / "manifest.json", {"format": 1, "digest": "abc"})
    return PreparedSet(directory)


def wild(history, at, item):
    """Coarse enough for ties, and different whenever a history, a moment or an item is mixed up."""
    return np.round(np.sin(item * 1.7 + at * 0.9 + history.sum() * 0.3 + len(history)) * 4)


def in_own_history(history, at, item):
    return np.isin(item, history).astype(float)


def naive(prepared, split, sampler):
    """One tuple per candidate: (request, user, label, history rows, moment, item row)."""
    requests, sets, histories = prepared.requests(split), prepared.candidates(split, sampler), prepared.histories
    rows = []
    for r in range(len(requests)):
        start = histories.offsets[requests.user[r]]
        history = histories.events.item[start : requests.end[r]].astype(np.int64) + 2
        ours = (requests.user[r], history, int(requests.at[r]))
        places = range(sets.offsets[r], sets.offsets[r + 1])
        rows += [(r, ours[0], sets.label[c], *ours[1:], int(sets.item[c])) for c in places]
    return rows


def test_every_value_equals_its_plain_definition(prepared):
    model = Fake(prepared.items, wild)
    result = evaluate({"wild": model}, prepared, CONFIG)
    for sampler in ("uniform", "popularity"):
        rows = naive(prepared, "test", sampler)
        score = np.array([float(wild(h, at, np.array([i]))[0]) for _, _, _, h, at, i in rows])
        request, user, label = (np.array([row[i] for row in rows]) for i in range(3))
        inside = np.array([i in h for _, _, _, h, _, i in rows])
        length = np.array([len(h) for _, _, _, h, _, _ in rows])

        def value(name, sampler=sampler):
            return result.metric("wild", sampler, name)

        def by(group, kept, score=score, label=label):
            parts = [kept & (group == g) for g in np.unique(group[kept])]
            both = [p for p in parts if 0 < label[p].sum() < p.sum()]
            return [roc_auc_score(label[p], score[p]) for p in both], [p.sum() for p in both], len(parts) - len(both)

        everything = np.ones(len(rows), bool)
        segments = {
            "": everything,
            "segment/history_0_4/": length < 5,
            "segment/history_5_11/": (length >= 5) & (length < 12),
            "segment/history_12_up/": length >= 12,
            "segment/target_in_history/": inside == (label == 1),
            "segment/target_outside_history/": ~inside,
        }
        for prefix, kept in segments.items():
            users, sizes, skipped_users = by(user, kept)
            requests, _, skipped = by(request, kept)
            assert value(prefix + "auc") == pytest.approx(roc_auc_score(label[kept], score[kept]), abs=1e-12)
            assert value(prefix + "gauc") == pytest.approx(np.average(users, weights=sizes), abs=1e-12)
            assert value(prefix + "auc_per_request") == pytest.approx(np.mean(requests), abs=1e-12)
            assert value(prefix + "gauc.skipped") == skipped_users
            assert value(prefix + "auc_per_request.skipped") == skipped
            assert value(prefix + "n_requests") == len(np.unique(request[kept]))
        ranking = rank(score, label, request, request.max() + 1)
        assert value("ndcg_at_10") == pytest.approx(ndcg(ranking, 10).mean(), abs=1e-12)
        assert value("mrr_at_10") == pytest.approx(mrr(ranking, 10).mean(), abs=1e-12)
        facts = result.candidates[sampler]
        assert facts.positives_in_history == pytest.approx(inside[label == 1].mean())
        assert facts.negatives_in_history == pytest.approx(inside[label == 0].mean())
        assert facts.negatives_per_request == NEGATIVES
        assert value("logloss") is None


def test_the_full_ranking_equals_a_sort_of_all_items(prepared):
    model = Fake(prepared.items, wild)
    chosen = draw_requests(prepared, "test", 20, seed=1)
    scores, labels = [], []
    for r in range(len(chosen)):
        history = prepared.histories.events.item[chosen.start[r] : chosen.requests.end[r]].astype(np.int64) + 2
        own = chosen.requests.positive[chosen.requests.offsets[r] : chosen.requests.offsets[r + 1]]
        scores.append(wild(history, int(chosen.requests.at[r]), np.arange(2, ITEMS + 2)))
        labels.append(np.isin(np.arange(2, ITEMS + 2), own))
    whole = rank(np.concatenate(scores), np.concatenate(labels), np.repeat(np.arange(20), ITEMS), 20)
    for depth in (1, 10, ITEMS, 200):
        found = rank_all_items(model, prepared, chosen, depth, batch_requests=3)
        for k in {1, min(depth, 10), depth}:
            for metric in (ndcg, recall, mrr, hit_rate):
                assert np.array_equal(metric(found, k), metric(whole, k))
    with pytest.raises(DataError, match="keeps the first 200"):
        auc(found)


def test_known_scorers(prepared):
    positives = {int(at): set() for at in prepared.requests("test").at}
    for r, at in enumerate(prepared.requests("test").at):
        requests = prepared.requests("test")
        positives[int(at)] = set(requests.positive[requests.offsets[r] : requests.offsets[r + 1]].tolist())
    models = {
        "constant": Fake(prepared.items, lambda h, at, i: np.zeros(len(i))),
        "oracle": Fake(prepared.items, lambda h, at, i: np.array([x in positives[at] for x in i.tolist()])),
        "flag": Fake(prepared.items, in_own_history),
    }
    result = evaluate(models, prepared, CONFIG)
    for sampler in ("uniform", "popularity"):
        for name in ("auc", "gauc", "auc_per_request", "segment/target_outside_history/auc"):
            assert result.metric("constant", sampler, name) == 0.5
            assert result.metric("oracle", sampler, name) == 1
            assert result.interval("oracle", sampler, name) == (1, 1)
        assert result.metric("flag", sampler, "segment/target_in_history/gauc") == 1
        assert result.metric("flag", sampler, "segment/target_outside_history/gauc") == 0.5
        worse = result.compare(sampler, "gauc", "constant", "oracle")
        assert (worse.difference, worse.ci_high, worse.share_better, worse.certain) == (-0.5, -0.5, 0, True)
        better = result.compare(sampler, "gauc", "oracle", "constant")
        assert (better.difference, better.ci_low, better.share_better) == (0.5, 0.5, 1)
        same = result.compare(sampler, "segment/target_outside_history/auc", "flag", "constant")
        assert (same.difference, same.share_better, same.certain) == (0, 0.5, False)
    assert result.metric("oracle", ALL_ITEMS, "ndcg_at_10") == pytest.approx(1)
    assert result.metric("constant", ALL_ITEMS, "recall_at_10") == pytest.approx(10 / ITEMS)


def test_batches_other_models_and_the_training_mode_change_nothing(prepared):
    model = Fake(prepared.items, wild)
    model.train()
    alone = evaluate({"wild": model}, prepared, replace(CONFIG, batch_requests=1, max_requests=30))
    assert model.training
    assert model.batches == 30 + CONFIG.full_ranking_requests + SINGLE_REQUESTS + 1
    others = {"flag": Fake(prepared.items, in_own_history), "wild": model}
    beside = evaluate(others, prepared, replace(CONFIG, batch_requests=1000, max_requests=30))
    assert alone.metrics["wild"] == beside.metrics["wild"]
    assert alone.n_requests == 30


def test_a_window_limits_what_a_model_reads_but_not_what_counts_as_history(prepared):
    seen = []
    model = Fake(prepared.items, lambda h, at, i: seen.append(len(h)) or np.zeros(len(i)), window=3)
    result = evaluate({"short": model}, prepared, CONFIG)
    whole = evaluate({"all": Fake(prepared.items, wild)}, prepared, CONFIG)
    assert max(seen) == 3
    assert result.candidates == whole.candidates
    assert result.metric("short", "uniform", "segment/history_12_up/n_requests") > 0


def test_history_flags_and_joined_candidates(prepared):
    chosen = draw_requests(prepared, "test", 10**6, seed=0)
    sets = prepared.candidates("test", "uniform")
    rows = naive(prepared, "test", "uniform")
    assert in_history(prepared, chosen, sets).tolist() == [i in h for *_, h, _, i in rows]
    lengths = {r: len(set(h.tolist())) for r, _, _, h, _, _ in rows}
    assert distinct_items(prepared, chosen).tolist() == [lengths[r] for r in range(len(chosen))]
    parts = [sets, prepared.candidates("test", "popularity")]
    joined, places = join_sets(parts)
    scores = score_sets(Fake(prepared.items, wild), prepared, chosen, joined, batch_requests=4)
    for part, place in zip(parts, places, strict=True):
        assert np.array_equal(joined.item[place], part.item)
        assert np.array_equal(joined.label[place], part.label)
        assert np.array_equal(score_sets(Fake(prepared.items, wild), prepared, chosen, part), scores[place])
    assert np.array_equal(np.sort(np.concatenate(places)), np.arange(len(joined.item)))


class FakeRetriever(Fake):
    """Its score is the inner product of its vectors; the vector of row 5 is zero: never retrieved."""

    vectors = np.random.default_rng(3).normal(size=(ITEMS + 2, 4)).astype(np.float32) - 3
    vectors[5] = 0

    def user_vectors(self, history):
        return torch.from_numpy(np.array([[1, 1, 1, 1 + len(h)] for h in self.encode(history)], np.float32))

    def item_vectors(self):
        return torch.from_numpy(self.vectors)


def test_validation_gives_what_evaluation_gives(prepared):
    model = FakeRetriever(prepared.items, wild)
    values = validate(model, prepared, "test", "popularity", max_requests=10**6)
    result = evaluate({"m": model}, prepared, CONFIG)
    for name in ("gauc", "auc", "auc_per_request", "ndcg_at_10"):
        assert values[name] == pytest.approx(result.metric("m", "popularity", name), abs=1e-12)
    few = validate(model, prepared, "valid", "uniform", max_requests=9)
    assert few == validate(model, prepared, "valid", "uniform", max_requests=9)
    assert "ndcg_at_20" not in validate(Fake(prepared.items, wild), prepared, "valid", "uniform", 9)


def test_a_retriever_is_ranked_by_its_vectors_and_zero_vectors_come_last(prepared):
    model = FakeRetriever(prepared.items, wild)
    chosen = draw_requests(prepared, "test", 10**6, seed=0)
    found = rank_all_items(model, prepared, chosen, depth=ITEMS, by_vectors=True)
    scores, labels = [], []
    for r in range(len(chosen)):
        own = chosen.requests.positive[chosen.requests.offsets[r] : chosen.requests.offsets[r + 1]]
        score = FakeRetriever.vectors @ np.array([1, 1, 1, 1 + chosen.length[r]], np.float32)  # all below zero
        score[5] = -1e9
        scores.append(score[2:])
        labels.append(np.isin(np.arange(2, ITEMS + 2), own))
    whole = rank(np.concatenate(scores), np.concatenate(labels), np.repeat(np.arange(len(chosen)), ITEMS), len(chosen))
    np.testing.assert_allclose(ndcg(found, 20), ndcg(whole, 20), atol=1e-12)


def test_saved_and_read_back(prepared, tmp_path):
    models = {"wild": Fake(prepared.items, wild), "flag": Fake(prepared.items, in_own_history)}
    seen = []
    result = evaluate(models, prepared, CONFIG, lambda *state: seen.append(state))
    assert (50, 50, "flag: scoring candidates") in seen
    result.save(tmp_path / "evaluation")
    back = Evaluation.load(tmp_path / "evaluation")
    assert back == result
    assert back.models == ["wild", "flag"]
    assert result.flat("wild")["test/uniform/gauc.ci_low"] == result.interval("wild", "uniform", "gauc")[0]
    assert "test/uniform/logloss" not in result.flat("wild")
    # what was scored and the scores suffice to compute everything again
    requests = load_file(tmp_path / "evaluation" / "predictions" / "requests.safetensors")
    scores = load_file(tmp_path / "evaluation" / "predictions" / "wild.safetensors")
    again = roc_auc_score(requests["uniform.label"], scores["uniform"])
    assert again == pytest.approx(result.metric("wild", "uniform", "auc"), abs=1e-12)
    path = tmp_path / "evaluation" / "metrics.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 7}))
    with pytest.raises(DataError, match="not an evaluation of format 1"):
        Evaluation.load(tmp_path / "evaluation")


def test_a_training_summary_survives_json(tmp_path):
    summary = TrainingSummary("dare", 12.5, 300, 250, 4096.0, 6.25, 1_000_000, curve=[{"step": 1, "valid/gauc": 0.5}])
    assert TrainingSummary.of(json.loads(json.dumps(summary.table()))) == summary
    with pytest.raises(DataError, match="training summary: steps"):
        TrainingSummary.of(summary.table() | {"steps": "many"})


def test_what_is_refused(prepared):
    broken = Fake(prepared.items, lambda h, at, i: np.full(len(i), np.nan))
    with pytest.raises(DataError, match=r"Fake: the score of item row .* is NaN"):
        evaluate({"broken": broken}, prepared, CONFIG)
    with pytest.raises(ConfigError, match=r"a run called 'requests': the kept predictions call what was asked so"):
        evaluate({"wild": Fake(prepared.items, wild), "requests": Fake(prepared.items, wild)}, prepared, CONFIG)
    with pytest.raises(DataError, match=r"no such candidates; this set has test_popularity"):
        evaluate({}, prepared, replace(CONFIG, samplers=("never",)))
    for table, message in (
        ({"samplers": []}, "samplers is empty"),
        ({"funnel_requests": -1}, "funnel_requests = -1; expected at least 0"),
        ({"history_edges": [10, 5]}, "ascending"),
        ({"level": 2.0}, "level = 2.0"),
        ({"max_request": 5}, "did you mean 'max_requests'"),
    ):
        with pytest.raises(ConfigError, match=message):
            parse(EvaluateConfig, table, "evaluate.toml")
