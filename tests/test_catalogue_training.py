"""Training on a catalogue: many items share words, and still nothing of what is held out is learned from."""

import dataclasses
import unicodedata

import numpy as np
import pytest
import tiny_text
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer
from tokenizers.processors import TemplateProcessing

from pipelines import neighbour_task
from pipelines.encoder_task import EncoderTask
from pipelines.first_stages import FirstStages
from pipelines.neighbour_task import NeighbourTask, Window
from pipelines.pair_vectors import PairVectors
from pipelines.reranker_task import RerankerTask
from pipelines.shipped import CONFIGS
from pipelines.text_corpus import Corpus
from pipelines.text_models import CATALOGUE, _pool, cut_queries, load_text_config, neighbour_sources, training_queries
from pipelines.text_pairs import PairSource, words_of
from ranking.dense_encoder import DenseConfig, DenseEncoder
from ranking.lexsembridge import LexSemBridge
from ranking.text_backbone import TextTokenizer
from recsys.errors import DataError

STEPS = 12
COMMON = tiny_text.WORDS[:8]


@pytest.fixture(scope="module")
def corpus():
    """Texts of few different words: a short query fits many, of every split, and is cut from several."""
    draws = np.random.default_rng(0)
    made = [" ".join(draws.choice(COMMON, draws.integers(3, 7))) for _ in range(400)]
    texts = list(dict.fromkeys(made))
    return Corpus(CATALOGUE, [f"i{n}" for n in range(len(texts))], texts, [[f"i{n}"] for n in range(len(texts))])


@pytest.fixture(scope="module")
def source(corpus):
    return PairSource(corpus, tiny_text.tokenizer())


def config_of(name, *sets):
    return load_text_config(CONFIGS / f"{name}.toml", ["rows=16", "seed=1", *sets])


def test_queries_cut_from_training_texts_have_no_held_out_positive_and_no_words_that_are_judged(corpus, source):
    options = config_of("lexsembridge").corpus
    held, test = source.held_out, cut_queries(options, source, "test")
    raw = cut_queries(options, source, "train")
    assert any(set(grades) & held for one in raw.values() for grades in one.grades), "the corpus shares no words"
    train, dev = training_queries(corpus, options, source)
    judged = {words_of(text) for one in (*dev.values(), *test.values()) for text in one.texts}
    for kind, queries in train.items():
        assert 0 < len(queries) < len(raw[kind])
        assert not {words_of(text) for text in queries.texts} & judged
        for grades in queries.grades:
            positives = {row for row, grade in grades.items() if grade > 0}
            assert positives
            assert not positives & held
    asked = {words_of(text) for one in test.values() for text in one.texts}
    assert all(words_of(text) not in asked for one in dev.values() for text in one.texts)


def test_neither_encoder_nor_reranker_meets_a_held_out_item(corpus, source, tmp_path):
    stages = FirstStages(corpus, tiny_text.dense(), tmp_path)
    config = config_of("lexsembridge", "group=4")
    encoder = EncoderTask(config, tiny_text.model_of(config), stages, *training_queries(corpus, config.corpus, source))
    met = {row for step in range(STEPS) for group in encoder.batch(step)[2] for row in group}
    reranker = config_of("mvp_apart", "group=4")
    train, dev = training_queries(corpus, reranker.corpus, source)
    model = tiny_text.model_of(reranker)
    pools = _pool(stages, train, source.held_out), _pool(stages, dev)
    lists = RerankerTask(reranker, model, corpus, *pools, PairVectors.of(model, tmp_path))
    met |= {row for step in range(STEPS) for one in lists.lists(step)[1] for row in one}
    assert len(met) > 50
    assert not met & source.held_out


PIECES = [*tiny_text.SPECIAL, "cafe", "creme", "uber", "tea", "milk", "red", "flow", "##er", "##s", "##y", "box", "a"]
WRITTEN = ["Café", "Crème", "Übers", "tea", "Milky", "red", "Flowers", "boxs", "teas"]


def pieces():
    """An uncased tokenizer of parts of words: its tokens say neither accents nor where a word is whole."""
    made = Tokenizer(WordPiece({name: place for place, name in enumerate(PIECES)}, unk_token="[UNK]"))
    made.normalizer, made.pre_tokenizer = BertNormalizer(lowercase=True), BertPreTokenizer()
    marks = [(name, PIECES.index(name)) for name in ("[CLS]", "[SEP]")]
    made.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=marks)
    return TextTokenizer.wrap(made)


@pytest.mark.parametrize("train", ["full", "fusion"])
@pytest.mark.parametrize("keywords", [0.0, 1.0])
def test_by_passages_every_item_that_a_query_fits_is_relevant_to_it(tmp_path, monkeypatch, train, keywords):
    draws = np.random.default_rng(1)
    texts = list(dict.fromkeys(" ".join(draws.choice(WRITTEN, draws.integers(3, 9))) for _ in range(400)))
    corpus = Corpus(CATALOGUE, [f"i{n}" for n in range(len(texts))], texts, [[f"i{n}"] for n in range(len(texts))])
    monkeypatch.setattr(neighbour_task, "KEYWORDS", keywords)
    sets = [f"train={train}", "batches=passages", "cuts=3", "train_tokens=10", *["layers=1"] * (train == "full")]
    config, words = config_of("lexsembridge", *sets), pieces()
    model = LexSemBridge(config.model, tiny_text.bert(), words)
    stages = FirstStages(corpus, DenseEncoder(DenseConfig(backbone="tiny"), tiny_text.bert(), words), tmp_path)
    task = NeighbourTask(config, model, neighbour_sources(config.corpus, [stages], model))
    source = PairSource(corpus, words)
    cut = [one for split in ("dev", "test") for one in cut_queries(config.corpus, source, split).values()]
    judged = {plain(text) for one in cut for text in one.texts}
    texts, several = [f" {text} " for text in map(unaccented, task.texts)], 0
    for step in range(STEPS):
        passages, queries, target, relevant = task.batch(step)
        assert len(queries) == len(target) == len(relevant) > 0
        for ids, column, own in zip(queries, target, relevant, strict=True):
            asked = "".join(
                name.removeprefix("##") if name.startswith("##") else f" {name}"
                for name in (PIECES[one] for one in ids[1:-1])
            ).split()
            assert plain(" ".join(asked)) not in judged
            span = f" {' '.join(asked)} "
            held = {at for at, text in enumerate(texts) if set(asked) <= set(text.split())}
            assert set(own) == (held if keywords else {at for at in held if span in texts[at]})
            assert passages[column] in own
            several += len(own) > 1
        own = torch.tensor([passages[column] for column in target])
        negatives = ~task._alike(torch.arange(len(task.documents)), own, relevant)
        negatives[torch.arange(len(own)), own] = False
        assert not any(negatives[query][rows].any() for query, rows in enumerate(relevant))
    assert several > STEPS


def unaccented(text):
    return "".join(one for one in unicodedata.normalize("NFD", text.lower()) if not unicodedata.combining(one))


def plain(text):
    return words_of(unaccented(text))


def test_where_all_words_are_judged_training_by_passages_says_so(corpus, tmp_path):
    config = config_of("lexsembridge", "batches=passages")
    model = tiny_text.model_of(config)
    (source,) = neighbour_sources(config.corpus, [FirstStages(corpus, tiny_text.dense(), tmp_path)], model)
    task = NeighbourTask(config, model, [dataclasses.replace(source, judged=Everything())])
    with pytest.raises(DataError, match="0 of 48 cuts from 16 texts are of words that no held-out text is judged by"):
        task.loss(0)


class Everything(frozenset):
    def __contains__(self, _):
        return True


def test_a_span_is_widened_to_whole_words_and_a_window_has_no_parts_of_words():
    window = Window([1, 2, 3, 4, 5], [0, 1, 1, 1, 2], "a bcd e", [(0, 1), (2, 3), (3, 4), (4, 5), (6, 7)])
    assert [window.whole(*span) for span in [(0, 1), (2, 3), (1, 4), (0, 5), (3, 5)]] == [
        (0, 1), (1, 4), (1, 4), (0, 5), (1, 5)
    ]  # fmt: skip
    spans = [(0, 5), (0, 3), (2, 5), (1, 4), (2, 3)]
    assert [window.of_whole_words(*span).written for span in spans] == ["a bcd e", "a", "e", "bcd", "c"]
