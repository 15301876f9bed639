"""DARE: a long-history ranker whose attention and representation read separate embedding tables.

"Long-Sequence Recommendation Models Need Decoupled Embeddings", ICLR 2025, arXiv 2410.02604.

With one table, the gradients of "which events matter" and "what they mean" meet in the same rows and mostly disagree.
Two tables part them, and the attention table may then be narrow, which makes the search over the history cheap.

    k = E_att(event)   q = E_att(candidate)   e = E_rep(event)   v = E_rep(candidate)      item | category | position
    s = <k_sem, q_sem> / sqrt(a_sem) + b[p]          b[p] = <T_att[p], T_att[0]> / sqrt(a_pos)                  search
    S = the K best real events, ties to the newer    w = softmax of s over S                                 selection
    h = sum_S w e                                    x = [v ; h ; v*h]                                         pooling
    logit = 1 <- PReLU <- 80 <- PReLU <- 200 <- BatchNorm(x)

As a candidate's position is always 0, position enters the search only through the bias b, one number per position.
Where the log has several actions and the widths one for them (ours), an action enters as a position does, and under
`own_counts` the head sees a vector of the newest action on the candidate.

Kept from the paper: the decoupled tables, the shared attention of search and pooling, the product v*h ("TR").
From the authors' published runs, not in the paper's equations: `scaling = "split"`, the auxiliary head.
Ours: padding takes no weight even when a history is shorter than K, so an empty history gives h = 0; scoring uses
BatchNorm's running statistics; `unknown_rate`; `pos_mode = "group"`, in which the events of a basket share a position;
the loss takes log q of sampled negatives off the logit, as that of every ranker here (`[batches] correct`, `samplers`);
products that no batch shape shows in (`ranking.products`): else two events that differ by rounding would swap places
with it.
Not in the paper, off by default: `own_counts = True` also shows the head how often, how lately and how regularly the
user chose the candidate before, and how popular it is, over the whole history: where people repeat themselves a window
of 200 events forgets much of that. Among all items nearly all of the best ten are then the user's own, and which of
these is due is learned from negatives of the user's own past (`[batches] own_negatives`) by `objective = "listwise"`.
`tests/benchmarks/RESULTS.md` has what each of these brought.
`tied = True` lets one table play both roles: TWIN (arXiv 2302.02352) in the form of DARE's authors.
"""

import math
from dataclasses import dataclass, field
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from ranking.attention import Attention, of_found
from ranking.batch import PAD, UNKNOWN, Batch, Candidates, History, Request
from ranking.embeddings import (
    ActionTable,
    Fields,
    FieldWidths,
    PositionMode,
    hide_items,
    network_weights,
    positions,
    take,
)
from ranking.items import ItemTable
from ranking.layers import (
    ScoringHead,
    candidate_chunks,
    masked_softmax,
    pool_by_scatter,
    pool_found,
    score_real,
    search,
)
from ranking.losses import binary_cross_entropy, listwise_cross_entropy, with_positives
from ranking.own_counts import (
    OwnEvents,
    add_event,
    decayed_counts,
    last_action,
    own_events,
    own_span,
)
from ranking.products import steady_each
from ranking.ranker import Loss, TrainsOn
from recsys.errors import ConfigError, DataError
from recsys.history import DAY

OWN_FEATURES = 5
"""Numbers that the head sees more under `own_counts`."""
LEAST_COUNT = 1e-3
"""Added to a decayed count before its logarithm: ten half-lives ago is as good as never."""
AS_GOOD_AS_NEVER = 10
"""Half-lives."""
SLOW = 3
"""Half-lives after which an event counts half in the slower of the two decayed counts."""
OBJECTIVES = {"pointwise": binary_cross_entropy, "listwise": listwise_cross_entropy}


@dataclass(frozen=True)
class DareConfig:
    """Attributes of the model; widths, window, retrieved and scaling by default as the authors have them.

    Attributes:
        window: newest events read (N).
        retrieved: events kept by the search for each candidate (K).
        attention: columns of the attention table's fields; narrower makes the search cheaper.
        representation: columns of the representation table's fields.
        category: item column used as category; None for none.
        pos_mode: `group` where events share time stamps (baskets), `slot` where only order is known.
        scaling: `split` divides the semantic and the position part by their own widths, `single` their sum by the sum.
        features: what the head sees: `full` [v ; h ; v*h], `only` v*h, `none` [v ; h].
        tied: let the representation table serve attention too (TWIN).
        auxiliary: train with a second head over all events, not only the K found.
        l2: penalty on the squares of all weights that are neither embeddings nor biases.
        unknown_rate: share of items hidden behind the unknown row in a training step.
        own_counts: show the head five more numbers, over the whole history (not in the paper, see above).
        half_life_days: age at which an event counts half in them.
        objective: `pointwise` judges each candidate by itself (the paper), `listwise` each positive beside the
            negatives of its request.
    """

    window: int = 200
    retrieved: int = 20
    attention: FieldWidths = field(default_factory=FieldWidths)
    representation: FieldWidths = field(default_factory=FieldWidths)
    category: str | None = "category"
    pos_mode: PositionMode = "slot"
    scaling: Literal["split", "single"] = "split"
    features: Literal["full", "only", "none"] = "full"
    tied: bool = False
    auxiliary: bool = True
    l2: float = 1e-6
    unknown_rate: float = 0.02
    own_counts: bool = False
    half_life_days: float = 60.0
    objective: Literal["pointwise", "listwise"] = "pointwise"

    def __post_init__(self) -> None:
        if min(self.window, self.retrieved) < 1 or self.l2 < 0 or not 0 <= self.unknown_rate < 1:
            raise ConfigError(
                f"window={self.window}, retrieved={self.retrieved}, l2={self.l2}, unknown_rate={self.unknown_rate}: "
                "expected window and retrieved at least 1, l2 not negative, rate in [0, 1)"
            )
        if self.retrieved > self.window:
            raise ConfigError(
                f"retrieved={self.retrieved}, window={self.window}: expected retrieved in 1..window, it cannot keep "
                "more than it reads"
            )
        if self.half_life_days <= 0:
            raise ConfigError(f"half_life_days={self.half_life_days}: expected above 0")
        if self.tied and self.attention != self.representation:
            raise ConfigError(
                f"tied = true needs equal widths, found attention {self.attention} and "
                f"representation {self.representation}"
            )


class DareState(NamedTuple):
    """A history embedded once in both tables; bytes per event: 4 (a_sem + d_rep) + 22."""

    key: Tensor  # float32 [B, T, a_sem], zero at padding
    value: Tensor  # float32 [B, T, d_rep], zero at padding
    item: Tensor  # int32 [B, T], 0 at padding
    position: Tensor  # int64 [B, T], newest = 1, padding = 0
    time: Tensor  # int64 [B, T]
    action: Tensor  # uint8 [B, T]
    mask: Tensor  # bool [B, T]
    own_item: Tensor  # int32 [B, N], `OwnEvents` of the whole history; no columns unless own_counts
    own_time: Tensor  # int64 [B, N]
    own_action: Tensor  # uint8 [B, N]

    @property
    def own(self) -> OwnEvents:
        """The whole history by item."""
        return OwnEvents(self.own_item, self.own_time, self.own_action)


class Dare(nn.Module):
    """Scores a candidate by the K events that its attention embedding finds in the history."""

    trains_on: ClassVar[TrainsOn] = "requests"

    def __init__(self, config: DareConfig, items: ItemTable) -> None:
        super().__init__()
        self.config = config
        self.items = items
        self.representation = Fields(items, config.representation, config.category, config.window)
        self.attention = None if config.tied else Fields(items, config.attention, config.category, config.window)
        width = {"full": 3, "only": 1, "none": 2}[config.features] * self.representation.width
        last = config.representation.action * config.own_counts
        self.last_action = ActionTable(last) if last else None
        self.head = ScoringHead(width + OWN_FEATURES * config.own_counts + last)
        self.auxiliary_head = ScoringHead(width, hidden=(200,)) if config.auxiliary else None

    @property
    def window(self) -> int | None:
        """Newest events read; None, all of them, for `own_counts`."""
        return None if self.config.own_counts else self.config.window

    def encode(self, history: History) -> DareState:
        """Return the newest events embedded in both tables, once for all candidates."""
        return self._encode(history, self.items.embedding_row)

    def score(self, state: DareState, request: Request, candidates: Candidates) -> Tensor:
        """Return logits float32 [B, C]; cost O(C T a_sem) for the search, O(C K d_rep) for pooling, by chunks of C."""
        row_of = self.items.embedding_row
        v = self.representation.candidate(candidates.item, row_of)
        q = self._attention.semantic(candidates.item, row_of)
        chunks = candidate_chunks(q.shape[1], state.mask.numel())
        h = torch.cat([self._pool(state, q[:, chunk]) for chunk in chunks], 1)
        features = self._with_counts(self._features(v, h), state, request, candidates, row_of)
        return score_real(self.head, features, candidates.mask)

    def loss(self, batch: Batch, generator: torch.Generator) -> Loss:
        """Return the objective of both heads plus the weight penalty: `main`, `auxiliary`, `l2`.

        Without the auxiliary head only the K winners' attention rows would ever get a gradient.
        """
        row_of = hide_items(self.items, self.config.unknown_rate, generator)
        state = self._encode(batch.history, row_of)
        v = self.representation.candidate(batch.candidates.item, row_of)
        scores = self.search_scores(state, self._attention.semantic(batch.candidates.item, row_of))
        index, found = search(scores, state.mask, self.config.retrieved)
        h = pool_by_scatter(masked_softmax(scores.gather(-1, index), found), index, state.value)
        mask = batch.candidates.mask
        features = self._with_counts(self._features(v, h), state, batch.request, batch.candidates, row_of)
        logits = score_real(self.head, features, mask)
        parts = {"main": self._objective(logits, batch)}
        if self.auxiliary_head is not None:
            everything = masked_softmax(scores, state.mask[:, None, :].expand_as(scores)) @ state.value
            logits = score_real(self.auxiliary_head, self._features(v, everything), mask)
            parts["auxiliary"] = self._objective(logits, batch)
        parts["l2"] = self.config.l2 * torch.stack([p.square().sum() for p in network_weights(self)]).sum()
        total = torch.stack(list(parts.values())).sum()
        counted = with_positives(batch.label, batch.weight) if self.config.objective == "listwise" else None
        return Loss(total, {name: part.detach() for name, part in parts.items()}, counted)

    def _objective(self, logits: Tensor, batch: Batch) -> Tensor:
        return OBJECTIVES[self.config.objective](logits, batch.label, batch.weight, batch.log_q)

    def append(self, state: DareState, item: Tensor, time: Tensor, action: Tensor) -> DareState:
        """Return the state after one more event per request, equal bit for bit to encoding the longer history.

        Args:
            state: what `encode` gave.
            item: int32 [B], rows of the new events.
            time: int64 [B], their moments, none before the newest in the state.
            action: integer [B], their actions' codes.

        Cost: one row looked up per request; kept rows move, and only their position part is read again.
        """
        semantic, row_of = self.representation.semantic_width, self.items.embedding_row
        own = state.own
        mask = push(state.mask, torch.ones_like(item, dtype=torch.bool))
        width = min(int(mask.sum(1).max()), self.config.window)
        mask, moved = mask[:, -width:], push(state.time, time)[:, -width:]
        items = push(state.item, item)[:, -width:]
        actions = push(state.action, action.to(torch.uint8))[:, -width:]
        position = positions(moved, mask, self.config.pos_mode)
        value = push(state.value[..., :semantic], self.representation.semantic(item, row_of))[:, -width:]
        return DareState(
            push(state.key, self._attention.semantic(item, row_of))[:, -width:],
            self.representation.events(value, position, actions, mask),
            items,
            position,
            moved,
            actions,
            mask,
            *(add_event(own, item, time, action) if self.config.own_counts else own),
        )

    def evict(self, state: DareState, item: Tensor) -> DareState:
        """Return the state without the oldest event of one item per request (int32 [B], 0 = none).

        Equal bit for bit to encoding what is left of the events in the state: of the window, or with `own_counts` of
        the whole history.

        Raises:
            DataError: an item is not among a request's events; or its oldest event lies in the window of a longer
                history, and what comes into the window in its place is not known.

        Cost: rows move, and only their position part is read again.
        """
        found = (state.item == item[:, None]) & state.mask
        own = state.own
        inside = found.any(1)
        missing = (item != PAD) & ~inside
        if self.config.own_counts:
            mine = own.item == item[:, None]
            everything = mine.sum(1) == found.sum(1)  # and not some of them before the window
            longer = (own.item != PAD).sum(1) > state.mask.sum(1)
            missing = (item != PAD) & (~mine.any(1) | (everything & longer))
            inside = inside & everything
            own = OwnEvents(*_kept(_oldest(mine & (item != PAD)[:, None]), own.item != PAD, *own))
        if missing.any():
            at = int(missing.nonzero()[0])
            raise DataError(f"request {at}: item row {int(item[at])} can't leave its state; encode the history again")
        semantic = self.representation.semantic_width
        gone = _oldest(found & inside[:, None])
        parts = (state.key, state.value[..., :semantic], state.item, state.time, state.action, state.mask)
        key, value, items, time, action, mask = _kept(gone, state.mask, *parts)
        position = positions(time, mask, self.config.pos_mode)
        value = self.representation.events(value, position, action, mask)
        return DareState(key, value, items, position, time, action, mask, *own)

    def attention_of(self, history: History, candidates: Candidates) -> Attention:
        """Return the weights of the K found events, beside softmax attention over all of the window."""
        state = self.encode(history)
        scores = self.search_scores(state, self._attention.semantic(candidates.item, self.items.embedding_row)).double()
        return of_found(scores, state.mask, *search(scores, state.mask, self.config.retrieved), state.value)

    @property
    def _attention(self) -> Fields:
        return self.representation if self.attention is None else self.attention

    def _encode(self, history: History, row_of: Tensor) -> DareState:
        padded = history.padded(self.config.window)
        position = positions(padded.time, padded.mask, self.config.pos_mode)
        value = self.representation.history(padded, position, row_of)  # [B, T, d_rep]
        if self.attention is None:
            key = value[..., : self.representation.semantic_width]
        else:
            key = self.attention.semantic(padded.item, row_of).masked_fill(~padded.mask.unsqueeze(-1), 0.0)
        action = padded.action.to(torch.uint8)
        none = OwnEvents(padded.item[:, :0], padded.time[:, :0], action[:, :0])
        own = own_events(history) if self.config.own_counts else none
        return DareState(key, value, padded.item, position, padded.time, action, padded.mask, *own)

    def search_scores(self, state: DareState, query: Tensor) -> Tensor:
        """Return the attention scores [B, C, T] of candidates' semantic attention vectors [B, C, a_sem].

        Scores at padding mean nothing.
        """
        attention, single = self._attention, self.config.scaling == "single"
        query = query / math.sqrt(attention.width if single else attention.semantic_width)
        scores = query @ state.key.mT if self.training else steady_each(query, state.key)
        parts = [
            take(table.to_candidate() / math.sqrt(attention.width if single else table.weight.shape[1]), row)
            for table, row in ((attention.position, state.position), (attention.action, state.action.int() + 1))
            if table is not None
        ]
        return scores + torch.stack(parts).sum(0)[:, None, :] if parts else scores

    def _pool(self, state: DareState, query: Tensor) -> Tensor:
        """Return h [B, C, d_rep] for semantic attention vectors [B, C, a_sem]."""
        scores = self.search_scores(state, query)
        index, found = search(scores, state.mask, self.config.retrieved)
        weights = masked_softmax(scores.gather(-1, index).double(), found)
        return pool_found(weights.to(query.dtype), index, state.value)

    def _features(self, v: Tensor, h: Tensor) -> Tensor:
        """Return what the head sees of a candidate v and its history h, [B, C, ...]."""
        if self.config.features == "only":
            return v * h
        return torch.cat([v, h] if self.config.features == "none" else [v, h, v * h], -1)

    def _with_counts(
        self, features: Tensor, state: DareState, request: Request, candidates: Candidates, row_of: Tensor
    ) -> Tensor:
        """Return the features, followed under `own_counts` by what the counts say of the candidate.

        Logs of its own decayed count and of a slower one, log(1 + days since the newest of its own events), log of how
        late it is, (1 + those days) / (1 + mean days between its events; 0 below two events), log(1 + training count).
        Where actions are told apart, the vector of the user's newest one on the candidate follows.
        """
        if not self.config.own_counts:
            return features
        own, item = state.own, candidates.item
        half_life = self.config.half_life_days
        mine, slowly = (
            (decayed_counts(own, request.at, item, times * half_life) + LEAST_COUNT).log() for times in (1, SLOW)
        )
        count, oldest, newest = own_span(own, item)
        days = (request.at[:, None] - newest).clamp_min(0).double() / DAY
        days = days.masked_fill(count == 0, torch.inf).clamp_max(AS_GOOD_AS_NEVER * half_life)
        between = (newest - oldest).double() / DAY / (count - 1).clamp_min(1)
        late = (days.log1p() - between.log1p()).masked_fill(count < 2, 0.0)
        known = take(row_of, item) != UNKNOWN  # a hidden item has no training events, as a new one has none
        everybody = take(self.items.count, item) * known
        shown = torch.stack([mine, slowly, days.log1p(), late, everybody.double().log1p()], -1).to(features.dtype)
        features = torch.cat([features, shown], -1)
        if self.last_action is None:
            return features
        return torch.cat([features, self.last_action(last_action(own, item))], -1)


def _oldest(found: Tensor) -> Tensor:
    """Mark the first of the events found in each row, bool [B, T]."""
    return found & (found.cumsum(1) == 1)


def _kept(gone: Tensor, mask: Tensor, *values: Tensor) -> list[Tensor]:
    """Return values [B, T, ...] without the events that are gone, moved to the right; 0 in the places left free."""
    left = mask & ~gone
    order = left.byte().argsort(dim=1, stable=True)  # free slots first
    width = max(int(left.sum(1).max()), 1)
    moved = []
    for one in values:
        shape = (*left.shape, *(1,) * (one.dim() - 2))
        where = order.view(shape).expand_as(one)
        moved.append(one.masked_fill(~left.view(shape), 0).gather(1, where)[:, -width:])
    return moved


def push(values: Tensor, newest: Tensor) -> Tensor:
    """Return [B, T + 1, ...]: values [B, T, ...] with newest [B, ...] after the last."""
    return torch.cat([values, newest[:, None]], 1)
