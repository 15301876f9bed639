"""What runs on a GPU gives what the processor gives; without one most of the same bodies run on the processor."""

import copy
import threading
from dataclasses import replace
from pathlib import Path

import faiss
import numpy as np
import pytest
import torch
from ranker_world import SETTINGS, requests, trained

import ranking.index as index_module
from pipelines.train import train, trained_run
from pipelines.train_config import load_config
from ranking.bundle import Bundle
from ranking.devices import pick_device
from ranking.golden import TOLERANCE
from ranking.index import IndexConfig, build
from ranking.recommender import Recommender
from ranking.snapshot import SnapshotReader
from recsys.errors import ConfigError
from recsys.messages import InlineEvent, RankRequest, RecommendRequest

NO_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
CUDA = pytest.param("cuda", marks=NO_CUDA)
DEVICES = pytest.mark.parametrize("device", ["cpu", CUDA])
STEPPED = ("din", "dare", "dare_own_counts", "twin", "eta", "sim_hard", "sdim", "aw_moe", "mqsa_ted", "mean_pooling")
RNG = np.random.default_rng(0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_here_is_named():
    assert pick_device("auto") == pick_device("cpu") == torch.device("cpu")
    for name, words in (("cuda", 'device = "cuda": this process sees no CUDA device'), ("tpu9", '"tpu9": no such')):
        with pytest.raises(ConfigError, match=words):
            pick_device(name)


@DEVICES
@pytest.mark.parametrize("name", SETTINGS)
def test_scores_are_those_of_the_processor(name, device):
    model, batch = trained(name), requests()
    there = copy.deepcopy(model).to(device)
    with torch.inference_mode():
        expected = model.score(model.encode(batch.history), batch.request, batch.candidates)
        moved = batch.to(torch.device(device))
        found = there.score(there.encode(moved.history), moved.request, moved.candidates)
    assert found.device.type == device
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "device"), [("dare", "cpu"), *(pytest.param(name, "cuda", marks=NO_CUDA) for name in STEPPED)]
)
def test_a_run_learns_is_resumed_and_read_back(name, device, prepared, mlflow_uri, tmp_path):
    shipped = load_config(Path(f"pipelines/configs/{name}.toml"))
    stop = replace(shipped.stop, max_steps=8, validate_every=4, checkpoint_every=3, requests=30, epochs=50.0)
    config = replace(shipped, device=device, batches=replace(shipped.batches, rows=16), stop=stop)

    def kill(done: int, total: int, words: str) -> None:
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(config, prepared, tmp_path, mlflow_uri, kill)
    first = train(config, prepared, tmp_path, mlflow_uri)
    assert first.summary.steps == 8
    assert first.summary.device == device
    again = trained_run(tmp_path, prepared)
    for key, tensor in first.model.state_dict().items():
        assert tensor.device.type == device
        assert torch.equal(tensor, again.model.state_dict()[key]), key


@DEVICES
def test_a_bundle_answers_as_on_the_processor(device, published):
    here, there = Bundle.load(published.bundle), Bundle.load(published.bundle, device)
    known = [item for item in here.item_ids if item][:40]
    history = [InlineEvent(item_id=item, timestamp=number) for number, item in enumerate(known[:20])]
    histories = SnapshotReader(published.snapshot)
    recommenders = [Recommender(bundle, histories) for bundle in (here, there)]
    scores = [one.rank(RankRequest(history=history, item_ids=known), 20).scores for one in recommenders]
    assert scores[1] == pytest.approx(scores[0], abs=10 * TOLERANCE, rel=10 * TOLERANCE)
    answers = [one.recommend(RecommendRequest(history=history), 20).items for one in recommenders]
    lists = [{item.item_id for item in answer} for answer in answers]
    assert len(lists[0] & lists[1]) >= len(lists[0]) - 1  # two that score alike may change places at the end


@pytest.mark.parametrize("config", [IndexConfig(), IndexConfig(exact_below=0), IndexConfig(rows_per_shard=1_500)])
@pytest.mark.parametrize("k", [1, 100, 3_000])
def test_an_index_finds_what_an_exhaustive_search_finds(config, k):
    vectors = RNG.normal(size=(4_000, 64)).astype(np.float32)
    index = build(vectors, np.arange(4_001, 1, -1), config)
    queries = RNG.normal(size=(9, 64)).astype(np.float32)
    (exact, _), (found, scores) = index.exact(queries, k), index.search(queries, k)
    share = np.mean([len(np.intersect1d(a, b)) / k for a, b in zip(exact, found, strict=True)])
    assert share >= (0.999 if faiss.get_num_gpus() or config.exact_below else 0.98)
    np.testing.assert_allclose(scores, np.einsum("bd,bkd->bk", queries, vectors[4_001 - found]), atol=1e-4)
    allowed = np.zeros(4_002, np.bool_)
    allowed[2:50] = True
    assert set(index.search(queries, 48, allowed)[0][0].tolist()) == set(range(2, 50))


def test_threads_may_search_at_once():
    vectors = RNG.normal(size=(3_000, 32)).astype(np.float32)
    index = build(vectors, np.arange(2, 3_002))
    expected = index.search(vectors[:8], 10)[0]
    found = {}

    def ask(number: int) -> None:
        found[number] = [index.search(vectors[:8], 10)[0] for _ in range(20)]

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(np.array_equal(one, expected) for number in range(4) for one in found[number])


@pytest.mark.skipif(not faiss.get_num_gpus(), reason="FAISS sees no GPU")
def test_full_vectors_lie_on_the_gpu():
    vectors = RNG.normal(size=(2_000, 16)).astype(np.float32)
    for config in (IndexConfig(), IndexConfig(exact_below=0)):
        (shard,) = build(vectors, np.arange(2, 2_002), config)._placed or [None]
        assert type(faiss.downcast_index(shard.index)).__name__ == "GpuIndexFlat"
    assert index_module.GPU_MAX_K == 2048
