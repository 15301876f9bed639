"""Puts what the buckets made together: histories, requests, counts, transitions, fixed candidates."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open

from pipelines.buckets import BUCKET_FILE, REQUEST_ARRAYS, SPLITS, BucketSummary
from pipelines.mixing import mix
from pipelines.prepared import CandidateSets, Requests
from pipelines.samplers import Ragged, Sampler
from pipelines.transitions import PAIRS, Edges, block_edges, blocks
from ranking.batch import PAD, rows_of
from ranking.items import Transitions
from recsys.history import Histories
from recsys.randomness import derive

REQUESTS_AT_ONCE = 1024

Buckets = Sequence[tuple[Path, BucketSummary]]
"""folder and summary of every bucket, in the order of history rows"""
Tick = Callable[[int, int], None]
"""(done, total)"""


def join_histories(buckets: Buckets, out: Path) -> Histories:
    """Write the buckets' events one after the other into `out`/histories; give them memory-mapped."""
    directory = out / "histories"
    directory.mkdir()
    total = sum(summary.events for _, summary in buckets)
    for name, kind in (("item", np.uint32), ("action", np.uint8), ("time", np.int64)):
        if not total:
            np.save(directory / f"{name}.npy", np.empty(0, kind))
            continue
        joined = np.lib.format.open_memmap(directory / f"{name}.npy", "w+", kind, (total,))
        start = 0
        for folder, summary in buckets:
            joined[start : start + summary.events] = _array(folder, name)
            start += summary.events
        joined.flush()
    lengths = _concatenated(buckets, "lengths")
    np.save(directory / "offsets.npy", np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))
    return Histories.load(directory)


def join_requests(buckets: Buckets) -> dict[str, Requests]:
    """Give the requests of each split, ordered by (at, user), histories ending at absolute places."""
    events = [summary.events for _, summary in buckets]
    base = np.cumsum(events) - events
    joined: dict[str, Requests] = {}
    for split in SPLITS:
        user, at, end, size, positive = (_concatenated(buckets, f"{split}_{name}") for name in REQUEST_ARRAYS)
        end = end + np.repeat(base, [summary.requests[split] for _, summary in buckets])
        offsets = np.concatenate([[0], np.cumsum(size)]).astype(np.int64)
        # Buckets are in the order of users, so a stable sort by moment is the order by (at, user).
        joined[split] = Requests(user, at, end, offsets, positive).take(np.argsort(at, kind="stable"))
    return joined


def choose_evaluated(
    requests: Mapping[str, Requests], hashes: NDArray[np.uint64], at_most: int | None, seed: int
) -> dict[str, Requests]:
    """Keep at most so many validation and test requests: those whose hash of (user id, at) is smallest."""
    chosen = dict(requests)
    for split in ("valid", "test"):
        found = requests[split]
        if at_most is not None and len(found) > at_most:
            words = mix(request_keys(found, hashes) ^ np.uint64(derive(seed, 0, "evaluated requests")))
            kept = np.argsort(words, kind="stable")[:at_most]
            chosen[split] = found.take(np.sort(kept))
    return chosen


def request_keys(requests: Requests, hashes: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Give a 64-bit name to each request that depends on its user id and moment only."""
    return mix(hashes[requests.user] ^ mix(requests.at.view(np.uint64)))


def training_counts(buckets: Buckets, rows: int) -> torch.Tensor:
    """Give the training-period events of each model row, int64 [V]."""
    counts = np.zeros(rows, np.int64)
    for folder, _ in buckets:
        counts[_array(folder, "counted_row")] += _array(folder, "counted")
    return torch.from_numpy(counts)


def merge_transitions(pool: Executor | None, buckets: Buckets, rows: int, top_n: int, tick: Tick) -> Iterator[Edges]:
    """Merge the buckets' pair words, a block of source rows at a time; a pool begins at once, before the first is asked.

    `top_n` heaviest edges are kept per row (0: all); `join_transitions` takes the blocks.
    """
    files = [folder / PAIRS for folder, _ in buckets]
    ranges = blocks(files, rows)
    merged = (pool.map if pool else map)(block_edges, repeat(files), ranges, repeat(top_n))

    def ticking() -> Iterator[Edges]:
        for done, edges in enumerate(merged):
            tick(done + 1, len(ranges))
            yield edges

    return ticking()


def join_transitions(merged: Iterator[Edges]) -> Transitions:
    """Give the sparse matrix [V, V] of all blocks."""
    parts = list(merged)
    offsets = np.concatenate([[0], np.cumsum(np.concatenate([edges.degree for edges in parts]))])
    return Transitions(
        torch.from_numpy(offsets),
        torch.from_numpy(np.concatenate([edges.target for edges in parts])),
        torch.from_numpy(np.concatenate([edges.weight for edges in parts])),
    )


def fixed_candidates(
    requests: Requests,
    keys: NDArray[np.uint64],
    sampler: Sampler,
    negatives: int,
    seed: int,
    history_of: Callable[[Requests], Ragged],
) -> CandidateSets:
    """Give each request its positives and `negatives` sampled items, drawn from the request's own key.

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
    """Give sizes, items and labels of candidate lists: the positives, then the drawn items without padding."""
    real = drawn != PAD
    negatives = real.sum(1)
    size = basket.lengths + negatives
    label = np.repeat(np.tile(np.array([1, 0], np.uint8), len(size)), np.stack([basket.lengths, negatives], 1).ravel())
    item = np.empty(len(label), np.int32)
    item[label == 1] = basket.values
    item[label == 0] = drawn[real]
    return size, item, label


def history_rows(histories: Histories, key_to_row: NDArray[np.int32]) -> Callable[[Requests], Ragged]:
    """Give a function that looks up the item rows of requests' whole histories."""

    def look_up(requests: Requests) -> Ragged:
        keys = histories.events.item.view(np.int32)  # same bits; a ragged array holds int32
        packed = Ragged.slices(keys, histories.offsets[requests.user], requests.end)
        return Ragged(packed.offsets, rows_of(packed.values.view(np.uint32), key_to_row))

    return look_up


def counts(buckets: Buckets, requests: Mapping[str, Requests]) -> dict[str, Any]:
    """Give the manifest's counts: events, repeats, requests found and kept, positives."""
    summaries = [summary for _, summary in buckets]
    events = sum(summary.events for summary in summaries)
    return {
        "events": events,
        "repeated_share": 1 - sum(summary.user_items for summary in summaries) / events,
        "requests": {split: len(found) for split, found in requests.items()},
        "requests_found": {split: sum(summary.requests[split] for summary in summaries) for split in SPLITS},
        "requests_straddling": sum(summary.straddling for summary in summaries),
        "positives": {split: len(found.positive) for split, found in requests.items()},
    }


def _concatenated(buckets: Buckets, name: str) -> NDArray[Any]:
    return np.concatenate([_array(folder, name) for folder, _ in buckets])


def _array(folder: Path, name: str) -> NDArray[Any]:
    with safe_open(folder / BUCKET_FILE, "np") as file:
        array: NDArray[Any] = file.get_tensor(name)
        return array
