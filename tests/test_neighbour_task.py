"""Full training by neighbouring passages: what it draws, what it leaves alone, and a backbone cut in two."""

import re

import pytest
import tiny_text
import torch

from pipelines.first_stages import FirstStages
from pipelines.neighbour_task import NeighbourTask
from pipelines.shipped import CONFIGS
from pipelines.text_corpus import read_corpus
from pipelines.text_models import load_text_config, neighbour_sources
from pipelines.text_pairs import split_of
from pipelines.text_train import contrastive_loss
from ranking.lexsembridge import LexSemBridge
from ranking.text_backbone import padded
from ranking.top_layers import TopLayers
from recsys.errors import ConfigError

SETTINGS = [
    *("train=full", "batches=passages", "layers=1", "train_tokens=12", "rows=8", "seed=1"),
    *("corpus.unit=word", "corpus.part_of_passage=[4]", "corpus.natural=train", "model.max_passage_len=48"),
]


@pytest.fixture
def folder(tmp_path):
    return tiny_text.beir(tmp_path / "tiny")


@pytest.fixture
def encoder():
    return tiny_text.dense()


def by_passages(folder, encoder, *extra, also=()):
    sets = [*SETTINGS, f"corpus.path={folder}", f"corpus.also={[str(one) for one in also]}", *extra]
    config = load_text_config(CONFIGS / "lexsembridge.toml", sets)
    torch.manual_seed(config.seed)
    model = LexSemBridge(config.model, tiny_text.bert(), tiny_text.tokenizer())
    each = [FirstStages(read_corpus(path), encoder, folder / "cache") for path in (folder, *also)]
    return NeighbourTask(config, model, neighbour_sources(config.corpus, each, model))


@pytest.mark.parametrize("layers", [1, 2])
def test_a_transformer_cut_in_two_gives_the_states_of_the_whole(layers):
    transformer = tiny_text.bert()
    ids, mask = padded([[8, 11, 12, 13, 9], [8, 14, 9]], 0)
    expected = transformer(input_ids=ids, attention_mask=mask).last_hidden_state
    cut = TopLayers.of(transformer, layers)
    found = cut.finish(cut.read(ids, mask), mask)
    torch.testing.assert_close(found[mask > 0], expected[mask > 0], rtol=0, atol=1e-5)
    found.sum().backward()
    learned = {name for name, parameter in transformer.named_parameters() if parameter.grad is not None}
    assert learned == {name for name, p in transformer.named_parameters() if p.requires_grad}
    assert {name.split(".")[2] for name in learned} == {str(place) for place in range(2 - layers, 2)}


def test_a_transformer_is_cut_at_a_layer_it_has():
    with pytest.raises(ConfigError, match="layers is 3; expected 1 to 2"):
        TopLayers.of(tiny_text.bert(), 3)
    with pytest.raises(ConfigError, match="T5Model is not built like BERT"):
        TopLayers.of(tiny_text.t5(), 1)


def test_neighbouring_passages_bring_queries_of_their_own_and_nobody_held_out(folder, encoder, tmp_path):
    other = tiny_text.beir(tmp_path / "other", documents=30)
    task = by_passages(folder, encoder, also=[other])
    for source, row in task.documents:
        corpus = source.stages.corpus
        assert split_of(corpus.name, corpus.ids[row]) == "train"
    assert {source.stages.corpus.name for source, _ in task.documents} == {folder.name, "other"}
    windows = [" ".join(map(str, window.ids)) for window in task.windows]
    natural = {tuple(task.model.tokenizer.encode([text], 64)[0]) for text, _ in task.natural}
    for step in range(20):
        passages, queries, target, _ = task.batch(step)
        assert (passages, queries, target) == task.batch(step)[:3]
        own = passages[: task.config.rows]
        assert len(set(own)) == len(own) == 8
        for query, column in zip(queries, target, strict=True):
            words = query[1:-1]
            span = " ".join(map(str, words)) in windows[passages[column]]
            text = task.texts[passages[column]].split()
            keyword = {task.model.tokenizer.tokenizer.id_to_token(word) for word in words} <= set(text)
            assert span or keyword or tuple(query) in natural
        assert target[: task.config.cuts * 8] == [column for column in range(8) for _ in range(task.config.cuts)]


def test_how_many_layers_learn_does_not_change_the_first_loss(folder, encoder):
    losses = [float(by_passages(folder, encoder, f"layers={layers}").loss(3)[0]) for layers in (0, 1, 2)]
    assert losses[1:] == pytest.approx(losses[:1] * 2, rel=2e-3)  # kept states have half precision


def test_a_frozen_backbone_asks_each_query_among_all_training_documents(folder, encoder):
    task = by_passages(folder, encoder, "train=fusion", "model.weights=c_only")
    passages, queries, target, _ = task.batch(2)
    vectors = torch.from_numpy(task.vectors)
    scores = task._queries(queries)[0] @ vectors.T / task.config.temperature
    own = torch.tensor([passages[column] for column in target])
    expected = torch.nn.functional.cross_entropy(scores, own)  # c is 0, and no two texts are equal
    loss, _ = task.loss(2)
    assert float(loss.detach()) == pytest.approx(float(expected), rel=1e-5)
    loss.backward()
    assert {name for name, p in task.model.named_parameters() if p.grad is not None} == {"lexicon.c"}
    judged = task.validate()
    assert judged["ndcg_at_10"] == pytest.approx(sum(list(judged.values())[1:]) / (len(judged) - 1))


@pytest.mark.parametrize("train", ["full", "fusion"])
def test_no_relevant_passage_is_a_negative(folder, encoder, monkeypatch, train):
    """A natural query has several; each step draws one of them, and neighbours may bring the others."""
    with (folder / "qrels" / "train.tsv").open("a") as file:
        file.writelines(f"q2\td{document}\t1\n" for document in (6, 7, 8, 9, 10))
    task = by_passages(folder, encoder, f"train={train}", "rows=40")
    place = {row: at for at, (_, row) in enumerate(task.documents)}
    relevant = {place[row] for row in (2, 6, 7, 8, 9, 10)}
    asked = task.model.tokenizer.encode([task.sources[0].natural.texts[0]], 64)[0]
    seen = []

    def told(queries, passages, target, also, *_):
        seen.append(also)
        return contrastive_loss(queries, passages, target, also, 1.0)

    monkeypatch.setattr("pipelines.neighbour_task.contrastive_loss", told)
    task.loss(0)
    passages, queries, target, _ = task.batch(0)
    query = queries.index(asked)
    candidates = passages if train == "full" else list(range(len(task.documents)))
    own = target[query] if train == "full" else passages[target[query]]
    assert seen[0][query].tolist() == [one in relevant and at != own for at, one in enumerate(candidates)]


def test_a_negative_counts_for_those_it_stands_for():
    scores = torch.tensor([[0.3, 0.1, -0.2]])
    also, target = torch.zeros(1, 3, dtype=torch.bool), torch.tensor([0])
    found = contrastive_loss(torch.ones(1, 1), scores.T, target, also, 1.0, each=5.0)
    repeated = torch.tensor([[0.3, *[0.1] * 5, *[-0.2] * 5]])
    assert float(found) == pytest.approx(float(torch.nn.functional.cross_entropy(repeated, target)))


def test_training_by_passages_learns_what_it_is_shown(folder, encoder):
    task = by_passages(folder, encoder, "model.weights=slr", "temperature=0.1")
    steps = torch.optim.Adam([p for p in task.model.parameters() if p.requires_grad], lr=1e-2)
    first = float(task.loss(0)[0])
    for _ in range(30):
        steps.zero_grad()
        task.loss(0)[0].backward()
        steps.step()
    assert float(task.loss(0)[0]) < 0.5 * first
    assert task.model.lexicon.W.abs().max() > 0


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("cuts=0", "cuts is 0, layers 1, train_tokens 12; expected at least 1, 0 and 8"),
        ("model.fusion_passages=true", "plain passages"),
        ("corpus.natural=tarin", "no corpus has qrels/tarin.tsv"),
    ],
)
def test_what_training_by_passages_cannot_do_is_refused(folder, encoder, change, told):
    with pytest.raises(ConfigError, match=re.escape(told)):
        by_passages(folder, encoder, change)


def test_rerankers_do_not_train_by_passages():
    with pytest.raises(ConfigError, match="is for lexsembridge, found mvp"):
        load_text_config(CONFIGS / "mvp.toml", ["batches=passages"])
