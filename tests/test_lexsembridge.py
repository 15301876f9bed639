"""LexSemBridge against its formulas, loops and worked examples, on tiny random models."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tiny_text import WORDS, bert, dense, tokenizer

from pipelines.text_train import contrastive_loss
from ranking.fusion import best
from ranking.lexsembridge import Lexicon, LexSemBridge, LexSemBridgeConfig, enhance
from ranking.text_backbone import padded
from ranking.text_models import load_encoder
from ranking.text_pooling import max_pooled
from recsys.errors import ConfigError

TEXTS = ["wing flow heat wing", "shock", "", "layer plate cone speed mach drag lift jet skin wall tube gas gas"]
KINDS = [("slr", "code"), ("slr", "paper"), ("llr", "code"), ("llr", "paper"), ("clr", "code")]


def build(kind="slr", variant="code", dtype=torch.float32, random=True, **options) -> LexSemBridge:
    config = LexSemBridgeConfig(weights=kind, variant=variant, clr_backbone="own", **options)
    model = LexSemBridge(config, bert(mlm=kind == "clr"), tokenizer()).to(dtype)
    if random:
        torch.manual_seed(1)
        with torch.no_grad():
            for parameter in model.lexicon.parameters():
                parameter.add_(torch.randn_like(parameter))
    return model.eval()


def parts(model: LexSemBridge, texts=TEXTS):
    ids, mask = padded(model.tokenizer.encode(texts, 64), model.tokenizer.pad)
    hidden, raw = model.states(ids, mask)
    clr = model.contextual(ids, mask)
    return ids, mask, hidden, raw, None if clr is None else clr.to(raw.dtype)


# The first worked example. P = the passages, e = the query's plain vector.
W = torch.tensor([[1.0, 0, 2, 0], [0, 1, 0, -1], [0, 0, 1, 1]])
P = torch.tensor([[1.0, 0, 0], [0, -1, 0], [0, 0, 1], [3**-0.5, -(3**-0.5), 3**-0.5]])
E = torch.tensor([[0.6, -0.64, 0.48]])


@pytest.mark.parametrize(
    ("w", "vector", "scores", "cosine", "bound"),
    [
        ([0, 1, 1, 0], [0.8484, -0.3329, 0.4116], [0.8484, 0.3329, 0.4116, 0.9197], 0.9197, 0.8868),
        ([0, 0.6931, 0.6931, 0], [0.7626, -0.4067, 0.5029], [0.7626, 0.4067, 0.5029, 0.9655], 0.9593, 0.9428),
        ([0, 0.4055, 1.0986, 0], [0.9035, -0.1606, 0.3973], [0.9035, 0.1606, 0.3973, 0.8438], 0.8356, 0.6999),
        ([0, 0, 0, 0], [0.5078, -0.5417, 0.6698], [0.5078, 0.5417, 0.6698, 0.9927], 0.9729, 0.9695),
    ],
)
def test_worked_example_one(w, vector, scores, cosine, bound):
    z = W @ torch.tensor(w, dtype=torch.float32) + torch.tensor([0, 0, 0.5])
    enhanced = enhance(E, z[None])[0]
    torch.testing.assert_close(enhanced, torch.tensor(vector), atol=1e-4, rtol=0)
    torch.testing.assert_close(P @ enhanced, torch.tensor(scores), atol=1e-4, rtol=0)
    assert float(enhanced @ E[0]) == pytest.approx(cosine, abs=1e-4)
    assert 1 / math.cosh(float(z.max() - z.min()) / 2) == pytest.approx(bound, abs=1e-4)


@pytest.mark.parametrize(("kind", "value"), [("slr", 1.0), ("llr", None)])
def test_worked_example_one_through_the_lexicon(kind, value):
    config = LexSemBridgeConfig(weights=kind)
    lexicon = Lexicon(config, 3, 4, [])
    with torch.no_grad():
        lexicon.W.copy_(W.T)
        lexicon.c.copy_(torch.tensor([0, 0, 0.5]))
        if kind == "llr":
            lexicon.u.zero_()
            lexicon.b.fill_(1.0)  # ReLU(0 + 1): the same weights as SLR's
    ids = torch.tensor([[2, 1, 2]])
    z = lexicon.z(ids, torch.ones_like(ids), torch.zeros(1, 3, 3), E)
    torch.testing.assert_close(z, torch.tensor([[2.0, 1.0, 1.5]]))


@pytest.mark.parametrize("ignore_sep", [False, True])
def test_worked_example_two(ignore_sep):
    excluded = [101, 0, 100, *([102] if ignore_sep else [])]
    lexicon = Lexicon(LexSemBridgeConfig(weights="llr"), 1, 103, excluded)
    with torch.no_grad():
        lexicon.u.fill_(1.0)
        lexicon.b.zero_()
    ids = torch.tensor([[101, 7, 9, 7, 102, 0]])
    mask = torch.tensor([[1, 1, 1, 1, 1, 0]])
    hidden = torch.tensor([3, 0.2, 0.7, 0.5, 0.4, 9]).reshape(1, 6, 1)
    w = lexicon.weights(ids, mask, hidden, hidden[:, 0])[0]
    expected = torch.zeros(103)
    expected[[7, 9, 102]] = torch.tensor([0.5, 0.7, 0.0 if ignore_sep else 0.4])
    torch.testing.assert_close(w, expected)


@pytest.mark.parametrize(("kind", "variant"), KINDS)
def test_zero_fusion_is_the_plain_encoder_and_has_a_gradient(kind, variant):
    """At v = 1/d the gradient is e_q * e_p - (e_q . e_p) e_q * e_q."""
    model = build(kind, variant, torch.float64, random=False)
    ids, mask, *_ = parts(model)
    fused, plain = model(ids, mask), model.plain(ids, mask)
    torch.testing.assert_close(fused, plain, atol=1e-15, rtol=0)
    z = torch.zeros(1, model.dim, dtype=torch.float64, requires_grad=True)
    q, p = plain[:1].detach(), plain[1:2].detach()
    (enhance(q, z) @ p.T).sum().backward()
    torch.testing.assert_close(z.grad, q * p - (q * p).sum() * q * q, atol=1e-12, rtol=0)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.01, 8))
def test_enhancement_keeps_signs_and_stays_within_its_bound(seed, spread):
    draws = torch.Generator().manual_seed(seed)
    e = F.normalize(torch.randn(3, 8, generator=draws, dtype=torch.float64), dim=-1)
    z = torch.randn(3, 8, generator=draws, dtype=torch.float64) * spread
    v, enhanced = torch.softmax(z, dim=-1), enhance(e, z)
    assert (v > 0).all()
    torch.testing.assert_close(v.sum(dim=-1), torch.ones(3, dtype=torch.float64))
    assert (enhanced.sign() == e.sign()).all()
    spans = z.amax(dim=-1) - z.amin(dim=-1)
    assert ((enhanced * e).sum(dim=-1) >= 1 / torch.cosh(spans / 2) - 1e-12).all()
    torch.testing.assert_close(enhance(e, z + 3.0), enhanced)
    torch.testing.assert_close(enhance(e * 7.0, z), enhanced)
    torch.testing.assert_close(enhance(e, torch.full_like(z, spread)), e, atol=1e-15, rtol=0)
    one = torch.ones_like(z[:1])
    jacobian = torch.autograd.functional.jacobian(lambda x: enhance(one, x[None], normalized=False)[0] / 8, z[0])
    torch.testing.assert_close(jacobian, torch.diag(v[0]) - torch.outer(v[0], v[0]), atol=1e-9, rtol=0)


@pytest.mark.parametrize(("kind", "variant"), KINDS)
def test_padding_batching_and_order_change_nothing(kind, variant):
    """Extra PAD columns, one by one, and input order."""
    model = build(kind, variant, torch.float64)
    ids, mask, *_ = parts(model)
    pad = torch.full((len(ids), 5), model.tokenizer.pad)
    wider = model(torch.cat([ids, pad], dim=1), torch.cat([mask, torch.zeros_like(pad)], dim=1))
    torch.testing.assert_close(wider, model(ids, mask), atol=1e-12, rtol=0)
    single = build(kind, variant)
    together = single.encode_queries(TEXTS)
    alone = np.concatenate([single.encode_queries([text]) for text in TEXTS])
    np.testing.assert_allclose(together, alone, atol=1e-5)
    np.testing.assert_allclose(single.encode_queries(TEXTS[::-1])[::-1], together, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, atol=1e-6)


@pytest.mark.parametrize("variant", ["paper", "code"])
def test_static_weights_ignore_order_and_repetition(variant):
    model = build("slr", variant)
    lists = ["wing flow heat", "heat wing flow wing wing"]
    ids, mask, hidden, raw, _ = parts(model, lists)
    first, second = model.lexicon.weights(ids, mask, hidden, raw)
    torch.testing.assert_close(first, second)
    if variant == "paper":
        values = first.unique()
        torch.testing.assert_close(values, torch.tensor([0.0, math.log(2)]))
    assert int((first != 0).sum()) == 4  # three words and [SEP], which counts
    model.lexicon.excluded = torch.tensor(model.tokenizer.special("[CLS]", "[PAD]", "[UNK]", "[SEP]"))
    ids, mask, hidden, raw, _ = parts(model, [""])
    assert not model.lexicon.weights(ids, mask, hidden, raw).any()
    torch.testing.assert_close(model.lexicon.z(ids, mask, hidden, raw)[0], model.lexicon.c)


def test_learned_and_contextual_weights_equal_naive_loops():
    """The code's LLR by token, the paper's LLR and CLR by formula, the score by a loop."""
    model = build("llr", "code", torch.float64)
    ids, mask, hidden, raw, _ = parts(model)
    lexicon = model.lexicon
    w = lexicon.weights(ids, mask, hidden, raw)
    for row in range(len(ids)):
        expected = torch.zeros(w.shape[1], dtype=w.dtype)
        for place in range(ids.shape[1]):
            id_ = int(ids[row, place])
            if mask[row, place] and id_ not in lexicon.excluded.tolist():
                value = torch.relu(hidden[row, place] @ lexicon.u[:, 0] + lexicon.b[0])
                expected[id_] = torch.maximum(expected[id_], value)
        torch.testing.assert_close(w[row], expected)
    vectors = model(ids, mask)
    for row in range(len(ids)):
        z = lexicon.c + sum(w[row, t] * lexicon.W[t] for t in range(w.shape[1]))
        v = torch.exp(z) / torch.exp(z).sum()
        product = v * F.normalize(raw[row], dim=0)
        torch.testing.assert_close(vectors[row], product / product.norm())
    paper = build("llr", "paper", torch.float64)
    ids, mask, hidden, raw, _ = parts(paper)
    naive = torch.log(1 + torch.clamp(raw @ paper.lexicon.u + paper.lexicon.b, min=0))
    torch.testing.assert_close(paper.lexicon.weights(ids, mask, hidden, raw), naive)


def test_maximum_pooling_equals_log_then_maximum_and_is_monotone():
    logits, mask = torch.randn(2, 5, 30), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    each = torch.log1p(torch.relu(logits)).masked_fill(mask[..., None] == 0, 0)
    torch.testing.assert_close(max_pooled(logits, mask), each.amax(dim=1))
    assert (max_pooled(logits + 0.5, mask) >= max_pooled(logits, mask)).all()


@pytest.mark.parametrize(("kind", "variant"), [*KINDS, ("c_only", "code"), ("linear_map", "code"), ("off", "code")])
def test_passages_stay_those_of_the_plain_encoder(kind, variant, tmp_path):
    """A stale index stays valid; everything survives save and load."""
    model = build(kind, variant)
    plain = dense()
    if kind != "clr":  # the bare model and the one with a head draw different weights
        np.testing.assert_array_equal(model.encode_passages(TEXTS), plain.encode_passages(TEXTS))
    model.save(tmp_path / "model")
    again = load_encoder(tmp_path / "model")
    np.testing.assert_array_equal(again.encode_queries(TEXTS), model.encode_queries(TEXTS))
    assert again.digest == model.digest
    kept = load_file(tmp_path / "model" / "model.safetensors")
    assert {f"lexicon.{name}" for name, _ in model.lexicon.named_parameters()} <= set(kept)


def test_fusion_at_test_is_a_switch():
    model = build("slr")
    off = build("slr", fusion_at_test=False)
    assert np.abs(model.encode_queries(TEXTS) - off.encode_queries(TEXTS)).max() > 1e-3
    np.testing.assert_array_equal(off.encode_queries(TEXTS), off.encode_passages(TEXTS))


def test_contrastive_loss_has_its_known_values():
    flat = torch.zeros(4, 3)
    target = torch.arange(4) * 2
    none = torch.zeros(4, 8, dtype=torch.bool)
    assert float(contrastive_loss(flat, torch.zeros(8, 3), target, none, 0.02)) == pytest.approx(math.log(8))
    assert float(
        contrastive_loss(torch.zeros(512, 3), torch.zeros(1024, 3), torch.arange(512) * 2, none[:1, :1], 0.02)
    ) == pytest.approx(math.log(1024), abs=1e-4)
    q, p = torch.eye(4), torch.eye(8, 4) * 0
    p[target] = torch.eye(4)
    assert float(contrastive_loss(q, p, target, none, 0.02)) == pytest.approx(0, abs=1e-6)
    p[target + 1] = p[target]
    assert float(contrastive_loss(q, p, target, none, 0.02)) == pytest.approx(math.log(2), abs=1e-6)
    draws = torch.Generator().manual_seed(0)
    q, p, order = torch.randn(4, 3, generator=draws), torch.randn(8, 3, generator=draws), torch.randperm(8)
    moved = float(contrastive_loss(q, p[order], torch.argsort(order)[target], none, 0.02))
    assert moved == pytest.approx(float(contrastive_loss(q, p, target, none, 0.02)), rel=1e-5)
    q, p = torch.eye(4), torch.eye(8, 4) * 0
    p[target], p[target + 1] = torch.eye(4), torch.eye(4)
    same = none.clone()
    same[torch.arange(4), target + 1] = True  # false negatives are masked out
    assert float(contrastive_loss(q, p, target, same, 0.02)) == pytest.approx(0, abs=1e-6)


def test_whole_passage_as_query_finds_itself():
    plain = dense(max_query_len=256)
    passages = [" ".join(WORDS[n : n + 4]) for n in range(10)]
    scores = plain.encode_queries(passages) @ plain.encode_passages(passages).T
    np.testing.assert_allclose(np.diag(scores), 1, atol=1e-6)
    assert best(scores, 1).rows[:, 0].tolist() == list(range(10))


@pytest.mark.slow
def test_a_splade_head_is_silent_at_the_first_position():
    """On the packaged SPLADE: CLR at [CLS] hardly has non-zeros, with maximum pooling it has ten times as many."""
    found = {}
    for how in ("cls", "max"):
        config = LexSemBridgeConfig(backbone="splade-tiny", weights="clr", clr_backbone="own", clr_pool=how)
        model = LexSemBridge.of(config)
        ids, mask = padded(model.tokenizer.encode(["heat transfer on a slender cone"], 64), 0)
        found[how] = int((model.contextual(ids, mask) > 0).sum())
    assert found["max"] > 10 * found["cls"]


@pytest.mark.parametrize(("kind", "variant"), [*KINDS, ("c_only", "code")])
def test_diagnostics_are_what_encoding_multiplies(kind, variant):
    model = build(kind, variant)
    v, w = model.enhancement(TEXTS), model.weights(TEXTS)
    plain = dense(max_query_len=64)
    if kind != "clr":  # whose backbone here has a head
        product = v * plain.encode_queries(TEXTS)
        expected = product / np.linalg.norm(product, axis=1, keepdims=True)
        np.testing.assert_allclose(model.encode_queries(TEXTS), expected, atol=1e-5)
    np.testing.assert_allclose(v.sum(axis=1), 1, atol=1e-5)
    assert w.shape == (4, len(model.tokenizer))
    if (kind, variant) == ("slr", "code"):
        counted = set(TEXTS[0].split())
        names = [model.tokenizer.tokenizer.id_to_token(int(place)) for place in w[0].nonzero()[1]]
        assert set(names) == counted | {"[SEP]"}
    if kind == "c_only":
        assert w.nnz == 0


def test_what_multiplies_nothing_has_no_enhancement():
    with pytest.raises(ConfigError, match="no enhancement"):
        build("off").enhancement(TEXTS)
