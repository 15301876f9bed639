"""What a prepared set keeps so that a day can be appended at the cost of a day.

    hashes.npy              uint64 [U], the hash of each user's id by history row
    pending/                the requests that do not train yet (`pipelines.waiting`)
    pairs/base-{row}.bin    every pair word (`pipelines.transitions`) of the source rows from {row} to the next file's
    pairs/{n}-added.bin     words that the n-th append since the base brought, and some before it, ascending
    pairs/{n}-removed.bin   words that it took away: a session that straddled the old cut may now stand between two
                            requests that followed each other before

The weight of a pair is the sum over base and added minus removed words, in integers, so it does not matter when a word
came. Files never change once written: an append links them and adds its own, in which it may put together the newest
ones. After `RUNS` appends they are merged into a new base. Nothing here belongs to the digest of the set: it is another
form of what the set says.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipelines.buckets import distinct
from pipelines.transitions import ROW_BITS, SIZE_BITS, SOURCE, Edges, Words, base_name, heaviest_edges, steps, weight_of
from ranking.items import Transitions
from recsys.files import link_file
from recsys.history import side_by_side

RUNS = 16
"""Appends before what they added is merged into a new base; each append reads what all since the base added."""
SEARCHED_AT_ONCE = 8192
"""Words: they stay in the fastest cache while many keys are looked for."""


@dataclass(frozen=True)
class PairRuns:
    """The pair words of a set; `lows` are the first source rows of the base's files."""

    folder: Path
    lows: tuple[int, ...]
    added: tuple[Path, ...]
    removed: tuple[Path, ...]

    @staticmethod
    def open(folder: Path) -> "PairRuns":
        """Open the folder `pairs` of a set."""
        lows = [int(path.stem.removeprefix("base-")) for path in sorted(folder.glob("base-*.bin"))]
        return PairRuns(
            folder, tuple(lows), tuple(sorted(folder.glob("*-added.bin"))), tuple(sorted(folder.glob("*-removed.bin")))
        )

    def grown(self, folder: Path, added: Words, removed: Words, rows: int) -> "PairRuns":
        """Return these runs and one more in the empty directory `folder`, as one base if there have been many.

        The newest of 1, 2, 4, ... appends are one run, as the digits of a binary number: of 15 there are four at most.
        """
        number = (_number(self.added[-1]) if self.added else 0) + 1
        joined = [path for path in (*self.added, *self.removed) if _number(path) > number - (number & -number)]
        for path in sorted(self.folder.iterdir()):
            if path not in joined:
                link_file(path, folder / path.name)
        for kind, words in (("added", added), ("removed", removed)):
            older = [np.fromfile(path, np.uint64) for path in joined if path.stem.endswith(kind)]
            if older:
                words = np.concatenate([words, *older])
                words.sort()
            words.tofile(folder / f"{number:04}-{kind}.bin")
        runs = PairRuns.open(folder)
        return runs._merged(rows) if number >= RUNS else runs

    def _merged(self, rows: int) -> "PairRuns":
        for low, high in self.ranges(rows):
            words = np.concatenate([self.base(low), *_slices(self.added, low, high)])
            words.sort()
            gone = np.concatenate([np.empty(0, np.uint64), *_slices(self.removed, low, high)])
            gone.sort()
            # The k-th of equal removed words takes the k-th of the equal words away.
            place = np.searchsorted(words, gone) + np.arange(len(gone)) - np.searchsorted(gone, gone)
            file = self.folder / base_name(low)
            file.unlink()  # the old one may be linked to by the set before
            np.delete(words, place).tofile(file)
        for file in (*self.added, *self.removed):
            file.unlink()
        return PairRuns.open(self.folder)

    def ranges(self, rows: int) -> list[tuple[int, int]]:
        """Return the ranges of source rows the base is divided into, up to `rows`."""
        return list(pairwise((*self.lows, rows)))

    def base(self, low: int) -> Words:
        """Map the base's words of the range that begins at row `low`."""
        file = self.folder / base_name(low)
        return np.memmap(file, np.uint64, "r") if file.stat().st_size else np.empty(0, np.uint64)


def _number(path: Path) -> int:
    """Return the number of the newest append whose words a run's file holds."""
    return int(path.stem.partition("-")[0])


def updated_edges(
    runs: PairRuns, old: Transitions, added: Words, removed: Words, rows: int, top_n: int
) -> Iterator[Edges]:
    """Yield the edges after an append, range by range, two at a time.

    Args:
        runs: all words, those of the append with them.
        old: the matrix before the append, the `top_n` heaviest edges of each row.
        added: words the append brought.
        removed: words it took away.
        rows: V after the append.
        top_n: heaviest edges kept per row; 0 keeps all.

    Where nothing was taken away weights only grew, so a row's heaviest edges are among its heaviest before and those
    that grew: only these are summed again. A row that lost a word is summed as a whole; a row without a word in the
    append is copied.
    """
    offsets, target, weight = (np.asarray(part) for part in (old.offsets, old.target, old.weight))
    offsets = np.concatenate([offsets, np.full(rows + 1 - len(offsets), offsets[-1])])

    def edges(limits: tuple[int, int]) -> Edges:
        low, high = limits
        lost = np.unique(_slice(removed, low, high) >> SOURCE).astype(np.int64)
        changed, total = _sums(runs, added, removed, lost, limits)
        row = (changed >> np.uint64(ROW_BITS)).astype(np.int64) - low
        first = np.diff(row, prepend=-1) > 0
        touched, inverse = row[first], np.cumsum(first) - 1
        before = slice(int(offsets[low]), int(offsets[high]))
        block = Edges(np.diff(offsets[low : high + 1]), target[before], weight[before])
        mine = np.zeros(high - low, np.bool_)
        mine[touched] = True
        inside = np.repeat(mine, block.degree)
        degree, now = block.degree[touched], block.weight[inside]
        pair = np.repeat((touched + low).astype(np.uint64) << np.uint64(ROW_BITS), degree)
        pair |= block.target[inside].view(np.uint32)
        enough = _enough(degree, now, top_n)
        enough[np.searchsorted(touched, lost - low)] = 0
        pair, now, more = _updated(pair, now, changed, total, enough[inverse])
        count = len(touched)
        degree += np.bincount(inverse[more > 0], minlength=count) - np.bincount(inverse[more < 0], minlength=count)
        return _replaced(block, mine, ~inside, heaviest_edges(pair, now, degree, top_n))

    with ThreadPoolExecutor(2) as pool:
        yield from pool.map(edges, runs.ranges(rows))


def _replaced(block: Edges, mine: NDArray[np.bool_], stays: NDArray[np.bool_], by: Edges) -> Edges:
    """Return a block of edges with those of the marked rows replaced; `stays` marks the edges of all other rows."""
    degree = block.degree.copy()
    degree[mine] = by.degree
    goes_on = np.repeat(~mine, degree)
    target, weight = np.empty(len(goes_on), np.int32), np.empty(len(goes_on), np.float32)
    target[goes_on], weight[goes_on] = block.target[stays], block.weight[stays]
    goes_on = ~goes_on
    target[goes_on], weight[goes_on] = by.target, by.weight
    return Edges(degree, target, weight)


def _sums(
    runs: PairRuns, added: Words, removed: Words, lost: NDArray[np.int64], limits: tuple[int, int]
) -> tuple[Words, NDArray[np.int64]]:
    """Return the pairs of a range to sum again, ascending, and their sums.

    They are those with words added or removed, and all pairs of the rows that lost a word.
    """
    low, high = limits
    plus, minus = [runs.base(low), *_slices(runs.added, low, high)], _slices(runs.removed, low, high)
    whole = [_slice(words, row, row + 1) for row in lost.tolist() for words in plus]
    words = np.concatenate([_slice(added, low, high), _slice(removed, low, high), *whole])
    changed = distinct(words >> np.uint64(SIZE_BITS))
    total = sum((_totals(words, changed) for words in plus), np.zeros(len(changed), np.int64))
    return changed, total - sum((_totals(words, changed) for words in minus), np.zeros(len(changed), np.int64))


def _enough(degree: NDArray[np.int64], weight: NDArray[np.float32], top_n: int) -> NDArray[np.float32]:
    """Return the weight below which a new edge can be ignored: that of the lightest edge of a full row, else 0."""
    enough = np.zeros(len(degree), np.float32)
    full = np.flatnonzero(degree == top_n) if top_n else np.empty(0, np.int64)
    if len(full):
        some = np.flatnonzero(degree)
        lightest = np.zeros(len(degree), np.float32)
        lightest[some] = np.minimum.reduceat(weight, (np.cumsum(degree) - degree)[some])
        enough[full] = lightest[full]
    return enough


def _totals(words: Words, pair: Words) -> NDArray[np.int64]:
    """Return the summed steps of each pair's words; both ascending."""
    total = np.zeros(len(pair), np.int64)
    if not len(words):
        return total
    # Both ends of a pair's words in one search: the second lies in the cache lines that the first has just read.
    ends = (np.stack([pair, pair + np.uint64(1)], axis=1) << np.uint64(SIZE_BITS)).ravel()
    low, high = _places(words, ends).reshape(-1, 2).T
    found = np.flatnonzero(high > low)
    if not len(found):
        return total
    index, offsets = side_by_side(low[found], (high - low)[found])
    total[found] = np.add.reduceat(steps(np.asarray(words[index])), offsets[:-1])
    return total


def _places(words: Words, keys: Words) -> NDArray[np.int64]:
    """Return `np.searchsorted(words, keys)` of ascending keys, run by run of words: half the time of one search."""
    starts = np.arange(0, len(words), SEARCHED_AT_ONCE)
    ends = np.append(np.searchsorted(keys, words[starts[1:]]), len(keys)).tolist()
    place = np.empty(len(keys), np.int64)
    begin = 0
    for start, end in zip(starts.tolist(), ends, strict=True):
        if begin < end:
            found = np.searchsorted(words[start : start + SEARCHED_AT_ONCE], keys[begin:end])
            np.add(found, start, out=place[begin:end])
        begin = end
    return place


def _updated(
    pair: Words,
    weight: NDArray[np.float32],
    changed: Words,
    total: NDArray[np.int64],
    enough: NDArray[np.float32],
) -> tuple[Words, NDArray[np.float32], NDArray[np.int8]]:
    """Return the edges (ascending pairs, weights) with the sums of the changed pairs, less new ones below `enough`.

    Beside them int8 [changed]: 1 for a pair that is new among the edges, -1 for one that is no longer an edge.
    """
    place, now = np.searchsorted(pair, changed), weight_of(total)
    known = np.zeros(len(changed), np.bool_)
    if len(pair):
        known = pair[np.minimum(place, len(pair) - 1)] == changed
        weight = weight.copy()
        weight[place[known]] = now[known]
    new = ~known & (total > 0) & (now >= enough)
    gone = known & (total == 0)
    pair, weight = np.insert(pair, place[new], changed[new]), np.insert(weight, place[new], now[new])
    if gone.any():
        lives = weight > 0
        pair, weight = pair[lives], weight[lives]
    return pair, weight, new.astype(np.int8) - gone.astype(np.int8)


def _slices(files: tuple[Path, ...], low: int, high: int) -> list[Words]:
    """Return each file's words of source rows low..high, memory-mapped."""
    return [_slice(np.memmap(file, np.uint64, "r"), low, high) for file in files if file.stat().st_size]


def _slice(words: Words, low: int, high: int) -> Words:
    begin, end = np.searchsorted(words, np.array([low, high], np.uint64) << SOURCE)
    return words[begin:end]
