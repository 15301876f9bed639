"""Text models on a device: they encode, rerank and learn there as on the CPU; run on the CPU too, where that is exact.

Scores of float32 products agree to 1e-3 of their size (measured: 1e-5): a GPU adds in another order.
"""

import copy
import itertools

import numpy as np
import pytest
import tiny_text
import torch

from pipelines.first_stages import FirstStages
from pipelines.head_room import head_room
from pipelines.pair_vectors import PairVectors
from pipelines.shipped import CONFIGS
from pipelines.text_corpus import read_corpus, read_queries
from pipelines.text_evaluate import TextModelRun, evaluate_text
from pipelines.text_models import load_text_config, train
from pipelines.text_train import TextLoop
from ranking.lexsembridge import LexSemBridge, LexSemBridgeConfig
from ranking.mvp import Mvp, MvpConfig
from ranking.splade import Splade
from ranking.text_backbone import device_of
from ranking.text_models import load_encoder, load_reranker

CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
on_devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=CUDA)])
TEXTS = ["wing flow heat", "", "jet", "shock layer plate cone speed mach drag lift", "heat heat wing unheard"]
LISTS = [TEXTS, [], TEXTS[2:4], TEXTS[:1]]
QUERIES = ["wing heat", "jet", "gas tube", "cone"]
RERANKERS = ("mvp", "mvp_apart", "cross_encoder")
WAYS = [*itertools.product((*RERANKERS, "lexsembridge"), ("fusion", "full")), ("lexsembridge", "passages")]
STEPS = 12
SETS = {
    "fusion": ["train=fusion"],
    "full": ["train=full"],
    "passages": ["train=full", "batches=passages", "layers=1", "train_tokens=12"],
}


def close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)


def lexsembridge(kind: str) -> LexSemBridge:
    config = LexSemBridgeConfig(backbone="tiny", weights=kind, clr_backbone="tiny", max_passage_len=48)
    lexical = tiny_text.bert(mlm=True) if kind == "clr" else None
    model = LexSemBridge(config, tiny_text.bert(), tiny_text.tokenizer(), lexical)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.lexicon.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def reranker(name: str):
    if name == "mvp_t5":
        return Mvp(MvpConfig(max_len=48), tiny_text.t5(), tiny_text.tokenizer(t5=True))
    model = tiny_text.model_of(load_text_config(CONFIGS / f"{name}.toml"))
    if name == "mvp_apart":
        model.count_words(TEXTS)
    return model


@on_devices
@pytest.mark.parametrize("kind", ["off", "slr", "llr", "clr", "c_only", "linear_map"])
def test_an_encoder_encodes_alike(kind, device):
    model = lexsembridge(kind)
    there = copy.deepcopy(model).to(device)
    close(there.encode_queries(TEXTS), model.encode_queries(TEXTS))
    close(there.encode_passages(TEXTS), model.encode_passages(TEXTS))
    close(there.weights(TEXTS).toarray(), model.weights(TEXTS).toarray())
    if kind not in ("off", "linear_map"):
        close(there.enhancement(TEXTS), model.enhancement(TEXTS))
    assert there.digest == model.digest


@on_devices
def test_first_stages_find_alike(device, tmp_path):
    folder = tiny_text.beir(tmp_path / "tiny")
    corpus, queries = read_corpus(folder), read_queries(folder, read_corpus(folder), "test")
    found = []
    for place in ("cpu", device):
        encoder = tiny_text.dense().to(place)
        splade = Splade(tiny_text.bert(mlm=True).to(place), tiny_text.tokenizer())
        found.append(FirstStages(corpus, encoder, tmp_path / f"{len(found)}", splade))
    close(found[1].passage_vectors, found[0].passage_vectors)
    close(found[1].splade.encode(TEXTS).toarray(), found[0].splade.encode(TEXTS).toarray())
    here, there = (stages.all(queries.texts, 0.4) for stages in found)
    for name, ranking in here.items():
        close(np.sort(there[name].scores), np.sort(ranking.scores))


@on_devices
@pytest.mark.parametrize("name", ["mvp", "mvp_t5", "mvp_apart", "cross_encoder"])
def test_a_reranker_scores_alike(name, device, tmp_path):
    model = reranker(name)
    there = copy.deepcopy(model).to(device)
    for ours, expected in zip(there.rerank_many(QUERIES, LISTS), model.rerank_many(QUERIES, LISTS), strict=True):
        close(ours, expected)
    pairs = [QUERIES[0]] * len(TEXTS), TEXTS
    kept = [PairVectors.of(one, tmp_path / f"{place}").get(*pairs) for place, one in enumerate((model, there))]
    close(kept[1], kept[0])
    close(there.rank_vectors([kept[1], kept[1][:2]])[1], model.rank_vectors([kept[0][:2]])[0])
    if isinstance(model, Mvp):
        close(there.view_scores(QUERIES[0], TEXTS), model.view_scores(QUERIES[0], TEXTS))
        close(there.anchors(QUERIES[0], TEXTS), model.anchors(QUERIES[0], TEXTS))


@on_devices
def test_the_ceiling_is_alike(device):
    draws = np.random.default_rng(0)
    passages = draws.normal(size=(20, 8)).astype(np.float32)
    passages /= np.linalg.norm(passages, axis=1, keepdims=True)
    here, there = (head_room(passages[:8] * 0.9, passages, np.arange(8), (1.0,), device=d) for d in ("cpu", device))
    assert (there[0].gold, there[0].wrong) == pytest.approx((here[0].gold, here[0].wrong), abs=0.13)  # one query of 8


def learn(name, how, device, folder, directory, uri, steps=STEPS):
    sets = [
        *("corpus.unit=word", "corpus.part_of_passage=[4]", "corpus.natural=train", f"corpus.path={folder}"),
        *("rows=8", "seed=1", f"device={device}", f"stop.steps={steps}", "stop.validate_every=4"),
        *("stop.checkpoint_every=4", "stop.patience=99", "optimiser.learning_rate=3e-4", *SETS[how]),
        *("optimiser.learning_rate_fresh=1e-2", "optimiser.warmup=0.0"),
        *(("temperature=0.1", "model.max_passage_len=48") if name == "lexsembridge" else ("rank_tau=0.2",)),
    ]
    if device == "cuda":  # slow on most CPUs
        sets.append("bfloat16=true")
    config = load_text_config(CONFIGS / f"{name}.toml", sets)
    encoder = tiny_text.dense()
    vectors = folder / f"cache-{device}"
    return train(config, folder / "none", directory, vectors, uri, encoder=lambda _: encoder, model=tiny_text.model_of)


@on_devices
@pytest.mark.parametrize(("name", "how"), WAYS)
def test_a_run_learns_goes_on_after_a_kill_and_is_loaded_on_the_cpu(
    name, how, device, tmp_path, mlflow_uri, monkeypatch
):
    folder, directory = tiny_text.beir(tmp_path / "tiny"), tmp_path / "run"
    step, losses, dies = TextLoop.step, [], set()

    def watched(self):
        assert device_of(self.task.model).type == device
        if self.state.step in dies:
            raise KeyboardInterrupt
        found = step(self)
        if self.state.step in (1, STEPS):
            self.task.model.eval()
            with torch.no_grad():
                losses.append(float(self.task.loss(0)[0]))
        return found

    monkeypatch.setattr(TextLoop, "step", watched)
    whole = learn(name, how, device, folder, tmp_path / "whole", mlflow_uri)
    assert losses[1] < losses[0]
    dies.add(7)
    with pytest.raises(KeyboardInterrupt):
        learn(name, how, device, folder, directory, mlflow_uri)
    dies.clear()
    resumed = learn(name, how, device, folder, directory, mlflow_uri)
    first, second = ([point.get("train/loss", 0.0) for point in run.state.curve] for run in (whole, resumed))
    assert second == (first if device == "cpu" else pytest.approx(first, rel=5e-2))  # sums of a GPU differ a little
    assert learn(name, how, device, folder, directory, mlflow_uri).run_id == resumed.run_id

    load = load_encoder if name == "lexsembridge" else load_reranker
    model = load(resumed.model)
    assert device_of(model).type == "cpu"
    there = load(resumed.model).to(device)
    if name == "lexsembridge":
        close(there.encode_queries(QUERIES), model.encode_queries(QUERIES))
    else:
        close(there.rerank(QUERIES[0], TEXTS), model.rerank(QUERIES[0], TEXTS))


def test_the_device_makes_no_other_run(tmp_path, mlflow_uri, monkeypatch):
    where = tiny_text.beir(tmp_path / "tiny"), tmp_path / "run", mlflow_uri
    first = learn("cross_encoder", "fusion", "cpu", *where, steps=2)
    monkeypatch.setattr(TextLoop, "step", None)  # no step is taken again
    assert learn("cross_encoder", "fusion", "auto", *where, steps=2).table() == first.table()
    with pytest.raises(TypeError):
        learn("cross_encoder", "fusion", "auto", *where, steps=3)


@on_devices
def test_evaluation_measures_alike(device, tmp_path, mlflow_uri):
    folder = tiny_text.beir(tmp_path / "tiny")
    names = ("lexsembridge", "mvp", "cross_encoder")
    for name in names:
        learn(name, "full", device, folder, tmp_path / name, mlflow_uri, steps=2)
    corpus = read_corpus(folder)
    tasks = {"natural": read_queries(folder, corpus, "test")}
    found = []
    for place in ("cpu", device):
        encoder = tiny_text.dense().to(place)
        runs = [TextModelRun.load(name, tmp_path / name, place) for name in names]
        stages = FirstStages(corpus, encoder, tmp_path / f"{place}-{len(found)}")
        found.append(evaluate_text(runs, stages, tasks, 0.4, places=10)[0].values)
    assert set(found[0]) == set(found[1])
    for name in ("dense", *names):
        assert found[1][name]["ndcg_at_10"].mean() == pytest.approx(found[0][name]["ndcg_at_10"].mean(), abs=0.1)
