"""Long texts in windows: every token is read, a text counts by its best window, files that do not fit are refused."""

import json
from dataclasses import replace

import numpy as np
import pytest
import text_world
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from pipelines.first_stages import FirstStages, windows_search
from pipelines.text_corpus import read_corpus
from pipelines.text_publish import search_contents
from ranking.bundle import Bundle
from ranking.dense_encoder import DenseEncoder
from ranking.fusion import NONE, Mix, Ranking
from ranking.manifest import TextEntry
from ranking.passages import Passages
from ranking.search_part import TEXT, WINDOWS, load_search_part, write_search_part
from ranking.searcher import Searcher
from ranking.text_backbone import TextTokenizer
from ranking.windows import OVERLAP, SPARE, by_passage, windows_of
from recsys.errors import BundleError

WORDS = text_world.COLOURS + text_world.THINGS
TOKENIZER = TextTokenizer.wrap(text_world.tiny_tokenizer())
texts = st.lists(st.lists(st.sampled_from(WORDS), max_size=300).map(" ".join), min_size=1, max_size=5)


@given(texts=texts, room=st.integers(1, 160))
def test_every_token_is_in_a_window_and_neighbours_overlap(texts: list[str], room: int) -> None:
    windows = windows_of(texts, TOKENIZER, room)
    assert windows.texts[: len(texts)] == texts
    assert windows.passage[: len(texts)].tolist() == list(range(len(texts)))
    for place, text in enumerate(texts):
        words = text.split()
        further = [
            windows.texts[n].split() for n in np.flatnonzero(windows.passage == place).tolist() if n >= len(texts)
        ]
        assert bool(further) == (len(words) > room)
        end = room  # the passage itself is read so far
        size = room - room // SPARE
        step = size - min(OVERLAP, size // 2)
        for number, window in enumerate(further):
            last = number == len(further) - 1
            start = len(words) - size if last else step * (number + 1)
            assert start <= end
            assert window == words[start : start + size]
            end = start + size
        assert end >= len(words)


@given(
    windows=st.integers(1, 30).flatmap(lambda n: st.lists(st.integers(0, 7), min_size=n, max_size=n)),
    places=st.integers(1, 12),
    draws=st.randoms(use_true_random=False),
)
def test_a_passage_stands_at_the_place_of_its_best_window(windows: list[int], places: int, draws) -> None:
    scores = [draws.randint(0, 50) / 7 for _ in windows]
    order = sorted(range(len(windows)), key=lambda n: -scores[n])
    found = Ranking(
        np.array([[*order, NONE]], np.int32), np.array([[*(scores[n] for n in order), -np.inf]], np.float32)
    )
    got = by_passage(found, np.array(windows, np.int32), places)
    best: dict[int, float] = {}
    for n in order:
        best.setdefault(windows[n], scores[n])
    assert got.rows[0].tolist() == [*best, *[NONE] * places][:places]
    assert got.scores[0][: len(best)].tolist() == pytest.approx(list(best.values())[:places])


def long_texts(count: int = 40, seed: int = 3) -> list[str]:
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, rng.integers(1, 60))) for _ in range(count)]


def short_sighted() -> DenseEncoder:
    """A tiny encoder that reads ten tokens, two of them special."""
    whole = text_world.tiny_encoder()
    return DenseEncoder(replace(whole.config, max_passage_len=10), whole.transformer, whole.tokenizer)


def test_batch_evaluation_and_a_published_bundle_find_the_same_by_windows(tmp_path) -> None:
    documents, encoder = list(dict.fromkeys(long_texts())), short_sighted()
    ids = [f"d{n}" for n in range(len(documents))]
    lines = [json.dumps({"_id": id_, "text": text}) for id_, text in zip(ids, documents, strict=True)]
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "corpus.jsonl").write_text("\n".join(lines))
    stages = FirstStages(read_corpus(tmp_path / "corpus"), encoder, tmp_path / "cache")
    passages = Passages.of(ids, documents)
    contents = search_contents(passages, encoder, None, Mix(), tmp_path / "cache")
    (tmp_path / "bundle").mkdir()
    entry = write_search_part(tmp_path / "bundle", contents)
    assert entry.windows == len(stages.windows.texts) > len(documents)
    written = {path.relative_to(tmp_path / "bundle").as_posix(): path for path in (tmp_path / "bundle").rglob("*")}
    part = load_search_part(tmp_path / "bundle", entry, written)
    queries = [" ".join(text.split()[-4:]) for text in documents]
    vectors = encoder.encode_queries(queries)
    alone = encoder.encode_passages(stages.windows.texts)
    every = 0.5 * alone + 0.5 * alone[stages.windows.passage]
    assert np.allclose(stages.window_vectors, every, atol=1e-6)
    assert np.array_equal(stages.window_vectors[: len(documents)], stages.passage_vectors)
    wanted = np.full((len(queries), len(documents)), -np.inf)
    for window, passage in enumerate(stages.windows.passage.tolist()):
        wanted[:, passage] = np.maximum(wanted[:, passage], vectors @ every[window])
    exact = windows_search(vectors, every, stages.windows, 10)
    served = part.nearest(vectors, 10)
    for found in (exact, served):
        there = found.rows >= 0  # the windows nearest to a query may be of few passages
        assert there[:, 0].all()
        assert np.allclose(found.scores[there], -np.sort(-wanted, axis=1)[:, :10][there], atol=1e-5)
        assert np.allclose(np.take_along_axis(wanted, found.rows, axis=1)[there], found.scores[there], atol=1e-5)
    assert (exact.rows >= 0).all()
    hybrid = stages.hybrid(queries)
    for place, query in enumerate(queries):
        answer = Searcher(part).search(query)
        assert np.allclose(answer.scores, hybrid.scores[place][: len(answer)], atol=1e-4)
    rankings = stages.all(queries, 0.4)
    assert (rankings["dense_windows"].scores >= rankings["dense"].scores - 1e-6)[:, 0].all()


def test_bytes_that_are_tokens_are_all_read() -> None:
    """Byte-level BPE: a character may be three tokens, and a window cut inside a word may have more."""
    corpus = ["the quick brown fox", "jumps over the lazy dog"]
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    trained.train_from_iterator(corpus, trainer)
    tokenizer = TextTokenizer(trained, (), (), 0)
    japanese = "".join(chr(0x3042 + n % 80) for n in range(220))
    assert len(tokenizer.pieces([japanese])[0]) == 660
    english = " ".join(corpus * 60)
    for text in (japanese, english):
        windows = windows_of([text], tokenizer, 254)
        assert len(windows.texts) > 2
        assert windows.texts[-1].endswith(text[-1])
        assert all(len(tokenizer.pieces([part])[0]) <= 254 for part in windows.texts[1:])


def test_one_huge_text_among_short_ones_is_published_and_leaves_room_for_them(tmp_path) -> None:
    rng = np.random.default_rng(0)
    short = dict.fromkeys(" ".join(rng.choice(WORDS, 4)) for _ in range(40))
    texts = [" ".join(rng.choice(WORDS, 5000)), *short]
    place = text_world.publish_corpus(tmp_path / "bundle", texts, encoder=short_sighted())
    part = Bundle.load(place).text
    assert part is not None
    vector = part.encoder.encode_queries([" ".join(texts[0].split()[:6])])
    assert len(part.windows) > 30 * len(texts)
    found = part.nearest(vector, 20)
    assert (found.rows >= 0).sum() >= 2


def test_a_filter_finds_the_nearest_long_texts_of_those_it_leaves(tmp_path) -> None:
    part = Bundle.load(text_world.publish_corpus(tmp_path / "long", long_texts(), encoder=short_sighted())).text
    assert part is not None
    assert part.windows is not None
    vector = part.encoder.encode_queries(["red tea"])
    every = part.nearest(vector, 10_000)
    for left in (40, 3, 1):
        far = every.rows[0, -left:]
        found = part.nearest(vector, 5, np.isin(np.arange(40), far))
        there = found.rows[0] != NONE
        assert there[0]
        assert np.isin(found.rows[0][there], far).all()
        assert np.allclose(found.scores[0][there], every.scores[0][-left:][: there.sum()], atol=1e-6)
    assert (part.nearest(vector, 5, np.zeros(40, bool)).rows == NONE).all()


def test_a_bundle_of_short_texts_has_no_windows_and_odd_ones_are_refused(tmp_path) -> None:
    place = text_world.publish_corpus(tmp_path / "short", ["red tea", "green jam"], encoder=short_sighted())
    assert not (place / TEXT / WINDOWS).exists()
    place = text_world.publish_corpus(tmp_path / "long", [" ".join(WORDS * 3), "red tea"], encoder=short_sighted())
    entry = TextEntry(**json.loads((place / "manifest.json").read_text())["text"])
    written = {path.relative_to(place).as_posix(): path for path in place.rglob("*")}
    assert load_search_part(place, entry, written).windows is not None
    good = entry.windows
    assert good is not None
    for odd in (
        {"passage": torch.zeros(good + 1, dtype=torch.int32)},
        {"passage": torch.full((good,), 2, dtype=torch.int32)},
        {"passage": torch.full((good,), -1, dtype=torch.int32)},
        {"passage": torch.zeros(good)},
        {"other": torch.zeros(good, dtype=torch.int32)},
    ):
        save_file(odd, place / TEXT / WINDOWS)
        with pytest.raises(BundleError, match=rf"not the passages of {good} windows"):
            load_search_part(place, entry, written)
