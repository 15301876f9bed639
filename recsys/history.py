"""Packed behaviour histories and the point-in-time rule.

All users' events lie in three flat arrays, user after user, oldest first; `offsets` says where each user starts. On
disk they are plain `.npy` files, memory-mapped when read: 13 bytes an event, never a padded copy.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from recsys.errors import DataError

DAY = 86_400_000_000
"""Microseconds of a day: all times are whole microseconds UTC."""

EARLIEST, LATEST = 315_532_800_000_000, 7_258_118_400_000_000
"""1980 and 2200. Within them no time in one unit can pass for one in another: that is how wrong units are found."""

POSITIONS = 1_000_000_000_000
"""Below it a moment is a position in a log of order only: as microseconds it would lie in the first days of 1970."""

OLD_DAYS = 30
"""Age of the newest event from which on a question asked now is told to be one about the past."""

UNKNOWN_KEY = 2**32 - 1
"""Item key of an event whose item the catalogue does not know; every bundle maps it to the unknown row."""


def moment(microseconds: int) -> str:
    """Return a moment as a person reads it; a plain position, as in a log without times, stays a number."""
    if abs(microseconds) < POSITIONS:
        return str(microseconds)
    return f"{datetime.fromtimestamp(microseconds // 1_000_000, UTC):%Y-%m-%d %H:%M:%S}"


@dataclass(frozen=True)
class Events:
    """A run of events, oldest first: item keys uint32 [N], actions uint8 [N], times int64 [N] (microseconds UTC)."""

    item: NDArray[np.uint32]
    action: NDArray[np.uint8]
    time: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.item)

    def slice(self, start: int, end: int) -> "Events":
        """Return events start..end as views, nothing copied."""
        return Events(self.item[start:end], self.action[start:end], self.time[start:end])

    def before(self, at: int) -> "Events":
        """Return the events strictly before the moment `at`: the point-in-time rule."""
        return self.slice(0, int(np.searchsorted(self.time, at, side="left")))

    @staticmethod
    def empty() -> "Events":
        """Return a history without events."""
        return Events(np.empty(0, np.uint32), np.empty(0, np.uint8), np.empty(0, np.int64))

    @staticmethod
    def packed(parts: Sequence["Events"]) -> "Events":
        """Put runs of events one after the other, as the events of several users lie."""
        return Events(
            np.concatenate([part.item for part in parts]),
            np.concatenate([part.action for part in parts]),
            np.concatenate([part.time for part in parts]),
        )

    @staticmethod
    def concatenate(*parts: "Events") -> "Events":
        """Join runs of events and put them in order of time (stable: earlier parts first at equal times)."""
        joined = Events.packed(parts)
        item, action, time = joined.item, joined.action, joined.time
        if np.all(time[:-1] <= time[1:]):
            return Events(item, action, time)
        order = np.argsort(time, kind="stable")
        return Events(item[order], action[order], time[order])


@dataclass(frozen=True)
class Histories:
    """All users' histories: user row u owns events offsets[u] .. offsets[u + 1]; offsets are int64 [U + 1]."""

    events: Events
    offsets: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def of(self, user: int) -> Events:
        """Return one user's whole history as views."""
        return self.events.slice(int(self.offsets[user]), int(self.offsets[user + 1]))

    def save(self, directory: Path) -> None:
        """Write item.npy, action.npy, time.npy and offsets.npy into an existing directory."""
        np.save(directory / "item.npy", self.events.item)
        np.save(directory / "action.npy", self.events.action)
        np.save(directory / "time.npy", self.events.time)
        np.save(directory / "offsets.npy", self.offsets)

    @staticmethod
    def load(directory: Path) -> "Histories":
        """Memory-map the four files of a directory; raises `DataError` if they are missing or do not fit together."""
        try:
            item, action, time, offsets = (
                np.load(directory / f"{name}.npy", mmap_mode="r", allow_pickle=False)
                for name in ("item", "action", "time", "offsets")
            )
        except (FileNotFoundError, ValueError) as error:
            raise DataError(f"{directory}: not a packed history ({error})") from None
        if not len(item) == len(action) == len(time) == int(offsets[-1]):
            raise DataError(
                f"{directory}: {len(item)} items, {len(action)} actions, {len(time)} times, "
                f"but offsets end at {int(offsets[-1])}; prepare the set again"
            )
        return Histories(Events(item, action, time), offsets)


def side_by_side(starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return where the values of B slices of a long array lie, slice after slice, and the offsets of the slices there.

    Args:
        starts: int64 [B], where each slice begins.
        lengths: int64 [B].

    Returns:
        Places int64 [N], N the sum of the lengths, and offsets int64 [B + 1] among them.
    """
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return np.arange(offsets[-1]) + np.repeat(starts - offsets[:-1], lengths), offsets
