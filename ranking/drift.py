"""Whether the scores that go out still lie as they did at publish: the population stability index.

    PSI = sum over bins of (p - q) ln(p / q)

p is the share of live scores in a bin, q that of the reference, whose bins hold a tenth each. Below 0.1 the scores lie
as they did, above 0.25 they do not (the usual reading; Siddiqi, Credit Risk Scorecards, 2006).
"""

from collections import deque
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from recsys.messages import Message

TOP = 10
"""Items of an answer that count, since further ones score less the more are asked for."""

BINS = 10
WINDOW = 5_000
LEAST = 500
"""Scores below which a drift means nothing: by chance alone PSI is about (bins - 1) / scores."""


class ScoreReference(Message):
    """How the scores of recommended items lay when the bundle was published."""

    edges: list[float] = Field(description="ascending, between the bins")
    shares: list[float] = Field(description="of the scores in each bin, one more than edges")
    scores: int

    @staticmethod
    def of(scores: NDArray[np.floating]) -> "ScoreReference":
        """Return bins that hold a tenth of the scores each; equal scores share a bin."""
        edges = np.unique(np.quantile(scores, np.arange(1, BINS) / BINS)) if len(scores) else np.empty(0)
        return ScoreReference(edges=edges.tolist(), shares=_shares(scores, edges).tolist(), scores=len(scores))


def stability(reference: ScoreReference, scores: NDArray[np.floating]) -> float:
    """Return the PSI of scores against a reference; half a score is added to every bin, so that none is empty."""
    edges = np.array(reference.edges)
    live, expected = _shares(scores, edges), np.array(reference.shares)
    live = (live * len(scores) + 0.5) / (len(scores) + 0.5 * len(live))
    expected = (expected * reference.scores + 0.5) / (reference.scores + 0.5 * len(expected))
    return float(np.sum((live - expected) * np.log(live / expected)))


class Drift:
    """The newest scores of one bundle, against its reference.

    Args:
        reference: of the bundle.
    """

    def __init__(self, reference: ScoreReference) -> None:
        self._reference = reference
        self._scores: deque[float] = deque(maxlen=WINDOW)

    def add(self, scores: Iterable[float]) -> None:
        """Take note of the scores of an answer."""
        self._scores.extend(scores)

    def value(self) -> float | None:
        """Return the PSI of the newest scores; None while there are too few."""
        scores = np.array(self._scores)
        return stability(self._reference, scores) if len(scores) >= LEAST else None


def _shares(scores: NDArray[np.floating], edges: NDArray[np.float64]) -> NDArray[np.float64]:
    counts = np.bincount(np.searchsorted(edges, scores, side="right"), minlength=len(edges) + 1)
    shares: NDArray[np.float64] = counts / max(len(scores), 1)
    return shares
