"""Maximum inner product search over item vectors: FAISS behind one class, on a GPU where there is one.

An index is a list of shards that never change; a search asks each of them and merges. Up to `IndexConfig.exact_below`
rows a shard is exact. Above it, it is an inverted file of codes, four bits a number, scanned fast, with the full
vectors beside: a query reads some lists, and the best by their codes are compared by full vector. As many lists are
read, and as many vectors compared, as it takes to find `IndexConfig.recall` of the best 100 of sample queries; with all
of both a search is exact, so that this is always to be had.

CPU time of one core per query, best 100 of clustered vectors of width 64 (`tests/benchmarks/index_choice.py`), in
batches of 64, single queries in brackets: of 100,000 exact 0.18 ms (0.61) and by codes 0.19 (0.32); of 1,000,000 exact
1.6 (7.7), by codes 0.22 (0.37) at recall .991. Codes and lists take 9 s of a core to build there, and 47 MiB beside the
vectors' 244. Half as many lists take 5 s to build, and 0.28 (0.63) to search.
"""

import itertools
import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch
from numpy.typing import NDArray

from recsys.errors import BundleError, ConfigError

logger = logging.getLogger(__name__)

NONE = 0
"""Row given where fewer than k items can be found."""

RECALL_AT = 100
"""Of how many of the best recall is measured."""

SAMPLE = 256
"""Queries on which recall is measured where none are given: item vectors, spread evenly."""

LEAST_LISTED = 1_024
"""A shard of fewer rows is exact whatever the config says: codes can't be learned from so few."""

TRAINED_ON = 64
"""Vectors per list that the centres are learned from; with `ROUNDS`, 5 s of a core for a million rows. More of both
does not help."""
ROUNDS = 10

ROUNDING = 1e-5
"""Of an inner product: two ways to add it up may differ by as much."""

GPU_MAX_K = 2048
"""Most neighbours FAISS gives from a GPU; searches for more run on the CPU shards."""
GPU_SCRATCH = 256 * 2**20
"""Bytes of a GPU that the searches of an index work in; FAISS alone would take 1.5 GiB for each."""


@dataclass(frozen=True)
class IndexConfig:
    """How an index is built."""

    exact_below: int = 100_000
    """shards of fewer rows are searched exhaustively"""
    rows_per_shard: int = 4_000_000
    lists: int = 0
    """inverted lists of an approximate shard; 0 = twice the square root of its rows"""
    probes: int = 0
    """lists read per query; 0 = as many as it takes to reach `recall` on the sample queries"""
    compared: int = 0
    """full vectors compared per query, times k or 100, whichever is more: the best by code; 0 = as many as it takes"""
    recall: float = 0.99
    """least share of the exact best 100 that is found; a bundle below it is not written"""

    def __post_init__(self) -> None:
        for name, least in (("exact_below", 0), ("rows_per_shard", 1), ("lists", 0), ("probes", 0), ("compared", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"[index] {name} is {getattr(self, name)}; expected at least {least}")
        if not 0 <= self.recall <= 1:
            raise ConfigError(f"[index] recall is {self.recall}; expected 0 to 1")


class Index:
    """Finds the items of the largest inner product with a query.

    Args:
        shards: CPU indexes whose ids are model rows; each row is in one of them.
    """

    def __init__(self, shards: Sequence[Any]) -> None:
        if not shards:
            raise ConfigError("an index needs at least one shard, got none")
        self._shards = list(shards)
        self._placed = on_best_device(self._shards)
        self._turn = threading.Lock()

    def __len__(self) -> int:
        return sum(shard.ntotal for shard in self._shards)

    @property
    def width(self) -> int:
        """Length of a vector."""
        return int(self._shards[0].d)

    def search(
        self, vectors: NDArray[np.float32], k: int, allowed: NDArray[np.bool_] | None = None
    ) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """Return the k best rows of each query, best first; equal scores by ascending row among those found.

        Args:
            vectors: float32 [B, D] queries.
            k: how many to find.
            allowed: bool [V], rows that may be found; None allows all.

        Returns:
            Rows int32 [B, k], `NONE` where there are no more, and their inner products float32 [B, k], -inf there.
            Which of several rows with the score of the k-th place are found is not defined.
            No row is missing for want of probing: a search that comes back short is repeated over all lists.

        Raises:
            ConfigError: queries of another width than the index.
        """
        vectors = np.ascontiguousarray(vectors, dtype=np.float32)
        if vectors.ndim != 2 or vectors.shape[1] != self.width:
            raise ConfigError(f"queries of shape {vectors.shape}; this index searches [B, {self.width}]")
        # A GPU index takes no filter, so filtered searches run on the CPU shards, which are kept (memory-mapped).
        if self._placed is None or allowed is not None or k > GPU_MAX_K:
            return _merged([_search_shard(shard, vectors, k, allowed) for shard in self._shards], k)
        with self._turn:  # what searches on a GPU work in is not for two threads at once
            return _merged([shard.search(vectors, k) for shard in self._placed], k)

    def exact(
        self, vectors: NDArray[np.float32], k: int, allowed: NDArray[np.bool_] | None = None
    ) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """Return rows and scores [B, k] of an exhaustive search, as `search` gives them; costs all inner products."""
        vectors = np.ascontiguousarray(vectors, dtype=np.float32)
        return _merged([_search_shard(shard, vectors, k, allowed, everything=True) for shard in self._shards], k)

    def recall(self, queries: NDArray[np.float32], k: int = RECALL_AT) -> float:
        """Return the share of the exact best k of the queries float32 [B, D] that `search` finds; see `share_found`."""
        k = min(k, len(self))
        return float(share_found(self.search(queries, k)[1], self.exact(queries, k)[1]).mean())

    def save(self, directory: Path) -> list[Path]:
        """Write one file per shard into an existing directory; gives their paths in order."""
        paths = [directory / f"shard_{number:03d}.faiss" for number in range(len(self._shards))]
        for shard, path in zip(self._shards, paths, strict=True):
            faiss.write_index(shard, str(path))
        return paths

    @staticmethod
    def load(paths: Sequence[Path]) -> "Index":
        """Memory-map the shards that `save` wrote; raises `BundleError` for a file that is no index."""
        shards = []
        for path in paths:
            try:
                shards.append(faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC))
            except RuntimeError as error:
                raise BundleError(f"{path}: not a FAISS index ({str(error).splitlines()[0]}); publish again") from None
        return Index(shards)


def build(
    vectors: NDArray[np.float32],
    rows: NDArray[np.integer[Any]],
    config: IndexConfig = IndexConfig(),
    queries: NDArray[np.float32] | None = None,
) -> Index:
    """Build an index over some item vectors.

    Args:
        vectors: float32 [n, D].
        rows: [n] the model row of each vector, distinct and above 0.
        config: exact or approximate, and how many shards.
        queries: float32 [n, D] on which the number of probed lists is chosen; some of the vectors if absent.

    Cost: exact shards only copy; an inverted file takes about a second per 100,000 rows of width 64 on one core.
    """
    if len(rows) != len(vectors) or not len(rows):
        raise ConfigError(f"{len(vectors)} vectors for {len(rows)} rows; expected one for one, and at least one")
    vectors = np.ascontiguousarray(vectors, dtype=np.float32)
    ids = np.ascontiguousarray(rows, dtype=np.int64)
    cuts = [*range(0, len(ids), config.rows_per_shard), len(ids)]
    sample = sample_of(vectors) if queries is None else np.ascontiguousarray(queries, dtype=np.float32)
    return Index([_build_shard(vectors[a:b], ids[a:b], config, sample) for a, b in itertools.pairwise(cuts)])


def share_found(found: NDArray[np.float32], best: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return the share of the best k that a search found, [B]; 1 where there is nothing to find.

    Items of equal vectors are as good as each other, so it is scores that are compared: a place counts if what was
    found is no worse than the last of the best.

    Args:
        found: float32 [B, k] scores of a search, best first, -inf where there are no more.
        best: float32 [B, k] those of an exhaustive one.
    """
    real = np.isfinite(best)
    number = real.sum(axis=1)
    last = np.where(real, best, np.inf).min(axis=1)  # of what there is
    last[number == 0] = 0
    good = found >= (last - ROUNDING * np.abs(last))[:, None]
    return np.where(number, np.minimum(good.sum(axis=1), number) / np.maximum(number, 1), 1.0)


def sample_of(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return up to `SAMPLE` of some vectors, spread evenly."""
    return vectors[np.linspace(0, len(vectors) - 1, min(SAMPLE, len(vectors))).astype(np.int64)]


def on_best_device(shards: Sequence[Any]) -> list[Any] | None:
    """Return copies of the shards on the first GPU, None if this process sees none or the shards do not fit there.

    Only full vectors go there: a GPU compares them all faster than it would read lists.
    """
    if faiss.get_num_gpus() == 0:
        return None
    needed = sum(4 * shard.ntotal * shard.d for shard in shards) + GPU_SCRATCH
    free = torch.cuda.mem_get_info(0)[0] if torch.cuda.is_available() else needed
    if needed > free:  # to run out of memory would end the process
        logger.warning(
            "the index needs %d bytes of the GPU and %d are free: it is searched on the processor", needed, free
        )
        return None
    resources = faiss.StandardGpuResources()
    resources.setTempMemory(GPU_SCRATCH)
    return [faiss.index_cpu_to_gpu(resources, 0, _exact_shard(shard)) for shard in shards]


def use_threads(count: int) -> None:
    """Set how many threads a batch of queries is searched with, in this whole process; a single query uses one."""
    faiss.omp_set_num_threads(count)


def _build_shard(
    vectors: NDArray[np.float32], ids: NDArray[np.int64], config: IndexConfig, queries: NDArray[np.float32]
) -> Any:
    width = vectors.shape[1]
    if len(ids) < max(config.exact_below, LEAST_LISTED):
        shard = faiss.IndexIDMap(faiss.IndexFlatIP(width))
        shard.add_with_ids(vectors, ids)
        return shard
    lists = min(config.lists or int(2 * len(ids) ** 0.5), len(ids))
    refined = faiss.index_factory(width, f"IVF{lists},PQ{width}x4fs,RFlat", faiss.METRIC_INNER_PRODUCT)
    clustering = faiss.extract_index_ivf(refined).cp
    clustering.max_points_per_centroid, clustering.niter = TRAINED_ON, ROUNDS
    refined.train(vectors)
    shard = faiss.IndexIDMap(refined)
    shard.add_with_ids(vectors, ids)
    _settle(shard, refined, config, queries)
    return shard


def _settle(shard: Any, refined: Any, config: IndexConfig, queries: NDArray[np.float32]) -> None:
    """Read more lists, or compare more vectors, whichever finds more, until the recall is reached."""
    inverted, k = faiss.extract_index_ivf(refined), min(RECALL_AT, shard.ntotal)
    best = _search_shard(shard, queries, k, None, everything=True)[0]

    def found(probes: int, factor: float) -> float:
        inverted.nprobe, refined.k_factor = probes, factor
        return float(share_found(_search_shard(shard, queries, k, None)[0], best).mean())

    now = min(config.probes or 4, inverted.nlist), float(config.compared or 2)
    share = found(*now)
    while share < config.recall:
        deeper = []
        if not config.probes and now[0] < inverted.nlist:
            deeper.append((min(now[0] + now[0] // 2, inverted.nlist), now[1]))
        if not config.compared and now[1] * k < shard.ntotal:
            deeper.append((now[0], now[1] * 1.5))
        if not deeper:
            break
        share, now = max((found(*one), one) for one in deeper)
    inverted.nprobe, refined.k_factor = now


def _merged(
    found: Sequence[tuple[NDArray[np.float32], NDArray[np.int64]]], k: int
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Return the k best rows and scores [B, k] of several shards' scores and ids, equal scores by ascending row."""
    scores = np.concatenate([part[0] for part in found], axis=1)  # [B, shards * k]
    rows = np.concatenate([part[1] for part in found], axis=1)
    scores[rows < 0] = -np.inf
    order = np.lexsort((rows, -scores), axis=1)[:, :k]
    scores = np.take_along_axis(scores, order, axis=1)
    rows = np.take_along_axis(rows, order, axis=1)
    return np.where(rows < 0, NONE, rows).astype(np.int32), scores


def _search_shard(
    shard: Any, vectors: NDArray[np.float32], k: int, allowed: NDArray[np.bool_] | None, everything: bool = False
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Return scores [B, k] and ids [B, k], -1 where there are no more; `everything` compares all full vectors."""
    selector = None if allowed is None else faiss.IDSelectorBitmap(np.packbits(allowed, bitorder="little"))
    refined = _refined(shard)
    if refined is not None:
        return _search_refined(shard, refined, vectors, k, selector, everything)
    scores, ids = shard.search(vectors, k, params=_only(selector))
    return scores, ids


def _search_refined(
    shard: Any, refined: Any, vectors: NDArray[np.float32], k: int, selector: Any, everything: bool
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Return the same of an inverted file. Inside it an item goes by its place, not by its id."""
    if selector is not None:
        selector = faiss.IDSelectorTranslated(shard.id_map, selector)
    whole = faiss.downcast_index(refined.refine_index)
    if everything:
        scores, places = whole.search(vectors, k, params=_only(selector))
    else:
        lists = faiss.SearchParametersIVF(nprobe=faiss.extract_index_ivf(refined).nprobe, sel=selector)
        compared = min(refined.k_factor * max(k, RECALL_AT), shard.ntotal)
        some = faiss.IndexRefineSearchParameters(k_factor=max(compared / k, 1.0), base_index_params=lists)
        scores, places = refined.search(vectors, k, params=some)
        short = (places < 0).any(axis=1)
        if short.any():
            scores[short], places[short] = whole.search(vectors[short], k, params=_only(selector))
    return scores, np.where(places < 0, -1, _ids_of(shard)[places])


def _only(selector: Any) -> Any:
    return None if selector is None else faiss.SearchParameters(sel=selector)


def _refined(shard: Any) -> Any:
    """Return the inverted file and full vectors of an approximate shard, None for an exact one."""
    inner = faiss.downcast_index(shard.index) if isinstance(shard, faiss.IndexIDMap) else None
    return inner if isinstance(inner, faiss.IndexRefine) else None


def _exact_shard(shard: Any) -> Any:
    """Return a shard of full vectors alone."""
    refined = _refined(shard)
    if refined is None:
        return shard
    vectors = faiss.downcast_index(refined.refine_index)
    exact = faiss.IndexIDMap(faiss.IndexFlatIP(vectors.d))
    exact.add_with_ids(vectors.reconstruct_n(0, vectors.ntotal), _ids_of(shard))
    return exact


def _ids_of(shard: Any) -> NDArray[np.int64]:
    """Return the ids of a shard by place, int64 [n], as a view."""
    ids: NDArray[np.int64] = faiss.rev_swig_ptr(shard.id_map.data(), shard.ntotal)
    return ids
