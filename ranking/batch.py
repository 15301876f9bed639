"""The tensors every model sees, and the one function that builds them.

Shape letters, used everywhere:

    B requests      T history steps   C candidates   D width    H heads
    E experts       G hash groups     V item rows    N packed events over all B histories
    Fi categorical columns            Fd dense columns

Item rows: 0 is padding, 1 is "unknown", known items start at 2. Training, evaluation and serving all call
`assemble`, so what a model was trained on is what it is served.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from recsys.history import Events, side_by_side

PAD = 0
UNKNOWN = 1
FIRST_ITEM = 2


class Padded(NamedTuple):
    """A history as rectangles, left-padded: the newest event is always in the last slot."""

    item: Tensor  # int32 [B, T], 0 = padding
    action: Tensor  # int32 [B, T]
    time: Tensor  # int64 [B, T], 0 at padding
    mask: Tensor  # bool [B, T], True at real events


@dataclass(frozen=True)
class History:
    """B packed histories, newest last; request b owns events offsets[b]..offsets[b + 1]."""

    item: Tensor  # int32 [N] model rows, never 0
    action: Tensor  # int32 [N]
    time: Tensor  # int64 [N], microseconds UTC
    offsets: Tensor  # int64 [B + 1]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> Tensor:
        """Number of events per request, int64 [B]."""
        return self.offsets.diff()

    @property
    def _values(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.item, self.action, self.time

    def to(self, device: torch.device) -> "History":
        """Return the same on another device."""
        return History(*(part.to(device) for part in (*self._values, self.offsets)))

    def padded(self, length: int) -> Padded:
        """Return the newest `length` events of each history, left-padded to the longest of them (at least one slot)."""
        lengths = self.lengths.clamp(max=length)  # [B]
        width = max(int(lengths.max()) if len(lengths) else 0, 1)
        back = torch.arange(width, 0, -1, device=self.item.device)  # [T] distance from the end, newest = 1
        mask = back[None, :] <= lengths[:, None]  # [B, T]
        index = self.offsets[1:, None] - back[None, :]  # [B, T]
        if bool((lengths == width).all()) and len(lengths):
            item, action, time = (v.index_select(0, index.flatten()).view(mask.shape) for v in self._values)
            return Padded(item, action, time, mask)
        index = index[mask]  # [valid]
        item, action, time = (
            torch.zeros(mask.shape, dtype=values.dtype, device=values.device).masked_scatter_(
                mask, values.index_select(0, index)
            )
            for values in self._values
        )
        return Padded(item, action, time, mask)


@dataclass(frozen=True)
class Request:
    """What is known of B requests besides history and candidates."""

    at: Tensor  # int64 [B], the moment of the request, microseconds UTC
    query: Tensor | None = None  # int32 [B], what was asked for: 0 nothing, 1 unknown, else a code of an item column

    def to(self, device: torch.device) -> "Request":
        """Return the same on another device."""
        return Request(self.at.to(device), None if self.query is None else self.query.to(device))


@dataclass(frozen=True)
class Candidates:
    """The items to be scored."""

    item: Tensor  # int32 [B, C], 0 = padding

    @property
    def mask(self) -> Tensor:
        """True at real candidates, bool [B, C]."""
        return self.item != PAD

    def to(self, device: torch.device) -> "Candidates":
        """Return the same on another device."""
        return Candidates(self.item.to(device))


@dataclass(frozen=True)
class Batch:
    """B requests with candidates; label and weight are 0 at padding."""

    history: History
    request: Request
    candidates: Candidates
    label: Tensor  # float32 [B, C]
    weight: Tensor  # float32 [B, C]
    log_q: Tensor | None = None  # float32 [B, C], log of how often a candidate is drawn as a negative; None = alike

    def __len__(self) -> int:
        return len(self.history)

    def to(self, device: torch.device) -> "Batch":
        """Return the same batch on another device."""
        return Batch(
            self.history.to(device),
            self.request.to(device),
            self.candidates.to(device),
            self.label.to(device),
            self.weight.to(device),
            None if self.log_q is None else self.log_q.to(device),
        )


def assemble(
    events: Events,
    starts: NDArray[np.int64],
    ends: NDArray[np.int64],
    at: NDArray[np.int64],
    candidates: NDArray[np.int32],
    key_to_row: NDArray[np.int32],
    label: NDArray[np.float32] | None = None,
    window: int | None = None,
    log_q: NDArray[np.float32] | None = None,
) -> Batch:
    """Build a batch from packed events.

    Args:
        events: packed events of many users (memory-mapped is fine) or of one.
        starts: int64 [B], where each request's history starts in the packed events.
        ends: int64 [B], where it ends; all of it lies before the request's moment.
        at: int64 [B], moments of the requests.
        candidates: int32 [B, C] model rows, 0 = padding.
        key_to_row: int32 [keys], model row of each item key; keys beyond it are unknown.
        label: float32 [B, C]; zeros if absent.
        window: keep only the newest so many events of each history.
        log_q: float32 [B, C], see `Batch`.

    Cost: one gather over the kept events; nothing is padded here.
    """
    if window is not None:
        starts = np.maximum(starts, ends - window)
    index, offsets = side_by_side(starts, ends - starts)
    history = History(
        torch.from_numpy(rows_of(events.item[index], key_to_row)),
        torch.from_numpy(events.action[index].astype(np.int32)),
        torch.from_numpy(np.ascontiguousarray(events.time[index])),
        torch.from_numpy(offsets),
    )
    item = torch.from_numpy(np.ascontiguousarray(candidates, dtype=np.int32))
    if label is None:
        label = np.zeros(candidates.shape, np.float32)
    return Batch(
        history,
        Request(torch.from_numpy(np.ascontiguousarray(at, dtype=np.int64))),
        Candidates(item),
        torch.from_numpy(np.ascontiguousarray(label, dtype=np.float32)),
        (item != PAD).float(),
        None if log_q is None else torch.from_numpy(np.ascontiguousarray(log_q, dtype=np.float32)),
    )


def rows_of(keys: NDArray[np.uint32], key_to_row: NDArray[np.int32]) -> NDArray[np.int32]:
    """Return the model row of each item key; keys the bundle has never seen are row 1."""
    known = keys < len(key_to_row)
    rows = np.full(keys.shape, UNKNOWN, np.int32)
    rows[known] = key_to_row[keys[known]]
    return rows
