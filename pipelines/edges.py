"""The transition matrix while a set is written: edges lie in files, of which only the degrees are in memory.

200,000 items have 34 million edges out of 20 million events: in memory they would be the largest thing there is.
Without torch, so that the processes of a pool need not load it.
"""

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipelines.streams import put
from pipelines.transitions import Block, Edges, block_edges, blocks, free_from

FREED_EVERY = 16
"""Blocks merged before their words are cut off the buckets' files."""


@dataclass(frozen=True)
class EdgeFiles:
    """A sparse matrix [V, V] by rows: the edges of each row, int64 [V], and pieces of the edges in order of rows.

    A piece is two files of bare numbers, {piece}.target (int32) and {piece}.weight (float32).
    """

    degree: NDArray[np.int64]
    pieces: tuple[Path, ...]

    def __len__(self) -> int:
        return int(self.degree.sum())


def write_edges(some: Iterable[Edges], piece: Path) -> EdgeFiles:
    """Write runs of edges, in order of rows, as one piece."""
    degrees = [np.empty(0, np.int64)]
    with piece.with_suffix(".target").open("wb") as target, piece.with_suffix(".weight").open("wb") as weight:
        for edges in some:
            degrees.append(edges.degree)
            put(target, edges.target)
            put(weight, edges.weight)
    return EdgeFiles(np.concatenate(degrees), (piece,))


def merge_pairs(
    pool: Executor | None,
    files: Sequence[Path],
    rows: int,
    top_n: int,
    keep: Path | None,
    out: Path,
    tick: Callable[[int, int], None],
) -> EdgeFiles:
    """Merge the buckets' pair words into edges under `out`, a block of source rows at a time, the last rows first.

    Args:
        pool: does the work; None for this thread.
        files: the buckets' words; what is merged is cut off their ends, so that the words lie on the disk but once.
        rows: V.
        top_n: heaviest edges kept per row; 0 keeps all.
        keep: where each block's words are written (`pipelines.growth`), if anywhere.
        out: an existing directory.
        tick: told (done, total) blocks.
    """
    ranges = blocks(files, rows)[::-1]
    work = (pool.map if pool else map)(_write_block, repeat(files), ranges, repeat(top_n), repeat(keep), repeat(out))
    merged: list[EdgeFiles] = []
    for block, piece in zip(ranges, work, strict=True):
        merged.append(piece)
        if len(merged) % FREED_EVERY == 0:
            free_from(files, block)
        tick(len(merged), len(ranges))
    merged.reverse()
    return EdgeFiles(
        np.concatenate([piece.degree for piece in merged]), tuple(path for piece in merged for path in piece.pieces)
    )


def _write_block(files: Sequence[Path], block: Block, top_n: int, keep: Path | None, out: Path) -> EdgeFiles:
    return write_edges([block_edges(files, block, top_n, keep)], out / f"edges-{block.low:08}")
