"""Maximum inner product search over item vectors: FAISS behind one class, on a GPU where there is one.

An index is a list of shards that never change; a search asks each of them and merges. Up to `IndexConfig.exact_below`
rows a shard is exact, above it an inverted file over full vectors, which reads the fewest lists that find
`IndexConfig.recall` of the best 100 of sample queries. All lists are exact, so that this is always to be had; what it
costs depends on how the vectors lie (`tests/benchmarks/index_choice.py`). Measured on one core at width 64, best 100 of
200,000 clustered vectors: exact 1.5 ms, inverted file (8 of 446 lists) 0.08 ms at recall .999, and product
quantisation with fast scan and refinement 0.06 ms at recall .999; at 68,000 exact 0.34 ms. Full vectors are kept
because refinement would store them anyway, a GPU can take them, and they can be filtered.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from recsys.errors import BundleError, ConfigError

NONE = 0
"""Row given where fewer than k items can be found."""

RECALL_AT = 100
"""Of how many of the best recall is measured."""

SAMPLE = 256
"""Queries on which recall is measured where none are given: item vectors, spread evenly."""

GPU_MAX_K = 2048
"""Most neighbours FAISS gives from a GPU; searches for more run on the CPU shards."""


@dataclass(frozen=True)
class IndexConfig:
    """How an index is built."""

    exact_below: int = 100_000
    """shards of fewer rows are searched exhaustively"""
    rows_per_shard: int = 4_000_000
    lists: int = 0
    """inverted lists of an approximate shard; 0 = the square root of its rows"""
    probes: int = 0
    """lists read per query; 0 = the fewest that reach `recall` on the sample queries"""
    recall: float = 0.99
    """least share of the exact best 100 that is found; a bundle below it is not written"""

    def __post_init__(self) -> None:
        for name, least in (("exact_below", 0), ("rows_per_shard", 1), ("lists", 0), ("probes", 0)):
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
        self._placed = [on_best_device(shard) for shard in self._shards]

    def __len__(self) -> int:
        return sum(shard.ntotal for shard in self._shards)

    @property
    def width(self) -> int:
        """Length of a vector."""
        return int(self._shards[0].d)

    def search(
        self, vectors: NDArray[np.float32], k: int, allowed: NDArray[np.bool_] | None = None
    ) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """Give the k best rows of each query, best first; equal scores by ascending row.

        Args:
            vectors: float32 [B, D] queries.
            k: how many to find.
            allowed: bool [V], rows that may be found; None allows all.

        Returns:
            Rows int32 [B, k], `NONE` where there are no more, and their inner products float32 [B, k], -inf there.
            No row is missing for want of probing: a search that comes back short is repeated over all lists.

        Raises:
            ConfigError: queries of another width than the index.
        """
        vectors = np.ascontiguousarray(vectors, dtype=np.float32)
        if vectors.ndim != 2 or vectors.shape[1] != self.width:
            raise ConfigError(f"queries of shape {vectors.shape}; this index searches [B, {self.width}]")
        # A GPU index takes no filter, so filtered searches run on the CPU shards, which are kept (memory-mapped).
        on_cpu = allowed is not None or k > GPU_MAX_K
        found = [_search_shard(shard, vectors, k, allowed) for shard in (self._shards if on_cpu else self._placed)]
        return _merged(found, k)

    def exact(
        self, vectors: NDArray[np.float32], k: int, allowed: NDArray[np.bool_] | None = None
    ) -> NDArray[np.int32]:
        """Give rows int32 [B, k] of an exhaustive search, as `search` gives them; costs all inner products."""
        vectors = np.ascontiguousarray(vectors, dtype=np.float32)
        return _merged([_search_shard(shard, vectors, k, allowed, everything=True) for shard in self._shards], k)[0]

    def recall(self, queries: NDArray[np.float32], k: int = RECALL_AT) -> float:
        """Give the share of the exact best k of the queries float32 [B, D] that `search` finds."""
        k = min(k, len(self))
        found, truth = self.search(queries, k)[0], self.exact(queries, k)
        return float(np.mean([len(np.intersect1d(a, b)) / k for a, b in zip(found, truth, strict=True)]))

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

    Cost: exact shards only copy; an inverted file takes about a second per 200,000 rows of width 64 on one core.
    """
    if len(rows) != len(vectors) or not len(rows):
        raise ConfigError(f"{len(vectors)} vectors for {len(rows)} rows; expected one for one, and at least one")
    vectors = np.ascontiguousarray(vectors, dtype=np.float32)
    ids = np.ascontiguousarray(rows, dtype=np.int64)
    cuts = [*range(0, len(ids), config.rows_per_shard), len(ids)]
    sample = sample_of(vectors) if queries is None else np.ascontiguousarray(queries, dtype=np.float32)
    return Index([_build_shard(vectors[a:b], ids[a:b], config, sample) for a, b in itertools.pairwise(cuts)])


def sample_of(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    """Give up to `SAMPLE` of some vectors, spread evenly."""
    return vectors[np.linspace(0, len(vectors) - 1, min(SAMPLE, len(vectors))).astype(np.int64)]


def on_best_device(shard: Any) -> Any:
    """Give the shard on the first GPU if this machine has one, else the shard itself."""
    if faiss.get_num_gpus() > 0:
        return faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), 0, shard)
    return shard


def use_threads(count: int) -> None:
    """Set how many threads a batch of queries is searched with, in this whole process; a single query uses one."""
    faiss.omp_set_num_threads(count)


def _build_shard(
    vectors: NDArray[np.float32], ids: NDArray[np.int64], config: IndexConfig, queries: NDArray[np.float32]
) -> Any:
    width = vectors.shape[1]
    if len(ids) < config.exact_below:
        shard = faiss.IndexIDMap(faiss.IndexFlatIP(width))
    else:
        lists = min(config.lists or int(len(ids) ** 0.5), len(ids))
        quantizer = faiss.IndexFlatIP(width)
        shard = faiss.IndexIVFFlat(quantizer, width, lists, faiss.METRIC_INNER_PRODUCT)
        shard.nprobe = min(config.probes, lists)
        shard.train(vectors)
    shard.add_with_ids(vectors, ids)
    if isinstance(shard, faiss.IndexIVF) and not config.probes:
        shard.nprobe = _fewest_probes(shard, queries, config.recall)
    return shard


def _fewest_probes(shard: Any, queries: NDArray[np.float32], recall: float) -> int:
    """Give a number of lists, doubling from 4, whose search finds the share `recall` of the best 100."""
    k = min(RECALL_AT, shard.ntotal)
    truth = _search_shard(shard, queries, k, None, everything=True)[1]
    shard.nprobe = min(4, shard.nlist)
    while shard.nprobe < shard.nlist:
        found = shard.search(queries, k)[1]
        if np.mean([len(np.intersect1d(a, b)) for a, b in zip(found, truth, strict=True)]) >= recall * k:
            break
        shard.nprobe = min(2 * shard.nprobe, shard.nlist)
    return int(shard.nprobe)


def _merged(
    found: Sequence[tuple[NDArray[np.float32], NDArray[np.int64]]], k: int
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Give the k best rows and scores [B, k] of several shards' scores and ids, equal scores by ascending row."""
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
    """Give scores [B, k] and ids [B, k], -1 where there are no more; `everything` reads all lists."""
    selector = None if allowed is None else faiss.IDSelectorBitmap(np.packbits(allowed, bitorder="little"))
    if not isinstance(shard, faiss.IndexIVF):
        if selector is None:
            scores, ids = shard.search(vectors, k)
        else:
            scores, ids = shard.search(vectors, k, params=faiss.SearchParameters(sel=selector))
        return scores, ids
    whole = faiss.SearchParametersIVF(nprobe=shard.nlist, sel=selector)
    some = whole if everything else faiss.SearchParametersIVF(nprobe=shard.nprobe, sel=selector)
    scores, ids = shard.search(vectors, k, params=some)
    short = (ids < 0).any(axis=1)
    if short.any() and some.nprobe < shard.nlist:
        scores[short], ids[short] = shard.search(vectors[short], k, params=whole)
    return scores, ids
