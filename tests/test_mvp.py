"""MVP against its formulas, loops and a worked example, in float64 on tiny random models of both paths."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_text import WORDS, bert, t5, tokenizer

from ranking.cross_encoder import CrossEncoder, CrossEncoderConfig
from ranking.mvp import Mvp, MvpConfig, orthogonal_loss, ragged, rank_loss, scores_by_view, targets
from ranking.text_backbone import padded
from ranking.text_models import load_reranker

QUERY = "shock wave heat"
PASSAGES = [" ".join(WORDS[k % 16] for k in range(n, n + 3 + n % 5)) for n in range(9)]


def build(path: str, dtype=torch.float64, **options) -> Mvp:
    if path == "t5":
        model = Mvp(MvpConfig(views=options.pop("views", 4), max_len=40, **options), t5(), tokenizer(t5=True))
    else:
        torch.manual_seed(3)
        model = Mvp(
            MvpConfig(views=options.pop("views", 4), decoder_heads=4, max_len=40, **options), bert(), tokenizer()
        )
        model.begin()
    return model.to(dtype).eval()


def vectors(model: Mvp, passages=PASSAGES) -> torch.Tensor:
    ids, mask = padded(model.rows(QUERY, passages), model.tokenizer.pad)
    with torch.no_grad():
        return model.encode(ids, mask)


def score(model: Mvp, e: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    with torch.no_grad():
        mask = torch.ones(e.shape[:2], dtype=torch.bool) if mask is None else mask
        return model.score(e, mask)[0]


both = pytest.mark.parametrize("path", ["t5", "bert"])


@both
def test_order_padding_and_dummies_change_nothing_but_company_does(path):
    model = build(path)
    e = vectors(model)[None]  # [1, n, m, d]
    s = score(model, e)[0]
    order = torch.tensor([3, 0, 8, 1, 7, 2, 6, 4, 5])
    torch.testing.assert_close(score(model, e[:, order])[0], s[order], atol=1e-10, rtol=0)
    ids, mask = padded(model.rows(QUERY, PASSAGES), model.tokenizer.pad)
    pad = torch.full((len(ids), 6), model.tokenizer.pad)
    wide = model.encode(torch.cat([ids, pad], dim=1), torch.cat([mask, torch.zeros_like(pad)], dim=1))
    torch.testing.assert_close(wide, e[0], atol=1e-10, rtol=0)
    dummies = torch.cat([e, torch.randn(1, 3, *e.shape[2:], dtype=e.dtype)], dim=1)
    live = torch.tensor([[True] * 9 + [False] * 3])
    torch.testing.assert_close(score(model, dummies, live)[0, :9], s, atol=1e-10, rtol=0)
    assert torch.isneginf(score(model, dummies, live)[0, 9:]).all()
    assert (score(model, dummies)[0, :9] - s).abs().max() > 1e-4
    twice = score(model, torch.cat([e, e], dim=1))[0]
    torch.testing.assert_close(twice, torch.cat([s, s]), atol=1e-10, rtol=0)
    alone = score(model, e[:, :1])
    assert torch.isfinite(alone).all()


@both
def test_lists_do_not_touch_each_other_and_any_batching_agrees(path):
    model = build(path, torch.float32)
    lists = [PASSAGES, [], PASSAGES[2:5], PASSAGES[:1]]
    queries = [QUERY, "jet", "gas tube", "wing"]
    together = model.rerank_many(queries, lists)
    for query, passages, scores in zip(queries, lists, together, strict=True):
        np.testing.assert_allclose(scores, model.rerank(query, passages), atol=1e-5)
        assert scores.dtype == np.float32
        assert len(scores) == len(passages)
    for tokens in (1, 60):
        small = build(path, torch.float32, tokens_per_pass=tokens)
        small.load_state_dict(model.state_dict())
        np.testing.assert_allclose(small.rerank(QUERY, PASSAGES), together[0], atol=1e-5)


@pytest.mark.parametrize("path", ["t5", "bert", "cross_encoder"])
@pytest.mark.parametrize("tokens", [1, 60, 4096])
def test_duplicates_tie_exactly(path, tokens):
    """M6, in the same list and in another one of the same query."""
    if path == "cross_encoder":
        model = CrossEncoder(CrossEncoderConfig(max_len=40, tokens_per_pass=tokens), bert(), tokenizer())
    else:
        model = build(path, torch.float32, tokens_per_pass=tokens)
    scores = model.rerank(QUERY, [*PASSAGES, *PASSAGES[::-1]])
    np.testing.assert_array_equal(scores[: len(PASSAGES)], scores[: len(PASSAGES) - 1 : -1])
    assert len(set(scores.tolist())) > len(PASSAGES) // 2


@both
def test_save_and_load_are_exact(path, tmp_path):
    model = build(path, torch.float32)
    model.save(tmp_path / "mvp")
    again = load_reranker(tmp_path / "mvp")
    np.testing.assert_array_equal(again.rerank(QUERY, PASSAGES), model.rerank(QUERY, PASSAGES))
    assert again.digest == model.digest


@both
def test_view_tokens_stand_first_and_only_the_passage_is_cut(path):
    model = build(path)
    rows = model.rows(QUERY, [*PASSAGES, " ".join(WORDS * 5)])
    assert all(row[:4] == model.view_ids for row in rows)
    assert len(rows[-1]) == 40
    long = " ".join(WORDS * 5)  # not even a query above the limit of its own makes a pair too long
    assert {len(row) for row in model.rows(long, [*PASSAGES, long])} == {40}
    assert model.truncated(long, PASSAGES).all()
    assert model.truncated(QUERY, [PASSAGES[0], " ".join(WORDS * 5)]).tolist() == [False, True]
    with pytest.raises(AssertionError, match="first places"):
        model.encode(torch.tensor([rows[0][1:]]), torch.ones(1, len(rows[0]) - 1, dtype=torch.int64))


@both
def test_views_and_anchors(path):
    model = build(path)
    e = vectors(model)[None]
    mask = torch.ones(e.shape[:2], dtype=torch.bool)
    scores, anchors = model.score(e, mask)
    loop = sum((anchors[0, k] * e[0, :, k]).sum(dim=-1) for k in range(4)) / 4 / model.scale
    torch.testing.assert_close(scores[0], loop)
    changed = e.clone()
    changed[0, 0] += 1.0
    cached = scores_by_view(anchors, changed).mean(dim=-1)[0] / model.scale
    assert (score(model, changed)[0] - cached).abs().max() > 1e-3
    if path == "bert":
        swapped = build(path)
        swapped.load_state_dict(model.state_dict())
        order = [2, 0, 3, 1]
        with torch.no_grad():
            swapped.start.copy_(model.start[order])
        torch.testing.assert_close(score(swapped, e[:, :, order]), score(model, e))


@both
def test_diagnostics_are_what_reranking_pools(path):
    model = build(path, torch.float32)
    anchors, each = model.anchors(QUERY, PASSAGES), model.view_scores(QUERY, PASSAGES)
    assert (anchors.shape, each.shape) == ((4, model.width), (9, 4))
    np.testing.assert_allclose(each.mean(axis=1), model.rerank(QUERY, PASSAGES), atol=1e-5)
    vectors = model.encode_pairs(QUERY, PASSAGES)
    np.testing.assert_allclose(np.einsum("md,nmd->nm", anchors, vectors) / model.scale, each, atol=1e-5)
    assert model.view_scores(QUERY, []).shape == (0, 4)


def test_the_decoder_runs_once_at_length_one(monkeypatch):
    model = build("t5", torch.float32, tokens_per_pass=60)
    calls = []
    inner = model.transformer.decoder.forward
    monkeypatch.setattr(
        model.transformer.decoder, "forward", lambda **kw: (calls.append(kw["input_ids"].shape), inner(**kw))[1]
    )
    model.rerank_many([QUERY, "jet"], [PASSAGES, PASSAGES[:4]])
    assert calls == [torch.Size([8, 1])]


def toy_scores(e: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    queries = torch.eye(2, dtype=e.dtype)
    anchors = torch.stack([torch.softmax(e[:, k] @ queries[k], dim=0) @ e[:, k] for k in range(2)])
    return scores_by_view(anchors[None], e[None])[0].mean(dim=-1), anchors


def test_worked_example():
    """The toy decoder; lists that repeat an item, and lists of one."""
    e = torch.tensor([[[2, 0], [0, 1]], [[1, 1], [1, 0]], [[0, 0], [0, 2]]], dtype=torch.float64)  # [n, m, d]
    s, anchors = toy_scores(e)
    close = {"atol": 1e-4, "rtol": 0}
    torch.testing.assert_close(anchors, torch.tensor([[1.5752, 0.2447], [0.0900, 1.5752]]).double(), **close)
    torch.testing.assert_close(s, torch.tensor([2.3628, 0.9550, 1.5752]).double(), **close)
    assert float(orthogonal_loss(anchors[None])) == pytest.approx(0.0879, abs=1e-4)
    torch.testing.assert_close(toy_scores(torch.cat([e, e]))[0], torch.cat([s, s]))
    more = toy_scores(torch.cat([e, e[:1]]))[0]
    torch.testing.assert_close(more, torch.tensor([2.4760, 0.9821, 1.4621, 2.4760]).double(), **close)
    assert float(toy_scores(e[:1])[0]) == pytest.approx(2.5)


def test_orthogonal_loss():
    assert float(orthogonal_loss(torch.diag(torch.tensor([1.0, 5, 0.1, 9]))[None])) == pytest.approx(0, abs=1e-12)
    assert float(orthogonal_loss(torch.ones(1, 4, 3, dtype=torch.float64))) == pytest.approx(12)
    assert float(orthogonal_loss(torch.randn(1, 1, 5, dtype=torch.float64))) == pytest.approx(0, abs=1e-12)
    for degrees, value in ((60, 0.5), (45, 1.0)):
        angle = math.radians(degrees)
        pair = torch.tensor([[[1.0, 0], [math.cos(angle), math.sin(angle)]]], dtype=torch.float64)
        assert float(orthogonal_loss(pair)) == pytest.approx(value)
        assert float(orthogonal_loss(pair * torch.tensor([[[3.0], [-0.5]]]))) == pytest.approx(value)
    a = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    orthogonal_loss(a[None]).backward()
    with torch.no_grad():
        unit = a / a.norm(dim=-1, keepdim=True)
        raw = 4 * (unit @ unit.T - torch.eye(4)) @ unit
        expected = (raw - (raw * unit).sum(dim=-1, keepdim=True) * unit) / a.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(a.grad, expected, atol=1e-8, rtol=0)
    assert torch.autograd.gradcheck(lambda x: orthogonal_loss(x[None]), a)
    collinear = torch.ones(1, 4, 3, dtype=torch.float64, requires_grad=True)
    orthogonal_loss(collinear).backward()
    torch.testing.assert_close(collinear.grad, torch.zeros_like(collinear), atol=1e-12, rtol=0)


def test_targets_and_rank_loss_have_their_known_values():
    y = targets(torch.arange(1.0, 6).double(), 0.8)
    torch.testing.assert_close(y, torch.tensor([0.3664, 0.1961, 0.1592, 0.1435, 0.1348]).double(), atol=1e-4, rtol=0)
    best = 1 / torch.arange(1.0, 6).double()
    for shift in (0.0, 11.0):
        assert float(rank_loss(best[None] + shift, y[None], 0.8)) == pytest.approx(1.5286, abs=1e-4)
    assert float(rank_loss(torch.zeros(1, 5).double(), y[None], 0.8)) == pytest.approx(math.log(5))
    assert float(rank_loss(best[None], y[None], 0.8, "released")) == pytest.approx(1.5764, abs=1e-4)
    for n, first, room in ((5, 0.3664, 0.0808), (10, 0.2266, 0.0784), (20, 0.1328, 0.0610), (100, 0.0322, 0.0203)):
        long = targets(torch.arange(1.0, n + 1).double(), 0.8)
        assert float(long[0]) == pytest.approx(first, abs=1e-4)
        assert math.log(n) + float((long * long.log()).sum()) == pytest.approx(room, abs=1e-4)
    norms = []
    for variant in ("single", "released"):
        s = torch.zeros(1, 5, dtype=torch.float64, requires_grad=True)
        rank_loss(s, y[None], 0.8, variant).backward()
        norms.append(float(s.grad.norm()))
    assert norms == pytest.approx([0.2398, 0.0480], abs=1e-4)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 12), st.floats(0.05, 5), st.integers(0, 999))
def test_targets_decrease_and_their_entropy_bounds_the_loss(n, tau, seed):
    y = targets(torch.arange(1.0, n + 1).double(), tau)
    assert float(y.sum()) == pytest.approx(1)
    assert (y.diff() <= 0).all()
    s = torch.randn(1, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    entropy = float(-(y * torch.log(y.clamp(min=1e-300))).sum())
    assert float(rank_loss(s, y[None], tau)) >= entropy - 1e-9
    dummy = torch.cat([s, torch.full((1, 2), -torch.inf, dtype=torch.float64)], dim=1)
    ranks = torch.cat([torch.arange(1.0, n + 1), torch.zeros(2)])[None].double()
    assert float(rank_loss(dummy, targets(ranks, tau), tau)) == pytest.approx(float(rank_loss(s, y[None], tau)))


def test_tied_grades_share_their_mean():
    y = targets(torch.tensor([1.0, 2, 3, 4]), 0.8, grades=torch.tensor([1, 1, 0, 0]))
    expected = torch.softmax(torch.tensor([0.75, 0.75, 7 / 24, 7 / 24]) / 0.8, dim=0)
    torch.testing.assert_close(y, expected)


@pytest.mark.slow
def test_eight_lists_are_learned_by_heart():
    torch.manual_seed(0)
    model = build("bert", torch.float32).train()
    e, mask = torch.randn(8, 5, 4, 24), torch.ones(8, 5, dtype=torch.bool)
    ranks = torch.stack([torch.randperm(5) + 1.0 for _ in range(8)])
    y = targets(ranks, 0.8)
    optimiser = torch.optim.Adam([*model.decoder.parameters(), model.start], lr=1e-2)
    for _ in range(200):
        optimiser.zero_grad()
        scores, _ = model.score(e, mask)
        loss = rank_loss(scores, y, 0.8)
        loss.backward()
        optimiser.step()
    entropy = float(-(y * y.log()).sum(dim=-1).mean())
    assert float(loss.detach()) - entropy < 0.01
    assert (scores.argsort(dim=1, descending=True) == ranks.argsort(dim=1)).all()


def test_cross_encoder_reads_pairs_alone(tmp_path):
    torch.manual_seed(0)
    model = CrossEncoder(CrossEncoderConfig(max_len=40), bert(), tokenizer())
    whole = model.rerank(QUERY, PASSAGES)
    np.testing.assert_allclose(whole[:3], model.rerank(QUERY, PASSAGES[:3]), atol=1e-5)
    model.save(tmp_path / "model")
    np.testing.assert_array_equal(load_reranker(tmp_path / "model").rerank(QUERY, PASSAGES), whole)
    assert model.rerank(QUERY, []).shape == (0,)


def test_ragged_lists_keep_their_lengths():
    e, mask = ragged([np.ones((2, 4, 3), np.float32), np.ones((0, 4, 3), np.float32)])
    assert mask.tolist() == [[True, True], [False, False]]
    assert e.shape == (2, 2, 4, 3)
