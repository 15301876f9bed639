"""Milliseconds per text search by stage, and per rerank of a list of documents, over SciFact's 5,183 abstracts.

    RECSYS_DATA=data python tests/benchmarks/search_latency.py                       table, minutes to half an hour
    RECSYS_DATA=data python tests/benchmarks/search_latency.py --out search.json
    python tests/benchmarks/search_latency.py --smoke                                made-up texts, seconds

The rerankers are an MVP, its form that reads apart, and a cross-encoder, all of MiniLM's size and untrained: time does
not depend on what weights say. They look at the clock every `TOKENS_PER_PASS` tokens, as those of a published bundle
do. Every kind of request is timed in turn within each round, so that a busy machine slows all alike. What is timed is
`Searcher`, without HTTP. The index is exact, so its time does not depend on what is in it: it holds random vectors,
which saves encoding the corpus. So half of what a hybrid search reranks is random abstracts, of the same lengths.
"""

import argparse
import dataclasses
import json
import os
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from pipelines.text_corpus import read_corpus, read_queries
from ranking.bm25 import Bm25
from ranking.cross_encoder import CrossEncoder, CrossEncoderConfig
from ranking.dense_encoder import DenseEncoder
from ranking.index import IndexConfig, build
from ranking.mvp import Mvp, MvpConfig
from ranking.mvp_apart import MvpApart, MvpApartConfig
from ranking.passages import Passages
from ranking.search_part import SHIFT, TOKENS_PER_PASS, SearchPart
from ranking.searched import SearchConfig
from ranking.searcher import Searcher
from ranking.text_models import TextReranker

TOKENS = 4096
"""Most tokens per document of a rerank request, the default of the service."""


@dataclass(frozen=True)
class Size:
    """How much is measured."""

    heads: tuple[int, ...] = (10, 20)
    """passages reranked in a search"""
    lists: tuple[int, ...] = (10, 20, 100)
    """documents of a rerank request"""
    rounds: int = 10
    """requests of each kind, each of another query"""


@dataclass(frozen=True)
class Row:
    """One kind of request, milliseconds."""

    request: str
    median: float
    p95: float
    documents_per_second: float | None


def texts(data: Path | None, most: int) -> tuple[list[str], list[str]]:
    """Return documents and queries: SciFact's of `data`, or made-up ones."""
    if data is None:
        words = [f"word{number}" for number in range(400)]
        draws = np.random.default_rng(0)
        return tuple([" ".join(draws.choice(words, size)) for _ in range(60)] for size in (80, 8))  # type: ignore[return-value]
    corpus = read_corpus(data / "scifact")
    return corpus.passages, read_queries(data / "scifact", corpus, "test").texts[:most]


def open_part(documents: list[str]) -> SearchPart:
    """Return the text part without a reranker."""
    encoder = DenseEncoder.of()
    passages = Passages.of([str(number) for number in range(len(documents))], documents)
    vectors = np.random.default_rng(0).standard_normal((len(passages), encoder.dim), np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    index = build(vectors, np.arange(len(passages), dtype=np.int64) + SHIFT, IndexConfig())
    return SearchPart(passages, Bm25.build(list(passages.texts)), encoder, index, None, encoder.tokenizer)


def rerankers() -> dict[str, TextReranker]:
    """Return untrained rerankers of MiniLM's size, in passes as short as those of a service."""
    torch.manual_seed(0)
    return {
        "mvp": Mvp.of(MvpConfig(tokens_per_pass=TOKENS_PER_PASS)),
        "mvp apart": MvpApart.of(MvpApartConfig(tokens_per_pass=TOKENS_PER_PASS)),
        "cross-encoder": CrossEncoder.of(CrossEncoderConfig(tokens_per_pass=TOKENS_PER_PASS)),
    }


def requests(part: SearchPart, size: Size) -> dict[str, tuple[Callable[[str], object], int]]:
    """Return every kind of request as a function of the query, with how many documents it reranks."""
    plain = Searcher(part)
    kinds: dict[str, tuple[Callable[[str], object], int]] = {
        f"search {mode}": (lambda query, mode=mode: plain.search(query, mode=mode), 0)
        for mode in ("bm25", "dense", "hybrid")
    }
    for name, reranker in rerankers().items():
        with_one = dataclasses.replace(part, reranker=reranker, tokenizer=reranker.tokenizer)  # type: ignore[attr-defined]
        for head in size.heads:
            searcher = Searcher(with_one, SearchConfig(rerank=head))
            kinds[f"search hybrid + {name} {head}"] = (
                lambda query, at=searcher: at.search(query, rerank=True),
                head,
            )
        for length in size.lists:
            documents = [part.passages.text(row) for row in range(length)]
            kinds[f"rerank {length} by {name}"] = (
                lambda query, at=searcher, sent=documents: at.rerank(query, sent, TOKENS),
                length,
            )
    return kinds


def measure(part: SearchPart, queries: list[str], size: Size) -> list[Row]:
    """Time every kind of request with every query, in turn."""
    kinds = requests(part, size)
    for call, _ in kinds.values():
        call(queries[0])
    times: dict[str, list[float]] = {name: [] for name in kinds}
    for query in queries[: size.rounds]:
        for name, (call, _) in kinds.items():
            began = time.perf_counter()
            call(query)
            times[name].append((time.perf_counter() - began) * 1e3)
    rows = []
    for name, (_, documents) in kinds.items():
        median, p95 = np.percentile(times[name], (50, 95))
        rate = round(documents / median * 1e3, 1) if documents else None
        rows.append(Row(name, round(float(median), 2), round(float(p95), 2), rate))
    return rows


def main() -> None:
    """Measure, print a table, and write it as JSON."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--data", type=Path, default=Path(os.environ.get("RECSYS_DATA", "data")), help="holds scifact")
    options.add_argument("--rounds", type=int, default=Size.rounds, help="requests of each kind")
    options.add_argument("--lists", type=int, nargs="+", default=Size.lists, help="documents of a rerank request")
    options.add_argument("--threads", type=int, default=1, help="of the models")
    options.add_argument("--smoke", action="store_true", help="made-up texts and few of them: does it run?")
    options.add_argument("--out", type=Path, default=None, help="JSON file for the rows")
    given = options.parse_args()
    torch.set_num_threads(given.threads)
    size = Size((2,), (3,), 2) if given.smoke else Size(lists=tuple(given.lists), rounds=given.rounds)
    documents, queries = texts(None if given.smoke else given.data, size.rounds)
    part = open_part(documents)
    rows = measure(part, queries, size)
    print(f"{len(part.passages):,} passages, {given.threads} threads, {size.rounds} requests of each kind")
    print(f"{'request':<36}{'median ms':>11}{'p95 ms':>10}{'documents/s':>13}")
    for row in rows:
        rate = "" if row.documents_per_second is None else f"{row.documents_per_second:,.1f}"
        print(f"{row.request:<36}{row.median:>11.2f}{row.p95:>10.2f}{rate:>13}")
    if given.out:
        about = {
            "passages": len(part.passages),
            "threads": given.threads,
            "rounds": size.rounds,
            "processor": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
        }
        given.out.write_text(json.dumps({**about, "rows": [asdict(row) for row in rows]}, indent=2) + "\n")


if __name__ == "__main__":
    main()
