"""Which requests train, which validate, which test.

    time           global: the newest `test_days` test, the `valid_days` before them validate, everything older trains
    last_request   per user: the last request tests, the one before it validates, the rest trains (papers' protocol)

Either way each user has a moment, the end of the training period. Counts, transitions and the `trained` flags see
events strictly before it, and a request trains only if all of its session lies before it. A session that straddles a
cut belongs to no split (its events stay in the histories); a log whose sessions carry one stamp has none.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from recsys.history import DAY

TRAIN, VALID, TEST, STRADDLES = 0, 1, 2, 3
NEVER = np.iinfo(np.int64).max
MOST_DAYS = 100_000
"""No log is longer: times lie between 1980 and 2200."""


@dataclass(frozen=True)
class SplitConfig:
    """How requests are divided.

    Attributes:
        kind: `time` (global cuts) or `last_request` (per user; the only choice for a log of positions).
        valid_days: length of the validation period, under `time`.
        test_days: length of the test period, counted back from the newest event, under `time`.
    """

    kind: Literal["time", "last_request"] = "time"
    valid_days: Annotated[float, Field(gt=0, le=MOST_DAYS)] = 14
    test_days: Annotated[float, Field(gt=0, le=MOST_DAYS)] = 28


@dataclass(frozen=True)
class Cuts:
    """First moments of the validation and the test period, microseconds UTC; unused under `last_request`."""

    kind: Literal["time", "last_request"]
    valid: int = NEVER
    test: int = NEVER


def cuts(config: SplitConfig, newest: int) -> Cuts:
    """Return the cuts for a log whose newest event is at `newest`; that event is the last of the test period."""
    if config.kind == "last_request":
        return Cuts(config.kind)
    test = newest + 1 - round(config.test_days * DAY)
    return Cuts(config.kind, test - round(config.valid_days * DAY), test)


def assign(
    cuts: Cuts, users: int, user: NDArray[np.int64], at: NDArray[np.int64], last: NDArray[np.int64]
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Return the split of each request, uint8 [R], and the end of each user's training period, int64 [users].

    Args:
        cuts: where the periods begin.
        users: number of users.
        user: int64 [R], ascending; the requests of one user are oldest first.
        at: int64 [R], first moment of each request's session.
        last: int64 [R], its last moment.
    """
    if cuts.kind == "time":
        split = np.full(len(user), STRADDLES, np.uint8)
        split[last < cuts.valid] = TRAIN
        split[(at >= cuts.valid) & (last < cuts.test)] = VALID
        split[at >= cuts.test] = TEST
        return split, np.full(users, cuts.valid, np.int64)
    counts = np.bincount(user, minlength=users)
    ends = np.cumsum(counts)
    test = ends[counts >= 1] - 1
    valid = ends[counts >= 2] - 2
    training_end = np.full(users, NEVER, np.int64)
    training_end[user[test]] = at[test]
    training_end[user[valid]] = at[valid]
    split = np.where(last < training_end[user], TRAIN, STRADDLES).astype(np.uint8)
    split[test] = TEST
    split[valid] = VALID
    return split, training_end
