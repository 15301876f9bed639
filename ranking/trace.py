"""What is told of a request: seconds by stage, where each item stood, and why others are not in the answer."""

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ranking.rules import Selection
from ranking.sources import Pool
from recsys.messages import DroppedItem, Explanation, StagePlace

LISTED = 50
"""Dropped items that an explanation lists of each stage; all of them are counted."""


class Clock:
    """Seconds by stage; a stage that comes again adds up."""

    def __init__(self) -> None:
        self._start = self._last = time.perf_counter()
        self._stages: dict[str, float] = {}

    def lap(self, stage: str) -> None:
        """End a stage."""
        now = time.perf_counter()
        self._stages[stage] = self._stages.get(stage, 0.0) + now - self._last
        self._last = now

    def seconds(self) -> dict[str, float]:
        """Return the stages so far and their total."""
        return {**self._stages, "total": self._last - self._start}


@dataclass(frozen=True)
class Found:
    """What a search found.

    Attributes:
        sources: names of the pool's sources.
        pool: candidates, best first.
        scores: float32 [C], of the ranker.
        chosen: what the rules chose of them.
        unscored: rows that the ranker can never recommend.
        rounds: searches it took.
    """

    sources: Sequence[str]
    pool: Pool
    scores: NDArray[np.float32]
    chosen: Selection
    unscored: NDArray[np.int32]
    rounds: int

    def sources_of(self, place: int) -> list[str]:
        """Return the sources that proposed a candidate."""
        return [name for name, rank in zip(self.sources, self.pool.rank[:, place].tolist(), strict=True) if rank]


def stages_of(found: Found, place: int) -> list[StagePlace]:
    """Return where a chosen candidate stood in every stage it came through.

    Args:
        found: the search.
        place: of the candidate in it.
    """
    proposed = zip(found.sources, found.pool.rank[:, place].tolist(), found.pool.value[:, place].tolist(), strict=True)
    stages = [StagePlace(stage=name, rank=rank, score=value) for name, rank, value in proposed if rank]
    score = float(found.scores[place])
    stages.append(StagePlace(stage="score", rank=place + 1, score=score))
    chosen = int(np.searchsorted(found.chosen.places, place)) + 1
    stages.append(StagePlace(stage="rules", rank=chosen, score=score))
    return stages


def explain(
    found: Found,
    answered: NDArray[np.int64],
    filtered: Sequence[tuple[int, str]],
    item_ids: Sequence[str],
) -> Explanation:
    """Return how an answer came about.

    Args:
        found: the search.
        answered: places of the items in the answer.
        filtered: rows that the sources would have proposed, each with the filter it does not pass.
        item_ids: by row.
    """
    given = set(answered.tolist())
    rows = found.pool.rows.tolist()
    dropped = [("filter", row, reason) for row, reason in filtered]
    dropped += [("score", row, "the ranker never recommends it") for row in found.unscored.tolist()]
    dropped += [("rules", rows[place], reason) for place, reason in found.chosen.passed_over.items()]
    dropped += [
        ("top_k", row, "scored below the answer")
        for place, row in enumerate(rows)
        if place not in given and place not in found.chosen.passed_over
    ]
    listed: Counter[str] = Counter()
    shown = []
    for stage, row, reason in dropped:
        listed[stage] += 1
        if listed[stage] <= LISTED:
            shown.append(DroppedItem(item_id=item_ids[row], stage=stage, reason=reason))
    return Explanation(
        candidates=len(rows),
        rounds=found.rounds,
        dropped=shown,
        dropped_counts=dict(Counter(reason for _, _, reason in dropped)),
    )
