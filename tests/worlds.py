"""A small synthetic world with a known structure, for tests: who understands it must beat who does not.

Users take one item a day. With probability

    order     the successor of the item before (a fixed random cycle over all items): only the newest event tells;
    category  any item of the user's favourite category: the whole history tells;
    repeats   one of the user's own earlier items;
    otherwise any item.

Popularity knows none of it, a mean over the history knows the category only, attention can know both.
The two highest rows are items of the catalogue that never occur in training ("untrained").
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pipelines import boost
from ranking.batch import FIRST_ITEM, Batch, Candidates, History, Request, assemble
from ranking.bundle_models import NamedModel
from ranking.embeddings import sparse_parameters
from ranking.gradient_boosting import GradientBoosting
from ranking.items import ItemTable, MultiValued, Transitions, identity_rows
from ranking.manifest import Provenance
from ranking.models import RANKERS
from ranking.ranker import NEGATIVE
from recsys.config import parse
from recsys.history import Events, Histories
from recsys.randomness import derive, generator

DAY = 86_400_000_000
START = 1_600_000_000_000_000
UNTRAINED = 2
ROWS = 30
"""Of `item_table`, the two before the items among them."""

PROVENANCE = Provenance(created="2026-01-01T00:00:00Z", commit="none", data_digest="digest")
"""Of bundles that nobody asks where they come from."""


@dataclass(frozen=True)
class World:
    """All events of all users, and what a bundle would know of the items; each user's last event is the test target."""

    items: ItemTable
    histories: Histories
    key_to_row: NDArray[np.int32]
    known: int  # items that occur; rows 2 .. known + 1

    def requests(self, split: str, size: int = 64, negatives: int = 4, seed: int = 0) -> list[Batch]:
        """Return batches of requests: first candidate the item taken, then uniform other items.

        `train` has one request per event from the fifth to the last but one, shuffled; `test` the last of each user.
        """
        draws = generator(seed, 0, f"requests/{split}")
        first, last = self.histories.offsets[:-1], self.histories.offsets[1:] - 1
        start, end = first, last
        if split == "train":
            start = np.concatenate([np.full(max(n - f - 4, 0), f) for f, n in zip(first, last, strict=True)])
            end = np.concatenate([np.arange(f + 4, n) for f, n in zip(first, last, strict=True)])
            order = draws.permutation(len(end))
            start, end = start[order], end[order]
        positive = self.key_to_row[self.histories.events.item[end]][:, None]  # [R, 1]
        other = draws.integers(FIRST_ITEM, FIRST_ITEM + self.known - 1, (len(end), negatives))
        item = np.concatenate([positive, other + (other >= positive)], axis=1).astype(np.int32)
        label = np.zeros(item.shape, np.float32)
        label[:, 0] = 1
        return self._batches(start, end, item, label, size)

    def sequences(self, size: int = 64) -> list[Batch]:
        """Return one row per user: the history before the last training event, and that event's item."""
        first, end = self.histories.offsets[:-1], self.histories.offsets[1:] - 2
        item = self.key_to_row[self.histories.events.item[end]][:, None]
        return self._batches(first, end, item, np.ones(item.shape, np.float32), size)

    def training(self, trains_on: str, size: int = 64) -> list[Batch]:
        """Return what a model of this kind trains on."""
        return self.sequences(size) if trains_on == "sequences" else self.requests("train", size)

    def _batches(
        self,
        start: NDArray[np.int64],
        end: NDArray[np.int64],
        item: NDArray[np.int32],
        label: NDArray[np.float32],
        size: int,
    ) -> list[Batch]:
        events = self.histories.events
        return [
            assemble(events, start[cut], end[cut], events.time[end[cut]], item[cut], self.key_to_row, label[cut])
            for cut in (slice(i, i + size) for i in range(0, len(end), size))
        ]


def make_world(
    users: int = 300,
    length: int = 24,
    known: int = 60,
    categories: int = 6,
    order: float = 0.45,
    category: float = 0.35,
    repeats: float = 0.0,
    seed: int = 0,
) -> World:
    """Make a world; histories have between half of `length` and `length` events."""
    draws = generator(seed, 0, "world")
    cycle = draws.permutation(known)
    successor = np.empty(known, np.int64)
    successor[cycle] = np.roll(cycle, -1)
    belongs = np.arange(known + UNTRAINED) % categories
    sequences = []
    for _ in range(users):
        favourite = np.flatnonzero(belongs[:known] == draws.integers(categories))
        taken: list[int] = [int(draws.choice(favourite))]
        for kind in draws.random(draws.integers(length // 2, length + 1) - 1):
            if kind < order:
                taken.append(int(successor[taken[-1]]))
            elif kind < order + category:
                taken.append(int(draws.choice(favourite)))
            elif kind < order + category + repeats:
                taken.append(taken[draws.integers(len(taken))])
            else:
                taken.append(int(draws.integers(known)))
        sequences.append(taken)
    return World(_counted_table(sequences, belongs), pack(sequences), identity_rows(len(belongs)), known)


def pack(sequences: Sequence[Sequence[int]]) -> Histories:
    """Return packed histories of item keys, one event a day."""
    lengths = [len(taken) for taken in sequences]
    item = np.concatenate([np.asarray(taken, np.uint32) for taken in sequences])
    time = np.concatenate([START + DAY * np.arange(n, dtype=np.int64) for n in lengths])
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return Histories(Events(item, np.zeros(len(item), np.uint8), time), offsets)


def item_table(rows: int = ROWS, categories: int = 5) -> ItemTable:
    """Return a table in which every item from row 2 was trained; categories go round."""
    code = torch.tensor([0, 1, *(2 + i % categories for i in range(rows - 2))], dtype=torch.int32)
    return ItemTable(["category"], code[:, None], [categories + 2], torch.tensor([0, 0] + [1] * (rows - 2)))


def _counted_table(sequences: Sequence[Sequence[int]], belongs: NDArray[np.int64]) -> ItemTable:
    """Count items and transitions over all but each user's last event."""
    rows = len(belongs) + FIRST_ITEM
    pairs = np.zeros((rows, rows), np.float32)
    count = np.zeros(rows, np.int64)
    for taken in sequences:
        row = np.asarray(taken[:-1]) + FIRST_ITEM
        np.add.at(count, row, 1)
        np.add.at(pairs, (row[:-1], row[1:]), 1)
    code = np.concatenate([[0, 1], belongs + 2]).astype(np.int32)[:, None]
    cardinality, counts = [int(code.max()) + 1], torch.from_numpy(count)
    return ItemTable(
        ["category"], torch.from_numpy(code), cardinality, counts, _csr(pairs), multi={"tags": _tags(belongs)}
    )


def _tags(belongs: NDArray[np.int64]) -> MultiValued:
    """Return every item its category and one to three tags that say nothing; every tenth item has none at all."""
    categories = int(belongs.max()) + 1
    tags = [[0], [1]]
    for place, category in enumerate(belongs.tolist()):
        more = range(place % 3 + 1)
        tags.append([1] if place % 10 == 9 else [category + 2, *(categories + 2 + (place * 7 + n) % 5 for n in more)])
    offsets = np.concatenate([[0], np.cumsum([len(codes) for codes in tags])])
    code = torch.tensor([code for codes in tags for code in codes], dtype=torch.int32)
    return MultiValued(torch.from_numpy(offsets), code, categories + 2 + 5)


def _csr(pairs: NDArray[np.float32]) -> Transitions:
    source, target = np.nonzero(pairs)
    offsets = np.concatenate([[0], np.cumsum(np.bincount(source, minlength=len(pairs)))])
    return Transitions(
        torch.from_numpy(offsets.astype(np.int64)),
        torch.from_numpy(target.astype(np.int32)),
        torch.from_numpy(pairs[source, target]),
    )


def histories(rows: list[list[int]]) -> History:
    """Return histories of item rows, one event a microsecond."""
    item = torch.tensor([row for history in rows for row in history], dtype=torch.int32)
    offsets = torch.tensor([0, *np.cumsum([len(history) for history in rows])])
    return History(item, torch.zeros_like(item), torch.arange(len(item)), offsets)


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return numbers of the standard normal distribution."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def take(batch: Batch, index: Sequence[int] | Tensor) -> Batch:
    """Return the requests at `index`, in that order, histories packed anew."""
    h = batch.history
    index = torch.as_tensor(index)
    parts = [torch.arange(int(h.offsets[i]), int(h.offsets[i + 1])) for i in index]
    events = torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), h.lengths[index].cumsum(0)])
    return Batch(
        History(h.item[events], h.action[events], h.time[events], offsets),
        Request(batch.request.at[index], None if batch.request.query is None else batch.request.query[index]),
        Candidates(batch.candidates.item[index]),
        batch.label[index],
        batch.weight[index],
    )


def with_candidates(batch: Batch, item: Tensor) -> Batch:
    """Return the same requests with other candidates [B, C], no labels."""
    item = item.to(torch.int32)
    return replace(batch, candidates=Candidates(item), label=torch.zeros(item.shape), weight=(item != 0).float())


def optimisers(model: nn.Module, learning_rate: float) -> list[torch.optim.Optimizer]:
    """Return Adam in its sparse form for embedding rows and in its plain form for the rest."""
    sparse = sparse_parameters(model)
    dense = [p for p in model.parameters() if all(p is not other for other in sparse)]
    adams: list[torch.optim.Optimizer] = [torch.optim.Adam(dense, lr=learning_rate)] if dense else []
    return adams + ([torch.optim.SparseAdam(sparse, lr=learning_rate)] if sparse else [])


def fit(
    model: Any, batches: Sequence[Batch], steps: int, learning_rate: float = 0.01, seed: int = 0, falling: bool = False
) -> list[float]:
    """Train in place, going round the batches, at one rate or one that falls to 0; gives the loss of every step."""
    model.train()
    adams = optimisers(model, learning_rate)
    rates = [torch.optim.lr_scheduler.LinearLR(adam, 1.0, 0.0 if falling else 1.0, steps) for adam in adams]
    losses = []
    for step in range(steps):
        draws = torch.Generator().manual_seed(derive(seed, step, "fit"))
        loss = model.loss(batches[step % len(batches)], draws).total
        for adam in adams:
            adam.zero_grad()
        loss.backward()
        for adam, rate in zip(adams, rates, strict=True):
            adam.step()
            rate.step()
        losses.append(float(loss.detach()))
    model.eval()
    return losses


class Fake(nn.Module):
    """Scores by a plain function of (history rows, moment, item rows): checks what reaches a model, and its order."""

    def __init__(self, items, function, window=None):
        super().__init__()
        self.items, self.function, self.window, self.batches = items, function, window, 0

    def encode(self, history):
        rows, ends = history.item.numpy(), history.offsets.numpy()
        self.batches += 1
        return [rows[a:b] for a, b in pairwise(ends)]

    def score(self, state, request, candidates):
        assert not self.training
        item = candidates.item.numpy()
        rows = [self.function(h, int(at), i) for h, at, i in zip(state, request.at, item, strict=True)]
        scores = torch.from_numpy(np.array(rows, np.float32).reshape(item.shape))
        return scores.masked_fill(~candidates.mask, NEGATIVE)


def grow(model: GradientBoosting, world: World, seed: int = 0) -> None:
    """Grow a model's trees from the training requests; a basket here is one item, and all of the period is recent."""
    batches = ((batch, torch.ones(len(batch), dtype=torch.int64)) for batch in world.requests("train"))
    boost.grow(model, batches, boost.Recent(world.items.count, since=0), seed)


def named_model(name: str, world: World, options: Mapping[str, Any], seed: int = 0, spread: float = 0.3) -> NamedModel:
    """Return a ranker whose every weight is away from its initial value, so that items score apart; trees are grown."""
    config_class, model_class = RANKERS[name]
    config = parse(config_class, options, name)
    torch.manual_seed(seed)
    model = model_class(config, world.items)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += spread * torch.randn_like(parameter)
    if isinstance(model, GradientBoosting):
        grow(model, world)
    return NamedModel(name, config, model.eval())


class Nobody:
    """Histories of nobody."""

    def read(self, user_id: str) -> Events | None:
        """Know no user."""
        return None


@torch.no_grad()
def scores(model: Any, batch: Batch) -> Tensor:
    """Return logits [B, C] in evaluation mode."""
    model.eval()
    logits: Tensor = model.score(model.encode(batch.history), batch.request, batch.candidates)
    return logits


def auc(model: Any, batches: Sequence[Batch]) -> float:
    """Return the chance that a request's item taken (its first candidate) scores above another; a tie counts half."""
    shares = []
    for batch in batches:
        logits = scores(model, batch)
        taken, other = logits[:, :1], logits[:, 1:]
        shares.append(((taken > other).double() + 0.5 * (taken == other).double()).mean(1))
    return float(torch.cat(shares).mean())


@dataclass(frozen=True)
class PlantedWorld:
    """Requests whose label depends on what lies far back in the history.

    40 categories of 50 items, 200 events a history, 8 candidates, none of them in the history. A candidate is positive
    if an event of its category is among the oldest 100 (half of them are), and a tenth of the labels are flipped: no
    model can pass an AUC of 0.9 by more than chance. Whether the newest 100 hold its category is independent of that.
    """

    items: ItemTable
    event: NDArray[np.int32]  # [R, 200] item rows, oldest first
    candidate: NDArray[np.int32]  # [R, 8] item rows
    label: NDArray[np.float32]  # [R, 8]
    slots: Tensor  # bool [R, 8, 200], the events that make a candidate positive

    def requests(self, start: int, end: int | None = None) -> Batch:
        """Return requests start..end as one batch."""
        event = torch.from_numpy(self.event[start:end])
        rows, length = event.shape
        time, offsets = torch.arange(length).repeat(rows), torch.arange(0, event.numel() + 1, length)
        history = History(event.flatten(), torch.zeros(event.numel(), dtype=torch.int32), time, offsets)
        label = torch.from_numpy(self.label[start:end])
        candidates = Candidates(torch.from_numpy(self.candidate[start:end]))
        return Batch(history, Request(torch.full((rows,), length)), candidates, label, torch.ones(label.shape))


def make_planted(requests: int, seed: int = 0) -> PlantedWorld:
    """Make a planted world of so many requests."""
    draws = generator(seed, 0, "planted")
    categories, each, half, targets = 40, 50, 100, 8
    rows = FIRST_ITEM + np.arange(categories * each).reshape(each, categories).T  # [40, 50], category = row mod 40
    used = draws.permuted(np.tile(np.arange(categories), (2, requests, 1)), axis=2)[..., : categories // 2]
    of = np.take_along_axis(used, draws.integers(0, categories // 2, (2, requests, half)), 2)
    events = np.concatenate([of[0], of[1]], 1)  # [R, 200] categories; each half knows its own 20
    wanted = draws.integers(0, categories, (requests, targets))
    slots = wanted[:, :, None] == events[:, None, :]
    slots[:, :, half:] = False
    label = slots.any(-1) ^ (draws.random(wanted.shape) < 0.1)
    code = torch.tensor([0, 1, *(2 + i % categories for i in range(categories * each))], dtype=torch.int32)
    return PlantedWorld(
        ItemTable(["category"], code[:, None], [categories + 2], (code > 1).long()),
        rows[events, draws.integers(0, each - 1, events.shape)].astype(np.int32),
        rows[wanted, each - 1].astype(np.int32),
        label.astype(np.float32),
        torch.from_numpy(slots),
    )
