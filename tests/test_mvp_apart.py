"""MVP's step over the list with texts read apart: its formulas by loops, and what must and must not change a score."""

import numpy as np
import pytest
import torch
from text_world import publish_corpus, tiny_encoder
from tiny_text import WORDS, bert, tokenizer

from ranking.bundle import Bundle
from ranking.deadline import Deadline
from ranking.dense_encoder import DenseConfig, DenseEncoder
from ranking.mvp_apart import K1, OPENING, STRIDE, WINDOW, B, MvpApart, MvpApartConfig, readings
from ranking.searched import SearchConfig
from ranking.searcher import Searcher
from ranking.text_models import load_reranker
from recsys.errors import ConfigError

QUERY = "shock wave heat"
PASSAGES = [" ".join(WORDS[k % 16] for k in range(n, n + 3 + 7 * (n % 7))) for n in range(9)]


def build(dtype: torch.dtype = torch.float32, trained: bool = True, **options) -> MvpApart:
    model = MvpApart(MvpApartConfig(max_len=60, **options), bert(), tokenizer())
    model.count_words(PASSAGES)
    if trained:
        torch.manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad and parameter.shape and len(parameter) == model.config.views:
                    parameter.add_(0.3 * torch.randn_like(parameter))
            for name in ("w", "u"):
                if hasattr(model, name):
                    getattr(model, name).add_(0.4)
    return model.to(dtype).eval()


def unit(x: torch.Tensor) -> torch.Tensor:
    return x / x.norm(dim=-1, keepdim=True)


def test_untrained_and_alone_it_is_the_dense_encoder():
    model = build(trained=False, views=1, listwise=False, words=False)
    plain = DenseEncoder(DenseConfig(max_query_len=64, max_passage_len=60), model.transformer, model.tokenizer)
    cosine = plain.encode_passages(PASSAGES) @ plain.encode_queries([QUERY])[0]
    np.testing.assert_allclose(model.rerank(QUERY, PASSAGES), 2.0 * cosine, atol=1e-5)


@pytest.mark.parametrize("length", [2, 20, WINDOW, WINDOW + 1, 3 * WINDOW])
def test_readings_are_those_of_a_loop_whatever_stands_past_the_end(length):
    torch.manual_seed(length)
    query, states = torch.randn(5, 6).double(), torch.randn(2, 3 * WINDOW + 5, 6).double()
    found = readings(query, states, torch.tensor([length, 3 * WINDOW + 5]))[0]
    own, asked = states[0, :length], query.mean(dim=0)
    nearest = torch.stack([unit(own)[(unit(own) @ token).argmax()] for token in query]).mean(dim=0)
    starts = range(0, length - WINDOW + 1, STRIDE) if length > WINDOW else []
    windows = [own[start : start + WINDOW].mean(dim=0) for start in starts] or [own.mean(dim=0)]
    window = max(windows, key=lambda one: float(unit(one) @ asked))
    expected = torch.stack([own.mean(dim=0), nearest, window, own[:OPENING].mean(dim=0)])
    torch.testing.assert_close(found, unit(expected))


def test_words_are_bm25_as_a_share():
    model = build(torch.float64)
    ids = model.tokenizer.encode([QUERY, *PASSAGES], 60)
    held = [sum(token in one for one in ids[1:]) for token in range(len(model.tokenizer))]
    mean = sum(map(len, ids[1:])) / len(PASSAGES)
    asked = set(ids[0][1:-1])
    for own in ids[1:]:
        top = bottom = 0.0
        for token in asked:
            idf = np.log(1 + (len(PASSAGES) - held[token] + 0.5) / (held[token] + 0.5))
            times = own.count(token)
            top += idf * times * (K1 + 1) / (times + K1 * (1 - B + B * len(own) / mean))
            bottom += idf
        assert float(model.share(torch.tensor(ids[0]), torch.tensor(own))) == pytest.approx(top / bottom, abs=1e-6)
    assert float(model.share(torch.tensor(ids[0][:1]), torch.tensor(ids[1]))) == 0  # nothing but marks is asked


@pytest.mark.parametrize("views", [1, 3])
def test_scores_are_the_formulas(views):
    model = build(torch.float64, views=views)
    with torch.no_grad():
        e = model.pairs([QUERY] * 9, PASSAGES).double()
        scores, anchors = model.score(e[None], torch.ones(1, 9, dtype=torch.bool))
        R, b, q = e[:, :-1, :-1], e[:, 0, -1], e[0, -1, :-1]
        starts = [(1 + model.D[k]) * q for k in range(views)]
        r = torch.stack([sum(starts[k] @ R[i, k] for k in range(views)) / views + model.u * b[i] for i in range(9)])
        share = torch.softmax(r / model.T.exp(), dim=0)
        for k in range(views):
            heard = sum(share[i] * R[i, k] for i in range(9))
            torch.testing.assert_close(anchors[0, k], starts[k] + model.beta[k] * (1 + model.G[k]) * heard)
        for i in range(9):
            mean = sum(anchors[0, k] @ R[i, k] for k in range(views)) / views
            torch.testing.assert_close(scores[0, i], model.c.exp() * (mean + model.w * b[i]))


def test_order_and_dummies_change_nothing_but_company_does():
    model = build(torch.float64)
    with torch.no_grad():
        e = model.pairs([QUERY] * 9, PASSAGES).double()[None]
        live = torch.ones(1, 9, dtype=torch.bool)
        s = model.score(e, live)[0]
        order = torch.tensor([3, 0, 8, 1, 7, 2, 6, 4, 5])
        torch.testing.assert_close(model.score(e[:, order], live)[0], s[:, order], atol=1e-10, rtol=0)
        dummies = torch.cat([e, torch.randn(1, 3, *e.shape[2:], dtype=e.dtype)], dim=1)
        masked = model.score(dummies, torch.tensor([[True] * 9 + [False] * 3]))[0]
        torch.testing.assert_close(masked[:, :9], s, atol=1e-10, rtol=0)
        assert torch.isneginf(masked[:, 9:]).all()
        torch.testing.assert_close(model.score(torch.cat([e, e], 1), live.repeat(1, 2))[0], s.repeat(1, 2))
        assert (model.score(e[:, :5], live[:, :5])[0] - s[:, :5]).abs().max() > 1e-3


def test_the_pointwise_control_scores_a_passage_alone_as_among_others():
    model = build(listwise=False)
    whole = model.rerank(QUERY, PASSAGES)
    each = np.concatenate([model.rerank(QUERY, [passage]) for passage in PASSAGES])
    np.testing.assert_allclose(each, whole, atol=1e-5)
    assert not {"beta", "G", "T", "u"} & {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize("listwise", [True, False])
def test_any_batching_agrees_and_lists_do_not_touch_each_other(listwise):
    model = build(listwise=listwise)
    lists = [PASSAGES, [], PASSAGES[2:5], PASSAGES[:1], [*PASSAGES[:2], PASSAGES[0], ""]]
    queries = [QUERY, "jet", "gas tube", "wing", ""]
    together = model.rerank_many(queries, lists)
    for query, passages, scores in zip(queries, lists, together, strict=True):
        np.testing.assert_allclose(scores, model.rerank(query, passages), atol=1e-5)
        assert (scores.dtype, len(scores)) == (np.float32, len(passages))
        assert np.isfinite(scores).all()
    assert together[4][0] == together[4][2]  # the same text twice ties exactly
    for tokens in (1, 60):
        small = build(listwise=listwise, tokens_per_pass=tokens)
        np.testing.assert_allclose(small.rerank(QUERY, PASSAGES), together[0], atol=1e-5)
    assert model.rerank_many([], []) == []


def test_progress_is_told_and_an_exception_ends_the_work():
    model, told = build(tokens_per_pass=60), []
    model.rerank(QUERY, PASSAGES, lambda done, total: told.append((done, total)))
    assert told[-1] == (9, 9)
    assert len(told) > 2
    with pytest.raises(TimeoutError):
        model.rerank(QUERY, PASSAGES, lambda *_: (_ for _ in ()).throw(TimeoutError()))


def test_save_and_load_are_exact_idf_too(tmp_path):
    model = build()
    model.save(tmp_path / "model")
    again = load_reranker(tmp_path / "model")
    np.testing.assert_array_equal(again.rerank(QUERY, PASSAGES), model.rerank(QUERY, PASSAGES))
    assert again.digest == model.digest
    assert float(again.idf.min()) < 1 < float(again.idf.max())


def test_what_decides_a_reading_decides_its_digest_and_training_does_not():
    known = build(trained=False).reading
    assert build().reading == known
    other = build(trained=False)
    other.count_words(PASSAGES[:4])
    assert len({known, other.reading, build(views=2).reading}) == 3


def test_every_parameter_learns_in_fusion_and_the_backbone_too_in_full():
    model = build(trained=False)
    e = model.pairs([QUERY] * 9, PASSAGES)[None]
    scores, anchors = model.score(e, torch.ones(1, 9, dtype=torch.bool))
    (scores.softmax(dim=1)[0, 3] + anchors.sum()).backward()
    for name, parameter in model.named_parameters():
        if "pooler" not in name:
            assert parameter.grad is not None, name
            assert parameter.grad.abs().max() > 0, name


def test_truncated_passages_are_named():
    assert build().truncated(QUERY, ["wing", " ".join(WORDS * 4)]).tolist() == [False, True]


@pytest.mark.parametrize("views", [0, 5])
def test_other_numbers_of_views_are_refused(views):
    with pytest.raises(ConfigError, match=f"views is {views}; expected 1 to 4"):
        MvpApartConfig(views=views)


def test_a_bundle_searches_with_it_and_without_it_when_time_is_up(tmp_path):
    model = build()
    path = publish_corpus(tmp_path / "bundle", PASSAGES, encoder=tiny_encoder(), reranker=model)
    searcher = Searcher(Bundle.load(path).text, SearchConfig(rerank=5))
    plain, found = searcher.search(QUERY, rerank=False), searcher.search(QUERY, rerank=True)
    head = [PASSAGES[row] for row in plain.rows[:5].tolist()]
    scores = model.rerank(QUERY, head)
    assert found.rows[:5].tolist() == plain.rows[:5][np.argsort(-scores, kind="stable")].tolist()
    np.testing.assert_allclose(found.scores[:5], np.sort(scores)[::-1], atol=1e-5)
    late = searcher.search(QUERY, Deadline(0.0), mode="bm25", rerank=True)
    assert late.degraded == ("rerank",)
