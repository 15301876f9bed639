"""Search: what a bundle's text part holds, how stages change the order, and where work stops when the time is up."""

import dataclasses
import shutil

import numpy as np
import pytest
import tiny_text
from hypothesis import given, settings
from hypothesis import strategies as st
from text_world import (
    COLOURS,
    NAMES,
    THINGS,
    WordCount,
    publish_corpus,
    publish_search,
    snapshot,
    tiny_encoder,
    tiny_tokenizer,
)

from ranking.batch import FIRST_ITEM
from ranking.bundle import Bundle
from ranking.cross_encoder import CrossEncoder, CrossEncoderConfig
from ranking.deadline import Deadline
from ranking.fusion import Mix, Ranking, convex_fusion
from ranking.passages import NO_ITEM, Passages
from ranking.recommender import Recommender
from ranking.rerank_depth import paced
from ranking.search_part import SHIFT
from ranking.searched import SearchConfig
from ranking.searcher import Searcher, shortened
from ranking.snapshot import SnapshotReader
from ranking.text_backbone import TextTokenizer
from recsys.errors import BundleError, ConfigError, DataError, RequestError
from recsys.files import read_json, write_json
from recsys.messages import RankRequest, RecommendRequest

LATER = 2**60


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return publish_search(tmp_path_factory.mktemp("search") / "bundle", reranker=WordCount())


@pytest.fixture(scope="module")
def bundle(directory) -> Bundle:
    return Bundle.load(directory)


@pytest.fixture(scope="module")
def recommender(bundle, tmp_path_factory) -> Recommender:
    return Recommender(bundle, SnapshotReader(snapshot(tmp_path_factory.mktemp("search") / "snapshot")))


def texts(searched) -> list[str]:
    return [searched.part.passages.text(row) for row in searched.rows.tolist()]


# --- passages


DOCUMENTS = st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 3), st.booleans()), min_size=1, max_size=20)


@settings(deadline=None)
@given(DOCUMENTS)
def test_documents_of_one_text_are_one_passage_and_none_is_lost(documents):
    ids = [f"d{number}" for number in range(len(documents))]
    items = np.array([FIRST_ITEM + n if item else NO_ITEM for n, (_, _, item) in enumerate(documents)], np.int32)
    weight = np.array([weight for _, weight, _ in documents])
    passages = Passages.of(ids, [text for text, _, _ in documents], items, weight)
    found = {passages.text(row): passages.documents(row, 99) for row in range(len(passages))}
    for text, of_text in found.items():
        same = [n for n, document in enumerate(documents) if document[0] == text]
        assert of_text == [ids[n] for n in sorted(same, key=lambda n: -weight[n])]
    assert sum(map(len, found.values())) == len(documents)
    rows, places = passages.items_of(np.arange(len(passages), dtype=np.int32))
    assert sorted(rows.tolist()) == sorted(items[items != NO_ITEM].tolist())
    assert all(documents[row - FIRST_ITEM][0] == passages.text(place) for row, place in zip(rows, places, strict=True))


def test_documents_that_are_no_items_may_all_be_shown():
    items = np.array([2, NO_ITEM, 3, 4, 5], np.int32)
    passages = Passages.of(["a", "b", "c", "d", "e"], ["x", "x", "y", "y", "z"], items)
    allowed = np.array([False, False, False, False, True, False])
    assert passages.allows(allowed).tolist() == [True, True, False]
    assert [passages.documents(row, 9, allowed) for row in range(3)] == [["b"], ["d"], []]
    assert [passages.count(row, allowed) for row in range(3)] == [1, 1, 0]


def test_no_documents_are_refused():
    with pytest.raises(DataError, match="at least one"):
        Passages.of([], [])


# --- the text part of a bundle


def test_a_bundle_gives_back_what_was_published(bundle):
    part = bundle.text
    assert (len(part.passages), len(part.passages.document_ids)) == (30, 62) == (part.bm25.passages, 62)
    encoder = tiny_encoder()
    vectors = encoder.encode_passages(NAMES)
    order = [NAMES.index(text) for text in part.passages.texts]
    scores = encoder.encode_queries(["red tea"]) @ vectors[order].T
    rows, found = part.index.search(part.encoder.encode_queries(["red tea"]), 30)
    assert np.allclose(scores[0][rows[0] - SHIFT], found[0], atol=1e-6)
    entry = bundle.manifest.text
    assert (entry.encoder, entry.reranker, entry.weight, entry.covered) == ("dense", "word_count", 0.3, None)


def damaged(directory, tmp_path, change):
    copy = tmp_path / "copy"
    shutil.copytree(directory, copy)
    change(copy)
    return copy


def rewrite(copy, name, value):
    """Change a file and the manifest's word of it, as somebody might who knows the format."""
    from ranking.manifest import describe

    if value is not None:
        write_json(copy / name, value)
    manifest = read_json(copy / "manifest.json")
    manifest["files"] = {k: v.model_dump() for k, v in describe(copy).items() if k != "manifest.json"}
    write_json(copy / "manifest.json", manifest)


def changed_score(copy):
    golden = read_json(copy / "text" / "golden.json")
    golden["searches"][0]["rerank"][0] += 0.5
    rewrite(copy, "text/golden.json", golden)


def other_vectors(copy):
    tiny_encoder(seed=1).save(copy / "text" / "encoder")
    rewrite(copy, "", None)


DAMAGE = {
    "a file was added": (lambda copy: (copy / "text" / "bm25" / "more.npy").write_bytes(b"x"), "not of the published"),
    "a file is gone": (lambda copy: (copy / "text" / "passages.safetensors").unlink(), "missing"),
    "a file was changed": (lambda copy: (copy / "text" / "encoder" / "config.json").write_text("{}"), "bytes|sha256"),
    "the reranker answers otherwise": (changed_score, "rerank: score of"),
    "the encoder is another one": (other_vectors, "dense"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_text_part_is_refused(directory, tmp_path, case):
    change, told = DAMAGE[case]
    with pytest.raises(BundleError, match=told):
        Bundle.load(damaged(directory, tmp_path, change))


def test_the_same_input_gives_the_same_bundle(directory, tmp_path):
    again = publish_search(tmp_path / "again", reranker=WordCount())
    assert (again / "manifest.json").read_bytes() == (directory / "manifest.json").read_bytes()


# --- stages


def test_first_stages_alone_and_together(bundle):
    searcher, part = Searcher(bundle.text), bundle.text
    words = searcher.search("red tea", mode="bm25", rerank=False)
    assert texts(words)[0] == "red tea"
    assert set(texts(words)) == {name for name in NAMES if {"red", "tea"} & set(name.split())}
    dense = searcher.search("red tea", mode="dense", rerank=False)
    assert len(dense) == 30
    both = searcher.search("red tea", rerank=False)
    expected = convex_fusion(
        Ranking(words.rows[None], words.scores[None]), Ranking(dense.rows[None], dense.scores[None]), part.mix.weight
    )
    assert (both.mode, both.rows.tolist()) == ("hybrid", expected.rows[0][expected.rows[0] >= 0].tolist())
    assert searcher.search("unheard of", mode="bm25").rows.tolist() == []
    ranks = Searcher(dataclasses.replace(part, mix=Mix(weight=None))).search("red tea", rerank=False)
    assert set(ranks.rows.tolist()) == set(both.rows.tolist())


def test_words_count_more_where_one_passage_holds_them_all(bundle):
    part = dataclasses.replace(bundle.text, mix=Mix(weight=0.0, covered=1.0))
    searcher = Searcher(part)
    for query, mode in (("tea red", "bm25"), ("soap", "bm25"), ("soap unheard of", "dense"), ("red tea soap", "dense")):
        alone = searcher.search(query, mode=mode, rerank=False)
        both = searcher.search(query, rerank=False)
        assert both.rows[:1].tolist() == alone.rows[:1].tolist()
        assert float(both.scores[0]) == 1.0


def test_the_reranker_orders_the_head_and_leaves_the_rest(bundle):
    searcher = Searcher(bundle.text, SearchConfig(rerank=5))
    plain = searcher.search("blue jam and milk", rerank=False)
    found = searcher.search("blue jam and milk")
    assert sorted(found.rows[:5].tolist()) == sorted(plain.rows[:5].tolist())
    assert found.rows[5:].tolist() == plain.rows[5:].tolist()
    assert (np.diff(found.scores[:5]) <= 0).all()
    assert plain.rows[found.first - 1].tolist() == found.rows.tolist()
    assert (found.reranked, found.degraded) == (5, ())


@pytest.mark.parametrize("mode", ["hybrid", "bm25", "dense"])
@given(words=st.lists(st.sampled_from([*COLOURS, *THINGS, "unheard"]), min_size=1, max_size=4, unique=True))
@settings(deadline=None, max_examples=40)
def test_where_one_passage_holds_the_query_the_first_stage_decides(bundle, mode, words):
    query = " ".join(words)
    known = set(words) - {"unheard"}
    held = any(known <= set(name.split()) for name in NAMES) and len(known) >= 2 * (len(words) - len(known))
    spared = held and mode != "dense"  # which looks for no words
    searcher = Searcher(bundle.text)
    plain, asked = (searcher.search(query, mode=mode, rerank=rerank) for rerank in (False, True))
    found = searcher.search(query, mode=mode)
    expected = plain if spared else asked
    assert (found.covered, found.reranked) == (spared, expected.reranked)
    assert found.rows.tolist() == expected.rows.tolist()
    assert found.degraded == ()
    assert (plain.covered, asked.covered) == (False, False)
    always = Searcher(bundle.text, SearchConfig(rerank_covered=True)).search(query, mode=mode)
    assert (always.covered, always.rows.tolist()) == (False, asked.rows.tolist())
    alone = Searcher(dataclasses.replace(bundle.text, reranker=None)).search(query, mode=mode)
    assert (alone.covered, alone.rows.tolist()) == (False, plain.rows.tolist())


def test_a_search_spared_the_reranker_is_not_told_of_missing_time(bundle):
    found = Searcher(dataclasses.replace(bundle.text, reranker=Broken())).search("blue jam", Deadline(60))
    assert (found.covered, found.degraded, found.reranked) == (True, (), 0)
    assert "rerank" not in found.timings


class Steps:
    """A clock that goes on by one each time it is read."""

    def __init__(self) -> None:
        self.now = 0

    def __call__(self) -> float:
        self.now += 1
        return self.now


@pytest.mark.parametrize("budget", [3, 6, 9])
def test_reranking_stops_when_the_time_is_up(bundle, budget):
    reranker = WordCount()
    searcher = Searcher(dataclasses.replace(bundle.text, reranker=reranker))
    plain = searcher.search("blue jam", rerank=False)
    found = searcher.search("blue jam", Deadline(budget, Steps()), rerank=True)
    assert found.degraded == ("rerank",)
    assert found.rows.tolist() == plain.rows.tolist()
    assert 0 < reranker.scored < budget


def test_without_any_time_words_alone_are_searched(bundle):
    found = Searcher(bundle.text).search("blue jam", Deadline(0), rerank=True)
    assert (found.mode, found.degraded) == ("bm25", ("dense", "rerank"))
    assert found.rows.tolist() == Searcher(bundle.text).search("blue jam", mode="bm25", rerank=False).rows.tolist()


class Broken:
    """A model of which every call fails."""

    def __getattr__(self, name):
        raise ZeroDivisionError(name)


def test_with_users_waiting_a_model_that_fails_is_left_out(bundle):
    part = dataclasses.replace(bundle.text, encoder=Broken(), reranker=Broken())
    found = Searcher(part).search("blue jam", Deadline(60), rerank=True)
    assert (found.mode, found.degraded) == ("bm25", ("dense", "rerank"))
    assert len(found)
    with pytest.raises(ZeroDivisionError):
        Searcher(part).search("blue jam", rerank=True)


def test_a_bundle_of_words_alone(tmp_path):
    part = Bundle.load(publish_search(tmp_path / "words", encoder=False)).text
    assert Searcher(part).search("red tea").mode == "bm25"
    for mode in ("dense", "hybrid"):
        with pytest.raises(RequestError, match="--text-encoder") as refused:
            Searcher(part).search("red tea", mode=mode)
        assert refused.value.status == 409
    with pytest.raises(RequestError, match="--reranker"):
        Searcher(part).rerank("red", ["tea"], 10)


def test_a_bundle_of_text_alone(tmp_path):
    corpus = ["red tea", "green bread and jam", "white soap", ""]
    bundle = Bundle.load(publish_corpus(tmp_path / "corpus", corpus, encoder=tiny_encoder()))
    found = Searcher(bundle.text).search("bread", mode="bm25")
    assert bundle.text.passages.documents(int(found.rows[0]), 5) == ["d1"]
    with pytest.raises(RequestError, match="--ranker"):
        _ = bundle.ranker
    # Without a reranker documents are ordered by the encoder's cosine, and those it reads the beginning of are named.
    long = "red tea " * 200
    assert Searcher(bundle.text).rerank("red", ["tea", long], 10_000).truncated.tolist() == [False, True]
    scores = Searcher(bundle.text).rerank("red tea", corpus[:3], 10).scores
    assert scores[0] == pytest.approx(1, abs=1e-5) == scores.max()


def test_cutting_keeps_whole_tokens_and_says_what_it_cut():
    tokenizer = TextTokenizer.wrap(tiny_tokenizer())
    given_texts = [
        "red tea",
        "red tea and jam",
        "",
        "x" * 10_000,
        " " * 400 + "red\ttea",
        " " * 400 + "red tea and jam",
    ]
    short, cut = shortened(tokenizer, given_texts, 2)
    assert short[:3] + short[4:] == ["red tea", "red tea", "", given_texts[4], "red tea"]
    assert cut.tolist() == [False, True, False, True, False, True]
    assert len(short[3]) <= 64


class Given(CrossEncoder):
    """A reranker that knows how much text it was given."""

    most = 0

    def rows(self, query, passages):
        self.most = max(self.most, *map(len, passages))
        return super().rows(query, passages)


def test_long_passages_are_cut_before_the_reranker_reads_them_and_score_alike(tmp_path):
    corpus = ["wing flow " * length for length in (1, 10, 19, 30, 60, 20_000)] + ["wing " + " " * 9_000 + "flow"]
    reranker = Given(CrossEncoderConfig(max_len=48), tiny_text.bert(), tiny_text.tokenizer())
    bundle = Bundle.load(publish_corpus(tmp_path / "long", corpus))
    part = dataclasses.replace(bundle.text, reranker=reranker, tokenizer=reranker.tokenizer)
    found = Searcher(part).search("wing", rerank=True)
    assert 0 < reranker.most < 10_000
    whole = [part.passages.text(row) for row in found.rows.tolist()]
    assert found.scores.tolist() == reranker.rerank("wing", whole).tolist()
    assert found.truncated.tolist() == reranker.truncated("wing", whole).tolist()
    assert 0 < found.truncated.sum() < len(corpus)
    reranker.most = 0
    late = Searcher(part).search("wing", Deadline(4, Steps()), rerank=True)
    assert (late.degraded, reranker.most) == (("rerank",), 0), "the clock was not looked at between the texts"
    assert paced(Searcher(part)).pace > 0
    assert 0 < reranker.most < 10_000


@given(st.lists(st.sampled_from(["red", "tea", "?", "   ", "unheard" * 9, "\n"]), max_size=40), st.integers(1, 6))
def test_a_text_is_cut_behind_its_token_however_long_its_words_are(words, tokens):
    tokenizer = TextTokenizer.wrap(tiny_tokenizer())
    text = " ".join(words)
    offsets = tokenizer.tokenizer.encode(text, add_special_tokens=False).offsets
    [short], [cut] = shortened(tokenizer, [text], tokens)
    if len(text) <= 32 * tokens:
        assert cut == (len(offsets) > tokens)
        assert short == (text[: offsets[tokens - 1][1]] if cut else text)
    else:
        own = tokenizer.pieces([text, short])
        assert own[1] == own[0][:tokens] or len(own[1]) < tokens


def test_settings_out_of_range_are_refused():
    for wrong in ({"depth": 0}, {"rerank": -1}, {"budget_ms": -1}, {"personal_weight": -0.1}, {"depth": 600}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            SearchConfig(**wrong)


# --- blending with a ranker


def test_a_request_with_a_query_blends_search_and_ranker_by_rank(bundle, recommender):
    searcher = Searcher(bundle.text, SearchConfig(personal=len(NAMES)))
    searched = searcher.search("wombat tea zebra")  # of which no passage holds enough
    request = RecommendRequest(user_id="user-3", query="wombat tea zebra", k=20, at=LATER)
    answer = recommender.recommend(request, 0, None, searched)
    rows, places = searched.items()
    ids = [bundle.item_ids[row] for row in rows]
    scores = recommender.rank(RankRequest(user_id="user-3", item_ids=ids, at=LATER), 0).scores
    by_ranker = sorted(range(len(ids)), key=lambda n: (-scores[n], rows[n]))
    total = {ids[n]: 1 / (61 + places[n]) + 1 / (61 + rank) for rank, n in enumerate(by_ranker)}
    assert [item.score for item in answer.items] == pytest.approx([total[item.item_id] for item in answer.items])
    assert [item.score for item in answer.items] == pytest.approx(sorted(total.values(), reverse=True)[:20])
    assert {source for item in answer.items for source in item.sources} == {"search"}
    explained = recommender.recommend(request.model_copy(update={"explain": True}), 0, None, searched)
    assert explained.items[0].stages[0].stage == "search"


def test_of_a_stranger_the_search_alone_decides(bundle, recommender):
    searched = Searcher(bundle.text).search("red tea")
    answer = recommender.recommend(RecommendRequest(user_id="nobody", query="red tea", k=62), 0, None, searched)
    rows, places = searched.items()
    place = dict(zip((bundle.item_ids[row] for row in rows), places.tolist(), strict=True))
    count = dict(zip(bundle.item_ids, bundle.items.count.tolist(), strict=True))
    found = [(place[item.item_id], -count[item.item_id]) for item in answer.items]
    assert found == sorted(found)
    assert len(found) == 62


def test_filters_hold_for_what_a_search_finds(bundle, recommender):
    searched = Searcher(bundle.text).search("red tea")
    filters = [{"column": "item_id", "deny": ["item-0", "item-30"]}]
    request = RecommendRequest(user_id="user-3", query="red tea", k=62, filters=filters, at=LATER)
    found = [item.item_id for item in recommender.recommend(request, 0, None, searched).items]
    assert len(found) == 60
    assert not {"item-0", "item-30"} & set(found)


@settings(deadline=None, max_examples=30)
@given(
    st.lists(st.booleans(), min_size=62, max_size=62),
    st.sampled_from(["bm25", "dense"]),
    st.sampled_from([3, 30]),
)
def test_a_search_finds_what_may_be_shown_and_no_less(bundle, shown, mode, depth):
    allowed = np.array([False, False, *shown])
    searcher = Searcher(bundle.text, SearchConfig(depth=depth))
    found = searcher.search("red tea", mode=mode, rerank=False, allowed=allowed)
    every = Searcher(bundle.text).search("red tea", mode=mode, rerank=False)
    left = [row for row in every.rows if allowed[every.part.passages.items_of(np.array([row]))[0]].any()]
    assert found.rows.tolist() == left[:depth]
    assert found.first.tolist() == list(range(1, len(found) + 1))
    rows, _ = found.items()
    assert allowed[rows].all()
    both = searcher.search("red tea", rerank=True, allowed=allowed)
    assert len(both) == min(depth, len({NAMES[n % 30] for n, one in enumerate(shown) if one}))


@pytest.mark.parametrize("mode", ["hybrid", "bm25", "dense"])
def test_a_filter_that_leaves_little_finds_what_stands_far_below_the_pool(bundle, monkeypatch, mode):
    monkeypatch.setattr("ranking.searcher.POOL", 3)
    searcher = Searcher(bundle.text, SearchConfig(depth=3))
    worst = Searcher(bundle.text, SearchConfig(depth=30)).search("red tea", mode=mode, rerank=False).rows[-2:]
    allowed = np.zeros(64, bool)
    allowed[bundle.text.passages.items_of(worst)[0][[0, -1]]] = True  # one item of each: what they share stays found
    found = searcher.search("red tea", mode=mode, rerank=False, allowed=allowed)
    assert sorted(found.rows.tolist()) == sorted(worst.tolist())
    assert not len(searcher.search("red tea", mode=mode, rerank=False, allowed=np.zeros(64, bool)))


@pytest.mark.parametrize("mode", ["hybrid", "bm25", "dense"])
def test_a_filter_that_denies_nothing_changes_no_bit(bundle, mode):
    plain, all_allowed = (
        Searcher(bundle.text).search("red tea and jam", mode=mode, allowed=allowed)
        for allowed in (None, np.ones(64, bool))
    )
    assert plain.rows.tobytes() == all_allowed.rows.tobytes()
    assert plain.scores.tobytes() == all_allowed.scores.tobytes()


def test_a_query_without_a_search_is_refused(recommender):
    with pytest.raises(RequestError, match="--text-encoder") as refused:
        recommender.recommend(RecommendRequest(user_id="user-3", query="red tea"), 0)
    assert refused.value.status == 409


@settings(deadline=None, max_examples=30)
@given(
    st.lists(st.floats(-5, 5, width=16), min_size=62, max_size=62),
    st.floats(0.1, 3),
    st.sampled_from(["red tea", "tea", "red tea wombat", "zebra"]),
    st.integers(0, 40),
)
def test_for_a_user_what_fits_equally_is_ordered_by_both_ranks_and_stands_above_the_rest(
    bundle, scores, weight, query, head
):
    searched = Searcher(bundle.text, SearchConfig(personal_weight=weight, personal=head)).search(query)
    rows, places = searched.items()
    texts = [set(searched.part.passages.text(row).split()) for row in searched.rows.tolist()]
    words = set(query.split()) & set().union(*texts)
    blends = [bool(words) and words <= text for text in texts]
    blends = blends if any(blends) else [place < head for place in range(len(texts))]
    first = sorted(range(len(texts)), key=lambda p: not blends[p])
    order = {p: n for n, p in enumerate(first)}
    best = [max(score for score, place in zip(scores, places, strict=False) if place == p) for p in range(len(texts))]
    rank = {p: n for n, p in enumerate(sorted(filter(blends.__getitem__, order), key=lambda p: (-best[p], p)), 1)}
    total = [1 / (61 + order[p]) + (weight / (60 + rank[p]) if blends[p] else 0) for p in range(len(texts))]
    personal = searched.for_user(places, rows, np.array(scores[: len(rows)], np.float32))
    assert personal.scores.tolist() == pytest.approx(total, rel=1e-6)
    assert [total[p] for p in personal.order] == pytest.approx(sorted(total, reverse=True), rel=1e-6)
    ahead = sum(blends)
    assert {bool(blends[p]) for p in personal.order[:ahead].tolist()} <= {True}
    assert personal.order[ahead:].tolist() == first[ahead:]
    assert sorted(personal.rank.tolist()) == list(range(1, len(texts) + 1))
    for p, item in enumerate(personal.item.tolist()):
        assert scores[rows.tolist().index(item)] == best[p]
        assert searched.part.passages.text(searched.rows[p]) == bundle.names[item]
    items = searched.blended(rows, np.array(scores[: len(rows)], np.float32), known=True)
    placed = [p for _, p in sorted(zip(-items, places.tolist(), strict=True))]
    assert all(blends[p] for p in placed[: sum(blends[p] for p in places.tolist())])


def test_an_item_asked_for_by_its_name_is_first_for_whoever_asks(bundle):
    searcher = Searcher(bundle.text)
    for name in NAMES:
        searched = searcher.search(name)
        rows, places = searched.items()
        worst = np.where(places == 0, -9.0, 9.0).astype(np.float32)  # of all that was found the ranker likes it least
        assert searched.part.passages.text(searched.rows[searched.for_user(places, rows, worst).order[0]]) == name
        assert bundle.names[rows[np.argmax(searched.blended(rows, worst, known=True))]] == name


def test_documents_that_are_no_items_keep_their_place_among_items(bundle):
    searched = Searcher(bundle.text).search("tea")
    rows, places = searched.items()
    for gone in range(5):
        kept = places != gone
        scores = -places[kept].astype(np.float32)  # the ranker agrees with the search
        assert searched.for_user(places[kept], rows[kept], scores).order[:5].tolist() == [0, 1, 2, 3, 4]


# --- how much is reranked on this machine


@pytest.mark.parametrize(
    ("each", "budget", "depth"),
    [(0.001, 1000, 20), (0.034, 1000, 20), (0.069, 1000, 10), (0.35, 1000, 2), (60.0, 1000, 2), (0.1, 200, 2)],
)
def test_a_search_reranks_what_this_machine_reads_in_its_budget(bundle, caplog, each, budget, depth):
    reranker = WordCount()
    part = dataclasses.replace(bundle.text, reranker=reranker)
    searcher = paced(Searcher(part, SearchConfig(budget_ms=budget)), lambda: reranker.scored * each)
    assert searcher.pace == pytest.approx(each)
    assert searcher.search("red tea", searcher.deadline(None), rerank=True).reranked == depth
    assert (f"the best {depth} instead of 20" in caplog.text) == (depth < 20)
    assert searcher.search("red tea", rerank=True).reranked == 20  # without a budget, as in evaluation
    assert paced(Searcher(bundle.text), lambda: 0.0).pace == 0


@given(st.floats(0.001, 1), st.integers(1, 30), st.lists(st.floats(0.01, 20), min_size=2, max_size=2))
def test_a_larger_budget_never_reranks_fewer(bundle, pace, most, budgets):
    searcher = Searcher(bundle.text, SearchConfig(rerank=most), pace)
    little, much = (searcher.rerank_depth(seconds) for seconds in sorted(budgets))
    assert min(2, most) <= little <= much <= most
    assert little <= 2 or little * pace <= 0.7 * min(budgets) * (1 + 1e-9)
