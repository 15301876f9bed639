"""Golden searches: what a bundle's text part answered when it was published, replayed before it serves.

Queries are the first words of a few passages, drawn by a seeded generator. Each stage is asked apart: what BM25 and the
vectors find, and how the reranker scores what they found. Two passages may lie closer than machines agree, so scores
are compared place by place and documents only where the scores lie apart.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from pydantic import Field

from ranking.golden import compare_order, compare_scores
from ranking.manifest import TextEntry
from ranking.search_part import TEXT, SearchContents, SearchPart, load_search_part, write_search_part
from recsys.errors import BundleError
from recsys.files import write_json
from recsys.messages import Message
from recsys.randomness import generator

TOLERANCE = 1e-4
"""Largest |a - b| / max(1, |a|) between a published and a replayed score; transformers differ more between machines
than rankers do."""

SEARCHES = 3
WORDS = 6
FOUND = 5


class GoldenList(Message):
    """Documents that a stage scored."""

    document_ids: list[str]
    scores: list[float]


class GoldenSearch(Message):
    """One query and what each stage answered."""

    query: str
    bm25: GoldenList
    dense: GoldenList | None = Field(description="null without an encoder")
    passages: list[int] = Field(description="rows the reranker was asked about")
    rerank: list[float] | None = Field(description="null without a reranker")


class SearchGolden(Message):
    """All golden searches of a bundle."""

    searches: list[GoldenSearch]


def write_text(directory: Path, contents: SearchContents) -> TextEntry:
    """Write the text part of a bundle and its golden searches, and give its entry of the manifest."""
    entry = write_search_part(directory, contents)
    written = {path.relative_to(directory).as_posix(): path for path in (directory / TEXT).rglob("*")}
    golden = make_search_golden(load_search_part(directory, entry, written))  # as it will be read
    write_json(directory / TEXT / "golden.json", golden.model_dump())
    return entry


def make_search_golden(part: SearchPart) -> SearchGolden:
    """Draw the queries and record what the part answers."""
    rng = generator(0, 0, "golden searches")
    drawn = rng.choice(len(part.passages), min(SEARCHES, len(part.passages)), replace=False)
    queries = [" ".join(part.passages.text(passage).split()[:WORDS]) for passage in drawn.tolist()]
    return SearchGolden(searches=[_ask(part, query, None) for query in queries])


def replay_searches(golden: SearchGolden, part: SearchPart) -> None:
    """Ask the golden searches again; raises `BundleError` naming the first answer that differs."""
    for number, expected in enumerate(golden.searches):
        if any(not 0 <= passage < len(part.passages) for passage in expected.passages):
            raise BundleError(f"golden search {number} is not of these {len(part.passages)} passages; publish again")
        got = _ask(part, expected.query, expected.passages)
        where = f"golden search {number}"
        _compare(f"{where}, bm25", expected.bm25, got.bm25)
        if (expected.dense is None) != (got.dense is None) or (expected.rerank is None) != (got.rerank is None):
            raise BundleError(f"{where}: published with other text models than the bundle holds; publish again")
        if expected.dense is not None and got.dense is not None:
            _compare(f"{where}, dense", expected.dense, got.dense)
        if expected.rerank is not None and got.rerank is not None:
            ids = [part.passages.documents(passage, 1)[0] for passage in expected.passages]
            compare_scores(f"{where}, rerank: score of", ids, expected.rerank, got.rerank, TOLERANCE)


def _ask(part: SearchPart, query: str, passages: Sequence[int] | None) -> GoldenSearch:
    words = part.bm25.search([query], FOUND)
    rows = words.rows[0][words.rows[0] >= 0].tolist()
    bm25 = _list(part, rows, words.scores[0][: len(rows)].tolist())
    dense, near = None, []
    if part.encoder is not None and part.index is not None:
        found = part.nearest(part.encoder.encode_queries([query]), FOUND)
        near = found.rows[0][found.rows[0] >= 0].tolist()
        dense = _list(part, near, found.scores[0][: len(near)].tolist())
    asked = list(dict.fromkeys([*rows, *near])) if passages is None else list(passages)
    rerank = None
    if part.reranker is not None:
        rerank = part.reranker.rerank(query, [part.passages.text(row) for row in asked]).tolist()
        if not np.isfinite(rerank).all():
            raise BundleError(f"the reranker scores {rerank}; expected finite numbers")
    return GoldenSearch(query=query, bm25=bm25, dense=dense, passages=asked, rerank=rerank)


def _list(part: SearchPart, rows: Sequence[int], scores: Sequence[float]) -> GoldenList:
    if not np.isfinite(scores).all():
        raise BundleError(f"a synthetic search is scored {scores}; expected finite numbers")
    return GoldenList(document_ids=[part.passages.documents(row, 1)[0] for row in rows], scores=list(scores))


def _compare(what: str, expected: GoldenList, got: GoldenList) -> None:
    ids, scores = expected.document_ids, expected.scores
    compare_scores(f"{what}: score of", ids, scores, got.scores, TOLERANCE)
    compare_order(f"{what}: document", ids, got.document_ids, scores, TOLERANCE)
