"""The funnel: every stage holds what plain counting over the recommender's own answers says it holds."""

import re
from dataclasses import replace

import numpy as np
import pytest
from benchmarks.personal_search import compare
from text_world import WordCount

from pipelines.funnel import DEEP, lists_are, measure_funnel, tables
from pipelines.funnel_search import measure_search, with_queries
from pipelines.publish import publish
from pipelines.scoring import draw_requests
from pipelines.shipped import find_config
from pipelines.text_publish import item_passages
from pipelines.train import train
from pipelines.train_config import load_config
from ranking.bundle import Bundle
from ranking.recommender import Recommender
from ranking.search_part import SearchContents
from ranking.searcher import Searcher
from recsys.errors import DataError
from recsys.messages import RecommendRequest

REQUESTS = 12


@pytest.fixture(scope="module")
def bundle(prepared, mlflow_uri, tmp_path_factory):
    root = tmp_path_factory.mktemp("funnel")
    chosen = train(load_config(find_config("personal_frequency")), prepared, root / "run", mlflow_uri)
    publish(prepared, chosen, None, root / "bundle", root / "snapshot", {}, ())
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
    assert [table.title for table in tables(funnel)] == ["Where positives are lost", "The first 10 of the answers"]
    assert measure_search(bundle, prepared, requests=REQUESTS) == (0, [])  # it searches no text


def test_with_a_query_each_stage_is_what_search_and_service_give(prepared, mlflow_uri, tmp_path):
    chosen = train(load_config(find_config("personal_frequency")), prepared, tmp_path / "run", mlflow_uri)
    text = SearchContents(item_passages(prepared), None, WordCount(reads=3))
    publish(prepared, chosen, None, tmp_path / "bundle", tmp_path / "snapshot", {}, (), text=text)
    bundle = Bundle.load(tmp_path / "bundle")
    searches, stages = measure_search(bundle, prepared, requests=REQUESTS, resamples=50)
    assert [stage.name for stage in stages] == ["search", "reranked", "answer"]
    asked, queries = with_queries(draw_requests(prepared, "test", REQUESTS, 2023), bundle.names, 2023)
    assert searches == len(queries) == len(asked) > 0
    users = prepared.users["user_id"].cast(str).to_list()
    recommender, searcher = Recommender(bundle, _Histories(prepared, users)), Searcher(bundle.text)
    found = {name: [] for name in ("search", "reranked", "answer")}
    for r, query in enumerate(queries):
        own = asked.requests.positive[asked.requests.offsets[r] : asked.requests.offsets[r + 1]]
        assert all(query in " ".join(re.findall(r"\w+", bundle.names[row].lower())) for row in own.tolist())
        plain, reranked = searcher.search(query, rerank=False), searcher.search(query)
        user, at = users[asked.requests.user[r]], int(asked.requests.at[r])
        answer = recommender.recommend(
            RecommendRequest(user_id=user, k=DEEP, at=at, query=query), at, searched=reranked
        )
        rows = {"search": plain.items()[0][:DEEP], "reranked": reranked.items()[0][:DEEP]}
        rows["answer"] = [bundle.row_of[item.item_id] for item in answer.items]
        for name, some in rows.items():
            found[name].append(np.isin(own, some).mean())
    for stage in stages:
        assert stage.recall == pytest.approx(np.mean(found[stage.name]))
        assert 0 < stage.recall <= 1
    whole = replace(measure_funnel(bundle, prepared, requests=2, resamples=50), searches=searches, searched=stages)
    table = tables(whole)[1]
    assert (table.title, [row[0].text for row in table.rows]) == ("With a query", ["search", "reranked", "answer"])


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


def test_what_a_ranker_adds_to_a_search_is_told_beside_a_blend_of_all(prepared, mlflow_uri, tmp_path):
    chosen = train(load_config(find_config("personal_frequency")), prepared, tmp_path / "run", mlflow_uri)
    text = SearchContents(item_passages(prepared), None)
    publish(prepared, chosen, None, tmp_path / "bundle", tmp_path / "snapshot", {}, (), text=text)
    found = compare(Bundle.load(tmp_path / "bundle"), prepared, words=2, requests=REQUESTS)
    values = {name: found[name]["ndcg_at_10"] for name in ("search", "all", "alike", "alike - all")}
    assert 0 < values["search"] <= 1
    assert values["alike - all"] == pytest.approx(values["alike"] - values["all"])
    assert found["requests"] == REQUESTS
