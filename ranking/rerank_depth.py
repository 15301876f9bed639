"""How many passages a search reranks on this machine: as many as it reads within most of the time budget, by the clock.

A reranker of MiniLM's size reads some 5 to 40 passages a second and core. A depth that is too great ends every search
without reranking, after a second that was spent for nothing; so the depth is measured once, when a bundle is loaded.
"""

import logging
import time
from collections.abc import Callable

import numpy as np

from ranking.search_part import SearchPart
from ranking.searcher import SearchConfig

logger = logging.getLogger(__name__)

SHARE = 0.7
"""of the budget; the rest is for the first stage, the user's ranker, and a machine that is busier than now"""
PROBED, ROUNDS = 6, 3
LEAST = 2
"""Passages that are reranked however slow the machine is: fewer have no order."""


def affordable_depth(
    part: SearchPart, config: SearchConfig, clock: Callable[[], float] = time.perf_counter, rounds: int = ROUNDS
) -> int:
    """Return `config.rerank`, or fewer passages if a reranker would not read so many in `SHARE` of the search's budget.

    Args:
        part: of the bundle.
        config: depth and budget that are wanted.
        clock: gives seconds.
        rounds: of `PROBED` passages from all over the corpus; the median counts.
    """
    if part.reranker is None or config.rerank <= LEAST:
        return config.rerank
    places = np.linspace(0, len(part.passages) - 1, min(PROBED, len(part.passages))).astype(int)
    texts = [part.passages.text(place) for place in places.tolist()]
    seconds = []
    for _ in range(rounds + 1):  # the first one warms up
        began = clock()
        part.reranker.rerank(texts[0][:100], texts)
        seconds.append((clock() - began) / len(texts))
    each = float(np.median(seconds[1:]))
    fits = config.rerank if each <= 0 else int(SHARE * config.budget_ms / 1e3 / each)
    depth = max(min(config.rerank, fits), LEAST)
    if depth < config.rerank:
        logger.warning(
            "searches rerank the best %d instead of %d: one takes %.0f ms here now, and %.0f %% of %d ms are for them",
            depth,
            config.rerank,
            1e3 * each,
            100 * SHARE,
            config.budget_ms,
        )
    return depth
