"""Encodings of pairs: read once and kept, and the same as what the model reads at every step."""

from dataclasses import replace

import numpy as np
import pytest
import tiny_text
import torch

from pipelines.pair_vectors import PairVectors
from pipelines.reranker_task import Pool, RerankerTask, rerank_pool
from pipelines.shipped import CONFIGS
from pipelines.text_corpus import read_corpus, read_queries
from pipelines.text_models import load_text_config
from ranking.cross_encoder import CrossEncoder
from ranking.fusion import best
from ranking.mvp import Mvp
from ranking.mvp_apart import MvpApart
from recsys.errors import ConfigError


def tiny(name: str, seed: int = 0, views: int = 2) -> Mvp | MvpApart | CrossEncoder:
    options = load_text_config(CONFIGS / f"{name}.toml").model
    transformer, tokenizer = tiny_text.bert(), tiny_text.tokenizer()
    torch.manual_seed(seed)
    if name == "cross_encoder":
        return CrossEncoder(replace(options, max_len=48), transformer, tokenizer)
    if name == "mvp_apart":
        made = MvpApart(replace(options, views=views, max_len=48), transformer, tokenizer)
        with torch.no_grad():
            made.D.normal_(std=0.1)
        return made
    model = Mvp(replace(options, views=views, decoder_heads=4, max_len=48), transformer, tokenizer)
    model.begin()
    return model


def world(tmp_path):
    folder = tiny_text.beir(tmp_path / "tiny")
    corpus = read_corpus(folder)
    queries = read_queries(folder, corpus, "test")
    return corpus, Pool(queries, best(np.random.default_rng(0).random((len(queries), len(corpus))), 12))


@pytest.mark.parametrize("name", ["mvp", "mvp_apart", "cross_encoder"])
def test_kept_vectors_rank_as_read_ones_and_are_read_once(name, tmp_path, monkeypatch):
    corpus, pool = world(tmp_path)
    model = tiny(name)
    read = rerank_pool(model, corpus, pool, 10)
    rerank_pool(model, corpus, pool, 10, vectors=PairVectors.of(model, tmp_path / "cache"))
    monkeypatch.setattr(
        type(model), "states" if name == "mvp_apart" else "encode", lambda *_: pytest.fail("a pair was read twice")
    )
    other = tiny(name, seed=1)  # another seed draws another head or decoder over the same encodings
    kept = PairVectors.of(other, tmp_path / "cache")
    order = np.random.default_rng(2).permutation(10).tolist()
    rerank_pool(other, corpus, pool, 10, order, kept)
    found = rerank_pool(model, corpus, pool, 10, order, PairVectors.of(model, tmp_path / "cache"))
    np.testing.assert_array_equal(found.rows, read.rows)
    np.testing.assert_allclose(found.scores, read.scores, atol=1e-5)


def test_what_decides_an_encoding_decides_where_it_is_kept(tmp_path):
    two, four = tiny("mvp"), tiny("mvp", views=4)
    kept = PairVectors.of(two, tmp_path)
    kept.get(["wing"], ["flow heat"])
    assert len(PairVectors.of(two, tmp_path).cache) == 1
    assert len(PairVectors.of(four, tmp_path).cache) == 0
    with torch.no_grad():
        next(two.transformer.parameters()).add_(0.1)
    assert len(PairVectors.of(two, tmp_path).cache) == 0


@pytest.mark.parametrize("name", ["mvp", "mvp_apart", "cross_encoder"])
def test_a_frozen_backbone_learns_from_kept_vectors_alone(name, tmp_path):
    corpus, pool = world(tmp_path)
    config = replace(load_text_config(CONFIGS / f"{name}.toml"), train="fusion", rows=4, depth=6)
    model = tiny(name)
    task = RerankerTask(config, model, corpus, pool, pool, PairVectors.of(model, tmp_path / "cache"))
    loss, _ = task.loss(0)
    loss.backward()
    assert all(parameter.grad is None for parameter in model.transformer.parameters())
    assert all(parameter.grad is not None for parameter in task.fresh)
    live, _ = RerankerTask(config, model, corpus, pool, pool).loss(0)
    assert float(loss) == pytest.approx(float(live), abs=1e-5)
    found = pool.ranking.rows[:, 1:6]
    for place, passages in enumerate(task.lists(0)[1]):
        known = pool.queries.grades[pool.queries.texts.index(task.lists(0)[0][place])]
        assert {row for row in passages if row not in known} <= set(found.flatten().tolist())


def test_an_encoder_decoder_has_nothing_but_its_backbone_to_train(tmp_path):
    corpus, pool = world(tmp_path)
    config = replace(load_text_config(CONFIGS / "mvp.toml"), train="fusion")
    model = Mvp(replace(config.model, views=2), tiny_text.t5(), tiny_text.tokenizer(t5=True))
    with pytest.raises(ConfigError, match="train = 'full'"):
        RerankerTask(config, model, corpus, pool, pool)
