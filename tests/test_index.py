"""The index finds what brute force finds, in any number of shards, filtered or not, before and after a save."""

from pathlib import Path

import faiss
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ranking import index as module
from ranking.index import LEAST_LISTED, NONE, Index, IndexConfig, build, share_found
from recsys.errors import BundleError, ConfigError

WIDTH = 4


@pytest.fixture(autouse=True, scope="module")
def no_gpu():
    """Lists and codes are for the processor; what a GPU finds is in test_gpu.py."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(faiss, "get_num_gpus", lambda: 0)
        yield


def brute_force(vectors, rows, queries, k, allowed):
    """Rows and scores by the definition: every inner product, best first, equal scores by ascending row."""
    scores = queries @ vectors.T
    found = np.full((len(queries), k), NONE)
    best = np.full((len(queries), k), -np.inf, np.float32)
    for b, line in enumerate(scores):
        ranking = sorted((-s, r) for s, r in zip(line, rows, strict=True) if allowed is None or allowed[r])[:k]
        for place, (negated, row) in enumerate(ranking):
            found[b, place], best[b, place] = row, -negated
    return found, best


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("approximate", [False, True], ids=["flat", "inverted lists, everything compared"])
@settings(max_examples=12, deadline=None)
@given(n=st.integers(5, 60), k=st.integers(1, 70), seed=st.integers(0, 10_000), filtered=st.booleans())
def test_search_is_brute_force(tmp_path_factory, shards, approximate, n, k, seed, filtered):
    rng = np.random.default_rng(seed)
    n += shards * LEAST_LISTED if approximate else 0
    vectors = rng.normal(size=(n, WIDTH)).astype(np.float32)
    rows = rng.permutation(np.arange(2, n + 20))[:n]
    queries = rng.normal(size=(3, WIDTH)).astype(np.float32)
    allowed = rng.random(n + 20) < min(0.4, 40 / n) if filtered else None
    config = IndexConfig(0 if approximate else 10**6, -(-n // shards), lists=2, probes=10**6, compared=10**6)
    index = build(vectors, rows, config)
    assert all(isinstance(faiss.downcast_index(s.index), faiss.IndexRefine) == approximate for s in index._shards)
    expected_rows, expected_scores = brute_force(vectors, rows, queries, k, allowed)
    directory = tmp_path_factory.mktemp("index")
    assert len(index.save(directory)) == shards
    for searched in (index, Index.load(sorted(directory.iterdir()))):
        assert len(searched) == n
        assert searched.width == WIDTH
        found, scores = searched.search(queries, k, allowed)
        assert found.dtype == np.int32
        assert scores.dtype == np.float32
        np.testing.assert_allclose(scores, expected_scores, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(found, expected_rows)


def test_inverted_lists_miss_nothing_that_is_needed():
    """With few probes recall is high on clustered vectors, and a filter that leaves k rows still finds all of them."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(40, 16))
    vectors = (centres[rng.integers(0, 40, 4000)] + 0.2 * rng.normal(size=(4000, 16))).astype(np.float32)
    rows = np.arange(2, 4002)
    approximate = build(vectors, rows, IndexConfig(exact_below=0, probes=8))
    queries = vectors[:50] + 0.1 * rng.normal(size=(50, 16)).astype(np.float32)
    found, _ = approximate.search(queries, 20)
    truth, _ = build(vectors, rows).search(queries, 20)
    assert np.mean([len(set(a) & set(b)) / 20 for a, b in zip(found, truth, strict=True)]) > 0.95
    allowed = np.zeros(4002, bool)
    allowed[rng.choice(rows, 20, replace=False)] = True
    found, _ = approximate.search(queries, 20, allowed)
    np.testing.assert_array_equal(np.sort(found), np.broadcast_to(np.flatnonzero(allowed), (50, 20)))


@pytest.mark.parametrize("shards", [1, 3])
def test_as_much_is_read_and_compared_as_the_recall_takes(shards):
    """On vectors without any structure few lists find little, and what was chosen finds the share asked for."""
    rng = np.random.default_rng(1)
    vectors = rng.normal(size=(6_000, 16)).astype(np.float32)
    queries = rng.normal(size=(100, 16)).astype(np.float32)
    rows = np.arange(2, 6_002)
    truth, _ = build(vectors, rows).search(queries, 50)
    chosen = {}
    for wanted in (0.5, 0.9, 1.0):
        config = IndexConfig(exact_below=0, rows_per_shard=6_000 // shards, recall=wanted)
        index = build(vectors, rows, config, queries)
        found, _ = index.search(queries, 50)
        assert np.mean([len(set(a) & set(b)) / 50 for a, b in zip(found, truth, strict=True)]) == pytest.approx(
            index.recall(queries, 50)
        )
        assert index.recall(queries) >= wanted
        np.testing.assert_array_equal(index.exact(queries, 50)[0], truth)
        refined = faiss.downcast_index(index._shards[0].index)
        chosen[wanted] = faiss.extract_index_ivf(refined).nprobe * refined.k_factor
    assert chosen[0.5] < chosen[0.9] < chosen[1.0]
    few = build(vectors, rows, IndexConfig(0, 6_000 // shards, lists=6, probes=1), queries)
    assert few.recall(queries) < 0.5


@pytest.mark.parametrize("config", [IndexConfig(exact_below=0), IndexConfig(exact_below=0, rows_per_shard=2_000)])
def test_items_with_one_vector_are_as_good_as_each_other(config):
    """New items of one category have one vector: which of them are found says nothing of the recall."""
    rng = np.random.default_rng(2)
    own = rng.normal(size=(4_000, 16))
    alike = np.repeat(rng.normal(size=(10, 16)), 200, axis=0)
    vectors = np.concatenate([own, alike]).astype(np.float32)
    index = build(vectors, np.arange(2, 6_002), config)
    assert index.recall(vectors[::60]) >= config.recall


@given(st.lists(st.sets(st.integers(0, 5), max_size=4), min_size=1, max_size=4), st.integers(0, 4))
def test_the_share_found_is_that_of_the_rows_where_no_scores_are_equal(found, there):
    """Of items with the scores 0, -1, -2, ... the best 4 are looked for, of which `there` exist."""
    best = np.where(np.arange(4) < there, -np.arange(4.0), -np.inf).astype(np.float32)
    scores = np.full((len(found), 4), -np.inf, np.float32)
    for row, items in enumerate(found):
        scores[row, : len(items)] = [-item for item in sorted(items)]
    expected = [len([item for item in items if item < there]) / there if there else 1.0 for items in found]
    np.testing.assert_allclose(share_found(scores, np.tile(best, (len(found), 1))), expected)


def test_equal_scores_are_ordered_by_row():
    vectors = np.ones((30, WIDTH), np.float32)
    index = build(vectors, np.arange(31, 1, -1), IndexConfig(rows_per_shard=10))
    found, _ = index.search(vectors[:1], 30)
    assert found[0].tolist() == list(range(2, 32))


class Resources:
    """Stands for what a GPU index works in."""

    def setTempMemory(self, size: int) -> None:  # noqa: N802 - FAISS's name
        assert size == module.GPU_SCRATCH


def pretend_gpus(monkeypatch, gpus: int) -> list:
    """Let FAISS say that there are so many; gives the list of shards that are moved to the first one."""
    moved = []

    def to_gpu(resources, number, shard):
        assert isinstance(resources, Resources)
        assert number == 0
        moved.append(shard)
        return shard

    monkeypatch.setattr(faiss, "get_num_gpus", lambda: gpus)
    monkeypatch.setattr(faiss, "index_cpu_to_gpu", to_gpu, raising=False)
    monkeypatch.setattr(faiss, "StandardGpuResources", Resources, raising=False)
    return moved


def test_an_index_that_a_gpu_has_no_room_for_stays_on_the_processor(monkeypatch, caplog):
    moved = pretend_gpus(monkeypatch, 1)
    room = 4 * 4 * WIDTH + module.GPU_SCRATCH
    monkeypatch.setattr(module.torch.cuda, "is_available", lambda: True)
    for free, fits in ((room, True), (room - 1, False)):
        monkeypatch.setattr(module.torch.cuda, "mem_get_info", lambda device, free=free: (free, 80 * 2**30))
        moved.clear()
        index = build(np.eye(WIDTH, dtype=np.float32), np.arange(2, 2 + WIDTH))
        assert bool(moved) == fits
        assert index.search(np.eye(WIDTH, dtype=np.float32), 1)[0][:, 0].tolist() == [2, 3, 4, 5]
    assert f"needs {room} bytes of the GPU and {room - 1} are free" in caplog.text


@pytest.mark.parametrize("gpus", [0, 2])
def test_a_gpu_is_used_where_there_is_one(monkeypatch, gpus):
    moved = pretend_gpus(monkeypatch, gpus)
    vectors = np.eye(WIDTH, dtype=np.float32)
    index = build(vectors, np.arange(2, 2 + WIDTH), IndexConfig(rows_per_shard=2))
    assert len(moved) == (2 if gpus else 0)
    found, _ = index.search(vectors, 1)
    assert found[:, 0].tolist() == [2, 3, 4, 5]


def test_what_a_gpu_cannot_do_runs_on_the_cpu_shards(monkeypatch):
    """GPU shards take no filter and at most 2,048 neighbours; here the "GPU" refuses to search at all."""
    monkeypatch.setattr(module, "on_best_device", lambda shards: [None] * len(shards))
    vectors = np.eye(WIDTH, dtype=np.float32)
    index = build(vectors, np.arange(2, 2 + WIDTH))
    allowed = np.array([False, False, True, False, True, True])
    assert index.search(vectors[:1], 4, allowed)[0].tolist() == [[2, 4, 5, NONE]]
    assert index.search(vectors[:1], module.GPU_MAX_K + 1)[0][0, :2].tolist() == [2, 3]
    with pytest.raises(AttributeError):
        index.search(vectors[:1], 1)


def test_bad_input_is_named(tmp_path: Path):
    index = build(np.eye(WIDTH, dtype=np.float32), np.arange(2, 2 + WIDTH))
    with pytest.raises(ConfigError, match=r"\(1, 3\).*\[B, 4\]"):
        index.search(np.zeros((1, 3), np.float32), 2)
    with pytest.raises(ConfigError, match="4 vectors for 3 rows"):
        build(np.eye(WIDTH, dtype=np.float32), np.arange(3))
    with pytest.raises(ConfigError, match="at least one"):
        build(np.empty((0, WIDTH), np.float32), np.arange(0))
    with pytest.raises(ConfigError, match=r"\[index\] probes is -1"):
        IndexConfig(probes=-1)
    with pytest.raises(ConfigError, match=r"\[index\] recall is 1.5"):
        IndexConfig(recall=1.5)
    broken = tmp_path / "shard_000.faiss"
    broken.write_bytes(b"not an index")
    with pytest.raises(BundleError, match=r"shard_000\.faiss: not a FAISS index"):
        Index.load([broken])


def test_a_gpu_compares_all_full_vectors(monkeypatch):
    """Codes and lists stay on the CPU; here the "GPU" keeps what it is given."""
    given = pretend_gpus(monkeypatch, 1)
    vectors = np.random.default_rng(0).normal(size=(2_000, WIDTH)).astype(np.float32)
    rows = np.arange(2_001, 1, -1)
    index = build(vectors, rows, IndexConfig(exact_below=0, probes=1))
    assert isinstance(faiss.downcast_index(given[0].index), faiss.IndexFlatIP)
    np.testing.assert_array_equal(index.search(vectors[:5], 20)[0], build(vectors, rows).search(vectors[:5], 20)[0])
