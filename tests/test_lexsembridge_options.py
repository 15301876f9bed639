"""LexSemBridge's options: how the fusion begins, what it is for, vectors of their own length, and its numbers."""

import logging
import math
from dataclasses import replace

import numpy as np
import pytest
import tiny_text
import torch
import torch.nn.functional as F
from test_lexsembridge import KINDS, TEXTS, build, parts
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing

from pipelines import neighbour_task
from pipelines.encoder_task import EncoderTask
from pipelines.first_stages import FirstStages
from pipelines.shipped import CONFIGS
from pipelines.text_corpus import Corpus, Queries, read_corpus
from pipelines.text_models import load_text_config
from pipelines.text_pairs import PairSource
from pipelines.text_train import contrastive_loss
from ranking.cross_encoder import CrossEncoder
from ranking.dense_encoder import DenseConfig, DenseEncoder
from ranking.lexsembridge import LexSemBridge, LexSemBridgeConfig, enhance
from ranking.mvp_apart import MvpApart
from ranking.text_backbone import TextTokenizer
from recsys.errors import ConfigError

CORPUS = Corpus("c", list("abcd"), ["wing flow heat", "wing heat shock", "heat flow cone", "jet skin"])
DEV = {"n": Queries(["1", "2", "3"], ["wing flow", "heat cone", "jet"], [{0: 1}, {2: 1}, {3: 1}])}


def task(folder, *changes: str, model: LexSemBridge | None = None) -> EncoderTask:
    config = load_text_config(CONFIGS / "lexsembridge.toml", ["rows=3", *changes])
    if model is None:
        model = build(config.model.weights, config.model.variant, normalized=config.model.normalized)
    encoder = DenseEncoder(DenseConfig(backbone="tiny"), tiny_text.bert(), tiny_text.tokenizer())
    return EncoderTask(replace(config, model=model.config), model, FirstStages(CORPUS, encoder, folder), DEV, DEV)


@pytest.mark.parametrize(("kind", "variant"), KINDS)
def test_a_linear_beginning_draws_w_and_c_as_torchs_linear_does_and_zero_draws_nothing(kind, variant):
    torch.manual_seed(0)
    linear, zero = (build(kind, variant, random=False, fusion_init=how).lexicon for how in ("linear", "zero"))
    assert zero.W.abs().sum() == zero.c.abs().sum() == 0
    bound = len(zero.W) ** -0.5  # torch's, of a layer from V terms
    torch.nn.init.uniform_(zero.c.data, -bound, bound)  # so that a bound of another size would show
    assert 0.95 * bound < float(linear.W.detach().abs().max()) <= bound
    assert float(linear.W.detach().std()) == pytest.approx(bound / math.sqrt(3), rel=0.1)
    assert 0.5 * bound < float(linear.c.detach().abs().max()) <= bound


@pytest.mark.parametrize("kind", ["slr", "llr", "c_only", "linear_map"])
def test_passages_are_enhanced_if_they_are_to_be(kind):
    model = build(kind, fusion_passages=True)
    plain = DenseEncoder(DenseConfig(), tiny_text.bert(), tiny_text.tokenizer()).encode_passages(TEXTS)
    passages, queries = model.encode_passages(TEXTS), model.encode_queries(TEXTS)
    np.testing.assert_allclose(passages, queries, atol=1e-6)  # all of them are short: one reading
    assert np.abs(passages - plain).max() > 1e-2
    off = build(kind, fusion_passages=True, fusion_at_test=False)
    np.testing.assert_allclose(off.encode_passages(TEXTS), passages, atol=1e-6)
    np.testing.assert_allclose(off.encode_queries(TEXTS), plain, atol=1e-6)


@pytest.mark.parametrize("how", ["cls", "max"])
def test_contextual_weights_are_log_one_plus_relu_of_the_heads_logits(how):
    model = build("clr", clr_pool=how)
    ids, mask, *_, clr = parts(model)
    logits = model.transformer(input_ids=ids, attention_mask=mask).logits.detach()
    for row, weights in enumerate(clr.detach()):
        places = logits[row, : int(mask[row].sum())] if how == "max" else logits[row, :1]
        expected = [math.log(1 + max(0.0, float(term))) for term in places.amax(dim=0)]
        assert weights.tolist() == pytest.approx(expected, abs=1e-5)
    assert float(clr.detach().max()) > 0.1
    assert float(logits.max()) > float(clr.detach().max()) + 0.1


@pytest.mark.parametrize("width", [2, 16, 256, 384])
def test_weights_of_exactly_one_leave_a_vector_as_it_is_bit_for_bit(width):
    """L2: all z alike, and 1 / d times d is 1 in float32."""
    e = torch.randn(50, width, generator=torch.Generator().manual_seed(width))
    for z in (torch.zeros_like(e), torch.full_like(e, -3.0)):
        assert torch.equal(enhance(e, z, normalized=False), e)
        if width != 384:  # 1 / d is a power of two: nothing is rounded before the division either
            assert torch.equal(enhance(e, z), F.normalize(e, dim=-1))


def test_vectors_that_keep_their_length_are_of_the_length_of_the_plain_ones():
    """Pitfall 5: v is 1 / d on average, so the product counts d times."""
    own, unit = (build("slr", normalized=normalized).encode_queries(TEXTS) for normalized in (False, True))
    v, e = build("slr").enhancement(TEXTS), build("slr", fusion_at_test=False).encode_queries(TEXTS)
    np.testing.assert_allclose(own, v.shape[1] * v * e, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(own / np.linalg.norm(own, axis=1, keepdims=True), unit, atol=1e-5)
    np.testing.assert_allclose(build("slr", random=False, normalized=False).encode_queries(TEXTS), e, atol=1e-6)
    for kind in ("off", "linear_map"):
        with pytest.raises(ConfigError, match=f"normalized = false would do nothing with weights = {kind}"):
            LexSemBridgeConfig(weights=kind, normalized=False)


@pytest.mark.parametrize(("normalized", "tau"), [(True, 0.02), (False, 1.0)])
def test_training_divides_by_the_temperature_and_by_1_where_vectors_keep_their_length(tmp_path, normalized, tau):
    made = task(tmp_path, f"model.normalized={str(normalized).lower()}")
    texts, grades, groups = made.batch(0)
    columns, target = [row for group in groups for row in group], torch.arange(len(groups)) * made.config.group
    plain, queries = (part.detach() for part in made.query_vectors(texts))
    also = made.left_out(texts, grades, columns, target)
    scores = (queries @ made.passage_vectors(columns).T / tau).masked_fill(also, -torch.inf)
    loss, parts = made.loss(0)
    assert float(loss.detach()) == pytest.approx(float(F.cross_entropy(scores, target)), rel=1e-5)
    cosine = float(F.cosine_similarity(plain, queries).mean())
    assert parts["cosine_to_plain"] == pytest.approx(cosine)
    assert cosine < 1


def test_training_by_passages_divides_by_1_too_where_vectors_keep_their_length(tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(
        neighbour_task, "contrastive_loss", lambda *args: (told.append(args[4]), contrastive_loss(*args))[1]
    )
    corpus = read_corpus(tiny_text.beir(tmp_path / "tiny"))
    encoder = DenseEncoder(DenseConfig(backbone="tiny"), tiny_text.bert(), tiny_text.tokenizer())
    stages = FirstStages(corpus, encoder, tmp_path)
    source = neighbour_task.Source(stages, PairSource(corpus), Queries([], [], []), {})
    for train in ("full", "fusion"):
        for normalized in ("true", "false"):
            by_passages = ["batches=passages", "rows=4", "train_tokens=10", f"train={train}"]
            changes = [*by_passages, f"model.normalized={normalized}"]
            config = load_text_config(CONFIGS / "lexsembridge.toml", changes)
            model = LexSemBridge(config.model, tiny_text.bert(), tiny_text.tokenizer())
            neighbour_task.NeighbourTask(config, model, [source]).loss(0)
    assert told == [0.02, 1.0] * 2


def test_a_temperature_beside_vectors_of_their_own_length_is_refused():
    with pytest.raises(ConfigError, match="forces a temperature of 1; leave temperature out"):
        load_text_config(CONFIGS / "lexsembridge.toml", ["model.normalized=false", "temperature=0.05"])


@pytest.mark.parametrize("train", ["fusion", "full"])
@pytest.mark.parametrize(("kind", "variant"), [*KINDS, ("c_only", "code"), ("linear_map", "code"), ("off", "code")])
def test_validation_tells_how_strong_the_fusion_is(kind, variant, train, tmp_path):
    made = task(tmp_path, f"model.weights={kind}", f"model.variant={variant}", f"train={train}")
    found, model = made.validate(), made.model
    assert next(iter(found)) == "ndcg_at_10"
    assert found["ndcg_at_10"] == pytest.approx(found["n/ndcg_at_10"])  # the measure alone decides
    texts = DEV["n"].texts
    plain = model.encode_passages(texts)
    cosine = (model.encode_queries(texts) * plain).sum(axis=1).mean()
    expected = {"n/cosine_to_plain": cosine}
    if kind not in ("linear_map", "off"):
        v = model.enhancement(texts)
        k = v.max(axis=1) / v.min(axis=1)
        expected |= {"n/k": k.mean(), "n/R": np.log(k).mean()}
        assert cosine >= (1 / np.cosh(np.log(k) / 2)).mean() - 1e-6
    if kind not in ("linear_map", "off", "c_only"):
        expected["n/non_zeros"] = np.diff(model.weights(texts).indptr).mean()
    if kind == "slr":
        assert found["n/non_zeros"] == pytest.approx((3 + 3 + 2) / 3)  # words and [SEP]
    assert {name: value for name, value in found.items() if not name.endswith("ndcg_at_10")} == pytest.approx(
        expected, rel=1e-3
    )


def test_queries_whose_every_weight_is_zero_are_warned_of(tmp_path, caplog):
    """Pitfall 4: a head that is silent at [CLS] multiplies every query by the same numbers."""
    model = build("clr", clr_pool="cls")
    made = task(tmp_path, model=model)
    with caplog.at_level(logging.WARNING, "pipelines.encoder_task"):
        assert made.validate()["n/non_zeros"] > 0
        assert not caplog.records
        with torch.no_grad():
            model.transformer.cls.predictions.bias.fill_(-1e4)
        made.states.clear()
        assert made.validate()["n/non_zeros"] == 0
    assert [record.getMessage() for record in caplog.records] == [
        "no term of 3 dev queries (n) has a weight: every query is multiplied by the same numbers; "
        "with weights = clr set clr_pool = max"
    ]


def test_special_tokens_are_left_out_by_what_they_are_not_by_bert_names():
    made = Tokenizer(WordLevel({"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, "wing": 4, "flow": 5}, unk_token="<unk>"))
    made.pre_tokenizer = Whitespace()
    made.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)])
    for changes, expected in [({}, [0, 1, 3]), ({"ignore_sep": True}, [0, 1, 2, 3]), ({"ignore_special": False}, [1])]:
        config = LexSemBridgeConfig(weights="slr", **changes)
        model = LexSemBridge(config, tiny_text.bert(), TextTokenizer.wrap(made))
        assert model.lexicon.excluded.tolist() == expected


def test_a_backbone_that_counts_positions_after_padding_reads_so_many_fewer():
    from transformers import RobertaConfig, RobertaModel

    config = RobertaConfig(
        vocab_size=40, hidden_size=24, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=42, pad_token_id=1,
    )  # fmt: skip
    model = DenseEncoder(DenseConfig(backbone="tiny"), RobertaModel(config).eval(), tiny_text.tokenizer())
    assert model.config.max_passage_len == 40
    assert model.encode_passages([" ".join(tiny_text.WORDS * 9)]).shape == (1, 24)


@pytest.mark.parametrize("kind", [LexSemBridge, DenseEncoder, MvpApart, CrossEncoder])
def test_models_that_read_by_an_encoder_refuse_a_backbone_with_a_decoder(kind):
    with pytest.raises(ConfigError, match=r"its backbone is t5, which has a decoder too; name one like BERT"):
        kind(kind.options(), tiny_text.t5(), tiny_text.tokenizer(t5=True))
