"""Items without training events: vectors from their content, in the bundle, on the request path, in the report."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score
from torch import nn

import ranking.content_vectors as content_vectors
import worlds
from pipelines.cold_start import features_of, item_names, measure_cold_start, vectors_of
from pipelines.evaluate import evaluate
from pipelines.evaluation import EvaluateConfig, Evaluation
from pipelines.report import build_page, render_html, render_markdown
from ranking.batch import FIRST_ITEM, Candidates, rows_of
from ranking.bundle import Bundle, Contents, write_bundle
from ranking.bundle_models import NamedModel
from ranking.content import ContentMatch, Features, content_features, match_content
from ranking.content_vectors import ContentVectors, VectorsConfig, WithContent, learn_vectors
from ranking.items import ItemTable
from ranking.mqsa_ted import MqsaTed, MqsaTedConfig
from ranking.popularity import Popularity, PopularityConfig
from ranking.recommender import Recommender, RecommenderConfig
from ranking.scorer import Scorer
from ranking.users import User
from recsys.errors import ConfigError
from recsys.history import Events
from recsys.messages import InlineEvent, RankRequest, RecommendRequest
from recsys.randomness import generator
from worlds import Nobody

WORLD = worlds.make_world(users=40, length=16, known=30)
NEW = [30 + FIRST_ITEM, 31 + FIRST_ITEM]
"""The two rows of the world without training events."""


def sparse(whole: np.ndarray) -> Features:
    row, column = np.nonzero(whole)
    offsets = np.concatenate([[0], np.cumsum(np.bincount(row, minlength=len(whole)))])
    value = torch.from_numpy(whole[row, column].astype(np.float32))
    return Features(torch.from_numpy(offsets), torch.from_numpy(column), value, whole.shape[1])


@settings(max_examples=60, deadline=None)
@given(rows=st.integers(1, 8), width=st.integers(1, 6), seed=st.integers(0, 10**6))
def test_sparse_products_are_dense_products(rows, width, seed):
    draws = generator(seed, 0, "sparse")
    whole = draws.normal(size=(rows, width)) * (draws.random((rows, width)) < 0.5)
    right, left = draws.normal(size=(width, 3)), draws.normal(size=(rows, 2))
    found = sparse(whole)
    chosen = draws.integers(0, rows, 5)
    for got, wanted in (
        (found.times(torch.from_numpy(right).float()), whole @ right),
        (found.transposed().times(torch.from_numpy(left).float()), whole.T @ left),
        (found.take(torch.from_numpy(chosen)).times(torch.from_numpy(right).float()), whole[chosen] @ right),
    ):
        np.testing.assert_allclose(got.numpy(), wanted, atol=1e-5)


@settings(max_examples=30, deadline=None)
@given(penalty=st.floats(0.1, 30), seed=st.integers(0, 10**6))
def test_the_solution_is_that_of_the_normal_equations(penalty, seed):
    draws = generator(seed, 0, "ridge")
    x = draws.normal(size=(60, 12)) * (draws.random((60, 12)) < 0.4)
    target = draws.normal(size=(60, 3))
    config = VectorsConfig(penalty=penalty, iterations=200, tolerance=1e-6)
    start = torch.from_numpy(draws.normal(size=(12, 3))).float()
    got = content_vectors._ridge(sparse(x), torch.from_numpy(target).float(), start, config)
    wanted = np.linalg.solve(x.T @ x + penalty * np.eye(12), x.T @ target)
    np.testing.assert_allclose(got.numpy(), wanted, atol=1e-4)


def catalogue(items: int, new: int, seed: int = 0) -> tuple[ItemTable, list[str], torch.Tensor]:
    """A catalogue whose item vectors are the sum of one vector per category and one per word, and a little noise."""
    draws = generator(seed, 0, "catalogue")
    category, word = draws.integers(0, 8, items), draws.integers(0, 12, items)
    code = np.concatenate([[0, 1], category + 2]).astype(np.int32)[:, None]
    count = np.concatenate([[0, 0], np.ones(items - new), np.zeros(new)]).astype(np.int64)
    table = ItemTable(["category"], torch.from_numpy(code), [10], torch.from_numpy(count))
    of_category, of_word = draws.normal(size=(8, 6)), draws.normal(size=(12, 6))
    vectors = of_category[category] + of_word[word] + 0.1 * draws.normal(size=(items, 6))
    texts = ["", "", *(f"Fine {'abcdefghijkl'[w]}word, 8 oz" + (" bon bon bon" if w % 3 == 0 else "") for w in word)]
    return table, texts, torch.from_numpy(np.concatenate([np.zeros((2, 6)), vectors])).float()


def test_content_that_tells_the_vectors_is_used_and_gives_those_of_new_items():
    table, texts, vectors = catalogue(600, 40)
    config = VectorsConfig(penalty=1.0)
    learned, quality = learn_vectors(content_features(table, texts), vectors, table.trained, config)
    assert quality.useful
    assert quality.items == 56
    assert quality.r2 > 0.9
    assert quality.recall_at_10 > 0.5 > 2 * quality.chance_at_10
    assert learned.row.tolist() == list(range(562, 602))
    true = vectors[562:]
    away = (torch.from_numpy(learned.vector) - true).square().sum() / (true - true.mean(0)).square().sum()
    assert away < 0.1


@pytest.mark.parametrize("seed", range(5))
def test_content_that_tells_nothing_is_not_used(seed):
    table, texts, vectors = catalogue(600, 40)
    noise = torch.randn(vectors.shape, generator=torch.Generator().manual_seed(seed))
    learned, quality = learn_vectors(content_features(table, texts), noise, table.trained)
    assert learned is None
    assert not quality.useful


def test_too_few_items_tell_nothing_and_without_new_ones_there_is_nothing_to_give():
    table, texts, vectors = catalogue(150, 20)
    assert learn_vectors(content_features(table, texts), vectors, table.trained) == (None, None)
    table, texts, vectors = catalogue(600, 0)
    learned, quality = learn_vectors(content_features(table, texts), vectors, table.trained)
    assert learned is None
    assert quality.useful


def test_an_item_nothing_is_known_of_gets_no_vector():
    table, texts, vectors = catalogue(600, 40)
    table.categorical[-1] = 1
    texts[-1] = " - "
    learned, _ = learn_vectors(content_features(table, texts), vectors, table.trained)
    assert learned.row.tolist() == list(range(562, 601))


def test_case_and_punctuation_say_nothing_but_the_order_of_words_does():
    table = ItemTable([], torch.zeros(6, 0, dtype=torch.int32), [], torch.ones(6, dtype=torch.int64))
    found = content_features(table, ["", "", "Red wine", "RED, wine!", "wine red", ""])
    columns = [sorted(found.column[a:b].tolist()) for a, b in zip(found.offsets, found.offsets[1:], strict=False)]
    assert columns[2] == columns[3] != columns[4]
    assert len(set(columns[2]) & set(columns[4])) == 2
    assert columns[0] == columns[1] == columns[5] == []
    with pytest.raises(ConfigError, match="2 texts for 6 item rows"):
        content_features(table, ["", ""])


def dense(offsets, column, value, width: int) -> np.ndarray:
    found = np.zeros((len(offsets) - 1, width))
    np.add.at(found, (np.repeat(np.arange(len(offsets) - 1), np.diff(offsets)), column), value)
    return found


@settings(max_examples=40, deadline=None)
@given(history=st.lists(st.integers(0, 41), min_size=1, max_size=12), seed=st.integers(0, 10**6))
def test_lift_by_its_definition(history, seed):
    """Recomputed densely; the order and repeats of a history change nothing, unknown items count for nothing."""
    table, texts, _ = catalogue(40, 8, seed)
    table.count[2:34] = torch.from_numpy(generator(seed, 0, "count").integers(1, 9, 32))
    features = content_features(table, texts, 2**14)
    match = match_content(features, table.count)
    plain = dense(features.offsets.numpy(), features.column.numpy(), features.value.numpy(), features.width)
    x = plain * np.log(40 / np.maximum((plain > 0).sum(0), 1))
    x /= np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
    np.testing.assert_allclose(dense(match.offsets, match.column, match.value, match.width), x, atol=1e-6)
    usual = x[34:] @ (table.count.numpy() @ x) / float(table.count.sum())
    usual += 0.1 * np.sort(usual)[(len(usual) - 1) // 2]
    known = sorted({row for row in history if row >= FIRST_ITEM})
    like = x[34:] @ x[known].mean(0) if known else np.zeros(8)
    np.testing.assert_allclose(match.lift(np.array(history)), like / usual, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(match.lift(np.array(history[::-1] + history)), match.lift(np.array(history)))


def test_the_match_finds_what_a_user_likes_not_what_everybody_does():
    """Category 0 is bought by all; who also buys category 1 is shown its new items first."""
    code = torch.tensor([0, 1, *[2] * 50, *[3] * 10, *[4] * 10, 2, 3, 4], dtype=torch.int32)[:, None]
    count = torch.tensor([0, 0, *[100] * 50, *[5] * 20, 0, 0, 0])
    table = ItemTable(["category"], code, [5], count)
    match = match_content(content_features(table, [""] * len(code)), count)
    lift = match.lift(np.array([*range(2, 30), 53, 54]))
    assert match.row.tolist() == [72, 73, 74]
    assert lift.argmax() == 1
    assert lift[2] == 0


@pytest.fixture(scope="module")
def retriever() -> MqsaTed:
    torch.manual_seed(3)
    model = MqsaTed(MqsaTedConfig(width=8, window=10), WORLD.items).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return model


@pytest.fixture(scope="module")
def vectors() -> ContentVectors:
    draws = generator(5, 0, "vectors")
    return ContentVectors(np.array(NEW, np.int32), draws.normal(size=(2, 8)).astype(np.float32))


@torch.no_grad()
def test_only_new_items_score_otherwise_and_theirs_is_the_inner_product(retriever, vectors):
    filled = WithContent(retriever, vectors)
    batch = WORLD.requests("test")[0]
    everything = torch.arange(len(WORLD.items), dtype=torch.int32).repeat(len(batch), 1)
    plain, scores = (worlds.scores(model, worlds.with_candidates(batch, everything)) for model in (retriever, filled))
    user = retriever.user_vectors(batch.history)
    torch.testing.assert_close(scores[:, NEW], user @ torch.from_numpy(vectors.vector).T, rtol=1e-5, atol=1e-6)
    assert not torch.equal(scores[:, NEW], plain[:, NEW])
    old = torch.ones(len(WORLD.items), dtype=torch.bool)
    old[NEW] = False
    assert torch.equal(scores[:, old], plain[:, old])
    for row in (*NEW, 5):  # alone as among all, in any order
        alone = worlds.scores(filled, worlds.with_candidates(batch, torch.full((len(batch), 1), row)))
        assert torch.equal(alone[:, 0], scores[:, row])
    assert torch.equal(filled.item_vectors()[NEW], torch.from_numpy(vectors.vector))
    assert torch.equal(filled.item_vectors()[old], retriever.item_vectors()[old])
    with pytest.raises(ConfigError, match="content of rows 2 to 99"):
        WithContent(retriever, replace(vectors, row=np.array([2, 99], np.int32)))


@pytest.fixture(scope="module")
def match() -> ContentMatch:
    found = match_content(content_features(WORLD.items, [""] * len(WORLD.items)), WORLD.items.count)
    assert found.row.tolist() == NEW
    return found


def bundle_of(
    directory: Path,
    retriever: MqsaTed,
    ranker: str,
    match: ContentMatch | None,
    vectors: ContentVectors | None,
) -> Bundle:
    own = NamedModel("mqsa_ted", retriever.config, retriever)
    popular = NamedModel("popularity", PopularityConfig(), Popularity(PopularityConfig(), WORLD.items))
    ids = ["", "", *(f"i{key}" for key in range(len(WORLD.key_to_row)))]
    write_bundle(
        directory,
        Contents(
            items=WORLD.items,
            item_ids=ids,
            names=ids,
            key_to_row=WORLD.key_to_row,
            vocabulary={},
            actions=[""],
            ranker=own if ranker == "mqsa_ted" else popular,
            retriever=own,
            content=match,
            content_vectors=vectors,
        ),
        worlds.PROVENANCE,
    )
    return Bundle.load(directory)


HISTORY = [InlineEvent(item_id=f"i{key}", timestamp=worlds.START + key) for key in (1, 4, 9)]


@pytest.mark.parametrize("ranker", ["mqsa_ted", "popularity"])
def test_a_bundle_carries_them_into_index_sources_and_scores(tmp_path, retriever, match, vectors, ranker):
    """Loading replays the golden requests, so what was published is what is loaded."""
    bundle = bundle_of(tmp_path / "with", retriever, ranker, match, vectors)
    assert bundle.manifest.counts["matched_items"] == bundle.manifest.counts["content_vectors"] == 2
    assert bundle.manifest.counts["indexed_items"] == WORLD.known + 2
    np.testing.assert_array_equal(bundle.content.row, NEW)
    np.testing.assert_array_equal(bundle.content.lift(np.array([5, 9])), match.lift(np.array([5, 9])))
    assert (bundle.ranker is bundle.retriever) == (ranker == "mqsa_ted")
    found, _ = bundle.index.search(10 * vectors.vector, 3)
    assert found[:, 0].tolist() == NEW

    asked = RecommendRequest(history=HISTORY, k=32, at=worlds.START + 100)
    only = RecommenderConfig(retrieval=0, repeats=0, transitions=0, popularity=0, new_items=2)
    answer = Recommender(bundle, Nobody(), only).recommend(asked, 0)
    assert {item.item_id for item in answer.items if item.sources == ["new_items"]} == {"i30", "i31"}
    assert {tuple(item.sources) for item in answer.items} == {("new_items",), ("catalogue",)}
    everything = Recommender(bundle, Nobody()).recommend(asked, 0)
    named = {item.item_id: set(item.sources) for item in everything.items}
    assert named["i30"] == named["i31"] == {"retrieval", "new_items"}
    rank = Recommender(bundle, Nobody()).rank(RankRequest(history=HISTORY, item_ids=["i30", "i31"], at=asked.at), 0)
    with torch.inference_mode():
        rows = np.array([[30, 31]], np.int32) + FIRST_ITEM
        events = Events(np.array([1, 4, 9], np.uint32), np.zeros(3, np.uint8), np.arange(3, dtype=np.int64))
        batch = Scorer(bundle)._assemble([User(events, bundle.key_to_row[events.item], 10, None)], 10)
        wanted = bundle.ranker.score(
            bundle.ranker.encode(batch.history), batch.request, Candidates(torch.from_numpy(rows))
        )[0]
    np.testing.assert_allclose(rank.scores, wanted.numpy(), rtol=1e-6)
    if ranker == "mqsa_ted":
        assert 0 not in rank.scores


def test_without_content_nothing_changes(tmp_path, retriever):
    bundle = bundle_of(tmp_path / "without", retriever, "mqsa_ted", None, None)
    assert bundle.content is None
    assert bundle.manifest.counts["indexed_items"] == WORLD.known
    answer = Recommender(bundle, Nobody()).recommend(RecommendRequest(history=HISTORY, k=32, at=worlds.START + 9), 0)
    assert {item.item_id for item in answer.items if item.sources == ["catalogue"]} == {"i30", "i31"}


class ByCategory(nn.Module):
    """A retriever that knows categories alone: an item is its category (one-hot), a user the sum over events.

    It has vectors for trained items only.
    """

    trains_on = "nothing"
    window = None

    def __init__(self, items: ItemTable) -> None:
        super().__init__()
        self.items = items
        self.code = items.column("category").long()

    def encode(self, history):
        user = torch.zeros(len(history), self.items.codes("category"))
        owner = torch.repeat_interleave(torch.arange(len(history)), history.lengths)
        return user.index_put((owner, self.code[history.item.long()]), torch.tensor(1.0), accumulate=True)

    user_vectors = encode

    def score(self, state, request, candidates):
        return (self.item_vectors()[candidates.item.long()] @ state[:, :, None]).squeeze(2)

    def item_vectors(self):
        known = self.items.trained & (self.code > 1)
        return nn.functional.one_hot(self.code, self.items.codes("category")).float() * known[:, None]

    def loss(self, batch, generator):
        raise AssertionError


CONFIG = EvaluateConfig(cold_requests=40, resamples=50, seed=1)


@pytest.fixture(scope="module")
def measured(prepared):
    models = {"popularity": Popularity(PopularityConfig(), prepared.items), "by_category": ByCategory(prepared.items)}
    return measure_cold_start(models, prepared, CONFIG)


def test_the_measurement_by_its_definition(prepared, measured):
    """On real households, recomputed request by request; no request without a new item takes part."""
    trained = prepared.items.trained.numpy()
    cold = [row for row in range(FIRST_ITEM, len(trained)) if not trained[row]]
    requests, histories = prepared.requests("test"), prepared.histories
    code = prepared.items.column("category").numpy()
    whole = []
    for r in range(len(requests)):
        positive = set(requests.positive[requests.offsets[r] : requests.offsets[r + 1]].tolist()) & set(cold)
        if positive:
            start = histories.offsets[requests.user[r]]
            rows = rows_of(histories.events.item[start : requests.end[r]], prepared.key_to_row)
            own = [float((code[rows] == code[row]).sum()) if code[row] > 1 else 0.0 for row in cold]
            whole.append(roc_auc_score([row in positive for row in cold], own))
    assert measured.items == len(cold)
    assert measured.requests == min(len(whole), CONFIG.cold_requests)
    full = measure_cold_start(
        {"by_category": ByCategory(prepared.items)}, prepared, replace(CONFIG, cold_requests=10**6)
    )
    assert full.requests == len(whole)
    assert full.scores["by_category with content"].auc == pytest.approx(np.mean(whole), abs=0.02)


def test_what_knows_nothing_gets_chance_and_content_does_better(measured):
    chance = measured.scores["random"]
    assert chance.auc == 0.5
    assert chance.recall_at_50 == pytest.approx(50 / measured.items)
    for name in ("popularity", "by_category"):
        found = measured.scores[name]
        assert (found.auc, found.recall_at_50) == (chance.auc, pytest.approx(chance.recall_at_50))
    assert measured.scores["by_category"].recall_at_100_of_all == 0
    for name in ("by_category with content", "content match"):
        found = measured.scores[name]
        assert found.auc > 0.53
        assert found.recall_at_50 > chance.recall_at_50
    assert measured.content["by_category"].useful
    assert sum(name.startswith(("popular ", "own ")) for name in measured.scores) == 2
    assert all(0 < score.auc < 1 for score in measured.scores.values())


def test_vectors_are_learned_from_the_prepared_set(prepared):
    learned, quality = vectors_of(ByCategory(prepared.items), features_of(prepared))
    assert quality.useful
    trained = prepared.items.trained.numpy()
    assert not trained[learned.row].any()
    names = item_names(prepared)
    assert all(names[row] for row in learned.row)


def test_the_report_shows_it(prepared, tmp_path):
    config = replace(CONFIG, max_requests=20, full_ranking_requests=1)
    evaluation = evaluate({"popularity": Popularity(PopularityConfig(), prepared.items)}, prepared, config)
    evaluation.save(tmp_path / "evaluation")
    assert Evaluation.load(tmp_path / "evaluation") == evaluation
    page = build_page(evaluation, {}, prepared.manifest)
    for text in (render_html(page), render_markdown(page)):
        assert "New items" in text
        for name, score in evaluation.cold_start.scores.items():
            assert name in text
            assert f"{score.auc:.4f}" in text
    without = build_page(replace(evaluation, cold_start=None), {}, prepared.manifest)
    assert "New items" not in render_html(without)


def test_a_set_without_new_items_has_nothing_to_measure(prepared, monkeypatch):
    items = prepared.items
    everybody = ItemTable(items.columns, items.categorical, items.cardinality, items.count + 1)
    monkeypatch.setitem(vars(prepared), "items", everybody)
    assert measure_cold_start({"by_category": ByCategory(everybody)}, prepared, CONFIG) is None
    assert vectors_of(ByCategory(everybody), features_of(prepared)) == (None, None)
