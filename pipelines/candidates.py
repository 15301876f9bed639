"""Which requests are evaluated, and the fixed candidates of each: chosen and drawn by hash, a piece at a time.

Neither the choice nor a request's candidates depend on the order of the requests, their pieces or their number.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from pipelines.mixing import mix
from pipelines.prepared import CandidateSets, Requests
from pipelines.samplers import Ragged, Sampler
from pipelines.streams import Kind, growing_safetensors, put
from ranking.batch import PAD, rows_of
from recsys.history import Histories
from recsys.randomness import derive

SLICE = 16_384
"""Requests written at once."""
REQUESTS_AT_ONCE = 1024
"""Requests drawn for at once."""

LookUp = Callable[[Requests], Ragged]
"""requests -> item rows of their whole histories"""


def request_keys(requests: Requests, hashes: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return a 64-bit name to each request that depends on its user id and moment only."""
    return _keys(requests.user, requests.at, hashes)


def _keys(user: NDArray[np.int64], at: NDArray[np.int64], hashes: NDArray[np.uint64]) -> NDArray[np.uint64]:
    return mix(hashes[user] ^ mix(at.view(np.uint64)))


def chosen(
    pieces: Iterable[Requests], hashes: NDArray[np.uint64], at_most: int | None, seed: int
) -> Iterator[Requests]:
    """Yield the requests to evaluate, piece by piece: those whose hash of (user id, at) is smallest.

    Args:
        pieces: all requests of a split by (at, user); gone through twice.
        hashes: of each history row.
        at_most: how many to give; None for all.
        seed: of the choice.

    Memory is that of a piece and of `at_most` numbers. Of requests with one hash (of one user at one moment) the first
    are taken.
    """
    if at_most is None:
        yield from pieces
        return
    smallest = np.empty(0, np.uint64)
    for piece in pieces:
        smallest = np.concatenate([smallest, _lots(piece.user, piece.at, hashes, seed)])
        if len(smallest) > at_most:
            smallest = np.partition(smallest, at_most - 1)[:at_most]
    if not len(smallest):
        return
    limit = smallest.max()
    ties = int(np.count_nonzero(smallest == limit))
    for piece in pieces:
        words = _lots(piece.user, piece.at, hashes, seed)
        last = np.flatnonzero(words == limit)[:ties]
        ties -= len(last)
        yield piece.take(np.sort(np.concatenate([np.flatnonzero(words < limit), last])))


def may_be_chosen(
    user: NDArray[np.int64], at: NDArray[np.int64], hashes: NDArray[np.uint64], at_most: int | None, seed: int
) -> NDArray[np.bool_]:
    """Mark the requests among which `chosen` finds all it gives: about `at_most`, so that the rest need not be read."""
    if at_most is None or len(user) <= at_most:
        return np.ones(len(user), np.bool_)
    words = _lots(user, at, hashes, seed)
    marked: NDArray[np.bool_] = words <= np.partition(words, at_most - 1)[at_most - 1]
    return marked


def _lots(user: NDArray[np.int64], at: NDArray[np.int64], hashes: NDArray[np.uint64], seed: int) -> NDArray[np.uint64]:
    return mix(_keys(user, at, hashes) ^ np.uint64(derive(seed, 0, "evaluated requests")))


def write_evaluated(
    requests: Iterable[Requests], out: Path, split: str, draw: Mapping[str, Callable[[Requests], CandidateSets]]
) -> tuple[int, int]:
    """Write the requests of a split, and their candidates by each sampler; give their number and that of positives.

    Args:
        requests: piece by piece, by (at, user).
        out: the prepared set.
        split: its name.
        draw: gives candidates, by the name of the sampler.
    """
    count = positives = 0
    drawn = dict.fromkeys(draw, 0)
    with ExitStack() as stack:

        def opened(path: Path, kinds: Mapping[str, Kind]) -> dict[str, IO[bytes]]:
            return stack.enter_context(growing_safetensors(path, kinds))

        main = opened(out / "requests" / f"{split}.safetensors", Requests.KINDS)
        sets = {name: opened(out / "candidates" / f"{split}_{name}.safetensors", CandidateSets.KINDS) for name in draw}
        for files in (main, *sets.values()):
            put(files["offsets"], np.zeros(1, np.int64))
        for some in _slices(requests):
            _append(main, some, positives)
            for name, candidates_of in draw.items():
                found = candidates_of(some)
                _append(sets[name], found, drawn[name])
                drawn[name] += len(found.item)
            count, positives = count + len(some), positives + len(some.positive)
    return count, positives


def _slices(pieces: Iterable[Requests]) -> Iterator[Requests]:
    for piece in pieces:
        for begin in range(0, len(piece), SLICE):
            yield piece.take(np.arange(begin, min(begin + SLICE, len(piece))))


def _append(files: Mapping[str, IO[bytes]], some: Requests | CandidateSets, before: int) -> None:
    """Write ragged arrays behind others that have `before` values."""
    for name, file in files.items():
        values: NDArray[Any] = getattr(some, name)
        put(file, values[1:] + before if name == "offsets" else values)


def fixed_candidates(
    requests: Requests,
    keys: NDArray[np.uint64],
    sampler: Sampler,
    negatives: int,
    seed: int,
    history_of: LookUp,
) -> CandidateSets:
    """Return each request its positives and `negatives` sampled items, drawn from the request's own key.

    A request that allows no negative at all has its positives only.

    Cost: 10,000 requests x 100 negatives take 0.03 s (`uniform`) to 0.07 s (`popularity`) on one core; memory is
    bounded by `REQUESTS_AT_ONCE` besides the result.
    """
    parts = []
    for begin in range(0, len(requests), REQUESTS_AT_ONCE):
        some = requests.take(np.arange(begin, min(begin + REQUESTS_AT_ONCE, len(requests))))
        basket = Ragged(some.offsets, some.positive)
        history = history_of(some) if sampler.skips_history else None
        drawn = sampler.draw_fixed(seed, keys[begin : begin + len(some)], basket, negatives, history)
        parts.append(_after_positives(basket, drawn))
    return CandidateSets(
        np.concatenate([[0], np.cumsum(np.concatenate([size for size, _, _ in parts] or [np.empty(0, np.int64)]))]),
        np.concatenate([item for _, item, _ in parts] or [np.empty(0, np.int32)]),
        np.concatenate([label for _, _, label in parts] or [np.empty(0, np.uint8)]),
    )


def _after_positives(
    basket: Ragged, drawn: NDArray[np.int32]
) -> tuple[NDArray[np.int64], NDArray[np.int32], NDArray[np.uint8]]:
    """Return sizes, items and labels of candidate lists: the positives, then the drawn items without padding."""
    real = drawn != PAD
    negatives = real.sum(1)
    size = basket.lengths + negatives
    label = np.repeat(np.tile(np.array([1, 0], np.uint8), len(size)), np.stack([basket.lengths, negatives], 1).ravel())
    item = np.empty(len(label), np.int32)
    item[label == 1] = basket.values
    item[label == 0] = drawn[real]
    return size, item, label


def history_rows(histories: Histories, key_to_row: NDArray[np.int32]) -> LookUp:
    """Return a function that looks up the item rows of requests' whole histories."""

    def look_up(requests: Requests) -> Ragged:
        keys = histories.events.item.view(np.int32)  # same bits; a ragged array holds int32
        packed = Ragged.slices(keys, histories.offsets[requests.user], requests.end)
        return Ragged(packed.offsets, rows_of(packed.values.view(np.uint32), key_to_row))

    return look_up
