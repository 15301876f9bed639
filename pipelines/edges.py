"""The transition matrix while a set is written: edges lie in files, of which only the degrees are in memory.

200,000 items have 34 million edges out of 20 million events: in memory they would be the largest thing there is.
Without torch, so that the processes of a pool need not load it.
"""

from collections.abc import Iterable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipelines.transitions import Block, Edges, block_edges, blocks, free_from
from recsys.progress import Progress

FREED_EVERY = 16
"""Blocks merged before their words are cut off the buckets' files."""


@dataclass(frozen=True)
class EdgeRuns:
    """A sparse matrix [V, V] by rows, not in memory: runs of edges in order of rows, to be gone through once.

    `most` is their number, or a little more where it shows only at the end.
    """

    most: int
    runs: Iterable[Edges]


@dataclass(frozen=True)
class _Piece:
    """A run of edges in two files of bare numbers, {path}.target (int32) and {path}.weight (float32)."""

    degree: NDArray[np.int64]
    path: Path

    @staticmethod
    def write(edges: Edges, path: Path) -> "_Piece":
        edges.target.tofile(path.with_suffix(".target"))
        edges.weight.tofile(path.with_suffix(".weight"))
        return _Piece(edges.degree, path)

    def read(self) -> Edges:
        target = np.fromfile(self.path.with_suffix(".target"), np.int32)
        return Edges(self.degree, target, np.fromfile(self.path.with_suffix(".weight"), np.float32))


def merge_pairs(
    pool: Executor | None,
    files: Sequence[Path],
    rows: int,
    top_n: int,
    keep: Path | None,
    out: Path,
    progress: Progress,
) -> EdgeRuns:
    """Merge the buckets' pair words into edges under `out`, a block of source rows at a time, the last rows first.

    Args:
        pool: does the work; None for this thread.
        files: the buckets' words; what is merged is cut off their ends, so that the words lie on the disk but once.
        rows: V.
        top_n: heaviest edges kept per row; 0 keeps all.
        keep: where each block's words are written (`pipelines.growth`), if anywhere.
        out: an existing directory.
        progress: told (done, total) blocks.
    """
    ranges = blocks(files, rows)[::-1]
    work = (pool.map if pool else map)(_write_block, repeat(files), ranges, repeat(top_n), repeat(keep), repeat(out))
    merged: list[_Piece] = []
    for block, piece in zip(ranges, work, strict=True):
        merged.append(piece)
        if len(merged) % FREED_EVERY == 0:
            free_from(files, block)
        progress(len(merged), len(ranges))
    return EdgeRuns(sum(int(piece.degree.sum()) for piece in merged), (piece.read() for piece in reversed(merged)))


def _write_block(files: Sequence[Path], block: Block, top_n: int, keep: Path | None, out: Path) -> _Piece:
    return _Piece.write(block_edges(files, block, top_n, keep), out / f"edges-{block.low:08}")
