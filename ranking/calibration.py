"""Scores as probabilities: a monotone map from a ranker's score to the chance that what is shown is taken.

A bundle may carry one (`calibration.json`). It is applied to the scores of an answer after everything has been ordered,
so it moves no item; equal probabilities can only arise, never a new order.
"""

from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from recsys.messages import Message

Method = Literal["isotonic", "platt"]
Floats = NDArray[np.float64]


class Calibration(Message):
    """A map from scores to probabilities that never falls.

    platt      p = 1 / (1 + exp(-(slope x + intercept))), slope above 0                     Platt 1999
    isotonic   p by straight lines between knots, constant beyond the outer ones            Zadrozny, Elkan 2002
    """

    method: Method
    slope: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    intercept: float = Field(default=0.0, allow_inf_nan=False)
    score: list[float] = Field(default=[], description="knots of `isotonic`, ascending")
    probability: list[float] = Field(default=[], description="at each knot, never falling")
    answers: int = Field(description="whose shown items it was fitted on")
    shown: int = Field(description="items in them")

    @model_validator(mode="after")
    def _never_falls(self) -> "Calibration":
        x, p = np.array(self.score), np.array(self.probability)
        if self.method == "isotonic" and not (
            len(x) == len(p) > 0 and (np.diff(x) > 0).all() and (np.diff(p) >= 0).all() and 0 <= p[0] <= p[-1] <= 1
        ):
            raise ValueError("expected as many probabilities in 0..1 as scores, one at least, both ascending")
        return self

    def of(self, score: NDArray[np.floating]) -> Floats:
        """Return the probability of each score, float64; a higher score never has a lower one, to the last bit."""
        x = score.astype(np.float64)
        if self.method == "platt":
            return np.exp(-np.logaddexp(0.0, -(self.slope * x + self.intercept)))
        knot, p = np.array(self.score), np.array(self.probability)
        if len(knot) == 1:
            return np.full(x.shape, p[0])
        x = np.clip(x, knot[0], knot[-1])
        left = np.clip(np.searchsorted(knot, x, "right") - 1, 0, len(knot) - 2)
        share = (x - knot[left]) / (knot[left + 1] - knot[left])
        # Rounding can lift the end of a line above the knot it leads to.
        return np.asarray(np.minimum(p[left] + share * (p[left + 1] - p[left]), p[left + 1]))
