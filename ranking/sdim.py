"""SDIM: a long history summed by hash bucket once per user, so that no candidate ever looks at its events.

"Sampling Is All You Need on Modeling Long-Term User Behaviors for CTR Prediction", CIKM 2022, arXiv 2205.10249.

Fixed random planes cut the space of item vectors into 2^tau buckets, G times over. A candidate reads the sum of the
events that lie in its own bucket: similar items collide with probability c = (1 - arccos(cos) / pi)^tau, so the sum is
an estimate of attention over the whole history. The sums are the user's table ("BSE" in the paper).

    b_g(x)   = sum_k [R_gk . x >= 0] << k                                signature: one bucket per group       hash
    T[g, b]  = sum_j [b_g(s_j) = b] s_j     N[g, b] = how many events    the table, G * 2^tau rows           encode
    long(q)  = 1/G sum_g u_g / |u_g|,  u_g = T[g, b_g(q)]                norm = "l2", the paper's              read
    short(q) = sum over the newest M of a(q, s_j) s_j                    DIN's attention
    logit    = head([q ; long ; q*long ; short ; q*short])               200 -> 80 -> 1

Kept from the paper: planes fixed and never trained, item | category hashed and pooled as they are (no projections), l2
per group, short-term target attention beside the long vector. Neither position nor age is hashed or pooled: they change
with the request and would break the table. The gradient of `long` reaches the events a candidate matches, none reaches
the candidate through the hash.
Other read-outs: `none`, 1/G sum u, unbiased for sum c s; `ratio`, sum u / sum n, which tends to sum c s / sum c as G
grows. With tau = 0 they are sum and mean pooling.

Ours:
* The table is exact. Vectors are rounded to a grid of 2^-16 and summed in integers, so that `append`, `evict` and
  `merge` in any order equal a rebuild bit for bit, and offline scoring reads the same table. Training sums floats.
* Sums by bucket are matrix products (`ranking.bucket_sums`).
* The loss takes log q of sampled negatives off the logit, as that of every ranker here (`[batches] correct`).
* `actions = True` adds a learned vector of what an event was to its summed value; hashed is the item alone.
* Every item's signature is computed once per version of the weights. Vectors and planes are float32; when scoring,
  their products are summed in float64, so that no device or batch shape flips a bit.
"""

import hashlib
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from ranking.attention import Attention
from ranking.batch import FIRST_ITEM, PAD, Batch, Candidates, History, Request
from ranking.bucket_sums import (
    Norm,
    bucket_rows,
    collision_chance,
    left_padded,
    mean_row,
    pool,
    read,
    read_once,
    read_weights,
    signatures,
)
from ranking.embeddings import ActionTable, Fields, FieldWidths, hide_items
from ranking.items import ItemTable
from ranking.layers import AttentionNetwork, ScoringHead, candidate_chunks, score_real
from ranking.losses import pointwise_loss
from ranking.ranker import Loss, TrainsOn
from recsys.errors import ConfigError, DataError
from recsys.randomness import generator as fresh_generator

GRID = 2.0**-16
"""Step of the fixed-point numbers a table is summed in; an int32 then holds sums up to 32,767."""

LOW, EXACT = 256, 1 << 24
"""A fixed-point number is summed in two parts, `LOW` times one plus the other; float32 is exact below `EXACT`."""

HASH_ROWS = 1 << 16
"""Items hashed at once."""

ROW_BITS = 32
"""In an entry of a log that knows actions the code stands above the bits of the item row."""


@dataclass(frozen=True)
class SdimConfig:
    """Attributes of the model; tau, G and the read-out are the paper's.

    Attributes:
        window: newest events in the table (T).
        recent: newest events under plain attention (M).
        long_includes_short: the table holds those too; False starts it at the event before them.
        bits: planes per group (tau), at most 8.
        groups: independent hashes (G).
        norm: read-out: `l2`, `none` or `ratio`, see above.
        center: subtract the mean item vector before hashing (not before pooling). Vectors with a common offset
            otherwise all look alike to the planes.
        item_width: columns of an item's own vector.
        category_width: columns of its category's.
        category: item column used as category; None for none.
        hidden: width of the short attention's network.
        planes_seed: the planes are a function of it alone.
        actions: add the action's vector to an event's; for logs of several actions.
        unknown_rate: share of items hidden behind the unknown row in a training step.
    """

    window: int = 200
    recent: int = 50
    long_includes_short: bool = True
    bits: int = 3
    groups: int = 16
    norm: Norm = "l2"
    center: bool = False
    item_width: int = 16
    category_width: int = 16
    category: str | None = "category"
    hidden: int = 36
    planes_seed: int = 0
    actions: bool = False
    unknown_rate: float = 0.02

    def __post_init__(self) -> None:
        if not 1 <= self.recent <= self.window:
            raise ConfigError(f"recent={self.recent}, window={self.window}: expected 1 <= recent <= window")
        if not 0 <= self.bits <= 8 or self.groups < 1:
            raise ConfigError(
                f"bits={self.bits}, groups={self.groups}: expected bits from 0 to 8 (a table has 2^bits rows per "
                "group) and groups at least 1"
            )
        if self.hidden < 1 or not 0 <= self.unknown_rate < 1:
            raise ConfigError(
                f"hidden={self.hidden}, unknown_rate={self.unknown_rate}: expected hidden at least 1, rate in [0, 1)"
            )


class SdimState(NamedTuple):
    """A user's table and the log it was summed from; bytes: 4 G 2^tau (D + 1), however long the history, + 4 or 8 T."""

    table: Tensor  # int32 [B, G, 2^tau, D], sums in steps of GRID
    size: Tensor  # int32 [B, G, 2^tau], events per bucket
    log: Tensor  # int32 [B, T] item rows of the window, newest last, left-padded with 0: the truth behind the table;
    # int64 [B, T] with actions, whose codes stand above the rows (`ROW_BITS`)

    def recent_only(self) -> "SdimState":
        """Return the state without its table: `long` is 0, the newest events remain."""
        return self._replace(table=torch.zeros_like(self.table), size=torch.zeros_like(self.size))


class Sdim(nn.Module):
    """Scores a candidate by the bucket sums it hashes to and by attention over the newest events."""

    trains_on: ClassVar[TrainsOn] = "requests"
    planes: Tensor

    def __init__(self, config: SdimConfig, items: ItemTable) -> None:
        super().__init__()
        self.config = config
        self.items = items
        self.fields = Fields(
            items, FieldWidths(config.item_width, config.category_width, 0), config.category, config.window
        )
        width = self.fields.semantic_width
        self.action = ActionTable(width) if config.actions else None
        draws = fresh_generator(config.planes_seed, 0, "sdim planes")
        planes = draws.standard_normal((config.groups, config.bits, width), dtype="float32")
        self.register_buffer("planes", torch.from_numpy(planes))  # saved with the model, never trained
        self.attention = AttentionNetwork(width, config.hidden)
        self.head = ScoringHead(5 * width)
        self._hashed: tuple[list[tuple[int, int]], Tensor] | None = None

    @property
    def window(self) -> int | None:
        """Newest events read."""
        return self.config.window

    @property
    def buckets(self) -> int:
        """Rows of the table per group."""
        return 1 << self.config.bits

    def encode(self, history: History) -> SdimState:
        """Return the exact table of the newest events.

        Raises:
            DataError: embeddings so large that the sums could overflow.

        Cost: O(T G 2^tau D) as one matrix product.
        """
        padded = history.padded(self.config.window)
        return self._state(self._entries(padded.item, padded.action))

    def score(self, state: SdimState, request: Request, candidates: Candidates) -> Tensor:
        """Return logits float32 [B, C]; cost O(C (G 2^tau D + M D hidden)), whatever the length of the history."""
        row_of = self.items.embedding_row
        item = candidates.item
        code = self._codes(item)  # [B, C, G]
        q = self.fields.semantic(item, row_of)
        rows = bucket_rows(state.table.double() * GRID, state.size, self.config.norm).to(q.dtype)
        recent = state.log[:, -self.config.recent :]
        s, mask = self._events(recent, row_of), recent != PAD
        each = recent.numel() * self.config.hidden  # numbers per candidate
        features = []
        for chunk in candidate_chunks(item.shape[1], each):
            long = read(rows, state.size, code[:, chunk], self.config.norm)
            features.append(self._features(q[:, chunk], long, s, mask))
        return score_real(self.head, torch.cat(features, 1), candidates.mask)

    def attention_of(self, history: History, candidates: Candidates) -> Attention:
        """Return each event's weight in `long`, beside its chance of a collision, which the hashes estimate."""
        state, row_of = self.encode(history), self.items.embedding_row
        s, q = (self.fields.semantic(item, row_of).double() for item in (self._rows(state.log), candidates.item))
        summed = state.log != PAD
        if not self.config.long_includes_short:
            summed = summed & (_ages(summed) > self.config.recent)
        codes = self._codes(self._rows(state.log)), self._codes(candidates.item)
        weight = read_weights(state.table.double() * GRID, *codes, self.config.norm)
        shift = self._mean() if self.config.center else 0.0
        chance = collision_chance(s - shift, q - shift, self.config.bits)
        weight, chance = (each.masked_fill(~summed[:, None], 0.0) for each in (weight, chance))
        return Attention(weight, chance, self._events(state.log, row_of).double())

    def loss(self, batch: Batch, generator: torch.Generator) -> Loss:
        """Return binary cross-entropy over the real candidates; items are hashed anew, as their vectors move."""
        config = self.config
        row_of = hide_items(self.items, config.unknown_rate, generator)
        padded = batch.history.padded(config.window)
        s, q = self.fields.semantic_of(row_of, padded.item, batch.candidates.item)  # [B, T, D], [B, C, D]
        older = padded.mask
        if not config.long_includes_short:
            older = older & (_ages(older) > config.recent)
        codes, newest = [self._signatures(x.detach()) for x in (s, q)], min(config.recent, s.shape[1])
        if self.action is not None:
            s = (s + self.action(padded.action + 1)).masked_fill(~padded.mask.unsqueeze(-1), 0.0)
        long, recent = read_once(s, codes[0], older, codes[1], self.buckets, config.norm, newest)
        features = self._features(q, long, recent, padded.mask[:, -config.recent :])
        logits = score_real(self.head, features, batch.candidates.mask)
        return pointwise_loss(logits, batch)

    def append(self, state: SdimState, item: Tensor, time: Tensor, action: Tensor) -> SdimState:
        """Return the state after one more event per request; the oldest leaves a full window.

        Args:
            state: what `encode` gave.
            item: int32 [B] rows.
            time: not read.
            action: integer [B], codes.

        Equal bit for bit to encoding the longer history; cost O(G D), and one copy of the state.
        """
        full = state.log.shape[1] == self.config.window and bool((state.log[:, 0] != PAD).all())
        entry = self._entries(item, action)
        if full and self.config.long_includes_short and bool((item != PAD).all()):
            return self._rolled(state, entry)
        return self.merge(state, self._state(entry[:, None]))

    def _rolled(self, state: SdimState, entry: Tensor) -> SdimState:
        """Return the state of full windows after one more entry each: it joins its buckets, the oldest leaves."""
        moved = torch.stack([entry, state.log[:, 0]], 1)  # [B, 2]
        sign = torch.tensor([1, -1], dtype=torch.int32, device=entry.device)[:, None]
        each = (self._fixed(moved).int() * sign).repeat_interleave(self.config.groups, 1)  # [B, 2 G, D]
        first = torch.arange(0, self.config.groups * self.buckets, self.buckets, device=entry.device)
        bucket = (self._codes(self._rows(moved)).long() + first).flatten(1)  # [B, 2 G]
        table = state.table.flatten(1, 2).scatter_add(1, bucket.unsqueeze(-1).expand_as(each), each)
        one = sign.expand(len(entry), 2, self.config.groups).flatten(1)
        size = state.size.flatten(1).scatter_add(1, bucket, one)
        log = torch.cat([state.log[:, 1:], entry[:, None]], 1)
        return SdimState(table.view_as(state.table), size.view_as(state.size), log)

    def evict(self, state: SdimState, item: Tensor) -> SdimState:
        """Return the state without the oldest event of one item per request (int32 [B], 0 = none).

        Raises:
            DataError: an item is not in the window of its request.
        """
        found = (self._rows(state.log) == item[:, None]) & (item != PAD)[:, None]
        missing = ((item != PAD) & ~found.any(1)).nonzero().flatten().tolist()
        if missing:
            row = int(item[missing[0]])
            raise DataError(f"request {missing[0]}: item row {row} is not in its window; encode the history again")
        oldest = found & (found.cumsum(1) == 1)
        leaving = (state.log * oldest).sum(1, dtype=state.log.dtype)  # [B], 0 for none
        if not self.config.long_includes_short:  # among the newest: not the item leaves the table, but who joins them
            among, M = (oldest & (_ages(found) <= self.config.recent)).any(1), self.config.recent
            joins = state.log[:, -M - 1] if state.log.shape[1] > M else torch.zeros_like(leaving)
            leaving = torch.where(among, joins, leaving)
        gone = self._tabulate(leaving[:, None])
        log = left_padded(state.log.masked_fill(oldest, PAD))
        return SdimState(state.table - gone.table, state.size - gone.size, log)

    def merge(self, older: SdimState, newer: SdimState) -> SdimState:
        """Return the state of histories that follow each other, request by request; the window cuts off the oldest."""
        log = left_padded(torch.cat([older.log, newer.log], 1))
        table, count = older.table + newer.table, older.size + newer.size
        if not self.config.long_includes_short:  # the newest of `older` that are pushed out by those of `newer`
            age, stay = _ages(older.log), self.config.recent - (newer.log != PAD).sum(1, keepdim=True)
            pushed = self._tabulate(older.log.masked_fill((age > self.config.recent) | (age <= stay), PAD))
            table, count = table + pushed.table, count + pushed.size
        gone = log[:, : -self.config.window]
        if gone.shape[1]:
            cut = self._tabulate(gone)
            table, count = table - cut.table, count - cut.size
        return SdimState(table, count, log[:, -self.config.window :])

    @property
    def key(self) -> str:
        """What a stored table depends on besides its history: SHA-256 of vectors, categories, planes and settings."""
        config = self.config
        table = f"{config.bits} {config.groups} {config.window} {config.center}"
        if not config.long_includes_short:
            table += f" before the newest {config.recent}"
        digest = hashlib.sha256(f"sdim {table}".encode())
        tensors = [*self.fields.parameters(), self.planes, self.items.embedding_row]
        if self.action is not None:
            tensors.append(self.action.weight)
        if config.category is not None:
            tensors += self.items.held(config.category)
        for tensor in tensors:
            digest.update(str(tuple(tensor.shape)).encode())
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def refuse_other(self, key: str) -> None:
        """Raise `DataError` if a stored state was made under another key: its sums would mean nothing here.

        Who can't encode the history again may score with `state.recent_only()`.
        """
        if key != self.key:
            raise DataError(
                f"a table stored under key {key[:12]}, this model reads {self.key[:12]}; encode the history again"
            )

    def item_signatures(self) -> Tensor:
        """Return every item's bucket in every group, uint8 [V, G]; computed once per version of the weights."""
        tensors = [*self.fields.parameters(), *([] if self.action is None else [self.action.weight]), self.planes]
        versions = [(tensor.data_ptr(), tensor._version) for tensor in tensors]
        known = self._hashed
        if known is None or known[0] != versions:
            with torch.inference_mode(False), torch.no_grad():
                self._check_range()
                known = (versions, self._hash_items())
            self._hashed = known
        return known[1]

    def _codes(self, item: Tensor) -> Tensor:
        """Return the buckets of item rows [B, N] in every group, uint8 [B, N, G]."""
        return self.item_signatures().index_select(0, item.flatten()).view(*item.shape, self.config.groups)

    def _hash_items(self) -> Tensor:
        row_of = self.items.embedding_row
        row = torch.arange(len(row_of), dtype=torch.int32, device=row_of.device)
        runs = row.tensor_split(1 + len(row) // HASH_ROWS)
        return torch.cat([self._signatures(self.fields.semantic(run, row_of).double()) for run in runs])

    def train(self, mode: bool = True) -> "Sdim":
        """Switch between training and scoring; training forgets the items' signatures."""
        if mode:
            self._hashed = None
        return super().train(mode)

    def _state(self, log: Tensor) -> SdimState:
        """Return the state of a log [B, T], left-padded."""
        summed = log if self.config.long_includes_short else log[:, : -self.config.recent]
        if not summed.shape[1]:
            summed = torch.zeros_like(log[:, :1])
        return self._tabulate(summed)._replace(log=log)

    def _tabulate(self, log: Tensor) -> SdimState:
        """Sum the entries of a log [B, T], 0 = padding, into an exact table."""
        value, code, low = self._fixed(log), self._codes(self._rows(log)), LOW
        if log.shape[1] * low > EXACT:
            table, count = pool(value.double(), code, log != PAD, self.buckets)
            return SdimState(table.int(), count.int(), log)
        high = (value / low).floor()  # two parts, whose sums float32 holds exactly
        parts = torch.cat([high, value - low * high], -1)
        table, count = pool(parts, code, log != PAD, self.buckets)
        first, second = table.int().chunk(2, -1)
        return SdimState(first * low + second, count.int(), log)

    def _entries(self, item: Tensor, action: Tensor) -> Tensor:
        """Return what a log holds of events, item rows and actions [...]; 0 at padding."""
        if self.action is None:
            return item
        return (item.long() | action.long() << ROW_BITS).masked_fill(item == PAD, PAD)

    def _rows(self, log: Tensor) -> Tensor:
        """Return the item rows int32 [...] of a log's entries."""
        return log if self.action is None else (log & (1 << ROW_BITS) - 1).int()

    def _fixed(self, log: Tensor) -> Tensor:
        """Return the vectors of entries [B, T] in steps of the grid: whole numbers, exact in float32 too."""
        return (self._events(log, self.items.embedding_row).detach() / GRID).round()

    def _events(self, log: Tensor, row_of: Tensor) -> Tensor:
        """Return the vectors of entries [B, T], exactly zero at padding."""
        s, padding = self.fields.semantic(self._rows(log), row_of), log == PAD
        if self.action is not None:
            s = s + self.action((log >> ROW_BITS) + 1)
        return s.masked_fill(padding.unsqueeze(-1), 0.0) if bool(padding.any()) else s

    def _features(self, q: Tensor, long: Tensor, s: Tensor, mask: Tensor) -> Tensor:
        """Return what the head sees of candidates q [B, C, D], given the newest events s [B, M, D]."""
        weight = self.attention(q, s).masked_fill(~mask[:, None, :], 0.0)  # [B, C, M]
        short = weight @ s if self.training else (weight.double() @ s.double()).to(q.dtype)
        return torch.cat([q, long, q * long, short, q * short], -1)

    def _signatures(self, x: Tensor) -> Tensor:
        """Return the buckets uint8 [..., G] of item vectors [..., D], in the type of x."""
        if self.config.center:
            x = x - self._mean().to(x.dtype)
        return signatures(x, self.planes.to(x.dtype))

    def _mean(self) -> Tensor:
        """Return the mean vector of all known items, float64 [D]."""
        known = slice(FIRST_ITEM, None)
        parts = []
        if self.fields.item is not None:
            parts.append(mean_row(self.fields.item.weight, self.items.embedding_row[known]))
        category = self.config.category
        if self.fields.category is not None and category is not None:
            if category in self.items.multi_columns:
                row = torch.arange(FIRST_ITEM, len(self.items), device=self.planes.device)
                share = self.items.multi(category).shares(row)
                parts.append(share @ self.fields.category.weight.detach().double())
            else:
                parts.append(mean_row(self.fields.category.weight, self.items.column(category)[known]))
        return torch.cat(parts)

    def _check_range(self) -> None:
        largest = max(float(table.detach().abs().max()) for table in self.fields.parameters())
        if self.action is not None:
            largest += float(self.action.weight.detach().abs().max())
        limit = (2**31 - 1) * GRID
        if not self.config.window * (largest + GRID) < limit:
            raise DataError(
                f"sdim: the largest number in an embedding is {largest:.6g}, a window of {self.config.window} events "
                f"could overflow the table; expected below {limit / self.config.window:.6g}: train with a smaller "
                "learning_rate or take a smaller window"
            )


def _ages(log: Tensor) -> Tensor:
    """Return how far back each slot of [B, T] lies, int64 [T], newest = 1."""
    return torch.arange(log.shape[1], 0, -1, device=log.device)
