"""Text corpora, first stages, training and evaluation, on a tiny corpus and tiny random models."""

import copy
import dataclasses
import itertools
import json
import subprocess
import sys
import unicodedata
from collections import Counter
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import text_world
import tiny_text
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

import pipelines.text_models
from pipelines.checkpoint import TrainingError
from pipelines.first_stages import FirstStages, dense_search
from pipelines.pair_vectors import PairVectors
from pipelines.reranker_task import Pool, rerank_pool
from pipelines.shipped import CONFIGS
from pipelines.text_cache import VectorCache
from pipelines.text_config import TEXT_MODELS, TextOptimiser, TextStop
from pipelines.text_corpus import Corpus, Queries, catalogue_corpus, read_corpus, read_queries
from pipelines.text_evaluate import TextModelRun, as_served, evaluate_runs, evaluate_text, write_text_report
from pipelines.text_measures import best_possible, compare, measure
from pipelines.text_models import load_text_config, natural_queries, train
from pipelines.text_pairs import PairSource, split_of
from pipelines.text_train import TextLoop, finished_run
from pipelines.workspace import Workspace
from ranking.bm25 import WORDS as WORDS_FILE
from ranking.bm25 import Bm25
from ranking.bundle import Bundle
from ranking.dense_encoder import DenseConfig, DenseEncoder
from ranking.fusion import COVERED, NONE, Mix, Ranking, best, convex_fusion, reciprocal_rank_fusion
from ranking.mvp import Mvp
from ranking.mvp_apart import MvpApart, MvpApartConfig
from ranking.searcher import Searcher
from ranking.splade import Splade
from ranking.text_backbone import TextTokenizer, in_passes, locate, passes
from ranking.text_models import load_encoder
from ranking.words import UNSPELT, folded, words_of
from recsys.errors import ConfigError, DataError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny_text.beir(tmp_path / "tiny")


@pytest.fixture
def encoder() -> DenseEncoder:
    return tiny_text.dense()


# Bad input.


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{not json", [":2: not JSON"]),
        ('["a", "list"]', [":2: expected a JSON object, found list"]),
        ('{"text": "no id"}', [":2: _id must be a string, found nothing"]),
        ('{"_id": "", "text": "wing"}', ["corpus.jsonl:2: _id is empty"]),
        ('{"_id": 7.5, "text": "wing"}', [":2: _id must be a string, found float 7.5"]),
        ('{"_id": true, "text": "wing"}', [":2: _id must be a string, found bool True"]),
        ('{"_id": "x"}', [":2: text must be a string, found nothing"]),
        ('{"_id": "x", "text": "hat \\ud83c"}', [":2: text has half of a surrogate pair"]),
        ("[" * 100_000, [":2: JSON nested too deep"]),
        ('{"_id": "x", "text": ["wing"]}', [":2: text must be a string, found list"]),
        ('{"_id": "d0", "text": "again"}', [":2: _id 'd0' was on line 1 already"]),
    ],
)
def test_a_corpus_line_that_is_not_as_it_should_be_is_named(tmp_path, line, words):
    (tmp_path / "corpus.jsonl").write_text('{"_id": "d0", "title": "", "text": "wing"}\n' + line + "\n")
    with pytest.raises(DataError) as caught:
        read_corpus(tmp_path)
    assert all(word in str(caught.value) for word in words)


def test_empty_and_absent_corpora_are_refused(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        read_corpus(tmp_path)
    (tmp_path / "corpus.jsonl").write_text("\n")
    with pytest.raises(DataError, match="0 documents"):
        read_corpus(tmp_path)
    with pytest.raises(DataError, match="0 passages"):
        Bm25.build([])
    with pytest.raises(DataError, match=r"corpus\.jsonl: a file; expected the folder"):
        read_corpus(tmp_path / "corpus.jsonl")


@pytest.mark.parametrize(
    "lines",
    [
        "query-id\tcorpus-id\tscore\nq0\td0\t1\nq1\td1\t2\n",
        "q0\td0\t1\nq1\td1\t2\n",
        "\ufeffq0\td0\t1\nq1\td1\t2\n",
        "\ufeffquery-id\tcorpus-id\tscore\r\nq0\td0\t1\r\n\r\nq1\td1\t2.0\r\n",
    ],
    ids=["header", "no header", "byte order mark", "as from a spreadsheet"],
)
def test_judgements_are_read_with_and_without_a_header(folder, lines):
    (folder / "qrels" / "mine.tsv").write_text(lines, newline="")
    found = read_queries(folder, read_corpus(folder), "mine")
    assert (found.ids, found.grades) == (["q0", "q1"], [{0: 1}, {1: 2}])


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ("q0\td0\t1\nq0\td0\t0\n", "query 'q0' and document 'd0' have grades 1 and 0"),
        ("q0\td0\t1\nq1\td1\n", r"mine.tsv:2: expected query-id, corpus-id and a whole number, found \['q1', 'd1'\]"),
        ("q0\td0\t1\nq1\td1\t1.5\n", r"mine.tsv:2: expected"),
        ("q0\td0\tx\nq1\td1\t1\n", r"mine.tsv:1: expected"),
        ('q0\td0\t1\n"q1\td1\t1\n', "query '\"q1' is not in"),
    ],
)
def test_judgements_that_cannot_be_meant_are_named(folder, lines, words):
    (folder / "qrels" / "mine.tsv").write_text(lines)
    with pytest.raises(DataError, match=words):
        read_queries(folder, read_corpus(folder), "mine")


def test_a_query_that_stands_twice_is_named_and_whole_numbers_are_ids(folder):
    with (folder / "corpus.jsonl").open("a") as file:
        file.write('{"_id": 7, "text": "wing"}\n')
    assert read_corpus(folder).ids[-1] == "7"
    with (folder / "queries.jsonl").open("a") as file:
        file.write('{"_id": "q3", "text": "wing"}\n')
    with pytest.raises(DataError, match=r"queries.jsonl:13: _id 'q3' was there before"):
        read_queries(folder, read_corpus(folder), "train")


def test_dev_queries_are_the_corpus_own_or_at_least_one(folder):
    corpus = read_corpus(folder)
    learn, dev = natural_queries(folder, corpus, "train")
    assert (len(learn) + len(dev), len(dev) >= 1, set(learn.ids) & set(dev.ids)) == (6, True, set())
    (folder / "qrels" / "two.tsv").write_text("q0\td0\t1\nq2\td2\t1\n")
    assert [len(part) for part in natural_queries(folder, corpus, "two")] == [1, 1]
    (folder / "qrels" / "dev.tsv").write_text("q1\td1\t1\n")
    learn, dev = natural_queries(folder, corpus, "train")
    assert (len(learn), dev.ids) == (6, ["q1"])


def test_natural_queries_teach_nothing_of_documents_that_cut_ones_are_judged_by(folder, tmp_path, encoder):
    from pipelines.encoder_task import EncoderTask
    from pipelines.text_models import training_queries

    with (folder / "qrels" / "train.tsv").open("a") as file:  # beside a document to learn from, two that are held out
        file.writelines(f"q{n}\td{document}\t1\n" for n in range(0, 12, 2) for document in (30, 32))
    corpus = read_corpus(folder)
    source = PairSource(corpus, tiny_text.tokenizer())
    held = set(source.rows("dev") + source.rows("test"))
    assert held & {30, 32} == {30, 32}
    config = load_text_config(CONFIGS / "lexsembridge.toml", [*QUICK, f"corpus.path={folder}", "group=8"])
    known, _ = natural_queries(folder, corpus, "train")
    train, dev = training_queries(corpus, config.corpus, source)
    learn = train["natural"]
    positives = [{row for row, grade in grades.items() if grade > 0} for grades in learn.grades]
    kept = [key for key, grades in zip(known.ids, known.grades, strict=True) if set(grades) - held]
    assert (learn.ids, 0 < len(learn) < len(known)) == (kept, True)
    assert all(rows and not rows & held for rows in positives)
    assert all({30, 32} <= set(grades) for grades in learn.grades)  # graded 0: no hard negatives either

    task = EncoderTask(config, tiny_text.model_of(config), FirstStages(corpus, encoder, tmp_path), train, dev)
    assert not held & {row for step in range(9) for group in task.batch(step)[2] for row in group}
    alone = load_text_config(
        CONFIGS / "lexsembridge.toml",
        [*QUICK, f"corpus.path={folder}", "corpus.keyword=false", "corpus.part_of_passage=[]"],
    )
    assert training_queries(corpus, alone.corpus, source)[0]["natural"] == known


def test_rerankers_meet_no_held_out_document(folder, tmp_path, mlflow_uri, encoder, monkeypatch):
    from pipelines.reranker_task import RerankerTask

    met: set[int] = set()
    lists = RerankerTask.lists

    def told(self, step):
        found = lists(self, step)
        met.update(row for one in found[1] for row in one)
        return found

    monkeypatch.setattr(RerankerTask, "lists", told)
    run("mvp_apart", folder, tmp_path / "run", mlflow_uri, encoder)
    corpus = read_corpus(folder)
    assert {split_of(corpus.name, corpus.ids[row]) for row in met} == {"train"}


def test_judgements_of_unknown_documents_are_counted_and_the_first_five_named(folder):
    with (folder / "qrels" / "test.tsv").open("a") as file:
        file.writelines(f"q1\tgone{n}\t1\n" for n in range(7))
    with pytest.raises(DataError, match=r"7 judgements .* gone0, gone1, gone2, gone3, gone4; mend"):
        read_queries(folder, read_corpus(folder), "test")
    with pytest.raises(DataError, match="there are test, train"):
        read_queries(folder, read_corpus(folder), "dev")


def test_model_folders_without_weights_and_pickles_are_refused(tmp_path, encoder):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no weights"):
        locate(str(tmp_path / "empty"))
    (tmp_path / "empty" / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(DataError, match="is a pickle, which is refused"):
        locate(str(tmp_path / "empty"))
    encoder.save(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").rename(tmp_path / "model" / "heads.pt")
    with pytest.raises(DataError, match=r"heads\.pt is a pickle"):
        load_encoder(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").write_bytes(b"\x80\x04.")
    with pytest.raises(DataError, match="not a safetensors file"):
        load_encoder(tmp_path / "model")


def test_importing_the_text_models_asks_nobody_and_reads_no_weights():
    code = """
import sys
def refuse(event, arguments):
    opened = str(arguments[0]) if arguments else ""
    if event.startswith("socket.") or (event == "open" and opened.endswith((".safetensors", "tokenizer.json"))):
        raise RuntimeError((event, opened))
sys.addaudithook(refuse)
import pipelines.text_models, pipelines.text_publish, ranking.lexsembridge, ranking.mvp, ranking.mvp_apart
import ranking.cross_encoder, ranking.splade, ranking.text_models
assert not {"transformers", "sentence_transformers", "huggingface_hub"} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# Batching, cache and fusion.


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 60), max_size=60), st.integers(1, 200))
def test_passes_cover_every_text_once_and_keep_to_their_size(lengths, tokens):
    found = list(passes(lengths, tokens))
    assert Counter(place for chosen in found for place in chosen.tolist()) == Counter(range(len(lengths)))
    assert all(len(c) == 1 or len(c) * max(lengths[i] for i in c) <= tokens for c in found)
    rows = [[7] * length for length in lengths]
    values = in_passes(rows, 0, torch.device("cpu"), lambda ids, mask: mask.sum(dim=1, keepdim=True), tokens=tokens)
    assert values.flatten().tolist() == lengths


def test_the_cache_computes_each_text_once_and_survives_a_kill(tmp_path, monkeypatch):
    monkeypatch.setattr("pipelines.text_cache.PART", 2)
    asked: list[str] = []

    def compute(texts):
        if len(asked) >= 4:
            raise KeyboardInterrupt
        asked.extend(texts)
        return np.array([[float(len(text))] for text in texts], np.float32)

    texts = ["wing", "a", "bb", "wing", "ccccc", "dddddd"]
    with pytest.raises(KeyboardInterrupt):
        VectorCache(tmp_path).get(texts, compute)
    asked.clear()
    values = VectorCache(tmp_path).get(texts, compute)
    assert values[:, 0].tolist() == [4, 1, 2, 4, 5, 6]
    assert len(asked) == 1  # four of the five texts were there


def test_whatever_changes_a_vector_changes_the_digest(encoder, tmp_path):
    """Equal weights read other ids by another tokenizer, and give other states by other values of the architecture."""
    words, bert = tiny_text.tokenizer(), tiny_text.bert()
    other = Tokenizer.from_str(
        words.tokenizer.to_str().replace('"wing":11', '"wing":12').replace('"flow":12', '"flow":11')
    )
    wide = type(bert)(copy.deepcopy(bert.config)).eval()
    wide.load_state_dict(bert.state_dict())
    wide.config.num_attention_heads = 2
    prompt = load_text_config(CONFIGS / "mvp.toml").model

    def read_by(transformer, tokenizer) -> list[str]:
        pairs = Mvp(dataclasses.replace(prompt, decoder_heads=4, max_len=48), transformer, tokenizer)
        return [
            DenseEncoder(DenseConfig(), transformer, tokenizer).digest,
            MvpApart(MvpApartConfig(max_len=48), transformer, tokenizer).reading,
            PairVectors.of(pairs, tmp_path).cache.directory.parent.name,
            Splade(transformer, tokenizer).digest,
        ]

    known = read_by(bert, words)
    assert known == read_by(copy.deepcopy(bert), tiny_text.tokenizer())
    for changed in (read_by(bert, TextTokenizer.wrap(other)), read_by(wide, words)):
        assert not set(changed) & set(known)
    bert.config.architectures, bert.config.name_or_path = ["BertModel"], "here"  # as loading writes them
    assert known == read_by(bert, words)


def test_fusions_by_arithmetic():
    one = Ranking(np.array([[0, 1, NONE]], np.int32), np.array([[3.0, 1.0, -np.inf]], np.float32))
    two = Ranking(np.array([[1, 2, 0]], np.int32), np.array([[9.0, 8.0, 5.0]], np.float32))
    fused = reciprocal_rank_fusion([one, two], 4)
    assert fused.rows[0].tolist() == [1, 0, 2, NONE]
    assert fused.scores[0, :3] == pytest.approx([1 / 62 + 1 / 61, 1 / 61 + 1 / 63, 1 / 62])
    mixed = convex_fusion(one, two, 0.25, 3)
    assert mixed.rows[0].tolist() == [1, 2, 0]
    assert mixed.scores[0] == pytest.approx([0.75, 0.75 * 0.75, 0.25])
    # What stands alone, or beside its equals, is the best there is; equal sums stand by row.
    alone = Ranking(np.array([[2, NONE]], np.int32), np.array([[4.0, -np.inf]], np.float32))
    equal = Ranking(np.array([[3, 1]], np.int32), np.array([[0.5, 0.5]], np.float32))
    mixed = convex_fusion(alone, equal, 0.5, 4)
    assert mixed.rows[0].tolist() == [1, 2, 3, NONE]
    assert mixed.scores[0, :3] == pytest.approx([0.5, 0.5, 0.5])


def test_a_query_is_covered_from_nine_tenths_on():
    lexical = Ranking(np.array([[0, 1]] * 2, np.int32), np.array([[2.0, 1.0]] * 2, np.float32))
    dense = Ranking(np.array([[1, 0]] * 2, np.int32), np.array([[2.0, 1.0]] * 2, np.float32))
    mixed = Mix(0.4, 0.9).fuse(lexical, dense, np.array([COVERED, np.nextafter(COVERED, 0)]), 2)
    assert mixed.rows[:, 0].tolist() == [0, 1]
    assert mixed.scores[:, 0] == pytest.approx([0.9, 0.6])


def test_bm25_survives_save_and_load_and_odd_queries(tmp_path):
    texts = ["wing flow wing", "heat shock", "the of and", ""]
    index = Bm25.build(texts)
    index.save(tmp_path)
    again = Bm25.load(tmp_path)
    for query in ("wing", "shock heat", "unheard", "", "the", "wing " * 20_000):
        np.testing.assert_array_equal(index.scores(query), again.scores(query))
    assert again.search(["heat", ""], 2).rows.tolist() == [[1, NONE], [NONE, NONE]]
    assert not any(path.suffix in {".pkl", ".pickle"} for path in tmp_path.iterdir())


def test_an_index_is_asked_by_the_rules_of_words_it_was_made_by(tmp_path):
    texts = ["Straße strasse", "smørrebrød", "tea"]
    build = Bm25.build(texts)
    earlier = Bm25(build.retriever, build.passages, UNSPELT)
    earlier.retriever.index(words_of(texts, UNSPELT), show_progress=False)
    earlier.save(tmp_path)
    (tmp_path / WORDS_FILE).unlink()  # as it was before there were two
    again = Bm25.load(tmp_path)
    for query in texts:
        assert earlier.search([query], 3).rows[0, 0] == again.search([query], 3).rows[0, 0] == texts.index(query)
        assert again.coverage([query], again.search([query], 3), texts.__getitem__)[0] == pytest.approx(1)
    (tmp_path / WORDS_FILE).write_text('{"rules": 3}')
    with pytest.raises(DataError, match="rules 3"):
        Bm25.load(tmp_path)


@pytest.mark.parametrize(
    ("query", "found"),
    [
        ("creme brulee", 0),
        ("CRÈME", 0),
        (unicodedata.normalize("NFD", "crème brûlée"), 0),
        ("绿茶", 1),
        ("茶", 1),
        ("耳机", 2),
        ("降噪耳机", 2),
        ("ヘッドホン", 3),
        ("WH1000", 3),
        ("наушники", 4),
        ("ﬁne", 5),
        ("strasse", 6),
        ("Smørrebrød", 6),
    ],
)
def test_words_of_other_languages_are_found(query, found):
    passages = [
        "Crème brûlée",
        "绿茶茶叶 100g",
        "索尼降噪耳机",
        "ソニーヘッドホンWH1000",
        "Беспроводные наушники",
        "fine tea",
        "Straße smorrebrod",
    ]
    index = Bm25.build(passages)
    ranking = index.search([query], 7)
    assert ranking.rows[0, 0] == found
    assert index.coverage([query], ranking, passages.__getitem__)[0] > 0


@pytest.mark.parametrize("query", ["WH-1000XM4", "wh1000xm4", "WH1000XM4 headphones"])
@pytest.mark.parametrize("written", ["Sony WH-1000XM4 headphones", "Sony WH1000XM4 headphones"])
def test_a_code_is_found_with_and_without_its_hyphens(query, written):
    passages = ["Bose QC-45 headphones", "free-stream flow", written]
    index = Bm25.build(passages)
    found = index.search([query], 3)
    assert found.rows[0, 0] == 2
    assert index.coverage([query], found, passages.__getitem__)[0] == pytest.approx(1)


@pytest.mark.parametrize(("query", "found"), [("iphone 6", 1), ("iphone 5", 0), ("6", 1), ("X-1", 2), ("x1", 2)])
@pytest.mark.parametrize("written", ["Sony X-1", "Sony X1"])
def test_a_digit_tells_passages_apart(query, found, written):
    passages = ["iPhone 5 32 GB", "iPhone 6 64 GB", written, "size 1"]
    index = Bm25.build(passages)
    ranking = index.search([query], 4)
    assert ranking.rows[0, 0] == found
    assert index.coverage([query], ranking, passages.__getitem__)[0] == pytest.approx(1)


@pytest.mark.parametrize(
    ("query", "share"),
    [
        ("vitamin D", 1),
        ("vitamin C", 1 / 2),
        ("D", 0),
        ("a vitamin", 1),
        ("vitamin's", 1),
        ("C++ primer", 1),
        ("C# primer", 1 / 2),
        ("C primer", 1 / 2),
    ],
)
def test_a_letter_on_its_own_is_held_by_the_passage_or_not_covered(query, share):
    passages = ["vitamin D", "vitamin B", "C++ primer"]
    index = Bm25.build(passages)
    assert index.coverage([query], index.search([query], 3), passages.__getitem__)[0] == pytest.approx(share)


def test_only_codes_are_joined():
    assert words_of(["free-stream 2-3 X-1 mach-2-a -7b a--b1"]) == [
        ["free", "stream", "2", "3", "1", "mach", "2", "7b", "b1", "x1", "mach2a"]
    ]
    assert words_of(["x-ray--1"]) == [["ray", "1"]]


def test_a_long_run_of_hyphens_is_read_in_one_go():
    """A regex that looks ahead from every hyphen would take hours."""
    for piece in ("1-", "a-", "1-a-", "-", "ab"):
        words = words_of([piece * 200_000])[0]
        assert len(words) <= 1 + 200_000 * piece.count("1")


@given(st.text(), st.text(alphabet=st.characters(codec="ascii")))
def test_how_a_text_is_encoded_changes_no_word_and_ascii_is_left_alone(text, ascii_text):
    assert folded(ascii_text) == ascii_text
    assert words_of([unicodedata.normalize("NFD", text)]) == words_of([unicodedata.normalize("NFC", text)])


def test_coverage_is_the_share_of_a_query_that_its_best_passage_holds():
    passages = ["wing flow heat", "heat shock", "flow", "jet"]
    index = Bm25.build(passages)
    queries = ["heat wing flow", "wing shock", "unheard heat shock", "the of", "unheard"]
    found = Ranking(np.array([[0], [0], [1], [NONE], [NONE]], np.int32), np.zeros((5, 1), np.float32))
    wing = shock = np.log1p(3.5 / 1.5)
    np.testing.assert_allclose(
        index.coverage(queries, found, passages.__getitem__), [1, wing / (wing + shock), 1, 0, 0]
    )
    # Up to one word that no passage holds to two that some do: a query cut inside a word, not one in other words.
    first = Ranking(np.zeros((3, 1), np.int32), np.zeros((3, 1), np.float32))
    told = index.coverage(
        ["wing unheard", "wing heat unheard", "wing heat flow unheard offhand"], first, passages.__getitem__
    )
    np.testing.assert_allclose(told, [0, 1, 0])


@given(st.integers(0, 1000), st.floats(0, 1), st.floats(0, 1))
@settings(max_examples=20, deadline=None)
def test_a_mix_is_the_convex_fusion_of_each_query_by_its_own_weight(seed, weight, covered):
    draws = np.random.default_rng(seed)
    one, two = (best(draws.random((6, 30)), 20) for _ in range(2))
    coverage = draws.choice([0.2, 1.0], 6)
    mixed = Mix(weight, covered).fuse(one, two, coverage, 10)
    for query in range(6):
        share = max(weight, covered) if coverage[query] == 1 else weight
        alone = convex_fusion(*(Ranking(r.rows[[query]], r.scores[[query]]) for r in (one, two)), share, 10)
        np.testing.assert_array_equal(mixed.rows[query], alone.rows[0])


def test_the_dense_first_stage_is_exact_however_many_passages():
    draws = np.random.default_rng(0)
    passages, queries = (draws.normal(size=(many, 16)).astype(np.float32) for many in (101_000, 64))
    found = dense_search(queries, passages)
    expected = -np.sort(-(queries @ passages.T), axis=1)[:, :100]
    np.testing.assert_allclose(found.scores, expected, rtol=1e-5)


def test_sparse_vectors_are_those_of_these_passages_and_this_model(folder, encoder):
    corpora = [Corpus("same", ["a", "b"], texts) for texts in (["wing", "heat"], ["heat", "wing"])]
    models = [Splade(tiny_text.bert(mlm=True, seed=seed), tiny_text.tokenizer()) for seed in (0, 1)]
    for corpus, model in itertools.product(corpora, models):
        kept = FirstStages(corpus, encoder, folder, model)._sparse_passages
        assert abs(kept - model.encode(corpus.passages)).max() < 1e-6
    assert len(list(folder.glob("splade-*.npz"))) == 4


# Queries cut from passages.


def test_the_splits_share_no_document_and_cut_queries_name_their_source(folder):
    """Spans are contiguous and seeded."""
    corpus = read_corpus(folder)
    source = PairSource(corpus, tiny_text.tokenizer())
    rows = [set(source.rows(split)) for split in ("train", "dev", "test")]
    assert sum(map(len, rows)) == len(set.union(*rows))
    assert set.union(*rows) == set(source.eligible)
    assert split_of("a", "b") == split_of("a", "b")
    for unit in ("token", "word", "char"):
        spans = source.part_of_passage(source.eligible, 4, unit)
        for text, grades in zip(spans.texts, spans.grades, strict=True):
            assert text in corpus.passages[next(iter(grades))]
        assert spans.texts == source.part_of_passage(source.eligible, 4, unit).texts
    assert source.part_of_passage(source.eligible, 99, "word").texts == []
    words = source.keyword(source.eligible, 3)
    assert all(
        set(text.split()) <= set(corpus.passages[next(iter(g))].split())
        for text, g in zip(words.texts, words.grades, strict=True)
    )


def test_a_catalogue_counts_every_item_that_fits(tmp_path):
    texts = ["Milk whole gallon", "Milk whole gallon", "Milk skim gallon", "Bread wheat", None]
    pl.DataFrame({"item_id": list("abcde"), "text": texts}).write_parquet(tmp_path / "items.parquet")
    corpus = catalogue_corpus(tmp_path / "items.parquet")
    assert corpus.items == [["a", "b"], ["c"], ["d"]]
    source = PairSource(corpus)
    spans = source.part_of_passage([0, 1], 1, "word", start="first")
    assert spans.grades == [{0: 1, 1: 1}, {0: 1, 1: 1}]  # both hold "Milk"
    pl.DataFrame({"item_id": ["a"], "text": ["a"]}).write_parquet(tmp_path / "items.parquet")
    with pytest.raises(DataError, match="no item has a text"):
        catalogue_corpus(tmp_path / "items.parquet")


# Measures.


def test_measures_by_arithmetic():
    queries = Queries(["q"], ["x"], [{3: 2, 5: 1, 9: 0}])
    ranking = Ranking(np.array([[9, 5, 3]], np.int32), np.zeros((1, 3), np.float32))
    values = {name: float(value[0]) for name, value in measure(ranking, queries).items()}
    log2 = np.log2
    ideal = 2 / log2(2) + 1 / log2(3)
    assert values["ndcg_at_10"] == pytest.approx((1 / log2(3) + 2 / log2(4)) / ideal)  # linear gain
    assert (values["hit_at_1"], values["mrr_at_10"], values["recall_at_100"]) == (0, 0.5, 1)
    without = measure(ranking, queries, zero_docs="remove")
    assert float(without["hit_at_1"][0]) == 1
    found = compare(np.array([1.0, 0.5, 0.2]), np.array([0.5, 0.5, 0.4]))
    assert (found.won, found.lost, found.tied) == (1, 1, 1)
    assert found.difference.value == pytest.approx(0.1)


def test_a_document_that_is_the_query_stands_in_no_ranking(folder):
    """Counter-arguments and duplicate questions are asked for by documents of the corpus."""
    corpus = read_corpus(folder)
    asked = {"d3": corpus.passages[3], "d5": "what the flow does", "d7": corpus.passages[7].upper(), "q1": "wing"}
    lines = [json.dumps({"_id": key, "text": text}) for key, text in asked.items()]
    (folder / "queries.jsonl").write_text("\n".join(lines))
    (folder / "qrels" / "mine.tsv").write_text("d3\td4\t1\nd5\td4\t1\nd7\td7\t1\nq1\td1\t1\n")
    queries = read_queries(folder, corpus, "mine")
    ranking = Ranking(np.array([[3, 4], [5, 4], [7, 4], [0, 1]], np.int32), np.zeros((4, 2), np.float32))
    found = measure(ranking, queries)
    assert found["mrr_at_10"].tolist() == [1, 0.5, 1, 0.5]  # d5 is another text, d7 is judged
    assert found["recall_at_100"].tolist() == [1] * 4
    assert best_possible(ranking, queries) == 1


# Training and evaluation.

QUICK = ["corpus.unit=word", "corpus.part_of_passage=[4]", "corpus.natural=train", "rows=8", "seed=1"]


PASSAGES = ["train=full", "batches=passages", "layers=1", "train_tokens=12", "model.max_passage_len=48"]


def run(name, folder, directory, uri, encoder, *extra):
    sets = [*QUICK, f"corpus.path={folder}", "stop.steps=4", "stop.validate_every=2", "stop.checkpoint_every=2", *extra]
    config = load_text_config(CONFIGS / f"{name}.toml", sets)
    return train(
        config, folder / "none", directory, folder / "cache", uri, encoder=lambda _: encoder, model=tiny_text.model_of
    )


@pytest.mark.parametrize(
    ("name", "how"), [*itertools.product(TEXT_MODELS, ("fusion", "full")), ("lexsembridge", "passages")]
)
def test_a_killed_run_goes_on_to_the_same_weights(name, how, folder, tmp_path, mlflow_uri, encoder, monkeypatch):
    changes = PASSAGES if how == "passages" else [f"train={how}"]
    whole = run(name, folder, tmp_path / "whole", mlflow_uri, encoder, *changes)

    step = TextLoop.step

    def dies(self):
        if self.state.step == 3:
            raise KeyboardInterrupt
        return step(self)

    monkeypatch.setattr(TextLoop, "step", dies)
    with pytest.raises(KeyboardInterrupt):
        run(name, folder, tmp_path / "killed", mlflow_uri, encoder, *changes)
    monkeypatch.setattr(TextLoop, "step", step)
    resumed = run(name, folder, tmp_path / "killed", mlflow_uri, encoder, *changes)
    assert resumed.state.curve == whole.state.curve
    first, second = ((one.model / "model.safetensors").read_bytes() for one in (whole, resumed))
    assert first == second
    again = run(name, folder, tmp_path / "killed", mlflow_uri, encoder, *changes)
    assert again.run_id == resumed.run_id


def test_a_gradient_that_is_no_number_stops_a_run_and_leaves_the_weights(tmp_path):
    class Task:
        model, fresh = torch.nn.Linear(2, 1), ()

        def loss(self, step):
            total = self.model.weight.sum()
            total.register_hook(lambda gradient: gradient * float("nan"))
            return total, {}

        def validate(self):
            return {"measure": 0.0}

    loop = TextLoop(Task(), tmp_path / "checkpoint", "inputs", TextOptimiser(), TextStop(), 1)
    with pytest.raises(TrainingError, match="gradient norm is nan at step 0; try a smaller learning rate"):
        loop.run_to_end()
    assert Task.model.weight.isfinite().all()


def test_a_run_is_begun_again_where_what_it_learned_from_is_another(folder, tmp_path, mlflow_uri, encoder):
    other, backbone = tiny_text.beir(tmp_path / "other", documents=20), tmp_path / "backbone"
    tiny_text.bert().save_pretrained(backbone)
    tiny_text.tokenizer().save(backbone)
    sets = [*PASSAGES, f"corpus.also=['{other}']", f"model.backbone={backbone}", "stop.steps=1"]

    def trained() -> str:
        return run("lexsembridge", folder, tmp_path / "run", mlflow_uri, encoder, *sets).run_id

    def written(path: Path, old: str, new: str) -> None:
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new))

    known = [trained()]
    written(folder / "qrels" / "test.tsv", "q1\td1\t1", "q1\td1\t2")  # which no run learns from
    assert trained() == known[0]
    for path, old, new in (
        (folder / "qrels" / "train.tsv", "q2\td2\t1", "q2\td2\t2"),
        (other / "queries.jsonl", '"q2", "text": "', '"q2", "text": "wing '),
        (folder / "corpus.jsonl", '"d39"', '"d40"'),
        (other / "corpus.jsonl", '"d1", "title": ""', '"d1", "title": "heat"'),
        (backbone / "tokenizer.json", '"gas"', '"fumes"'),
    ):
        written(path, old, new)
        known.append(trained())
        assert trained() == known[-1]
    tiny_text.bert(seed=1).save_pretrained(backbone)
    known.append(trained())
    assert len(set(known)) == 7
    data = json.loads((tmp_path / "run" / "run.json").read_text())["data"]
    assert [one["name"] for one in data["corpora"]] == ["tiny", "other"]
    assert data["corpora"][0]["natural_left_out"] > 0


def test_a_run_that_was_begun_again_is_not_finished_by_its_old_weights(
    folder, tmp_path, mlflow_uri, encoder, monkeypatch
):
    from pipelines import text_train

    directory = tmp_path / "run"

    def trained(*sets: str) -> str:
        return run("mvp_apart", folder, directory, mlflow_uri, encoder, "stop.steps=1", *sets).run_id

    def dies(*_, **__) -> None:
        raise KeyboardInterrupt

    first = trained()
    assert finished_run(directory) == ("mvp_apart", directory / "model")
    with pytest.raises(ConfigError, match="0 dev queries"):  # nothing was begun
        trained("corpus.natural=", "corpus.keyword=false", "corpus.part_of_passage=[]")
    assert finished_run(directory)
    for place, name in (
        (text_train.shutil, "rmtree"),  # at the old weights
        (text_train.TextLoop, "step"),
        (text_train.TextLoop, "save"),  # beside the new weights, which are whole
        (text_train.TextRun, "table"),
    ):
        trained()
        with monkeypatch.context() as patched:
            patched.setattr(place, name, dies)
            with pytest.raises(KeyboardInterrupt):
                trained("seed=2")
        with pytest.raises(DataError, match="no finished text run"):
            finished_run(directory)
    second = trained("seed=2")
    assert (trained("seed=2"), second != first, finished_run(directory)[0]) == (second, True, "mvp_apart")


def test_every_shipped_text_config_is_read():
    assert set(TEXT_MODELS) == set(pipelines.text_models.TEXT_MODELS)
    for name in TEXT_MODELS:
        assert load_text_config(CONFIGS / f"{name}.toml").name == name
    with pytest.raises(ConfigError, match="did you mean 'weights'"):
        load_text_config(CONFIGS / "lexsembridge.toml", ["model.weigths=slr"])


@pytest.mark.parametrize(
    ("name", "key", "of"),
    [
        ("mvp", "cuts=2", "mvp"),
        ("cross_encoder", "orthogonal=1.0", "cross_encoder"),
        ("lexsembridge", "teacher=qrels", "lexsembridge with batches = 'queries'"),
        ("lexsembridge", "layers=1", "lexsembridge with batches = 'queries'"),
    ],
)
def test_what_another_kind_of_training_reads_is_refused(name, key, of):
    with pytest.raises(ConfigError, match=f"{key.split('=')[0]} would do nothing for {of}; leave it out"):
        load_text_config(CONFIGS / f"{name}.toml", [key])
    with pytest.raises(ConfigError, match=r"\[corpus\] also would do nothing with batches = 'queries'"):
        load_text_config(CONFIGS / f"{name}.toml", ["corpus.also=['there']"])


def test_enhanced_passages_are_trained_in_full(folder, tmp_path, mlflow_uri, encoder):
    sets = ["model.fusion_passages=true", "stop.steps=1"]
    with pytest.raises(ConfigError, match=r"fusion_passages = true with train = 'fusion'"):
        run("lexsembridge", folder, tmp_path / "run", mlflow_uri, encoder, *sets)
    assert run("lexsembridge", folder, tmp_path / "run", mlflow_uri, encoder, *sets, "train=full").state.step == 1


def test_evaluation_sets_every_model_beside_its_first_stage(folder, tmp_path, mlflow_uri, encoder):
    for name in ("lexsembridge", "mvp", "mvp_apart"):
        run(name, folder, tmp_path / name, mlflow_uri, encoder)
    runs = [TextModelRun.load(name, tmp_path / name) for name in ("lexsembridge", "mvp", "mvp_apart")]
    corpus = read_corpus(folder)
    stages = FirstStages(corpus, encoder, folder / "cache")
    queries = read_queries(folder, corpus, "test")
    weight = stages.choose_weight({"natural": read_queries(folder, corpus, "train")})
    results = evaluate_text(runs, stages, {"natural": queries}, weight, places=10)
    page = write_text_report(results, {"corpus": corpus.name, "<b>": 1}, tmp_path / "report").read_text()
    report = (tmp_path / "report" / "report.md").read_text()
    assert "<script" not in page
    assert "&lt;b&gt;" in page
    for result in results:
        gain = result.values["mvp"]["ndcg_at_10"] - result.values["rrf"]["ndcg_at_10"]
        shown = [result.queries.texts[place] for place in (gain.argmax(), gain.argmin()) if gain[place]]
        assert all(text in page and text in report for text in shown)
    for system in (
        "bm25",
        "dense",
        "rrf",
        "convex",
        "hybrid",
        "lexsembridge",
        "lexsembridge, fusion off",
        "lexsembridge + bm25",
        "mvp",
        "mvp, as served",
        "mvp_apart",
    ):
        assert f"| {system} |" in report
    table = json.loads((tmp_path / "report" / "metrics.json").read_text())["tasks"]["natural"]
    assert table["n_queries"] == len(queries)
    counts = table["ndcg_at_10_against_baseline"]["mvp"]
    assert counts["won"] + counts["lost"] + counts["tied"] == len(queries)
    found = {name: one["baseline"] for name, one in table["ndcg_at_10_against_baseline"].items()}
    assert found["lexsembridge"] == "lexsembridge, fusion off"
    assert (found["mvp"], found["mvp, as served"]) == ("rrf", "hybrid")


def test_a_reranker_as_served_is_what_a_published_bundle_answers(folder, tmp_path, mlflow_uri, encoder):
    run("mvp", folder, tmp_path / "mvp", mlflow_uri, encoder)
    mvp = TextModelRun.load("mvp", tmp_path / "mvp")
    corpus = read_corpus(folder)
    stages = FirstStages(corpus, encoder, folder / "cache")
    mixed = [f"{text[:30]} {other[-30:]}" for text, other in itertools.pairwise(corpus.passages[:13])]
    spans = Queries([f"s{n}" for n in range(12)], mixed, [{n: 1} for n in range(12)])
    judged = read_queries(folder, corpus, "test")
    texts = [*judged.texts, *spans.texts]
    found = as_served(mvp, stages, Pool(judged + spans, stages.hybrid(texts)))
    place = text_world.publish_corpus(tmp_path / "bundle", corpus.passages, encoder=encoder, reranker=mvp.model)
    searcher = Searcher(Bundle.load(place).text)
    answers = [searcher.search(text) for text in texts]
    assert 0 < sum(answer.covered for answer in answers) < len(answers)
    for answer, rows in zip(answers, found.rows, strict=True):
        assert answer.rows.tolist() == rows[: len(answer)].tolist()


def test_runs_are_judged_by_test_on_any_corpus_and_told_what_they_learned_from(
    folder, tmp_path, mlflow_uri, encoder, monkeypatch
):
    monkeypatch.setattr(DenseEncoder, "of", lambda *_: encoder)
    place, said = Workspace(tmp_path / "place"), []
    made = run("cross_encoder", folder, place.run("mine"), mlflow_uri, encoder, "corpus.keyword=false")
    assert made.state.step > 0

    def judged(**more) -> dict:
        page = evaluate_runs(["mine"], place, mlflow_uri, say=said.append, **more)
        assert page.name == "report.html"
        return json.loads((page.parent / "metrics.json").read_text())

    found = judged()
    assert next(iter(found["tasks"])) == "natural test"
    assert (said, found["weight of words"]) == ([], "0.4, shipped")
    found = judged(split="train")
    assert said == ["mine learned from the queries of train: figures say nothing of new ones."]
    assert (found["learned from these queries"], found["weight of words"]) == ("mine", "0.4, shipped")
    assert "learned from these queries" in judged(split="train", corpus=str(folder))
    other = tiny_text.beir(tmp_path / "other", documents=9, queries=4)
    (other / "qrels" / "train.tsv").unlink()
    assert next(iter(judged(corpus=str(other))["tasks"])) == "natural test"
    (other / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n")
    with pytest.raises(DataError, match=r"test\.tsv: 0 judged queries"):
        judged(corpus=str(other))
    (other / "qrels" / "test.tsv").unlink()
    (other / "corpus.jsonl").write_text('{"_id": "d0", "text": "one"}\n')
    with pytest.raises(ConfigError, match="0 queries to judge by; give --split"):
        judged(corpus=str(other))


@pytest.mark.parametrize(
    ("natural", "split", "place", "told"),
    [
        ("train", "train", "path", True),
        ("train", "train", "also", True),
        ("train", "dev", "path", True),  # chose the best step
        ("train", "dev", "also", True),
        ("train", "test", "path", False),
        ("train", "train", "elsewhere", False),
        ("", "dev", "path", False),
    ],
)
def test_what_a_run_learned_from_is_known_of_every_corpus_and_of_the_dev_split(natural, split, place, told, tmp_path):
    from pipelines.text_evaluate import _learned_from

    corpus = {"natural": natural, "path": str(tmp_path / "path"), "also": [str(tmp_path / "also")]}
    assert _learned_from(corpus, tmp_path / "path" / ".." / place, split) is told


def test_a_corpus_is_held_out_alike_from_within_its_folder(folder, monkeypatch):
    monkeypatch.chdir(folder)
    assert [read_corpus(path).name for path in (folder, Path(), Path("qrels/.."))] == ["tiny"] * 3


@pytest.mark.parametrize("name", ["mvp", "mvp_apart"])
def test_reranked_order_does_not_depend_on_the_order_of_candidates(name, folder, encoder):
    config = load_text_config(CONFIGS / f"{name}.toml")
    corpus = read_corpus(folder)
    queries = read_queries(folder, corpus, "test")
    pool = Pool(queries, best(np.random.default_rng(0).random((len(queries), len(corpus))), 20))
    model = tiny_text.model_of(config)
    straight = rerank_pool(model, corpus, pool, 20)
    for seed in range(3):
        order = np.random.default_rng(seed).permutation(20).tolist()
        np.testing.assert_array_equal(rerank_pool(model, corpus, pool, 20, order).rows, straight.rows)


def test_relevant_and_equal_passages_are_never_negatives(folder, encoder):
    from pipelines.encoder_task import EncoderTask

    corpus = Corpus("c", ["a", "b", "c"], ["wing flow", "Wing  flow", "heat"])
    queries = Queries(["1", "2"], ["wing", "wing"], [{0: 1}, {2: 1}])
    config = load_text_config(CONFIGS / "lexsembridge.toml")
    task = EncoderTask(config, tiny_text.model_of(config), FirstStages(corpus, encoder, folder), {"n": queries}, {})
    also = task.left_out(queries.texts, queries.grades, [0, 1, 2, 1], torch.tensor([0, 2]))
    assert also.tolist() == [[False, True, True, True], [True, True, False, False]]


@pytest.mark.parametrize(
    ("texts", "left_out"),
    [
        (["wing", "heat"], [[False] * 4, [False] * 4]),
        (["wing", "wing"], [[False, False, True, True], [True, True, False, False]]),
    ],
    ids=["two queries", "one query twice"],
)
def test_a_query_is_told_from_its_own_hard_negatives(folder, encoder, texts, left_out):
    from pipelines.encoder_task import EncoderTask

    corpus = Corpus("c", list("abcd"), ["wing flow", "wing heat", "heat flow", "jet"])
    queries = Queries(["1", "2"], texts, [{0: 1}, {2: 1}])
    config = load_text_config(CONFIGS / "lexsembridge.toml")
    task = EncoderTask(config, tiny_text.model_of(config), FirstStages(corpus, encoder, folder), {"n": queries}, {})
    assert task.left_out(texts, queries.grades, [0, 1, 2, 3], torch.tensor([0, 2])).tolist() == left_out


def test_head_room_grows_with_its_bound_and_starts_at_the_plain_encoder():
    from pipelines.head_room import head_room

    draws = np.random.default_rng(0)
    passages = draws.normal(size=(30, 16)).astype(np.float32)
    passages /= np.linalg.norm(passages, axis=1, keepdims=True)
    gold = np.arange(12)
    queries = passages[gold] + 0.3 * draws.normal(size=(12, 16)).astype(np.float32)
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    plain = float(((queries @ passages.T).argmax(axis=1) == gold).mean())
    none, some, much = head_room(queries, passages, gold, (0.0, 1.0, 6.0))
    assert none.gold == pytest.approx(plain)
    assert none.gold <= some.gold <= much.gold
    assert none.wrong <= some.wrong <= much.wrong <= much.gold + 0.2


def test_a_few_queries_have_values_and_no_intervals(folder, tmp_path, mlflow_uri, encoder):
    """JSON knows no NaN, and nothing is told apart by three queries."""
    run("mvp_apart", folder, tmp_path / "run", mlflow_uri, encoder)
    corpus = read_corpus(folder)
    queries = read_queries(folder, corpus, "test").only(range(3))
    runs, stages = [TextModelRun.load("mvp_apart", tmp_path / "run")], FirstStages(corpus, encoder, folder / "cache")
    write_text_report(evaluate_text(runs, stages, {"natural": queries}, 0.4, 10), {"corpus": "few"}, tmp_path)
    told = json.loads((tmp_path / "metrics.json").read_text())["tasks"]["natural"]
    assert told["systems"]["bm25"]["ndcg_at_10"]["value"] >= 0
    assert told["systems"]["bm25"]["ndcg_at_10"]["ci_low"] is None
    page = (tmp_path / "report.md").read_text()
    assert "not told apart" in page
    assert "nan" not in page
