"""Exact states of long histories, kept from one request to the next.

A ranker that can `append` an event to a state need not encode the whole history again for one more event. An entry
holds the state of a user and the very events it was made of. A request compares them with the history it has just
read: alike, the state is taken as it is; a few events more at the end, or fewer at the front, it is brought up to date
event by event, which equals a rebuild bit for bit; anything else (a late event, another order, a user forgotten) and it
is built anew. So the events are the version of a history: whatever store they come from, no answer can be stale, and
the cache may be lost at any time. A bundle with the same ranker over the same items finds the states of the one before.
"""

import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from threading import Lock
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ranking.bundle import Bundle
from ranking.manifest import Role
from ranking.recommender_config import StatesConfig
from ranking.users import User
from recsys.files import sha256_json

MOST_STEPS = 32
"""Events a state is brought up to date by; from there on one encode costs no more."""


@runtime_checkable
class Appends(Protocol):
    """A ranker whose state can take one more event."""

    def append(self, state: Any, item: Tensor, time: Tensor, action: Tensor) -> Any:
        """Return the state after one more event per request: item rows int32 [B], times int64 [B], codes uint8 [B]."""
        ...


@runtime_checkable
class Evicts(Protocol):
    """A ranker whose state can lose an event."""

    def evict(self, state: Any, item: Tensor) -> Any:
        """Return the state without the oldest event of one item per request, int32 [B]."""
        ...


OVERHEAD, PER_TENSOR = 1_000, 100
"""Bytes of an entry and of each of its tensors beside their numbers; measured 1,230 with one tensor, 940 with four."""


class Seen(NamedTuple):
    """The events a model reads, oldest first."""

    rows: NDArray[np.int32]  # [n]
    times: NDArray[np.int64]  # [n]
    actions: NDArray[np.uint8]  # [n]

    def part(self, start: int | None, end: int | None) -> "Seen":
        """Return some of them."""
        return Seen(self.rows[start:end], self.times[start:end], self.actions[start:end])

    def same(self, other: "Seen") -> bool:
        """Whether others are the very same."""
        pairs = (self.times, other.times), (self.rows, other.rows), (self.actions, other.actions)
        return all(np.array_equal(ours, theirs) for ours, theirs in pairs)

    def copied(self) -> "Seen":
        """Return them in memory of their own."""
        return Seen(self.rows.copy(), self.times.copy(), self.actions.copy())


@dataclass(frozen=True)
class Entry:
    """A state and the events it was made of."""

    events: Seen
    state: Any

    @property
    def bytes(self) -> int:
        """Memory of the entry, about: what the objects around a few numbers take is most of a small one."""
        parts = list(_tensors(self.state))
        events = sum(values.nbytes for values in (self.events.times, self.events.rows, self.events.actions))
        return OVERHEAD + PER_TENSOR * len(parts) + events + sum(part.nbytes for part in parts)


@dataclass
class Counts:
    """What a cache has done with states, and what it holds now, vectors too."""

    hits: int = 0
    updates: int = 0
    misses: int = 0
    evictions: int = 0
    entries: int = 0
    bytes: int = 0


class StateCache:
    """Entries by user and model, within a number of bytes; the least recently used and the unused go first.

    Args:
        config: bounds.
        clock: gives seconds.
    """

    def __init__(self, config: StatesConfig, clock: Callable[[], float] = time.monotonic) -> None:
        self.config = config
        self.counts = Counts()
        self._clock = clock
        self._lock = Lock()
        self._entries: OrderedDict[tuple[str, str], tuple[Entry, float]] = OrderedDict()

    def get(self, user_id: str, model: str) -> Entry | None:
        """Return an entry, None if there is none that was used within the time to live."""
        with self._lock:
            now = self._clock()
            self._expire(now)
            found = self._entries.get((user_id, model))
            if found is None:
                return None
            self._entries[user_id, model] = found[0], now
            self._entries.move_to_end((user_id, model))
            return found[0]

    def put(self, user_id: str, model: str, entry: Entry) -> None:
        """Keep an entry in place of the one before."""
        with self._lock:
            now = self._clock()
            self._drop((user_id, model))
            self._expire(now)
            if entry.bytes <= self.config.bytes:
                self._entries[user_id, model] = entry, now
                self.counts.bytes += entry.bytes
                self.counts.entries += 1
            while self.counts.bytes > self.config.bytes:
                self._drop(next(iter(self._entries)))
                self.counts.evictions += 1

    def forget(self, user_id: str) -> None:
        """Drop all that is kept of a user."""
        with self._lock:
            for key in [key for key in self._entries if key[0] == user_id]:
                self._drop(key)

    def _expire(self, now: float) -> None:
        """Drop what was not used for too long: it stands in front."""
        while self._entries:
            key, (_, used) = next(iter(self._entries.items()))
            if now - used <= self.config.seconds:
                return
            self._drop(key)
            self.counts.evictions += 1

    def _drop(self, key: tuple[str, str]) -> None:
        if (found := self._entries.pop(key, None)) is not None:
            self.counts.bytes -= found[0].bytes
            self.counts.entries -= 1


class Vectors:
    """Gives the user vectors of one bundle's retriever: kept as they are, for as long as the history is the very same.

    They are small, so those of short histories are kept, too.

    Args:
        bundle: the retriever.
        cache: where vectors are kept.
    """

    def __init__(self, bundle: Bundle, cache: StateCache) -> None:
        self._window = bundle.retriever_window
        self._cache = cache
        self._model = model_digest(bundle, "retriever")

    def of(self, user: User, encode: Callable[[], Tensor]) -> Tensor:
        """Return the vector of a user, float32 [1, D], equal bit for bit to what `encode` gives."""
        events = _newest(user, self._window)
        if user.user_id is None:
            return encode()
        entry = self._cache.get(user.user_id, self._model)
        if entry is not None and entry.events.same(events):
            vector: Tensor = entry.state
            return vector
        vector = encode()
        self._cache.put(user.user_id, self._model, Entry(events.copied(), _owned(vector)))
        return vector


class States:
    """Gives the states of one bundle's ranker.

    Args:
        bundle: the ranker.
        cache: where states are kept; a ranker that cannot `append` keeps none.
    """

    def __init__(self, bundle: Bundle, cache: StateCache) -> None:
        self._ranker = bundle.ranker
        self._device = bundle.device
        self._cache = cache
        self._model = model_digest(bundle, "ranker")

    def of(self, user: User, encode: Callable[[], object]) -> object:
        """Return the state of a user, equal bit for bit to what `encode` gives.

        Args:
            user: the history as it was just read.
            encode: builds the state from the history.

        Cost: of a kept state one comparison of its events; of each event more or less one append or evict.
        """
        window = self._ranker.window
        events, least = _newest(user, window), self._cache.config.least_events
        if user.user_id is None or not isinstance(self._ranker, Appends) or len(events.rows) < least:
            return encode()
        counts = self._cache.counts
        entry = self._cache.get(user.user_id, self._model)
        steps = None if entry is None else _steps(entry.events, events, window, isinstance(self._ranker, Evicts))
        if entry is None or steps is None:
            counts.misses += 1
            state = encode()
        elif steps == (0, 0):
            counts.hits += 1
            return entry.state
        else:
            counts.updates += 1
            state = self._updated(entry, events, *steps)
        # Copies: views would keep the mapped snapshot, or the arrays of a wider state, alive uncounted.
        self._cache.put(user.user_id, self._model, Entry(events.copied(), _owned(state)))
        return state

    def _updated(self, entry: Entry, events: Seen, gone: int, new: int) -> object:
        """Bring a state up to date by so many events from the front and at the end."""
        state = entry.state
        if gone and isinstance(self._ranker, Evicts):
            for item in torch.split(self._tensor(entry.events.rows[:gone]), 1):
                state = self._ranker.evict(state, item)
        if new and isinstance(self._ranker, Appends):
            added = (torch.split(self._tensor(values), 1) for values in events.part(-new, None))
            for item, moment, action in zip(*added, strict=True):
                state = self._ranker.append(state, item, moment, action)
        return state

    def _tensor(self, values: NDArray[Any]) -> Tensor:
        return torch.from_numpy(values.copy()).to(self._device)


def _newest(user: User, window: int | None) -> Seen:
    """Return a user's newest events, all of them without a window."""
    start = None if window is None else -window
    return Seen(user.rows, user.events.time, user.events.action).part(start, None)


def model_digest(bundle: Bundle, role: Role) -> str:
    """Return what a state depends on besides the history: a model with its settings and weights, and the items."""
    manifest = bundle.manifest
    entry = manifest.models[role]
    files = [manifest.files[name].sha256 for name in (entry.weights, "items.safetensors")]
    return sha256_json([entry.name, entry.config, *files])


def _steps(old: Seen, events: Seen, window: int | None, evicts: bool) -> tuple[int, int] | None:
    """Return how many events to evict, and then to append, to come from old events to these; None for no way.

    An append to a full window drops the oldest event by itself.
    """
    before, after = len(old.rows), len(events.rows)
    for new in range(min(MOST_STEPS, after) + 1):
        kept = after - new
        if kept > before or kept == 0:
            continue
        gone = before - kept - (0 if window is None else max(0, before + new - window))
        if gone < 0 or gone > (MOST_STEPS if evicts else 0):
            continue
        if old.part(before - kept, None).same(events.part(None, kept)):
            return gone, new
    return None


def _tensors(state: Any) -> Iterator[Tensor]:
    if isinstance(state, Tensor):
        yield state
    elif isinstance(state, tuple):
        for part in state:
            yield from _tensors(part)


def _owned(state: Any) -> Any:
    """Return a state whose tensors hold no more memory than their own numbers."""
    if isinstance(state, Tensor):
        return state.clone() if state.untyped_storage().nbytes() > state.nbytes else state
    if isinstance(state, tuple):
        parts = [_owned(part) for part in state]
        return type(state)(*parts) if hasattr(state, "_fields") else tuple(parts)
    return state
