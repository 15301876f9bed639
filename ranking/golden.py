"""Golden requests: what a bundle answered for a few synthetic users when it was published, replayed before it serves.

The users are drawn from the item rows by a seeded generator; no real user is in them. They include an empty history,
an item the catalogue does not know and a candidate that is not known. Scores of other machines differ in the last
bits, so scores must agree within `TOLERANCE` and the order wherever it does not hang on less than that.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field

from ranking.batch import FIRST_ITEM, UNKNOWN, Batch, assemble
from ranking.index import Index
from ranking.items import ItemTable
from ranking.ranker import AnyRanker, Retriever
from recsys.errors import BundleError
from recsys.history import DAY, UNKNOWN_KEY, Events
from recsys.messages import Message
from recsys.randomness import generator

TOLERANCE = 1e-5
"""Largest |a - b| / max(1, |a|) between a published and a replayed score."""

LENGTHS = (0, 1, 7, 60)
"""Events of the synthetic users."""

CANDIDATES = 40
NEIGHBOURS = 20
MOMENT = 1_735_689_600_000_000
"""2025-01-01 00:00 UTC; only ages matter."""


class GoldenUser(Message):
    """One synthetic user, its candidates, and what the bundle answered."""

    item_key: list[int]
    action: list[int]
    time: list[int]
    at: int
    candidates: list[int] = Field(description="model rows")
    scores: list[float] = Field(description="of the candidates, by the ranker")
    neighbours: list[str] = Field(description="item ids the index finds for the user's vector, best first")
    neighbour_scores: list[float]


class Golden(Message):
    """All golden requests of a bundle."""

    users: list[GoldenUser]


@dataclass(frozen=True)
class Answering:
    """The parts of a bundle that answer: all on CPU or all on the device of `device`."""

    items: ItemTable
    item_ids: Sequence[str]
    key_to_row: NDArray[np.int32]
    ranker: AnyRanker
    retriever: Retriever | None
    index: Index | None
    device: torch.device


def make_golden(parts: Answering) -> Golden:
    """Draw the synthetic users and record what the parts answer."""
    rng = generator(0, 0, "golden")
    keys = np.flatnonzero(parts.key_to_row >= FIRST_ITEM).astype(np.uint32)
    users = []
    for length in LENGTHS:
        item = rng.choice(keys, length)
        if length > 1:
            item[0] = UNKNOWN_KEY
        time = MOMENT - np.sort(rng.integers(1, 90 * DAY, length))[::-1]
        events = Events(item.astype(np.uint32), np.zeros(length, np.uint8), time.astype(np.int64))
        drawn = rng.integers(FIRST_ITEM, len(parts.items), CANDIDATES)
        own = parts.key_to_row[item[1:3]]
        candidates = np.unique(np.concatenate([[UNKNOWN], drawn, own])).astype(np.int32)
        users.append(_answer(parts, events, candidates))
    return Golden(users=users)


def replay(golden: Golden, parts: Answering) -> None:
    """Ask the golden requests again; raises `BundleError` naming the first answer that differs."""
    for number, user in enumerate(golden.users):
        got = _answer(parts, _events(user), np.array(user.candidates, np.int32))
        where = f"golden user {number} ({len(user.item_key)} events)"
        ids = [parts.item_ids[row] or f"row {row}" for row in user.candidates]
        compare_scores(f"{where}: score of", ids, user.scores, got.scores, TOLERANCE)
        wanted = user.neighbour_scores
        compare_scores(f"{where}: inner product with", user.neighbours, wanted, got.neighbour_scores, TOLERANCE)
        compare_order(f"{where}: neighbour", user.neighbours, got.neighbours, wanted, TOLERANCE)


def golden_error(user: GoldenUser, parts: Answering) -> float:
    """Return the largest |a - b| / max(1, |a|) between the published and today's scores of one golden user."""
    got = _answer(parts, _events(user), np.array(user.candidates, np.int32))
    pairs = [*zip(user.scores, got.scores, strict=True), *zip(user.neighbour_scores, got.neighbour_scores, strict=True)]
    return max((abs(wanted - found) / max(1.0, abs(wanted)) for wanted, found in pairs), default=0.0)


def _events(user: GoldenUser) -> Events:
    return Events(np.array(user.item_key, np.uint32), np.array(user.action, np.uint8), np.array(user.time, np.int64))


def _answer(parts: Answering, events: Events, candidates: NDArray[np.int32]) -> GoldenUser:
    neighbours: list[str] = []
    neighbour_scores: list[float] = []
    with torch.inference_mode():
        batch = _batch(parts, events, candidates, parts.ranker.window)
        state = parts.ranker.encode(batch.history)
        scores = parts.ranker.score(state, batch.request, batch.candidates)[0].tolist()
        if parts.retriever is not None and parts.index is not None:
            window = cast(AnyRanker, parts.retriever).window  # every retriever is a ranker too
            vectors = parts.retriever.user_vectors(_batch(parts, events, candidates, window).history)
            rows, found = parts.index.search(vectors.float().cpu().numpy(), min(NEIGHBOURS, len(parts.index)))
            neighbours = [parts.item_ids[row] for row in rows[0]]
            neighbour_scores = found[0].tolist()
    if not np.isfinite(scores + neighbour_scores).all():
        raise BundleError(f"a synthetic user with {len(events)} events is scored {scores}; expected finite numbers")
    return GoldenUser(
        item_key=events.item.tolist(),
        action=events.action.tolist(),
        time=events.time.tolist(),
        at=MOMENT,
        candidates=candidates.tolist(),
        scores=scores,
        neighbours=neighbours,
        neighbour_scores=neighbour_scores,
    )


def _batch(parts: Answering, events: Events, candidates: NDArray[np.int32], window: int | None) -> Batch:
    ends = np.array([len(events)], np.int64)
    at = np.array([MOMENT], np.int64)
    starts = np.zeros(1, np.int64)
    batch = assemble(events, starts, ends, at, candidates[None, :], parts.key_to_row, window=window)
    return batch.to(parts.device)


def compare_scores(
    what: str, ids: Sequence[str], expected: Sequence[float], got: Sequence[float], tolerance: float
) -> None:
    """Raise `BundleError` at the first of the listed ids whose |a - b| / max(1, |a|) is above the tolerance."""
    if len(expected) != len(got):
        raise BundleError(f"{what} {len(expected)} entries expected, {len(got)} found; publish again")
    for name, wanted, found in zip(ids, expected, got, strict=True):
        if not abs(wanted - found) <= tolerance * max(1.0, abs(wanted)):
            raise BundleError(
                f"{what} {name!r} was {wanted:.7g} when published and is {found:.7g} now; "
                "the code or the machine computes something else: publish again with this version"
            )


def compare_order(
    what: str, expected: Sequence[str], got: Sequence[str], scores: Sequence[float], tolerance: float
) -> None:
    """Raise `BundleError` unless those whose published scores lie apart from both neighbours' keep their place."""
    if not len(scores):
        return
    published = np.array(scores)
    apart = np.abs(np.diff(published)) > 4 * tolerance * np.maximum(1.0, np.abs(published[:-1]))
    # The last place competes with what is not listed, so it is held to its score alone.
    settled = np.concatenate([[True], apart]) & np.concatenate([apart, [False]])
    for place in np.flatnonzero(settled).tolist():
        if expected[place] != got[place]:
            raise BundleError(
                f"{what} {place + 1} was {expected[place]!r} when published and is {got[place]!r} now; "
                "the index does not belong to what it lists: publish again"
            )
