"""What a reranker trains on, step by step: lists out of four documents, teachers, the loss, and ties when reranking."""

import math
from dataclasses import replace

import numpy as np
import pytest
import tiny_text
import torch
from torch import Tensor

from pipelines.reranker_task import Pool, RerankerTask, rerank_pool
from pipelines.shipped import CONFIGS
from pipelines.text_config import TextTrainConfig
from pipelines.text_corpus import Corpus, Queries
from pipelines.text_models import load_text_config
from ranking.cross_encoder import CrossEncoderConfig
from ranking.fusion import NONE, Ranking
from ranking.lexsembridge import LexSemBridgeConfig
from ranking.mvp import MvpConfig
from recsys.errors import ConfigError

CORPUS = Corpus("four", list("abcd"), ["wing flow heat", "shock layer", "plate cone", "jet skin wall tube"])
QUERIES = Queries(
    ["graded", "tied", "hopeless"],
    ["flow", "wall", "gas"],
    [{0: 1, 1: 2, 2: 0}, {0: 1, 3: 1}, {2: 0}],
)
FOUND = Ranking(
    np.array([[0, 2, 3, 1], [1, 3, 2, 0], [0, 1, 2, 3]], np.int32), np.tile(np.float32([4, 3, 2, 1]), (3, 1))
)
NO_MORE = {"rows": 12, "group": 4, "positives": 3}
RANKS = {  # of the passages of a list, those after its last being padding; the first place of a pool is no negative
    "qrels": {"flow": {1: 1, 0: 2, 3: 3}, "wall": {3: 1, 0: 2, 2: 3}},
    "mixed": {"flow": {1: 1, 0: 2, 3: 3}, "wall": {3: 1, 0: 2, 2: 3}},
    "silver": {"flow": {0: 1, 3: 2, 1: 3}, "wall": {3: 1, 2: 2, 0: 3}},
}


def task(name: str = "mvp", **changes) -> RerankerTask:
    config = replace(load_text_config(CONFIGS / f"{name}.toml"), **{**NO_MORE, **changes})
    model = tiny_text.model_of(config)
    with torch.no_grad():  # far from where scores and anchors are alike
        for place, parameter in enumerate(model.parameters()):
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(place)) * 0.1)
    pool = Pool(QUERIES, FOUND)
    return RerankerTask(config, model, CORPUS, pool, pool)


@pytest.mark.parametrize("teacher", ["qrels", "mixed", "silver"])
def test_a_list_has_the_positives_and_unjudged_negatives_in_the_teachers_order(teacher):
    queries, passages, ranks, grades = task(teacher=teacher).lists(0)
    assert set(queries) == {"flow", "wall"}  # a query without a positive teaches nothing
    for query, chosen, places, known in zip(queries, passages, ranks, grades, strict=True):
        expected = RANKS[teacher][query]
        assert dict(zip(chosen, places.int().tolist(), strict=False)) == expected
        assert places[len(chosen) :].tolist() == [0]
        judged = QUERIES.grades[QUERIES.texts.index(query)]
        assert known.tolist() == [judged.get(row, 0) for row in chosen] + [0]


def test_a_document_with_the_text_of_a_relevant_one_is_no_negative():
    made = task()
    made.corpus = replace(CORPUS, passages=[*CORPUS.passages[:3], "Shock  layer"])  # d beside b, relevant to "flow"
    for query, chosen in zip(*made.lists(0)[:2], strict=True):
        assert sorted(chosen) == {"flow": [0, 1], "wall": [0, 2, 3]}[query]


def test_a_list_has_at_most_so_many_positives_and_negatives_down_to_a_depth():
    queries, passages, *_ = task(positives=1, group=2, depth=2).lists(0)
    for query, chosen in zip(queries, passages, strict=True):
        known = QUERIES.grades[QUERIES.texts.index(query)]
        assert known[chosen[0]] > 0
        assert len(chosen) == 1  # the second place of either pool is judged
    _, deeper, *_ = task(positives=1, group=2, depth=3).lists(0)
    assert {len(chosen) for chosen in deeper} == {2}
    assert {chosen[1] for chosen in deeper} == {2, 3}


def test_relevant_passages_lead_the_first_stages_order_if_they_are_made_to():
    """The authors' labelled passage is always rank 1; the others keep the first stage's order."""
    queries, passages, ranks, _ = task(teacher="silver", force_positive_first=True).lists(0)
    for query, chosen, places in zip(queries, passages, ranks, strict=True):
        expected = {"flow": {0: 1, 1: 2, 3: 3}, "wall": {3: 1, 0: 2, 2: 3}}[query]
        assert dict(zip(chosen, places.int().tolist(), strict=False)) == expected
    for _, chosen, places, known in zip(
        *task(teacher="silver", force_positive_first=True, positives=1).lists(0), strict=True
    ):
        assert known[places.tolist().index(1)] > 0
        assert places[: len(chosen)].sort().values.tolist() == list(range(1, len(chosen) + 1))


def listwise(scores: Tensor, of: dict[int, float], tau: float, variant: str) -> float:
    """Return - sum_i y_i log p_i of one list whose targets come from r -> 1 / r, written out in numbers."""
    inverse = np.array([of[place] for place in range(len(scores))])
    y = np.exp(inverse / tau) / np.exp(inverse / tau).sum()
    logits = scores.double().numpy() / tau
    if variant == "released":  # a softmax of the softmax
        logits = np.exp(logits) / np.exp(logits).sum()
    return float(-(y * (logits - math.log(np.exp(logits).sum()))).sum())


@pytest.mark.parametrize("variant", ["single", "released"])
@pytest.mark.parametrize("teacher", ["qrels", "mixed", "silver"])
@pytest.mark.parametrize("name", ["mvp", "mvp_apart", "cross_encoder"])
def test_the_loss_is_that_of_every_list_plus_the_orthogonal_term(name, teacher, variant):
    made = task(name, teacher=teacher, loss_variant=variant, rank_tau=0.5, orthogonal=0.7)
    found, parts = made.loss(0)
    queries, passages, ranks, _ = made.lists(0)
    each, apart = [], []
    for query, chosen, places in zip(queries, passages, ranks, strict=True):
        of = {at: 1 / float(places[at]) for at in range(len(chosen))}
        if teacher == "qrels" and query == "wall":  # two passages of grade 1 share the mean of 1 and 1/2
            of = {at: 0.75 if row in (0, 3) else 1 / 3 for at, row in enumerate(chosen)}
        texts = [CORPUS.passages[row] for row in chosen]
        each.append(listwise(torch.from_numpy(made.model.rerank(query, texts)), of, 0.5, variant))
        if name != "cross_encoder":
            vectors = made._encoded([query], [chosen])[:, : len(chosen)]
            anchors = made.model.score(vectors, torch.ones(1, len(chosen), dtype=torch.bool))[1][0].detach().double()
            unit = anchors / anchors.norm(dim=1, keepdim=True)
            apart.append(float((unit @ unit.T - torch.eye(len(unit))).square().sum()))
    assert parts["rank"] == pytest.approx(np.mean(each), abs=1e-5)
    if name == "cross_encoder":
        assert float(found.detach()) == pytest.approx(parts["rank"])
        return
    assert parts["orthogonal"] == pytest.approx(np.mean(apart), abs=1e-4)
    assert parts["orthogonal"] > 0.01
    assert float(found.detach()) == pytest.approx(parts["rank"] + 0.7 * parts["orthogonal"], rel=1e-6)


class ByLength:
    """A reranker whose scores are the passages' numbers of words, so that many are equal."""

    def rerank(self, query, passages):
        return np.array([len(passage.split()) for passage in passages], np.float32)


def test_equal_scores_keep_the_first_stages_order():
    draws = np.random.default_rng(0)
    corpus = Corpus("many", [str(n) for n in range(300)], ["wing " * int(n) for n in draws.integers(1, 4, 300)])
    rows = np.stack([draws.permutation(300) for _ in range(2)]).astype(np.int32)
    rows[1, 250:] = NONE
    pool = Pool(Queries(["1", "2"], ["wing", "flow"], [{}, {}]), Ranking(rows, np.zeros(rows.shape, np.float32)))
    words = [len(passage.split()) for passage in corpus.passages]
    for places in (300, 40):
        for order in (None, draws.permutation(places).tolist()):
            found = rerank_pool(ByLength(), corpus, pool, places, order)  # type: ignore[arg-type]
            for line, reranked, scores in zip(rows[:, :places].tolist(), found.rows, found.scores, strict=True):
                present = [row for row in line if row != NONE]
                expected = [row for number in (3, 2, 1) for row in present if words[row] == number]
                assert reranked.tolist() == expected + [NONE] * (places - len(present))
                assert scores[: len(present)].tolist() == [words[row] for row in expected]


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("mvp", "force_positive_first=true", "would do nothing with teacher = 'mixed'"),
        ("mvp", "loss_variant=double", "loss_variant"),
        ("lexsembridge", "loss_variant=released", "loss_variant would do nothing for lexsembridge"),
        ("lexsembridge", "force_positive_first=false", "force_positive_first would do nothing for lexsembridge"),
        ("cross_encoder", "orthogonal=0.5", "orthogonal would do nothing for cross_encoder"),
        ("mvp", "temperature=0.1", "temperature would do nothing for mvp"),
    ],
)
def test_settings_that_would_do_nothing_are_refused_by_name(name, change, words):
    with pytest.raises(ConfigError, match=words):
        load_text_config(CONFIGS / f"{name}.toml", [change])


def test_rerankers_read_the_variant_of_the_loss_and_who_leads_a_list():
    for name in ("mvp", "mvp_apart", "cross_encoder"):
        changes = ["loss_variant=released", "force_positive_first=true", "teacher=silver"]
        config = load_text_config(CONFIGS / f"{name}.toml", changes)
        assert (config.loss_variant, config.force_positive_first) == ("released", True)


def test_shipped_configs_have_the_settings_of_their_specifications():
    """Sections 2 to 5 of MVP's, sections 2 to 6 of LexSemBridge's."""
    for name in ("mvp", "cross_encoder"):  # the control differs in the model alone
        config = load_text_config(CONFIGS / f"{name}.toml")
        assert (config.rank_tau, config.teacher, config.group, config.positives) == (0.8, "mixed", 5, 2)
        assert (config.rows, config.depth, config.loss_variant, config.force_positive_first) == (
            32,
            100,
            "single",
            False,
        )
        step = config.optimiser
        assert (step.learning_rate, step.learning_rate_fresh, step.warmup) == (2e-5, 1e-4, 0.1)
        assert (step.weight_decay, step.clip) == (0.01, 1.0)
    assert load_text_config(CONFIGS / "mvp.toml").orthogonal == TextTrainConfig("mvp", MvpConfig()).orthogonal == 1.0
    model = load_text_config(CONFIGS / "mvp.toml").model
    assert (model.views, model.view_pool, model.score_scale, model.shared_start) == (4, "mean", "sqrt_d", False)
    assert (model.decoder_layers, model.decoder_heads, model.max_query_len, model.max_len) == (2, 12, 64, 256)
    control = load_text_config(CONFIGS / "cross_encoder.toml").model
    assert isinstance(control, CrossEncoderConfig)
    assert (control.max_query_len, control.max_len) == (64, 256 - model.views)  # the same tokens but for the views

    config = load_text_config(CONFIGS / "lexsembridge.toml")
    assert (config.temperature, config.tau, config.group, config.rows, config.train) == (0.02, 0.02, 2, 64, "fusion")
    assert (config.optimiser.learning_rate_fresh, config.optimiser.clip) == (1e-3, 1.0)
    lexical = config.model
    assert lexical == LexSemBridgeConfig()
    assert (lexical.weights, lexical.variant, lexical.clr_pool, lexical.fusion_init) == ("slr", "code", "max", "zero")
    assert (lexical.ignore_special, lexical.ignore_sep, lexical.normalized) == (True, False, True)
    assert (lexical.fusion_passages, lexical.fusion_at_test) == (False, True)
    assert (lexical.max_query_len, lexical.max_passage_len) == (64, 256)
