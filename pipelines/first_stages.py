"""The first stages every text model is printed beside: BM25, dense, SPLADE, and their fusions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from pipelines.text_cache import VectorCache
from pipelines.text_corpus import Corpus, Queries
from pipelines.text_measures import measure
from ranking.bm25 import Bm25
from ranking.fusion import POOL, WEIGHT, Mix, Ranking, best, convex_fusion, reciprocal_rank_fusion
from ranking.index import IndexConfig, build
from ranking.splade import Splade, sparse_search
from ranking.text_models import TextEncoder, Vectors
from ranking.windows import Windows, beside_beginning
from recsys.files import sha256_json, whole_file
from recsys.progress import Progress, silent

PLACES = 100
NATURAL = "natural"
"""dev task of queries that people wrote"""
_AT_ONCE = 64
"""queries whose similarity to all windows is held at once"""
LEAST_TOLD_APART = 10
"""Queries that must have another result by another weight before one is chosen by them."""

WEIGHTS = tuple(step / 10 for step in range(1, 10))
"""of BM25 in the hybrid, tried on the dev queries"""


@dataclass(frozen=True)
class FirstStages:
    """First stages over one corpus. Vectors are cached under `cache`, by model and content.

    Args:
        corpus: the passages.
        encoder: the plain dense encoder.
        cache: directory of the vectors.
        splade: a sparse encoder; None leaves SPLADE out.
        progress: told of passages encoded.
    """

    corpus: Corpus
    encoder: TextEncoder
    cache: Path
    splade: Splade | None = None
    progress: Progress = silent

    @cached_property
    def bm25(self) -> Bm25:
        """The lexical index."""
        return Bm25.build(self.corpus.passages)

    @cached_property
    def passage_vectors(self) -> Vectors:
        """Plain vectors of the passages, float32 [P, D]: of a long one its beginning alone."""
        return self.encoded(self.encoder, self.corpus.passages)

    @cached_property
    def windows(self) -> Windows:
        """What a bundle encodes of the passages: all of the long ones."""
        return self.encoder.windows(self.corpus.passages)

    @cached_property
    def window_vectors(self) -> Vectors:
        """Plain vectors of the windows, float32 [W, D]."""
        return self.of_windows(self.encoder, self.windows)

    def encoded(self, encoder: TextEncoder, texts: Sequence[str]) -> Vectors:
        """Return an encoder's vectors of passages, those in the cache from there."""
        return VectorCache(self.cache / encoder.digest / "passages").get(texts, encoder.encode_passages, self.progress)

    @cached_property
    def _sparse_passages(self) -> Any:
        assert self.splade is not None
        path = self.cache / f"splade-{sha256_json([self.splade.digest, self.corpus.passages])[:16]}.npz"
        if path.exists():
            return sparse.load_npz(path)
        matrix = self.splade.encode(self.corpus.passages, self.progress)
        with whole_file(path) as temporary, temporary.open("wb") as file:
            sparse.save_npz(file, matrix)
        return matrix

    def of_windows(self, encoder: TextEncoder, windows: Windows) -> Vectors:
        """Return vectors float32 [W, D] of windows as a bundle indexes them; the passages' own come first."""
        return beside_beginning(self.encoded(encoder, windows.texts), windows.passage)

    def query_vectors(self, texts: Sequence[str]) -> Vectors:
        """Plain vectors of queries, float32 [Q, D]."""
        return VectorCache(self.cache / self.encoder.digest / "queries").get(texts, self.encoder.encode_queries)

    def dense(self, texts: Sequence[str], vectors: Vectors | None = None, places: int = PLACES) -> Ranking:
        """Rank by inner product, exactly; `vectors` stands in for those of the plain encoder."""
        vectors = self.query_vectors(texts) if vectors is None else vectors
        return dense_search(vectors, self.passage_vectors, places)

    def dense_by_windows(self, texts: Sequence[str], places: int = PLACES) -> Ranking:
        """Rank as a bundle does, a passage by the nearest of its windows."""
        return windows_search(self.query_vectors(texts), self.window_vectors, self.windows, places)

    def sparse(self, texts: Sequence[str]) -> Ranking:
        """Rank by SPLADE."""
        assert self.splade is not None
        return sparse_search(self.splade.encode(texts), self._sparse_passages, PLACES)

    def all(self, texts: Sequence[str], weight: float | None = None) -> dict[str, Ranking]:
        """Return every first stage by name; the convex fusion and the hybrid where a BM25 weight is given.

        Dense and the papers' fusions know the beginning of a long passage, the hybrid all of it, as a bundle does.
        """
        lexical, dense = self.bm25.search(texts, POOL), self.dense(texts, places=POOL)
        rankings = {"bm25": lexical.top(PLACES), "dense": dense.top(PLACES)}
        if self.splade is not None:
            rankings["splade"] = self.sparse(texts)
        found = list(rankings.values())
        rankings["rrf"] = reciprocal_rank_fusion(found[:2], PLACES)
        if self.splade is not None:
            rankings["rrf3"] = reciprocal_rank_fusion(found, PLACES)
        if weight is not None:
            if len(self.windows.texts) > len(self.corpus):
                rankings["dense_windows"] = self.dense_by_windows(texts)
            rankings["convex"] = convex_fusion(lexical, dense, weight, PLACES)
            rankings["hybrid"] = self.hybrid(texts, weight)
        return rankings

    def hybrid(self, texts: Sequence[str], weight: float = WEIGHT, dense: Ranking | None = None) -> Ranking:
        """Rank as a bundle's search does by default; `dense` stands in for what the plain encoder finds."""
        lexical = self.bm25.search(texts, POOL)
        dense = self.dense_by_windows(texts, POOL) if dense is None else dense
        return Mix(weight).fuse(lexical, dense, self.coverage(texts, lexical), PLACES)

    def coverage(self, texts: Sequence[str], lexical: Ranking) -> NDArray[np.float64]:
        """Return [Q] how much of each query the best passage by words holds (`Bm25.coverage`)."""
        return self.bm25.coverage(texts, lexical, self.corpus.passages.__getitem__)

    def choose_weight(self, dev: Mapping[str, Queries]) -> float:
        """Return the BM25 weight of the best nDCG@10 on natural dev queries, or the shipped one where there are none.

        Queries cut from passages would choose words alone, which is wrong for natural ones. The shipped weight stays
        where fewer than `LEAST_TOLD_APART` queries have another result by another weight, and wins among equals.
        """
        natural = dev.get(NATURAL)
        if natural is None or not len(natural):
            return WEIGHT
        found = np.array([measure(self.hybrid(natural.texts, weight), natural)["ndcg_at_10"] for weight in WEIGHTS])
        if np.count_nonzero(np.ptp(found, axis=0) > 0) < LEAST_TOLD_APART:
            return WEIGHT
        mean = found.mean(axis=1)
        best = [weight for weight, value in zip(WEIGHTS, mean, strict=True) if value >= mean.max() - 1e-9]
        return min(best, key=lambda weight: abs(weight - WEIGHT))


def windows_search(queries: Vectors, vectors: Vectors, windows: Windows, places: int = PLACES) -> Ranking:
    """Rank passages exactly by the nearest of their windows, whose vectors are float32 [W, D]."""
    order = np.argsort(windows.passage, kind="stable")
    first = np.flatnonzero(np.diff(windows.passage[order], prepend=-1))
    vectors, found = vectors[order], [best(np.zeros((0, len(first))), places)]
    for at in range(0, len(queries), _AT_ONCE):
        similar = queries[at : at + _AT_ONCE] @ vectors.T
        found.append(best(np.maximum.reduceat(similar, first, axis=1), places))
    return Ranking(np.concatenate([one.rows for one in found]), np.concatenate([one.scores for one in found]))


def dense_search(queries: Vectors, passages: Vectors, places: int = PLACES) -> Ranking:
    """Rank passages by inner product, exactly however many, through the bundle's index; its rows start at 1."""
    if not len(queries):
        return best(np.zeros((0, len(passages))), places)
    index = build(passages, np.arange(1, len(passages) + 1), IndexConfig(exact_below=len(passages) + 1))
    rows, scores = index.search(queries, min(places, len(passages)))
    return Ranking(rows - 1, scores)
