"""The funnel: every stage holds what plain counting over the recommender's own answers says it holds."""

import numpy as np
import pytest

from pipelines.funnel import DEEP, lists_are, measure_funnel, tables
from pipelines.publish import publish
from pipelines.scoring import draw_requests
from pipelines.shipped import find_config
from pipelines.train import load_config, train
from ranking.bundle import Bundle
from ranking.recommender import Recommender
from recsys.errors import DataError
from recsys.messages import RecommendRequest

REQUESTS = 12


@pytest.fixture(scope="module")
def bundle(prepared, mlflow_uri, tmp_path_factory):
    root = tmp_path_factory.mktemp("funnel")
    chosen = train(load_config(find_config("personal_frequency")), prepared, root / "run", mlflow_uri)
    publish(prepared, chosen, None, root / "bundle", root / "snapshot", {})
    return Bundle.load(root / "bundle")


def test_recall_only_falls_from_the_union_to_the_answer(prepared, bundle):
    funnel = measure_funnel(bundle, prepared, requests=REQUESTS, resamples=50)
    held = {stage.name: stage.recall for stage in funnel.stages}
    sources = set(held) - {"union", "ranked", "answer"}
    assert {"repeats", "popularity", "transitions"} <= sources
    assert held["union"] >= max(held[name] for name in sources)
    assert held["union"] >= held["ranked"] >= held["answer"] > 0
    assert all(stage.ci_low <= stage.recall <= stage.ci_high for stage in funnel.stages)
    assert 0 < funnel.lists.coverage < 1
    assert 0 <= funnel.lists.diversity <= 1
    assert "text stage plays no part" in tables(funnel)[0].note


def test_the_answer_is_what_the_service_answers(prepared, bundle):
    funnel = measure_funnel(bundle, prepared, requests=REQUESTS, resamples=50)
    sample = draw_requests(prepared, "test", REQUESTS, 2023)
    users = prepared.users["user_id"].cast(str).to_list()
    recommender = Recommender(bundle, _Histories(prepared, users))
    shares = []
    for r in range(len(sample)):
        at = int(sample.requests.at[r])
        user = users[sample.requests.user[r]]
        answer = recommender.recommend(RecommendRequest(user_id=user, k=DEEP, at=at), at)
        rows = {bundle.row_of[item.item_id] for item in answer.items}
        own = sample.requests.positive[sample.requests.offsets[r] : sample.requests.offsets[r + 1]].tolist()
        shares.append(np.mean([row in rows for row in own]))
    assert {s.name: s.recall for s in funnel.stages}["answer"] == pytest.approx(np.mean(shares))


class _Histories:
    def __init__(self, prepared, users):
        self.prepared, self.row = prepared, {user: row for row, user in enumerate(users)}

    def read(self, user_id):
        return self.prepared.histories.of(self.row[user_id])


def test_what_lists_are_like_by_arithmetic(prepared):
    sample = draw_requests(prepared, "test", 5, 0)
    category = prepared.items.column("department").numpy()
    count = prepared.items.count.numpy()
    one = int(np.argmax(count))
    other = int(np.flatnonzero((category != category[one]) & (count > 0))[-1])
    found = lists_are(prepared, [np.array([one, other]), np.array([one])], sample)
    share = count[[one, other, one]] / count[prepared.items.trained.numpy()].sum()
    assert found.novelty == pytest.approx(-np.log2(share).mean())
    assert found.diversity == 1
    assert found.coverage == pytest.approx(2 / int(prepared.items.trained.sum()))
    taken = count[sample.requests.positive].mean()
    assert found.popularity_bias == pytest.approx(count[[one, other, one]].mean() / taken)


def test_a_bundle_of_other_data_is_refused(bundle, tmp_path):
    from pipelines.prepared import PreparedSet
    from recsys.files import write_json

    write_json(tmp_path / "manifest.json", {"format": 1, "digest": "f" * 64})
    with pytest.raises(DataError, match="ffffffffffff"):
        measure_funnel(bundle, PreparedSet(tmp_path))
