"""Puts what the buckets made together: histories, requests, counts, transitions, fixed candidates.

What grows with the log is written piece by piece; in memory stay the requests that do not train (`pending`), one number
per user, and the item table.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open

from pipelines.buckets import BUCKET_FILE, BucketSummary, Sessions
from pipelines.mixing import mix
from pipelines.prepared import CandidateSets, Requests
from pipelines.samplers import Ragged, Sampler
from pipelines.splits import TEST, VALID
from pipelines.streams import npy_file, put, safetensors_file
from pipelines.transitions import PAIRS, Edges, block_edges, blocks
from ranking.batch import PAD, rows_of
from ranking.items import Transitions
from recsys.history import Histories
from recsys.randomness import derive

REQUESTS_AT_ONCE = 1024
POSITIVES_AT_ONCE = 4_000_000
"""Positives of training requests sorted at once: about 120 MB with their temporaries."""
HISTORY_ARRAYS: dict[str, type[np.generic]] = {"item": np.uint32, "action": np.uint8, "time": np.int64}

Buckets = Sequence[tuple[Path, BucketSummary]]
"""folder and summary of every bucket, in the order of history rows"""
Tick = Callable[[int, int], None]
"""(done, total)"""


@dataclass(frozen=True)
class Tally:
    """What a log holds, whatever was chosen of it later.

    Attributes:
        events: number of events.
        user_items: distinct (user, item) pairs.
        train: training requests.
        train_positives: their positives.
        count: training events of each model row, int64 [V].
    """

    events: int
    user_items: int
    train: int
    train_positives: int
    count: NDArray[np.int64]


def tally(buckets: Buckets, rows: int) -> Tally:
    """Add up the buckets; `rows` is V."""
    count = np.zeros(rows, np.int64)
    for folder, _ in buckets:
        count[_array(folder, "counted_row")] += _array(folder, "counted")
    summaries = [summary for _, summary in buckets]
    return Tally(
        events=sum(summary.events for summary in summaries),
        user_items=sum(summary.user_items for summary in summaries),
        train=sum(summary.train for summary in summaries),
        train_positives=sum(summary.train_positives for summary in summaries),
        count=count,
    )


def join_histories(buckets: Buckets, out: Path) -> Histories:
    """Write the buckets' events one after the other into `out`/histories; give them memory-mapped."""
    directory = out / "histories"
    directory.mkdir()
    total = sum(summary.events for _, summary in buckets)
    for name, kind in HISTORY_ARRAYS.items():
        with npy_file(directory / f"{name}.npy", kind, total) as file:
            for folder, _ in buckets:
                put(file, _array(folder, name))
    lengths = _concatenated(buckets, "lengths")
    np.save(directory / "offsets.npy", np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))
    return Histories.load(directory)


def join_training(buckets: Buckets, path: Path) -> None:
    """Write the training requests of all buckets, ordered by (at, user), ends counted in the packed events."""
    base = np.cumsum([0, *(summary.events for _, summary in buckets)])
    positives = sum(summary.train_positives for _, summary in buckets)
    edges = _moments(buckets, max(1, -(-positives // POSITIVES_AT_ONCE)))
    places = np.stack([np.searchsorted(_array(folder, "train_at"), edges) for folder, _ in buckets])  # [bucket, edge]
    heads = np.stack(
        [_running(_array(folder, "train_size"))[place] for (folder, _), place in zip(buckets, places, strict=True)]
    )

    def block(number: int) -> Requests:
        parts: dict[str, list[NDArray[Any]]] = {name: [] for name in ("user", "at", "end", "size", "positive")}
        for bucket, (folder, _) in enumerate(buckets):
            low, high = places[bucket, number : number + 2].tolist()
            if low == high:
                continue
            with safe_open(folder / BUCKET_FILE, "np") as file:
                for name in ("user", "at", "size"):
                    parts[name].append(file.get_slice(f"train_{name}")[low:high])
                parts["end"].append(file.get_slice("train_end")[low:high] + base[bucket])
                first, stop = heads[bucket, number : number + 2].tolist()
                parts["positive"].append(file.get_slice("train_positive")[first:stop])
        user, at, end, size = (
            np.concatenate([np.empty(0, np.int64), *parts[name]]) for name in ("user", "at", "end", "size")
        )
        positive = np.concatenate([np.empty(0, np.int32), *parts["positive"]])
        # Buckets are in the order of users, so a stable sort by moment is the order by (at, user).
        return Requests(user, at, end, _running(size), positive).take(np.argsort(at, kind="stable"))

    count = sum(summary.train for _, summary in buckets)
    write_requests(path, count, positives, map(block, range(len(edges) - 1)))


def write_requests(path: Path, count: int, positives: int, pieces: Iterator[Requests]) -> None:
    """Write requests that come in pieces, in order, as the one file `Requests.load` reads."""
    layout: dict[str, tuple[type[np.generic], int]] = {
        **dict.fromkeys(("user", "at", "end"), (np.int64, count)),
        "offsets": (np.int64, count + 1),
        "positive": (np.int32, positives),
    }
    with safetensors_file(path, layout) as files:
        put(files["offsets"], np.zeros(1, np.int64))
        written = 0
        for piece in pieces:
            for name in ("user", "at", "end", "positive"):
                put(files[name], getattr(piece, name))
            put(files["offsets"], piece.offsets[1:] + written)
            written += int(piece.offsets[-1])


def _moments(buckets: Buckets, parts: int) -> NDArray[np.int64]:
    """Give ascending moments that divide the training requests into about equal parts, beyond both ends of them."""
    sample = []
    for folder, summary in buckets:
        sample.append(_array(folder, "train_at")[:: max(1, summary.train // (4 * parts))])
    at = np.sort(np.concatenate(sample))
    inner = at[np.linspace(0, len(at), parts + 1)[1:-1].astype(np.int64)] if len(at) else at
    limits = np.iinfo(np.int64)
    return np.unique(np.concatenate([[limits.min], inner, [limits.max]]).astype(np.int64))


def join_pending(buckets: Buckets) -> Sessions:
    """Give the requests that do not train, by user, ends counted in the packed events."""
    events = [summary.events for _, summary in buckets]
    base = np.cumsum(events) - events
    end = _concatenated(buckets, "pending_end") + np.repeat(base, [summary.pending for _, summary in buckets])
    return Sessions(
        user=_concatenated(buckets, "pending_user"),
        at=_concatenated(buckets, "pending_at"),
        last=_concatenated(buckets, "pending_last"),
        end=end,
        offsets=_running(_concatenated(buckets, "pending_size")),
        positive=_concatenated(buckets, "pending_positive"),
    )


def evaluated(
    pending: Sessions, split: NDArray[np.uint8], hashes: NDArray[np.uint64], at_most: int | None, seed: int
) -> dict[str, Requests]:
    """Give the validation and the test requests, by (at, user).

    At most so many of each are kept: those whose hash of (user id, at) is smallest.
    """
    chosen = {}
    for name, code in (("valid", VALID), ("test", TEST)):
        index = np.flatnonzero(split == code)
        if at_most is not None and len(index) > at_most:
            keys = _request_keys(pending.user[index], pending.at[index], hashes)
            words = mix(keys ^ np.uint64(derive(seed, 0, "evaluated requests")))
            near = np.flatnonzero(words <= np.partition(words, at_most - 1)[at_most - 1])
            index = index[near[np.argsort(words[near], kind="stable")[:at_most]]]
            index.sort()
        found = pending.take(index[np.argsort(pending.at[index], kind="stable")])
        chosen[name] = Requests(found.user, found.at, found.end, found.offsets, found.positive)
    return chosen


def request_keys(requests: Requests, hashes: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Give a 64-bit name to each request that depends on its user id and moment only."""
    return _request_keys(requests.user, requests.at, hashes)


def _request_keys(user: NDArray[np.int64], at: NDArray[np.int64], hashes: NDArray[np.uint64]) -> NDArray[np.uint64]:
    return mix(hashes[user] ^ mix(at.view(np.uint64)))


def merge_transitions(
    pool: Executor | None, buckets: Buckets, rows: int, top_n: int, keep: Path | None, tick: Tick
) -> Iterator[Edges]:
    """Merge the buckets' pair words, a block of source rows at a time; a pool begins at once, not when first asked.

    `top_n` heaviest edges are kept per row (0: all); `join_transitions` takes the blocks. With `keep` each block's
    words are written there (`pipelines.growth`).
    """
    files = [folder / PAIRS for folder, _ in buckets]
    ranges = blocks(files, rows)
    merged = (pool.map if pool else map)(block_edges, repeat(files), ranges, repeat(top_n), repeat(keep))

    def ticking() -> Iterator[Edges]:
        for done, edges in enumerate(merged):
            tick(done + 1, len(ranges))
            yield edges

    return ticking()


def join_transitions(merged: Iterator[Edges]) -> Transitions:
    """Give the sparse matrix [V, V] of all blocks."""
    parts = list(merged)
    return Transitions(
        torch.from_numpy(_running(np.concatenate([edges.degree for edges in parts]))),
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


def counts(found: Tally, split: NDArray[np.uint8], requests: Mapping[str, Requests]) -> dict[str, Any]:
    """Give the manifest's counts: events, repeats, requests found and kept, positives.

    `split` is that of the pending requests; `requests` are the evaluated ones.
    """
    kept = {name: len(some) for name, some in requests.items()}
    positives = {name: len(some.positive) for name, some in requests.items()}
    return {
        "events": found.events,
        "user_items": found.user_items,
        "repeated_share": 1 - found.user_items / found.events,
        "requests": {"train": found.train, **kept},
        "requests_found": {
            "train": found.train,
            "valid": int((split == VALID).sum()),
            "test": int((split == TEST).sum()),
        },
        "requests_straddling": int((split > TEST).sum()),
        "positives": {"train": found.train_positives, **positives},
    }


def _running(sizes: NDArray[np.int64]) -> NDArray[np.int64]:
    """Give offsets from sizes: 0, then the running sum."""
    offsets = np.zeros(len(sizes) + 1, np.int64)
    np.cumsum(sizes, out=offsets[1:])
    return offsets


def _concatenated(buckets: Buckets, name: str) -> NDArray[Any]:
    return np.concatenate([_array(folder, name) for folder, _ in buckets])


def _array(folder: Path, name: str) -> NDArray[Any]:
    with safe_open(folder / BUCKET_FILE, "np") as file:
        array: NDArray[Any] = file.get_tensor(name)
        return array
