"""MQSA-TED: multi-query self-attention with transition-aware embedding distillation.

"Collaboration and Transition: Distilling Item Transitions into Multi-Query Self-Attention for Sequential
Recommendation", WSDM 2024, arXiv 2311.01056.

Kept from the paper: two self-attention stacks that share only the item and position tables, one whose query is the
current item (short) and one whose query is the mean of the last L items (long), mixed by alpha; the cross-entropy over
all items; the item table taught to reproduce, by dot products, a softened row of the transition counts (TED).

Changed, and why:
  - Baskets. Events of one moment have no order, so they form one basket: L counts baskets, a query sees the keys of its
    own and earlier baskets, all of a basket predicts the next basket, positions are counted in baskets from the newest.
    Where every moment has one item this is the paper. Order inside a basket changes nothing.
  - Row 1 is the unknown item: an input like any other (its vector starts at 0), never a target, a teacher or a pupil.
  - The query mask of the authors' code (attention off where the normalised query is 0) is left out: it is dead after
    the first step, and padding is silenced by ids.
  - TED is computed from observed edges only, exactly: see `teacher`.

    B users    T slots (events)    G baskets    D width    V item rows    R query rows with a target    M heads of TED
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ranking.baskets import Slots, arrange, by_length, targets
from ranking.batch import FIRST_ITEM, PAD, UNKNOWN, Batch, Candidates, History, Padded, Request
from ranking.embeddings import hide_items, take
from ranking.items import ItemTable, Transitions
from ranking.layers import dropout, in_float64
from ranking.losses import binary_cross_entropy
from ranking.ranker import NEGATIVE, Loss, TrainsOn
from ranking.softmax import (
    Positives,
    Proposal,
    chunked_log_partition,
    log_partition,
    sampled_log_partition,
)
from recsys.errors import ConfigError

EPSILON = 1e-24  # of every LayerNorm; the variance of the inputs starts near .0065, so the usual 1e-5 would bias it
FILL = -(2.0**32) + 1  # finite, so that a row without keys is uniform and not NaN
Drop = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class MqsaTedConfig:
    """The paper's settings on Amazon Beauty.

    The L2 term of the paper is coupled weight decay (1e-4) of a dense Adam (1e-3), so it belongs to the optimiser.
    """

    width: int = 64
    window: int = 50  # newest events read
    averaged: int = 3  # L: newest baskets (single items: items) whose mean is the long query
    alpha: float = 0.5  # weight of the short branch
    lambda_kd: float = 0.1  # weight of the distillation; 0 leaves it out
    tau: float | Literal["auto"] = (
        0.1  # of teacher and pupil; auto keeps the teacher as sharp as 0.1 is at 12,101 items
    )
    blocks: int = 1
    heads: int = 1
    dropout: float = 0.5
    softmax: Literal["chunked", "full", "sampled"] = "chunked"  # chunked and full are the same numbers
    negatives: int = 1024  # drawn per step, softmax = "sampled" only
    objective: Literal["sequence", "candidates"] = "sequence"  # candidates: learn to order a request's candidates only
    kd_heads: int = 0  # distil at most so many tokens a step, repeats merged; 0: every token (the paper)
    baskets: bool = True  # events of one moment are one basket; False: every event is its own
    unknown_rate: float = 0.0  # share of items hidden behind the unknown row in a training step (the paper: none)

    def __post_init__(self) -> None:
        for name in ("width", "window", "averaged", "blocks", "heads", "negatives"):
            if getattr(self, name) < 1:
                raise ConfigError(f"mqsa_ted: {name} must be at least 1, found {getattr(self, name)}")
        for name, low, high in (("alpha", 0, 1), ("lambda_kd", 0, math.inf), ("kd_heads", 0, math.inf)):
            if not low <= getattr(self, name) <= high:
                raise ConfigError(f"mqsa_ted: {name} must lie in [{low}, {high}], found {getattr(self, name)}")
        for name in ("dropout", "unknown_rate"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"mqsa_ted: {name} must lie in [0, 1), found {getattr(self, name)}")
        if self.tau != "auto" and not self.tau > 0:
            raise ConfigError(f'mqsa_ted: tau must be above 0 or "auto", found {self.tau}')
        if self.width % self.heads:
            raise ConfigError(f"mqsa_ted: width must be a multiple of heads, found {self.width} and {self.heads}")


def pool(sums: Tensor, count: Tensor, averaged: int) -> Tensor:
    """Return Q0, the mean of the real items in the last `averaged` baskets up to each, [B, G, D].

    Args:
        sums: [B, G, D] sums over the items of each basket.
        count: [B, G] their numbers.
        averaged: baskets, at least 1.
    """
    total, number, G = sums, count, sums.shape[1]
    for back in range(1, min(averaged, G)):
        total = total + F.pad(sums, (0, 0, back, 0))[:, :G]
        number = number + F.pad(count, (back, 0))[:, :G]
    return total / number.clamp(min=1)[:, :, None]


class Block(nn.Module):
    """One self-attention block in which only the query is normalised and is itself the residual."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query_norm = nn.LayerNorm(width, EPSILON)
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.output_norm = nn.LayerNorm(width, EPSILON)
        self.expand, self.contract = (nn.Linear(width, width) for _ in range(2))

    def forward(self, pooled: Tensor, slots: Tensor, allowed: Tensor, drop: Drop) -> Tensor:
        """Attend from pooled queries [B, G, D] to slots [B, T, D] where `allowed` [B, G, T]; gives [B, G, D]."""
        # A query of zeros has no direction; with this epsilon its gradient would be 1e12 times too large.
        pooled = torch.where(pooled.any(-1, keepdim=True), pooled, pooled.detach())
        query = self.query_norm(pooled)  # [B, G, D]
        attended = self._attend(self.query(query), self.key(slots), self.value(slots), allowed, drop)
        output = self.output_norm(attended + query)
        inner = drop(F.relu(self.expand(output)))
        result: Tensor = output + drop(self.contract(inner))
        return result

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, allowed: Tensor, drop: Drop) -> Tensor:
        (B, G, D), H = query.shape, self.heads
        q, k, v = (x.view(B, -1, H, D // H).transpose(1, 2) for x in (query, key, value))  # [B, H, G or T, D/H]
        logits = q @ k.transpose(2, 3) / math.sqrt(D // H)  # [B, H, G, T]
        weight = drop(torch.softmax(logits.masked_fill(~allowed[:, None], FILL), dim=-1))
        return (weight @ v).transpose(1, 2).reshape(B, G, D)


class Branch(nn.Module):
    """A stack of blocks whose queries are means over the newest baskets."""

    def __init__(self, config: MqsaTedConfig, averaged: int) -> None:
        super().__init__()
        self.averaged = averaged
        self.blocks = nn.ModuleList(Block(config.width, config.heads) for _ in range(config.blocks))
        self.norm = nn.LayerNorm(config.width, EPSILON)

    def forward(self, x: Tensor, slots: Slots, drop: Drop, newest: bool) -> Tensor:
        """Return Z of every basket [B, G, D], or of the newest only [B, 1, D], from slot inputs [B, T, D]."""
        real = (slots.count > 0)[:, :, None].to(x.dtype)  # [B, G, 1]
        order = torch.arange(slots.count.shape[1], device=x.device)
        allowed = slots.real[:, None, :] & (slots.basket[:, None, :] <= order[None, :, None])  # [B, G, T]
        sums = slots.sums(x)
        for index, block in enumerate(self.blocks):
            pooled = pool(sums, slots.count.to(x.dtype), self.averaged)
            if newest and index == len(self.blocks) - 1:
                pooled, allowed, real = pooled[:, -1:], allowed[:, -1:], real[:, -1:]
            output = block(pooled, x, allowed, drop) * real
            if index < len(self.blocks) - 1:  # every slot of a basket goes on with the basket's output
                where = slots.basket[:, :, None].expand(-1, -1, output.shape[2])
                x = output.gather(1, where) * slots.real[:, :, None]
                sums = output * slots.count[:, :, None].to(x.dtype)
        z: Tensor = self.norm(output)
        return z


class MqsaTed(nn.Module):
    """Next-basket ranker and retriever: a user is one vector, a score one inner product.

    Category, action, ages and the moment of the request are not used. An item without training events is read as
    unknown (row 1) and scores 0, the logit of the padding class; the retriever never gives it.
    """

    items: ItemTable

    def __init__(self, config: MqsaTedConfig, items: ItemTable) -> None:
        super().__init__()
        self.config, self.items = config, items
        classes = len(items) - FIRST_ITEM
        if classes < 2:
            raise ConfigError(f"mqsa_ted: the catalogue must have at least 2 items, found {classes}")
        # With this a head of one edge has the same teacher probability, .645436, at any number of items.
        self.tau = 1 / math.log(1.8203690740 * (classes - 1)) if config.tau == "auto" else config.tau
        self.item = nn.Parameter(torch.empty(len(items), config.width))  # E
        self.position = nn.Parameter(torch.empty(config.window, config.width))  # P, newest basket last
        self.short = Branch(config, 1)
        self.long = Branch(config, config.averaged)
        self._initialise()

    def _initialise(self) -> None:
        nn.init.normal_(self.item, std=0.01)
        nn.init.normal_(self.position, std=0.01)
        with torch.no_grad():
            self.item[:FIRST_ITEM] = 0
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    @property
    def trains_on(self) -> TrainsOn:
        """User sequences, or requests with negatives for the objective `candidates`."""
        return "sequences" if self.config.objective == "sequence" else "requests"

    @property
    def window(self) -> int:
        """Newest events of a history the model reads."""
        return self.config.window

    def encode(self, history: History) -> Tensor:
        """Return the user vectors float32 [B, D]: the output at the newest basket; one constant for empty histories.

        The oldest of the `window` newest events may begin inside a basket; the rest of that basket is not seen.
        The branches are computed in float64 and rounded at the end: see `ranking.layers`.
        """
        slots = arrange(history.padded(self.config.window), self.items.embedding_row, self.config.baskets)
        x = self.inputs(slots, _keep).double()
        mixed = self._mixed(lambda branch: in_float64(branch)(x, slots, _keep, True))  # [B, 1, D]
        return mixed[:, -1].to(self.item.dtype)

    def score(self, state: Tensor, request: Request, candidates: Candidates) -> Tensor:
        """Return state . E[item], [B, C]; `NEGATIVE` at padding and unknown, 0 at items without training events."""
        item = candidates.item  # [B, C]
        row = take(self.items.embedding_row, item)
        vectors = self.item.index_select(0, row.flatten()).view(*item.shape, self.config.width)  # [B, C, D]
        logits = (vectors.double() @ state.double()[:, :, None]).squeeze(2).to(state.dtype)
        logits = logits.masked_fill(row == UNKNOWN, 0.0)
        return logits.masked_fill(item < FIRST_ITEM, NEGATIVE)

    def user_vectors(self, history: History) -> Tensor:
        """Return float32 [B, D]; their inner products with `item_vectors` are the scores."""
        return self.encode(history)

    def item_vectors(self) -> Tensor:
        """Return float32 [V, D]; zero at padding, unknown and items without training events."""
        return self.item * self.items.trained[:, None]

    def loss(self, batch: Batch, generator: torch.Generator) -> Loss:
        """Return the mean cross-entropy of the next basket plus lambda_kd times the distillation.

        Args:
            batch: one row per user; candidates with a label are the basket that followed the history.
            generator: of all dropout and draws. TED has its own, derived from it, so that lambda_kd = 0 draws for the
                rest exactly what another lambda draws.

        Users are computed in groups of similar length, so that cost follows events and not the longest history.
        """
        seed = torch.randint(2**62, (), generator=generator, device=generator.device)
        kd_generator = torch.Generator(generator.device).manual_seed(int(seed))
        padded = batch.history.padded(self.config.window)
        row_of = hide_items(self.items, self.config.unknown_rate, generator)
        if self.config.objective == "candidates":
            slots = arrange(padded, row_of, self.config.baskets)
            rec = self._candidates(batch, self(slots, self._dropout(generator), True)[:, -1], row_of)
            return self._total(rec, self._distillation(slots.item[slots.item >= FIRST_ITEM], kd_generator))
        following = take(row_of, torch.where(batch.label > 0, batch.candidates.item, PAD)).long()  # [B, C]
        query, row, item, tokens, rows = [], [], [], [], 0
        for index in by_length(padded.mask.sum(1)):
            width = int(padded.mask[index].sum(1).max())
            part = Padded(*(tensor.index_select(0, index)[:, -width:] for tensor in padded))
            slots = arrange(part, row_of, self.config.baskets)
            tokens.append(slots.item[slots.item >= FIRST_ITEM])
            z = self(slots, self._dropout(generator)).flatten(0, 1)  # [B G, D]
            where, target = targets(slots, following.index_select(0, index))
            used, place = torch.unique(where, return_inverse=True)
            query.append(z.index_select(0, used))
            row.append(place + rows)
            item.append(target)
            rows += len(used)
        if not rows:
            return self._nothing()
        rec = self._recommendation(torch.cat(query), Positives(torch.cat(row), torch.cat(item) - FIRST_ITEM), generator)
        return self._total(rec, self._distillation(torch.cat(tokens), kd_generator))

    def _total(self, rec: Tensor, kd: Tensor) -> Loss:
        return Loss(rec + self.config.lambda_kd * kd, {"rec": rec.detach(), "kd": kd.detach()})

    def _candidates(self, batch: Batch, z: Tensor, row_of: Tensor) -> Tensor:
        """Return the loss of user vectors [B, D] on their requests' candidates, those that are known.

        Softmax cross-entropy where every row was given exactly one positive, the mean over rows that know theirs, else
        binary cross-entropy over all candidates.
        """
        row = take(row_of, batch.candidates.item)  # [B, C]
        logits = (F.embedding(row, self.item, padding_idx=PAD) @ z[:, :, None]).squeeze(2)
        weight = batch.weight * (row >= FIRST_ITEM)
        positive = batch.label * weight
        if bool(((batch.label * batch.weight > 0).sum(1) == 1).all()):
            logits = logits if batch.log_q is None else logits - batch.log_q
            logits = logits.masked_fill(weight == 0, torch.finfo(logits.dtype).min)
            return -(logits.log_softmax(1) * (positive > 0)).sum() / (positive > 0).sum().clamp(min=1)
        return binary_cross_entropy(logits, positive, weight, batch.log_q)

    def forward(self, slots: Slots, drop: Drop, newest: bool = False) -> Tensor:
        """Return Zhat, both branches mixed, of every basket [B, G, D] or of the newest only [B, 1, D]."""
        x = self.inputs(slots, drop)
        return self._mixed(lambda branch: branch(x, slots, drop, newest))

    def _mixed(self, output: Callable[[Branch], Tensor]) -> Tensor:
        """Return the branches' outputs mixed by alpha; a branch without weight (SASRec's long one) is not computed."""
        weights = ((self.short, self.config.alpha), (self.long, 1 - self.config.alpha))
        first, *second = (weight * output(branch) for branch, weight in weights if weight)
        return first + second[0] if second else first

    def inputs(self, slots: Slots, drop: Drop) -> Tensor:
        """Return X, the embedded slots [B, T, D], zero at padding."""
        x = math.sqrt(self.config.width) * F.embedding(slots.item, self.item, padding_idx=PAD)
        place = slots.basket + (self.config.window - slots.count.shape[1])  # the newest basket reads the last row
        return drop(x + F.embedding(place, self.position)) * slots.real[:, :, None]

    def _recommendation(self, query: Tensor, positives: Positives, generator: torch.Generator) -> Tensor:
        """Return the cross-entropy of queries [R, D], mean over each row's targets, then over rows."""
        table, rows = self.item[FIRST_ITEM:], len(query)
        share = 1 / torch.bincount(positives.row, minlength=rows)[positives.row].to(query.dtype)  # [P]
        logit = (query.index_select(0, positives.row) * table.index_select(0, positives.item)).sum(1)  # [P]
        if self.config.softmax == "sampled":
            proposal = Proposal.mixed(self.items.count[FIRST_ITEM:])
            draws = proposal.draw(self.config.negatives, generator)
            partition = sampled_log_partition(query, table, positives, draws, proposal, pad_class=True).mean()
        else:
            partition = self._partition(query, table, query.new_full((rows,), 1 / rows), pad_class=True)
        return partition - (share * logit).sum() / rows

    def _distillation(self, tokens: Tensor, generator: torch.Generator) -> Tensor:
        """Return TED's loss over the input tokens of a batch (int64, repeats included)."""
        transitions = self.items.transitions
        tokens = tokens[transitions.offsets.diff()[tokens] > 0]
        if not self.config.lambda_kd or not len(tokens):
            return self.item.new_zeros(())
        weight = self.item.new_ones(len(tokens))
        limit = self.config.kd_heads
        if limit:
            order = torch.randperm(len(tokens), generator=generator, device=generator.device)[:limit]
            tokens, number = torch.unique(tokens[order], return_counts=True)
            weight = number.to(weight.dtype)
        scaled = math.sqrt(self.config.width) * self.item.index_select(0, tokens)  # [M, D]
        head = self._dropout(generator)(scaled) / self.tau
        distinct, place = torch.unique(tokens, return_inverse=True)
        mean = teacher(transitions, distinct, self.item, self.tau).index_select(0, place)  # [M, D]
        weight = weight / weight.sum()
        partition = self._partition(head, self.item[FIRST_ITEM:], weight, pad_class=False)
        return partition - (weight * (head * mean).sum(1)).sum()

    def _partition(self, query: Tensor, table: Tensor, weight: Tensor, pad_class: bool) -> Tensor:
        if self.config.softmax == "full":
            return (weight * log_partition(query, table, pad_class)).sum()
        return chunked_log_partition(query, table, weight, pad_class)

    def _dropout(self, generator: torch.Generator) -> Drop:
        rate = self.config.dropout if self.training else 0.0
        return lambda x: dropout(x, rate, generator)

    def _nothing(self) -> Loss:
        zero = self.item.sum() * 0
        return Loss(zero, {"rec": zero.detach(), "kd": zero.detach()})


def teacher(transitions: Transitions, heads: Tensor, table: Tensor, tau: float) -> Tensor:
    """Return the mean item vector under each head's teacher distribution, [M, D].

    The teacher of head i is p_i = softmax(r_i / tau) over all N items, r_i = C_i / max_j C_ij: items never seen after i
    keep exp(0) each. With b = exp(-1 / tau), what such an item weighs once the row maximum is taken out, and
    a_ij = exp((r_ij - 1) / tau) - b on observed edges,

        sum_j p_ij e_j = (b sum_j e_j + sum_observed a_ij e_j) / (N b + sum_observed a_ij),

    so that the cross-entropy of a pupil with logits s_j = x . e_j is logsumexp_j s_j - x . (this): exact, and no [M, N]
    teacher is ever made.

    Args:
        transitions: counts by row; edges to rows 0 and 1 are ignored.
        heads: int64 [M] rows with at least one edge.
        table: [V, D] item vectors.
        tau: temperature.
    """
    number = transitions.offsets.diff()[heads]  # [M] edges of each head
    first = number.cumsum(0) - number  # [M] where its edges begin below
    head = torch.repeat_interleave(torch.arange(len(heads), device=heads.device), number)  # [edges]
    edge = torch.arange(len(head), device=heads.device) + (transitions.offsets[heads] - first)[head]
    target = transitions.target.index_select(0, edge).long()
    count = transitions.weight.index_select(0, edge).to(table.dtype) * (target >= FIRST_ITEM)
    largest = count.new_zeros(len(heads)).scatter_reduce_(0, head, count, "amax")
    relative = count / largest.clamp(min=EPSILON)[head]  # r, at most 1
    base = math.exp(-1 / tau)
    extra = ((relative - 1) / tau).exp() - base  # a, 0 where r = 0
    observed = F.embedding_bag(target, table, first, mode="sum", per_sample_weights=extra)  # [M, D]
    mass = base * (len(table) - FIRST_ITEM) + extra.new_zeros(len(heads)).index_add_(0, head, extra)
    return (base * table[FIRST_ITEM:].sum(0) + observed) / mass[:, None]


def _keep(x: Tensor) -> Tensor:
    return x
