"""Counts of "bought in one basket, then in the next": the transition matrix of the training period.

Every two consecutive training requests a, b of a user add 1 / (|a| |b|) to every pair (item of a, item of b), so a
transition weighs 1 whatever the size of its baskets; on single items this is the plain transition count.

Each pair is one 64-bit word, source row | target row | |a| |b|, so that a sort of bare words groups equal pairs, and
weights are summed as integers (steps of 2^-32, at most 8e-6 off relatively): any order of merging gives the same bits.
Buckets write their words sorted; blocks of source rows are merged one at a time.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

ROW_BITS, SIZE_BITS = 24, 16
MAX_ROWS = 1 << ROW_BITS
MAX_BASKET = 181
"""Largest basket taken whole (181^2 pairs still fit the word); a larger one counts with 181 evenly spaced of its items.
The largest of the 155,848 grocery baskets holds 161."""
CHUNK = 1 << 19
"""Pairs built at once: small enough that the temporaries stay in cache."""
PAIRS_PER_BLOCK = 2_000_000
"""Words merged at once. Arrays of 16 MB are reused by the allocator; larger ones are mapped anew each time, and
touching fresh pages costs more than the work: 14 million words took 2.8 s as one block, a quarter of that as eight."""
PAIRS = "pairs.bin"
SOURCE = np.uint64(ROW_BITS + SIZE_BITS)
"""shift of the source row in a word"""

Words = NDArray[np.uint64]


@dataclass(frozen=True)
class Edges:
    """The edges out of a block of source rows, by source, targets ascending; `degree` has one entry per source."""

    degree: NDArray[np.int64]
    target: NDArray[np.int32]
    weight: NDArray[np.float32]


def pair_words(user: NDArray[np.int64], offsets: NDArray[np.int64], rows: NDArray[np.int32]) -> Words:
    """Give one word per pair of each two consecutive requests of a user, ascending.

    Args:
        user: int64 [R], user of each training request; the requests of one user stand together, oldest first.
        offsets: int64 [R + 1], request r's distinct item rows are rows[offsets[r]] .. rows[offsets[r + 1]].
        rows: int32, item rows below `MAX_ROWS`.

    Cost: 16 million pairs (1.47 million grocery events) take 0.4 s on one core and 8 bytes each.
    """
    offsets, rows = _thin(offsets, rows)
    first = np.flatnonzero(user[1:] == user[:-1])
    size = np.diff(offsets)
    pairs = size[first] * size[first + 1]
    total = np.cumsum(pairs)
    words = np.empty(int(total[-1]) if len(total) else 0, np.uint64)
    begin = done = 0
    while begin < len(first):
        end = max(int(np.searchsorted(total, done + CHUNK, side="right")), begin + 1)
        chunk = first[begin:end]
        stop = int(total[end - 1])
        _fill(words[done:stop], chunk, offsets, rows)
        begin, done = end, stop
    words.sort()
    return words


def _fill(out: Words, first: NDArray[np.int64], offsets: NDArray[np.int64], rows: NDArray[np.int32]) -> None:
    """Write the words of the transitions first -> first + 1 into `out`."""
    a_size, b_size = offsets[first + 1] - offsets[first], offsets[first + 2] - offsets[first + 1]
    # One entry per item of every first basket, then each repeated once per item of the basket after it.
    head = np.arange(a_size.sum()) + np.repeat(offsets[first] - (np.cumsum(a_size) - a_size), a_size)
    source = rows[head].astype(np.uint64) << SOURCE
    source |= np.repeat((a_size * b_size).astype(np.uint64), a_size)
    fan = np.repeat(b_size, a_size)
    tail = np.repeat(np.repeat(offsets[first + 1], a_size) - (np.cumsum(fan) - fan), fan)
    tail += np.arange(len(tail))
    np.left_shift(rows[tail].astype(np.uint64), np.uint64(SIZE_BITS), out=out)
    out |= np.repeat(source, fan)


def _thin(offsets: NDArray[np.int64], rows: NDArray[np.int32]) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    size = np.diff(offsets)
    if not len(size) or size.max() <= MAX_BASKET:
        return offsets, rows
    kept = np.minimum(size, MAX_BASKET)
    thin = np.concatenate([[0], np.cumsum(kept)])
    place = np.arange(thin[-1]) - np.repeat(thin[:-1], kept)
    index = np.repeat(offsets[:-1], kept) + place * np.repeat(size, kept) // np.repeat(kept, kept)
    return thin, rows[index]


@dataclass(frozen=True)
class Block:
    """A range of source rows and where its words lie: file f holds words[start[f]] .. words[end[f]]."""

    low: int
    high: int
    start: tuple[int, ...]
    end: tuple[int, ...]


def blocks(files: Sequence[Path], rows: int) -> list[Block]:
    """Divide the source rows 0..rows into blocks of about `PAIRS_PER_BLOCK` words each, judged by the largest file."""
    loaded = [np.memmap(file, np.uint64, "r") if file.stat().st_size else np.empty(0, np.uint64) for file in files]
    parts = max(1, -(-sum(len(words) for words in loaded) // PAIRS_PER_BLOCK))
    largest = max(loaded, key=len)
    inner = (largest[np.linspace(0, len(largest), parts + 1)[1:-1].astype(np.int64)] >> SOURCE).astype(np.int64)
    edges = np.unique(np.concatenate([[0, rows], inner]))
    places = [np.searchsorted(words, edges.astype(np.uint64) << SOURCE).tolist() for words in loaded]
    return [
        Block(int(low), int(high), tuple(place[i] for place in places), tuple(place[i + 1] for place in places))
        for i, (low, high) in enumerate(pairwise(edges))
    ]


def block_edges(files: Sequence[Path], block: Block, top_n: int) -> Edges:
    """Merge a block's words from all files into edges, the `top_n` heaviest per source row.

    Equal weights (in float32) go to the smaller target row. `top_n` 0 keeps all edges.
    """
    low, high = block.low, block.high
    words = np.concatenate(
        [
            np.fromfile(file, np.uint64, count=end - start, offset=8 * start)
            for file, start, end in zip(files, block.start, block.end, strict=True)
        ]
    )
    words.sort()
    pair = words >> np.uint64(SIZE_BITS)
    starts = np.flatnonzero(np.concatenate([[True], pair[1:] != pair[:-1]])) if len(pair) else np.empty(0, np.int64)
    step = (1 << 32) // np.maximum((words & np.uint64((1 << SIZE_BITS) - 1)).astype(np.int64), 1)
    total = np.add.reduceat(step, starts) if len(starts) else np.empty(0, np.int64)
    pair = pair[starts]
    source = (pair >> np.uint64(ROW_BITS)).astype(np.int64) - low
    target = (pair & np.uint64(MAX_ROWS - 1)).astype(np.int32)
    weight = (total * 2.0**-32).astype(np.float32)
    degree = np.bincount(source, minlength=high - low)
    if top_n and len(degree) and degree.max() > top_n:
        keep = _heaviest(source, degree, weight, top_n)
        source, target, weight = source[keep], target[keep], weight[keep]
        degree = np.bincount(source, minlength=high - low)
    return Edges(degree.astype(np.int64), target, weight)


def _heaviest(
    source: NDArray[np.int64], degree: NDArray[np.int64], weight: NDArray[np.float32], top_n: int
) -> NDArray[np.bool_]:
    """Mark the `top_n` heaviest edges of each source: sort source | inverted weight as bare words, take the nth."""
    # Positive floats order as their bits do, so the inverted bits put the heaviest first.
    light = np.uint64(0xFFFFFFFF) - weight.view(np.uint32).astype(np.uint64)
    key = source.astype(np.uint64) << np.uint64(32) | light
    begin = np.cumsum(degree) - degree
    nth = np.minimum(begin + top_n, begin + degree) - 1
    threshold = np.sort(key)[np.maximum(nth, 0)][source]
    inside, tie = key < threshold, key == threshold
    before = np.cumsum(tie) - tie  # ties to the left, over all sources
    ties_before = before - before[begin[source]]
    free = top_n - np.bincount(source[inside], minlength=len(degree))[source]
    marked: NDArray[np.bool_] = inside | (tie & (ties_before < free))
    return marked
