"""Cross-encoders of Hugging Face: scores as transformers gives them, layouts of pairs, refusals, and a search."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import tiny_text
import torch
from tokenizers.processors import RobertaProcessing, TemplateProcessing
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    PreTrainedTokenizerFast,
    XLMRobertaConfig,
    XLMRobertaForSequenceClassification,
)
from typer.testing import CliRunner

from pipelines.text_publish import find_reranker
from ranking.bundle import Bundle
from ranking.searcher import Searcher
from ranking.sequence_reranker import SequenceReranker
from ranking.text_backbone import architecture_of
from ranking.text_models import load_reranker
from recsys.cli import app
from recsys.errors import ConfigError, DataError

POSITIONS = 40
SHAPE = {
    "vocab_size": len(tiny_text.SPECIAL) + len(tiny_text.WORDS),
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "initializer_range": 0.4,
}
PASSAGES = ["wing flow", "", "heat shock layer plate cone", "speed", "mach drag lift jet skin wall tube gas wing flow"]
QUERY = "heat flow"


def words(family: str) -> PreTrainedTokenizerFast:
    """A tokenizer that lays out pairs as its family does: [CLS] a [SEP] b [SEP], or <s> a </s> </s> b </s>."""
    tokenizer = tiny_text.tokenizer().tokenizer
    cls, sep = (tokenizer.token_to_id(name) for name in ("[CLS]", "[SEP]"))
    if family == "bert":
        tokenizer.post_processor = TemplateProcessing(
            "[CLS] $A [SEP]", "[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1", [("[CLS]", cls), ("[SEP]", sep)]
        )
    else:
        tokenizer.post_processor = RobertaProcessing(("[SEP]", sep), ("[CLS]", cls), add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]")


def classifier(family: str, logits: int = 1) -> torch.nn.Module:
    torch.manual_seed(0)
    if family == "bert":
        config = BertConfig(**SHAPE, max_position_embeddings=POSITIONS, num_labels=logits)
        return BertForSequenceClassification(config).eval()
    config = XLMRobertaConfig(
        **SHAPE, max_position_embeddings=POSITIONS + 1, num_labels=logits, type_vocab_size=1, pad_token_id=0
    )
    return XLMRobertaForSequenceClassification(config).eval()


@pytest.fixture(params=["bert", "xlm-roberta"])
def family(request) -> str:
    return request.param


@pytest.fixture
def folder(family, tmp_path) -> Path:
    place = tmp_path / family
    classifier(family).save_pretrained(place)
    words(family).save_pretrained(place)
    return place


def by_transformers(family: str, query: str, passages: list[str]) -> np.ndarray:
    """Scores of transformers' own model and tokenizer, the passage cut to the model's positions."""
    tokenizer = words(family)
    encoded = tokenizer(
        [query] * len(passages),
        passages,
        truncation="only_second",
        max_length=POSITIONS,
        padding=True,
        return_tensors="pt",
        return_token_type_ids=family == "bert",
    )
    with torch.inference_mode():
        return classifier(family)(**encoded).logits[:, 0].numpy()


def test_scores_are_those_of_transformers(family, folder):
    model = SequenceReranker.of(str(folder))
    long = [*PASSAGES, "jet " * 35, "jet " * 100 + "wing"]
    found = model.rerank(QUERY, long)
    assert found == pytest.approx(by_transformers(family, QUERY, long), abs=1e-5)
    assert np.ptp(found) > 0.01
    assert model.config.max_len == POSITIONS
    room = POSITIONS - len(QUERY.split()) - (3 if family == "bert" else 4)
    edge = ["jet " * room, "jet " * (room + 1)]
    assert model.truncated(QUERY, edge).tolist() == [False, True]
    assert model.truncated(QUERY, long).tolist() == [False] * 5 + [len(long[5].split()) > room, True]
    assert len(model.rerank("wing " * 500, PASSAGES)) == len(PASSAGES)


def test_a_pair_scores_alike_in_every_batch_and_work_can_be_ended(folder):
    model = SequenceReranker.of(str(folder))
    together = model.rerank(QUERY, PASSAGES)
    assert together == pytest.approx([model.rerank(QUERY, [one])[0] for one in PASSAGES], abs=1e-5)
    many = model.rerank_many([QUERY, "jet"], [PASSAGES, PASSAGES[::-1]])
    assert many[0] == pytest.approx(together, abs=1e-5)
    assert many[1] == pytest.approx(model.rerank("jet", PASSAGES)[::-1], abs=1e-5)
    assert model.rerank(QUERY, []).shape == (0,)
    told = []
    passages = [" ".join(words) for words in itertools.permutations(tiny_text.WORDS, 3)][:1000]
    model.rerank(QUERY, passages * 2, lambda *progress: told.append(progress))
    assert told[-1] == (1000, 1000)  # equal pairs are read once
    assert len(told) > 1


def test_a_saved_model_scores_bit_for_bit_alike(folder, tmp_path):
    model = SequenceReranker.of(str(folder))
    model.save(tmp_path / "saved")
    again = load_reranker(tmp_path / "saved")
    assert again.rerank(QUERY, PASSAGES).tolist() == model.rerank(QUERY, PASSAGES).tolist()
    assert again.digest == model.digest
    assert architecture_of(again.transformer) == architecture_of(model.transformer)
    assert {path.name for path in (tmp_path / "saved").iterdir()} == {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    }


def test_what_gives_no_single_score_is_refused(family, folder, tmp_path):
    classifier(family, logits=2).save_pretrained(folder)
    with pytest.raises(DataError, match=r"2 logits for a pair; expected a cross-encoder with one"):
        find_reranker(str(folder), tmp_path)
    tiny_text.bert().save_pretrained(folder)
    with pytest.raises(DataError, match="no trained sequence classifier"):
        find_reranker(str(folder), tmp_path)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(DataError, match="is a pickle, which is refused"):
        find_reranker(str(folder), tmp_path)
    with pytest.raises(ConfigError, match="no run 'mpv'"):
        find_reranker("mpv", tmp_path)


@pytest.mark.parametrize("family", ["xlm-roberta"], indirect=True)
def test_it_is_published_and_orders_a_search(folder, tmp_path):
    corpus, place = tiny_text.beir(tmp_path / "corpus"), tmp_path / "workspace"
    arguments = ["publish", "--text-encoder", "none", "--reranker", folder, "--corpus", corpus, "--workspace", place]
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    done = CliRunner().invoke(app, [str(argument) for argument in (*arguments, "--mlflow", uri)])
    assert done.exit_code == 0, done.output
    bundle = Bundle.load(place / "bundle")
    assert bundle.manifest.text.reranker == "sequence"
    found = Searcher(bundle.text).search(QUERY, rerank=True)
    texts = [bundle.text.passages.text(row) for row in found.rows[: found.reranked].tolist()]
    scores = SequenceReranker.of(str(folder)).rerank(QUERY, texts)
    assert found.reranked > 1
    assert found.scores[: found.reranked] == pytest.approx(scores, abs=1e-5)
    assert (np.diff(found.scores[: found.reranked]) <= 0).all()
