"""How many passages a search reranks on this machine: as many as it reads within most of its time budget, by the clock.

A reranker of MiniLM's size reads some 5 to 40 passages a second and core. A depth that is too great ends every search
without reranking, after a second that was spent for nothing; so the pace is measured once, when a bundle is loaded, and
each request's budget says how many passages that is.
"""

import logging
import time
from collections.abc import Callable

import numpy as np

from ranking.search_part import SearchPart
from ranking.searcher import SHARE, Searcher, readable

logger = logging.getLogger(__name__)

PROBED, ROUNDS = 6, 3
"""Passages from all over the corpus, and how often they are read; the median counts."""


def paced(searcher: Searcher, clock: Callable[[], float] = time.perf_counter) -> Searcher:
    """Return a searcher that knows how fast its reranker reads on this machine; warns if that limits every search.

    Args:
        searcher: without a pace.
        clock: gives seconds.
    """
    config = searcher.config
    if searcher.part.reranker is None or not config.rerank:
        return searcher
    known = Searcher(searcher.part, config, _pace(searcher.part, clock))
    depth = known.rerank_depth(config.budget_ms / 1e3)
    if depth < config.rerank:
        logger.warning(
            "searches rerank the best %d instead of %d: one takes %.0f ms here now, and %.0f %% of %d ms are for them",
            depth,
            config.rerank,
            1e3 * known.pace,
            100 * SHARE,
            config.budget_ms,
        )
    return known


def _pace(part: SearchPart, clock: Callable[[], float]) -> float:
    """Return the seconds a passage takes."""
    assert part.reranker is not None, "asked for only where there is one"
    places = np.linspace(0, len(part.passages) - 1, min(PROBED, len(part.passages))).astype(int)
    texts = [part.passages.text(place) for place in places.tolist()]
    seconds = []
    for _ in range(ROUNDS + 1):  # the first one warms up
        began = clock()
        part.reranker.rerank(texts[0][:100], readable(part, texts)[0])
        seconds.append((clock() - began) / len(texts))
    return float(np.median(seconds[1:]))
