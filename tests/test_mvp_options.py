"""MVP's options and the limits of its losses: pooling of views, division of scores, first view vectors, one view."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_mvp import PASSAGES, QUERY, build, score, vectors
from tiny_text import bert, t5, tokenizer

from ranking.mvp import Mvp, MvpConfig, orthogonal_loss, pooled_views, rank_loss, scores_by_view, targets

VIEWS = torch.tensor([[[1.0, 4.0, -2.0], [0.5, 0.5, 0.5]]], dtype=torch.float64)  # [1, n, m]


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("mean", [1.0, 0.5]),
        ("max", [4.0, 0.5]),
        ("logmeanexp", [math.log((math.e + math.e**4 + math.e**-2) / 3), 0.5]),
    ],
)
def test_views_are_pooled_as_asked(how, expected):
    assert pooled_views(VIEWS, how)[0].tolist() == pytest.approx(expected)
    for path in ("t5", "bert"):
        model = build(path, view_pool=how)
        e = vectors(model)[None]
        anchors = model.score(e, torch.ones(e.shape[:2], dtype=torch.bool))[1].detach()
        each = scores_by_view(anchors, e) / model.scale
        torch.testing.assert_close(score(model, e), pooled_views(each, how))


@pytest.mark.parametrize(
    ("path", "how", "expected"),
    [("bert", "sqrt_d", math.sqrt(24)), ("bert", "none", 1.0), ("t5", "sqrt_d", 1.0), ("t5", "none", 1.0)],
)
def test_scores_are_divided_by_the_root_of_the_width_on_the_encoder_only_path_alone(path, how, expected):
    model, plain = (build(path, torch.float32, score_scale=one) for one in (how, "none"))
    plain.load_state_dict(model.state_dict())
    e = vectors(model)[None]
    assert model.scale == pytest.approx(expected)
    torch.testing.assert_close(score(model, e), score(plain, e) / expected)
    each = np.einsum("md,nmd->nm", model.anchors(QUERY, PASSAGES), e[0].numpy())
    np.testing.assert_allclose(model.view_scores(QUERY, PASSAGES), each / expected, atol=1e-4)


def test_view_tokens_begin_as_cls_and_a_little_noise_the_same_for_every_seed():
    tables = []
    for seed in (3, 4):
        torch.manual_seed(seed)
        model = Mvp(MvpConfig(views=4, decoder_heads=4), bert(), tokenizer())
        before = model.transformer.get_input_embeddings().weight.detach().clone()
        model.begin()
        after = model.transformer.get_input_embeddings().weight.detach()
        others = [row for row in range(len(after)) if row not in model.view_ids]
        assert torch.equal(after[others], before[others])
        noise = after[model.view_ids] - after[model.tokenizer.prefix[0]]
        assert 0.015 < float(noise.std()) < 0.025
        assert float(noise.abs().max()) < 0.1  # the rows themselves lie .4 apart
        assert len({tuple(row.tolist()) for row in noise}) == 4
        tables.append(after[model.view_ids])
    assert torch.equal(*tables)
    model = Mvp(MvpConfig(views=4), t5(), tokenizer(t5=True))  # whose sentinels are trained already
    before = model.transformer.get_input_embeddings().weight.detach().clone()
    model.begin()
    assert torch.equal(model.transformer.get_input_embeddings().weight, before)


@pytest.mark.parametrize("path", ["t5", "bert"])
def test_one_view_scores_by_its_anchor_alone(path):
    """M9 and M8 at m = 1."""
    scored = []
    for how in ("mean", "max", "logmeanexp"):
        model = build(path, views=1, view_pool=how)
        e = vectors(model)[None]  # [1, n, 1, d]
        with torch.no_grad():
            s, anchors = model.score(e, torch.ones(e.shape[:2], dtype=torch.bool))
        assert anchors.shape == (1, 1, model.width)
        torch.testing.assert_close(s[0], e[0, :, 0] @ anchors[0, 0] / model.scale)
        assert float(orthogonal_loss(anchors)) == pytest.approx(0, abs=1e-12)
        scored.append(s)
    torch.testing.assert_close(scored[1], scored[0])
    torch.testing.assert_close(scored[2], scored[0])


def test_an_encoder_decoder_reads_a_pair_as_published():
    """Section 2: view_1 .. view_m | Query: q | Context: c_i."""
    model = build("t5", views=2)
    (row,) = model.rows("wing flow", ["heat shock"])
    names = [model.tokenizer.tokenizer.id_to_token(one) for one in row]
    assert " ".join(names) == "<extra_id_0> <extra_id_1> | Query : wing flow | Context : heat shock </s>"


@pytest.mark.parametrize("variant", ["single", "released"])
def test_scores_that_are_no_number_are_no_padding(variant):
    y = targets(torch.tensor([[1.0, 2.0, 0.0], [1.0, 2.0, 3.0]]), 0.8)
    scores = torch.tensor([[0.3, 0.1, -torch.inf], [0.2, 0.1, 0.0]])
    assert torch.isfinite(rank_loss(scores, y, 0.8, variant))
    scores[1, 2] = torch.nan
    assert rank_loss(scores, y, 0.8, variant).isnan()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 999), st.integers(1, 5))
def test_the_orthogonal_term_knows_neither_lengths_nor_signs_nor_a_common_rotation(seed, views):
    """M8."""
    draws = torch.Generator().manual_seed(seed)
    a = torch.randn(2, views, 6, generator=draws, dtype=torch.float64)
    value = float(orthogonal_loss(a))
    rotation, _ = torch.linalg.qr(torch.randn(6, 6, generator=draws, dtype=torch.float64))
    assert float(orthogonal_loss(a @ rotation)) == pytest.approx(value, abs=1e-9)
    scale = torch.randn(2, views, 1, generator=draws, dtype=torch.float64)
    assert float(orthogonal_loss(a * scale)) == pytest.approx(value, abs=1e-9)
    assert 0 <= value <= views * (views - 1) + 1e-12


@pytest.mark.parametrize("n", [1, 5, 20])
def test_targets_are_one_hot_at_a_small_temperature_and_uniform_at_a_large_one(n):
    """M11."""
    ranks = torch.arange(1.0, n + 1).double()
    first = torch.nn.functional.one_hot(torch.tensor(0), n).double()
    torch.testing.assert_close(targets(ranks, 1e-3), first, atol=1e-12, rtol=0)
    torch.testing.assert_close(targets(ranks, 1e9), torch.full((n,), 1 / n).double(), atol=1e-8, rtol=0)


def test_the_released_loss_has_its_known_values_and_stops_ordering_the_tail():
    """Section 3.2: at a one-hot p, and at its own minimum, which is none of the single form's."""
    y = targets(torch.arange(1.0, 6).double(), 0.8)[None]

    def released(p: list[float]) -> float:
        return float(rank_loss(0.8 * torch.tensor([p]).double().log().clamp(min=-1e6), y, 0.8, "released"))

    assert released([1, 0, 0, 0, 0]) == pytest.approx(1.5384, abs=1e-4)
    best = [0.8285, 0.1714, 0.0001, 0, 0]
    assert released(best) == pytest.approx(1.5311, abs=1e-4)
    s = torch.zeros(1, 5, dtype=torch.float64, requires_grad=True)
    steps = torch.optim.Adam([s], lr=0.05)
    for _ in range(800):
        steps.zero_grad()
        rank_loss(s, y, 0.8, "released").backward()
        steps.step()
    assert float(rank_loss(s.detach(), y, 0.8, "released")) == pytest.approx(1.5311, abs=1e-4)
    np.testing.assert_allclose(torch.softmax(s.detach() / 0.8, dim=-1)[0].numpy(), best, atol=2e-3)
    assert float(rank_loss(1 / torch.arange(1.0, 6).double()[None], y, 0.8, "released")) > 1.57
