"""Counts of "bought in one basket, then in the next": the transition matrix of the training period.

Every two consecutive training requests a, b of a user add 1 / (|a| |b|) to every pair (item of a, item of b), so a
transition weighs 1 whatever the size of its baskets; on single items this is the plain transition count.

Each pair is one 64-bit word, source row | target row | |a| |b|, so that a sort of bare words groups equal pairs, and
weights are summed as integers (steps of 2^-32, at most 8e-6 off relatively): any order of merging gives the same bits.
Buckets write their words sorted; blocks of source rows are merged one at a time.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipelines.streams import put

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
    """Return one word per pair of each two consecutive requests of a user, ascending.

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
    """A range of source rows and where its words lie: file f holds words[start[f]] .. words[end[f]], int64 [files]."""

    low: int
    high: int
    start: NDArray[np.int64]
    end: NDArray[np.int64]

    def __len__(self) -> int:
        return int((self.end - self.start).sum())


def blocks(files: Sequence[Path], rows: int) -> list[Block]:
    """Divide the source rows 0..rows into blocks of about `PAIRS_PER_BLOCK` words each, judged by the largest file."""
    length = [file.stat().st_size // 8 for file in files]
    parts = max(1, -(-sum(length) // PAIRS_PER_BLOCK))
    largest = _mapped(files[int(np.argmax(length))])
    inner = (largest[np.linspace(0, len(largest), parts + 1)[1:-1].astype(np.int64)] >> SOURCE).astype(np.int64)
    edges = np.unique(np.concatenate([[0, rows], inner]))
    # One file mapped at a time: the pages a search touches stay with the process for as long as the map does.
    places = np.stack([np.searchsorted(_mapped(file), edges.astype(np.uint64) << SOURCE) for file in files], axis=1)
    return [
        Block(int(low), int(high), places[place], places[place + 1])
        for place, (low, high) in enumerate(pairwise(edges))
    ]


def free_from(files: Sequence[Path], block: Block) -> None:
    """Cut the files off where a block begins: it and all blocks after it are merged and not needed any more."""
    for file, start in zip(files, block.start.tolist(), strict=True):
        os.truncate(file, 8 * start)


def _mapped(file: Path, end: int | None = None) -> Words:
    """Map a file's words, or those before `end`: what comes after them may be cut off at any time."""
    words = file.stat().st_size // 8 if end is None else end
    return np.memmap(file, np.uint64, "r", shape=(words,)) if words else np.empty(0, np.uint64)


def block_edges(files: Sequence[Path], block: Block, top_n: int, keep: Path | None = None) -> Edges:
    """Merge a block's words from all files into edges, the `top_n` heaviest per source row.

    Equal weights (in float32) go to the smaller target row. `top_n` 0 keeps all edges. With `keep`, the block's words
    are also written, ascending, to the file of that folder named by `base_name`.
    """
    pairs, totals = [], []
    with ExitStack() as stack:
        kept = None if keep is None else stack.enter_context((keep / base_name(block.low)).open("wb"))
        for words in _sorted(files, block):
            if kept is not None:
                put(kept, words)
            pair = words >> np.uint64(SIZE_BITS)
            starts = np.flatnonzero(np.concatenate([[True], pair[1:] != pair[:-1]]))
            pairs.append(pair[starts])
            totals.append(np.add.reduceat(steps(words), starts))
    pair = np.concatenate([np.empty(0, np.uint64), *pairs])
    total = np.concatenate([np.empty(0, np.int64), *totals])
    source = (pair >> np.uint64(ROW_BITS)).astype(np.int64) - block.low
    return heaviest_edges(pair, weight_of(total), np.bincount(source, minlength=block.high - block.low), top_n)


def _sorted(files: Sequence[Path], block: Block) -> Iterator[Words]:
    """Yield a block's words, ascending, in pieces that divide no pair: a block of one common item may be large."""
    places = [block.start, block.end]
    if len(block) > 2 * PAIRS_PER_BLOCK:
        longest = int(np.argmax(block.end - block.start))
        mine = _mapped(files[longest], int(block.end[longest]))[block.start[longest] :]
        wanted = np.linspace(0, len(mine), -(-len(block) // PAIRS_PER_BLOCK) + 1)[1:-1].astype(np.int64)
        limits = np.unique(mine[wanted] >> np.uint64(SIZE_BITS)) << np.uint64(SIZE_BITS)
        inner = [
            start + np.searchsorted(_mapped(file, end)[start:], limits)
            for file, start, end in zip(files, block.start.tolist(), block.end.tolist(), strict=True)
        ]
        places[1:1] = list(np.stack(inner, axis=1))
    for begin, stop in pairwise(places):
        words = np.empty(int((stop - begin).sum()), np.uint64)
        done = 0
        # Into one array: hundreds of small ones beside it would leave holes in the heap that stay with the process.
        for file, start, end in zip(files, begin.tolist(), stop.tolist(), strict=True):
            if end > start:
                with file.open("rb") as source:
                    source.seek(8 * start)
                    source.readinto(words[done : done + end - start].data)
                done += end - start
        words.sort()
        if len(words):
            yield words


def base_name(low: int) -> str:
    """Return the name of the file of the block whose first source row is `low`; names sort as rows do."""
    return f"base-{low:08}.bin"


def steps(words: Words) -> NDArray[np.int64]:
    """Return the weight of each word, 1 / (|a| |b|) in steps of 2^-32."""
    return (1 << 32) // np.maximum((words & np.uint64((1 << SIZE_BITS) - 1)).astype(np.int64), 1)


def weight_of(total: NDArray[np.int64]) -> NDArray[np.float32]:
    """Return weights from sums of `steps`."""
    return (total * 2.0**-32).astype(np.float32)


def heaviest_edges(pair: Words, weight: NDArray[np.float32], degree: NDArray[np.int64], top_n: int) -> Edges:
    """Return the edges of a run of source rows, the `top_n` heaviest of each, from distinct ascending pairs.

    A pair is source row | target row; `degree` are the pairs of each source. See `block_edges`.
    """
    if top_n and len(degree) and degree.max() > top_n:
        kept = _heaviest(degree, weight, top_n)
        pair, weight, degree = pair[kept], weight[kept], np.minimum(degree, top_n)
    return Edges(degree, (pair & np.uint64(MAX_ROWS - 1)).astype(np.int32), weight)


def _heaviest(degree: NDArray[np.int64], weight: NDArray[np.float32], top_n: int) -> NDArray[np.bool_]:
    """Mark the `top_n` heaviest edges of each source; of equal ones at the limit, those that stand first.

    Only sources with more than `top_n` are looked at: row | inverted weight is sorted as bare words, the nth is the
    limit. `degree` are the edges of each source, which stand together.
    """
    marked = np.ones(len(weight), np.bool_)
    over = np.flatnonzero(degree > top_n)
    length = degree[over]
    mine = np.flatnonzero(np.repeat(degree > top_n, degree))
    # Positive floats order as their bits do, so the inverted bits put the heaviest first.
    key = np.uint64(0xFFFFFFFF) - weight[mine].view(np.uint32)
    key |= np.repeat(np.arange(len(over), dtype=np.uint64) << np.uint64(32), length)
    begin = np.cumsum(length) - length
    limit = np.repeat(np.sort(key)[begin + top_n - 1], length)
    inside = key <= limit
    excess = np.add.reduceat(inside, begin, dtype=np.int64) - top_n
    if excess.any():
        # Ties at the limit: a row's last `excess` of them are one too many.
        tie = np.flatnonzero(key == limit)
        row = (key[tie] >> np.uint64(32)).astype(np.int64)
        ties = np.bincount(row, minlength=len(over))
        place = np.arange(len(tie)) - (np.cumsum(ties) - ties)[row]
        inside[tie[place >= (ties - excess)[row]]] = False
    marked[mine] = inside
    return marked
