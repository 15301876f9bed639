"""Puts what the buckets made together: histories, requests, counts.

What grows with the log is read and written piece by piece; in memory stay one number per user and one per item.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open

from pipelines.buckets import BUCKET_FILE, KINDS, WAITING, BucketSummary, Sessions
from pipelines.prepared import Requests
from pipelines.streams import Layout, npy_file, put, safetensors_file
from recsys.history import Histories

POSITIVES_AT_ONCE = 4_000_000
"""Positives of requests sorted at once: about 120 MB with their temporaries."""
HISTORY_ARRAYS: dict[str, type[np.generic]] = {"item": np.uint32, "action": np.uint8, "time": np.int64}

Buckets = Sequence[tuple[Path, BucketSummary]]
"""folder and summary of every bucket, in the order of history rows"""


@dataclass(frozen=True)
class Tally:
    """What a log holds, whatever was chosen of it later.

    Attributes:
        events: number of events.
        user_items: distinct (user, item) pairs.
        requests: by the name of `pipelines.buckets.KINDS`.
        train_positives: positives of the training requests.
        count: training events of each model row, int64 [V].
    """

    events: int
    user_items: int
    requests: Mapping[str, int]
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
        requests={kind: sum(summary.requests[kind] for summary in summaries) for kind in KINDS},
        train_positives=sum(summary.positives["train"] for summary in summaries),
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


@dataclass(frozen=True)
class Pieces:
    """The requests of one kind from all buckets by (at, user), ends counted in the packed events; read anew each time.

    Attributes:
        kind: of `pipelines.buckets.KINDS`, but those that wait.
        buckets: where they lie.
    """

    kind: str
    buckets: Buckets

    def __len__(self) -> int:
        return sum(summary.requests[self.kind] for _, summary in self.buckets)

    @property
    def positives(self) -> int:
        """Number of their positives."""
        return sum(summary.positives[self.kind] for _, summary in self.buckets)

    def __iter__(self) -> Iterator[Requests]:
        moments = self._moments(max(1, -(-self.positives // POSITIVES_AT_ONCE)))
        places, heads = [], []
        for folder, _ in self.buckets:
            place = np.searchsorted(_array(folder, f"{self.kind}_at"), moments)
            places.append(place)
            heads.append(_running(_array(folder, f"{self.kind}_size"))[place])
        for number in range(len(moments) - 1):
            edges = slice(number, number + 2)
            yield self._piece([place[edges].tolist() for place in places], [head[edges].tolist() for head in heads])

    def _moments(self, pieces: int) -> NDArray[np.int64]:
        """Return ascending moments that divide the requests into about equal pieces, beyond both ends of them."""
        sample = [
            _array(folder, f"{self.kind}_at")[:: max(1, summary.requests[self.kind] // (4 * pieces))]
            for folder, summary in self.buckets
        ]
        at = np.sort(np.concatenate(sample))
        inner = at[np.linspace(0, len(at), pieces + 1)[1:-1].astype(np.int64)] if len(at) else at
        limits = np.iinfo(np.int64)
        return np.unique(np.concatenate([[limits.min], inner, [limits.max]]).astype(np.int64))

    def _piece(self, places: Sequence[list[int]], heads: Sequence[list[int]]) -> Requests:
        """Read a range of requests of each bucket, and their positives, and put them in order."""
        parts: dict[str, list[NDArray[Any]]] = {name: [] for name in ("user", "at", "end", "size", "positive")}
        base = 0
        for (folder, summary), (low, high), (first, stop) in zip(self.buckets, places, heads, strict=True):
            if low < high:
                with safe_open(folder / BUCKET_FILE, "np") as file:
                    for name in ("user", "at", "size"):
                        parts[name].append(file.get_slice(f"{self.kind}_{name}")[low:high])
                    parts["end"].append(file.get_slice(f"{self.kind}_end")[low:high] + base)
                    parts["positive"].append(file.get_slice(f"{self.kind}_positive")[first:stop])
            base += summary.events
        user, at, end, size = (
            np.concatenate([np.empty(0, np.int64), *parts[name]]) for name in ("user", "at", "end", "size")
        )
        positive = np.concatenate([np.empty(0, np.int32), *parts["positive"]])
        # Buckets are in the order of users, so a stable sort by moment is the order by (at, user).
        return Requests(user, at, end, _running(size), positive).take(np.argsort(at, kind="stable"))


def write_requests(path: Path, count: int, positives: int, pieces: Iterable[Requests]) -> None:
    """Write requests that come in pieces, in order, as the one file `Requests.load` reads."""
    layout: Layout = {
        **dict.fromkeys(("user", "at", "end"), (np.int64, (count,))),
        "offsets": (np.int64, (count + 1,)),
        "positive": (np.int32, (positives,)),
    }
    with safetensors_file(path, layout) as files:
        put(files["offsets"], np.zeros(1, np.int64))
        written = 0
        for piece in pieces:
            for name in ("user", "at", "end", "positive"):
                put(files[name], getattr(piece, name))
            put(files["offsets"], piece.offsets[1:] + written)
            written += int(piece.offsets[-1])


def count_waiting(buckets: Buckets) -> tuple[int, int]:
    """Return the number of the requests that do not train, and of their positives."""
    summaries = [summary for _, summary in buckets]
    return sum(one.requests[WAITING] for one in summaries), sum(one.positives[WAITING] for one in summaries)


def waiting(buckets: Buckets) -> Iterator[Sessions]:
    """Yield the requests that do not train, bucket by bucket and so by user, ends counted in the packed events."""
    base = 0
    for folder, summary in buckets:
        found = {
            name: _array(folder, f"{WAITING}_{name}") for name in ("user", "at", "last", "end", "size", "positive")
        }
        yield Sessions(
            user=found["user"],
            at=found["at"],
            last=found["last"],
            end=found["end"] + base,
            offsets=_running(found["size"]),
            positive=found["positive"],
        )
        base += summary.events


def _running(sizes: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return offsets from sizes: 0, then the running sum."""
    offsets = np.zeros(len(sizes) + 1, np.int64)
    np.cumsum(sizes, out=offsets[1:])
    return offsets


def _concatenated(buckets: Buckets, name: str) -> NDArray[Any]:
    return np.concatenate([_array(folder, name) for folder, _ in buckets])


def _array(folder: Path, name: str) -> NDArray[Any]:
    with safe_open(folder / BUCKET_FILE, "np") as file:
        array: NDArray[Any] = file.get_tensor(name)
        return array
