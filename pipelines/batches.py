"""Training batches as a pure function of (seed, step): what a resumed run sees is what it would have seen.

An epoch is a seeded permutation of the training rows. Inside blocks of a few batches the rows are sorted by history
length, so that a batch's padding stays small and cost follows real events; then the batches are shuffled again.
"""

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from pipelines.own_negatives import OwnItems
from pipelines.prepared import PreparedSet, Requests
from pipelines.samplers import SAMPLERS, Ragged, Sampler, log_density
from ranking.batch import Batch, assemble, rows_of
from recsys.errors import ConfigError, DataError
from recsys.randomness import generator

BLOCK = 16  # batches sorted by length together


@dataclass(frozen=True)
class BatchConfig:
    """What a training step sees."""

    rows: int = 256  # requests (or user sequences) per step
    negatives: int = 2  # sampled per positive; rows of `sequences` models have none
    samplers: tuple[str, ...] = ("uniform", "popularity")  # negatives are shared out evenly among them
    own_negatives: int = 0  # more of them per positive, from what the user chose before
    correct: bool = True  # learn how likely an item is, not how much likelier than the samplers draw it
    max_positives: int = 8  # of one request, a seeded choice among more
    max_requests: int | None = None  # use only a seeded sample of the training requests
    sequence_end: Literal["random", "newest"] = "random"  # which of a user's requests ends its training sequence
    order: Literal["by_length", "random"] = "by_length"  # random: all lengths in every batch, as in papers

    def __post_init__(self) -> None:
        if min(self.rows, self.negatives, self.max_positives) < 1:
            raise ConfigError(
                f"[batches] rows, negatives and max_positives must be at least 1, found {self.rows}, "
                f"{self.negatives} and {self.max_positives}"
            )
        if self.max_requests is not None and self.max_requests < 1:
            raise ConfigError(f"[batches] max_requests must be at least 1, found {self.max_requests}")
        if self.own_negatives < 0:
            raise ConfigError(f"[batches] own_negatives must not be negative, found {self.own_negatives}")
        unknown = [name for name in self.samplers if name not in SAMPLERS]
        if unknown or not self.samplers:
            raise ConfigError(f"[batches] samplers must be some of {', '.join(SAMPLERS)}, found {self.samplers}")


@dataclass(frozen=True)
class TrainingBatches:
    """The batches of one training run.

    Args:
        prepared: the prepared set.
        config: see `BatchConfig`.
        trains_on: `requests` draws negatives; `sequences` takes one request per user and no negatives.
        window: newest events of a history to gather.
        seed: of every draw.
    """

    prepared: PreparedSet
    config: BatchConfig
    trains_on: Literal["requests", "sequences"]
    window: int | None
    seed: int

    @cached_property
    def requests(self) -> Requests:
        """The training requests with at least one event before them."""
        requests = self.prepared.requests("train")
        start = self.prepared.histories.offsets[requests.user]
        kept = np.flatnonzero((requests.end > start) & (np.diff(requests.offsets) > 0))
        if not len(kept):
            raise DataError(
                f"{self.prepared.directory}: none of its {len(requests):,} training requests has an event before it, "
                "and a model learns from those alone; take in a longer log or, under split.kind=time, prepare it with "
                "shorter split.valid_days and split.test_days"
            )
        limit = self.config.max_requests
        if limit is not None and limit < len(kept):
            kept = np.sort(generator(self.seed, 0, "training sample").choice(kept, limit, replace=False))
        return requests.take(kept)

    @cached_property
    def _samplers(self) -> list[Sampler]:
        return [SAMPLERS[name](self.prepared.items) for name in self.config.samplers]

    @cached_property
    def _log_q(self) -> NDArray[np.float32]:
        return log_density(self._samplers)

    @cached_property
    def _users(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Requests grouped by user: their order and the offsets of the groups."""
        order = np.lexsort((self.requests.at, self.requests.user))
        _, counts = np.unique(self.requests.user[order], return_counts=True)
        return order, np.concatenate([[0], np.cumsum(counts)])

    def __len__(self) -> int:
        """Steps per epoch."""
        rows = len(self.requests) if self.trains_on == "requests" else len(self._users[1]) - 1
        return max(rows // self.config.rows, 1)

    @property
    def rows_per_epoch(self) -> int:
        """Requests (or user sequences) one epoch goes over; the remainder of the last batch waits for the next."""
        rows = len(self.requests) if self.trains_on == "requests" else len(self._users[1]) - 1
        return min(len(self) * self.config.rows, rows)

    def chosen(self, step: int) -> NDArray[np.int64]:
        """Return which of `requests` make up the batch of one step."""
        return self._epoch(step // len(self))[step % len(self)]

    def batch(self, step: int, rank: int = 0, size: int = 1) -> Batch:
        """Return the batch of one step, counted from 0 over the whole run, or the share of one of `size` workers in it.

        Worker `rank` gets every size-th row from its own on: the rows lie by length, so shares cost alike.
        """
        requests = self.requests.take(self.chosen(step))
        draws = generator(self.seed, step, "candidates")
        positives = _some_positives(requests, self.config.max_positives, draws)
        items, labels, log_q = positives, (positives > 0).astype(np.float32), None
        if self.trains_on == "requests":
            negatives = self._negatives(requests, positives, draws)
            own = self._own_items(requests) if self.config.own_negatives else None
            if own is not None:
                negatives = np.concatenate([negatives, self._own_negatives(own, requests, positives, step)], axis=1)
            items = np.concatenate([positives, negatives], axis=1)
            labels = np.concatenate([labels, np.zeros(negatives.shape, np.float32)], axis=1)
            if self.config.correct:
                log_q = self._log_q[items] if own is None else self._log_q_with(own, items)
        if size > 1:
            mine = np.arange(rank, len(requests), size)
            requests, items, labels = requests.take(mine), items[mine], labels[mine]
            log_q = None if log_q is None else log_q[mine]
        histories = self.prepared.histories
        return assemble(
            histories.events,
            histories.offsets[requests.user],
            requests.end,
            requests.at,
            items,
            self.prepared.key_to_row,
            labels,
            self.window,
            log_q,
        )

    def _negatives(
        self, requests: Requests, positives: NDArray[np.int32], draws: np.random.Generator
    ) -> NDArray[np.int32]:
        wanted = self.config.negatives * positives.shape[1]
        shares = [len(part) for part in np.array_split(np.arange(wanted), len(self._samplers))]
        basket = Ragged(requests.offsets, requests.positive)
        history = self._histories(requests) if any(sampler.skips_history for sampler in self._samplers) else None
        columns = [
            sampler.draw(draws, basket, share, history)
            for sampler, share in zip(self._samplers, shares, strict=True)
            if share
        ]
        negatives = np.concatenate(columns, axis=1)
        # A request with fewer positives than the widest gets fewer negatives: the ratio is per positive. Interleaving
        # the samplers first keeps their shares equal in what is left.
        order = np.argsort(np.concatenate([np.linspace(0, 1, share) for share in shares if share]), kind="stable")
        return _per_positive(negatives[:, order], positives, self.config.negatives)

    def _own_items(self, requests: Requests) -> OwnItems:
        return OwnItems.of(self._histories(requests), len(self.prepared.items))

    def _own_negatives(
        self, own: OwnItems, requests: Requests, positives: NDArray[np.int32], step: int
    ) -> NDArray[np.int32]:
        each, draws = self.config.own_negatives, generator(self.seed, step, "own candidates")
        drawn = own.draw(draws, Ragged(requests.offsets, requests.positive), each * positives.shape[1])
        return _per_positive(drawn, positives, each)

    def _log_q_with(self, own: OwnItems, items: NDArray[np.int32]) -> NDArray[np.float32]:
        """Return log of how often each item is drawn by the samplers and from the user's own together, float32 [B, C].

        In the units of `log_density`: as a multiple of the samplers' average over the trained items.
        """
        trained, share = int(self.prepared.items.trained.sum()), self.config.own_negatives / self.config.negatives
        drawn = np.exp(self._log_q[items].astype(np.float64)) + share * trained * own.density(items)
        return np.log(drawn).astype(np.float32)

    def _histories(self, requests: Requests) -> Ragged:
        """Return the item rows of each request's whole history so far."""
        starts = self.prepared.histories.offsets[requests.user]
        keys = self.prepared.histories.events.item.view(np.int32)
        packed = Ragged.slices(keys, starts, requests.end)
        return Ragged(packed.offsets, rows_of(packed.values.view(np.uint32), self.prepared.key_to_row))

    @lru_cache(maxsize=2)  # noqa: B019 - one instance lives as long as its run
    def _epoch(self, epoch: int) -> list[NDArray[np.int64]]:
        """Return the request indices of every batch of an epoch."""
        draws = generator(self.seed, epoch, "epoch order")
        if self.trains_on == "requests":
            rows = draws.permutation(len(self.requests))
        else:
            order, offsets = self._users
            first, last = offsets[:-1], offsets[1:] - 1
            chosen = last if self.config.sequence_end == "newest" else draws.integers(first, last + 1)
            rows = draws.permutation(order[chosen])
        rows = rows[: self.rows_per_epoch]
        lengths = (self.requests.end - self.prepared.histories.offsets[self.requests.user])[rows]
        if self.window is not None:
            lengths = np.minimum(lengths, self.window)
        size = self.config.rows
        if self.config.order == "random":
            return [rows[i : i + size] for i in range(0, len(rows), size)]
        batches: list[NDArray[np.int64]] = []
        for start in range(0, len(rows), BLOCK * size):
            block = rows[start : start + BLOCK * size]
            block = block[np.argsort(lengths[start : start + BLOCK * size], kind="stable")]
            batches += [block[i : i + size] for i in range(0, len(block), size)]
        return [batches[i] for i in draws.permutation(len(batches))]


def _per_positive(drawn: NDArray[np.int32], positives: NDArray[np.int32], each: int) -> NDArray[np.int32]:
    """Keep `each` of the draws for every positive a request has; 0 for the rest."""
    kept = np.arange(drawn.shape[1])[None, :] < each * (positives > 0).sum(1, keepdims=True)
    return np.where(kept, drawn, 0).astype(np.int32)


def _some_positives(requests: Requests, limit: int, draws: np.random.Generator) -> NDArray[np.int32]:
    """Return at most `limit` positives per request, a seeded choice among more, int32 [B, P] with 0 = padding."""
    lengths = np.diff(requests.offsets)
    row = np.repeat(np.arange(len(requests)), lengths)
    order = np.lexsort((draws.random(len(row)), row))  # a shuffle inside each request
    place = np.arange(len(row)) - np.repeat(requests.offsets[:-1], lengths)
    kept = place < limit
    positives = np.zeros((len(requests), int(min(lengths.max(), limit))), np.int32)
    positives[row[kept], place[kept]] = requests.positive[order][kept]
    return positives
