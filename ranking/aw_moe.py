"""AW-MoE, our reading: experts mixed by a gate that attends to the history, with a contrastive loss on the gate.

"Attention Weighted Mixture of Experts with Contrastive Learning for Personalized Ranking in E-commerce", ICDE 2023,
arXiv 2306.05011. No code of the authors and no figure of theirs is known to us. From its abstract: experts and gate
both read the history; the gate has one gate unit and one activation unit, whose attention gives a weight per expert;
events are masked at random to look like users with few of them; a contrastive loss on the gate's output helps those.
Every equation, size and default below is our reading and must not be reported as the paper's.

    h_j, h_t = MLP_in(event j), MLP_in(candidate)                     item | category (| action) -> 64 -> D
    h_q      = MLP_q(query)                                           16 -> 64 -> D, only where requests carry one
    a_j      = a_e([h_j ; h_t ; h_j*h_t ; h_j - h_t])                 attention of the experts, no softmax
    s_k      = Expert_k([sum_j mu_j a_j h_j ; h_t ; h_q])             one number per expert; mu: real events
    G_j, w_j = GateUnit([h_j ; c]), ActUnit([h_j ; c ; h_j*c ; h_j - c])    own weights; c = h_q, h_t, or nothing
    g        = g0 + sum_j mu_j w_j G_j                                K numbers: not a distribution
    logit    = sum_k g_k s_k

    L    = L_bce + lambda L_cl
    L_cl = -mean_i log( e^(cos(g_i, g'_i)/tau) / (e^(cos(g_i, g'_i)/tau) + sum_n e^(cos(g_i, z_n)/tau)) )

g' is the gate of a view in which each event is kept with probability 1 - p (the newest if none is). z_n are the other
requests of the batch: their views g'_n (variant A) or their gates g_n (variant B). Requests with an equal history and
query are no negatives of each other, requests without events take no part.

`gate = "none"` sees no candidate: g is one vector per user, a part of the state. `"query"` sees what the request asks
for: g is one vector per request, made once in `score`. `"target"` sees the candidate. A query is a value of an item
column (a department, a genre); where a request asks for nothing h_q is 0. No log that is read here carries queries, so
training with one is refused and told of `"target"`.
g0 (ours) is what users without events are ranked by; without it their every logit is 0.
For comparison: `gate = "mixture"` is the plain mixture of experts, softmax of a unit that sees the query, else the
candidate, alone; `gate = "fixed"` gives every expert 1/K, with one expert DIN; `pooling = "mean"` beside it is the
network without attention; `masking_alone` shows events to experts and gate as the view does, without the contrastive
loss.
"""

import itertools
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from ranking.batch import PAD, Batch, Candidates, History, Request
from ranking.contrast import Against, Similarity, contrastive_loss, masked_view, others, some_of
from ranking.embeddings import INIT_STD, Fields, FieldWidths, ItemEmbedding, hide_items
from ranking.gate_units import HIDDEN, ActivationUnit, GateUnit
from ranking.items import ItemTable
from ranking.layers import Layers, candidate_chunks, masked_softmax
from ranking.losses import binary_cross_entropy
from ranking.ranker import NEGATIVE, Loss, TrainsOn
from recsys.errors import ConfigError, DataError

EMBEDDING_STD = 0.3
"""Spread of the embeddings at the start. With the 0.01 of models that normalise their input the first layers see little
but their own biases: in the contract's small world all ReLUs of MLP_in died at a learning rate of 0.01."""

QUERY_WIDTH = 16
"""Columns of a query's own vector."""

UNIT_SCALE = 0.1
"""Factor on the last layers of the units at the start: they are summed over the whole history."""


@dataclass(frozen=True)
class AwMoeConfig:
    """Attributes of the model; all of them are our choices.

    Attributes:
        window: newest events read.
        experts: number of experts (K).
        width: columns of h (D).
        item_width: columns of an item's own vector.
        category_width: columns of its category's.
        action_width: columns of what an event was; for logs of several actions.
        category: item column used as category; None for none.
        query: item column whose values requests ask for; None where they ask for nothing.
        gate: what the gate sees beside the history, see above.
        activation: `raw` weights w, or `softmax` over the real events.
        gate_softmax: make g a distribution over the experts.
        base: learn g0.
        pooling: what the experts see of the history: the sum under attention, or the mean.
        contrast: weight of the contrastive loss (lambda); 0 leaves it out.
        masking: chance that the view loses an event (p).
        temperature: of the contrastive loss (tau).
        variant: its negatives, `views` (A) or `gates` (B) of other requests.
        negatives: how many of them, drawn at random; None for all.
        similarity: `cosine`, or `dot`, which also sees the length of g.
        masking_alone: mask the training histories as the view does.
        unknown_rate: share of items hidden behind the unknown row in a training step.
    """

    window: int = 50
    experts: int = 4
    width: int = 32
    item_width: int = 16
    category_width: int = 16
    action_width: int = 0
    category: str | None = "category"
    query: str | None = None
    gate: Literal["query", "target", "none", "mixture", "fixed"] = "target"
    activation: Literal["raw", "softmax"] = "raw"
    gate_softmax: bool = False
    base: bool = True
    pooling: Literal["attention", "mean"] = "attention"
    contrast: float = 0.05
    masking: float = 0.2
    temperature: float = 1.0
    variant: Against = "views"
    negatives: int | None = None
    similarity: Similarity = "cosine"
    masking_alone: bool = False
    unknown_rate: float = 0.02

    def __post_init__(self) -> None:
        if self.gate == "query" and self.query is None:
            raise ConfigError(
                'gate = "query" needs query = "COLUMN", the item column whose values requests ask for; without queries '
                'use gate = "target"'
            )
        if min(self.window, self.experts, self.width) < 1 or not 0 <= self.unknown_rate < 1:
            raise ConfigError(
                f"window={self.window}, experts={self.experts}, width={self.width}, unknown_rate={self.unknown_rate}: "
                "expected the first three at least 1, rate in [0, 1)"
            )
        if self.contrast < 0 or self.temperature <= 0 or not 0 <= self.masking <= 1:
            raise ConfigError(
                f"contrast={self.contrast}, temperature={self.temperature}, masking={self.masking}: "
                "expected contrast not negative, temperature above 0, masking in [0, 1]"
            )
        if self.negatives is not None and self.negatives < 1:
            raise ConfigError(f"negatives={self.negatives}: expected at least 1, or none given for all")
        if self.contrast and (self.gate in ("mixture", "fixed") or self.masking_alone):
            raise ConfigError(
                f"contrast={self.contrast} with gate={self.gate!r}, masking_alone={self.masking_alone}: the "
                "contrastive loss compares gates of a whole and a masked history; set contrast = 0.0"
            )


class AwMoeState(NamedTuple):
    """The history as the experts and the gate see it."""

    event: Tensor  # float32 [B, T, D], zero at padding
    mask: Tensor  # bool [B, T]
    gate: Tensor  # float32 [B, K] for gate = "none", else [B, 0]


class AwMoe(nn.Module):
    """Scores a candidate by experts that a gate weighs for this history."""

    trains_on: ClassVar[TrainsOn] = "requests"

    def __init__(self, config: AwMoeConfig, items: ItemTable) -> None:
        super().__init__()
        self.config = config
        self.items = items
        width, seen = config.width, 0 if config.gate == "none" else config.width
        widths = FieldWidths(config.item_width, config.category_width, 0, config.action_width)
        self.fields = Fields(items, widths, config.category, config.window)
        self.inner = Layers(*linear_layers(self.fields.width, 64, width), nn.ReLU())  # MLP_in
        self.attention = ActivationUnit(width, width) if config.pooling == "attention" else None
        self.queries, self.asking = self._query_part(config, items)
        self.experts = Experts((2 if self.queries is None else 3) * width, config.experts)
        attends = config.gate in ("query", "target", "none")
        self.activation = ActivationUnit(width, seen) if attends else None
        self.gate_unit = GateUnit(width, seen, config.experts) if attends else None
        mixture = config.gate == "mixture"
        self.mixture = Layers(*linear_layers(width, HIDDEN, config.experts)) if mixture else None
        start = torch.full((config.experts,), 1 / config.experts)
        self.base = nn.Parameter(start) if attends and config.base else None
        self._start()

    @property
    def window(self) -> int | None:
        """Newest events read."""
        return self.config.window

    def encode(self, history: History) -> AwMoeState:
        """Return the events' vectors, and for gate = "none" the gate, once for all candidates."""
        event, mask = self._events(history, self.items.embedding_row)
        gate = event[:, 0, :0]
        if self.config.gate == "none":
            gate = self._gate(event, mask, None).squeeze(1).to(event.dtype)
        return AwMoeState(event, mask, gate)

    def score(self, state: AwMoeState, request: Request, candidates: Candidates) -> Tensor:
        """Return logits float32 [B, C]; cost O(C T D 32), by chunks of C."""
        h = self.inner(self.fields.candidate(candidates.item, self.items.embedding_row))  # [B, C, D]
        asked, whole, logits = self._asked(request.query, h), None, []
        if self.config.gate == "none":
            whole = state.gate[:, None]
        elif asked is not None and self.config.gate in ("query", "mixture"):
            whole = self._gate(state.event, state.mask, asked)  # [B, 1, K], once for all candidates
        for chunk in candidate_chunks(h.shape[1], max(state.mask.numel(), state.mask.shape[1] * HIDDEN)):
            part = h[:, chunk]
            gate = self._gate(state.event, state.mask, part) if whole is None else whole
            logits.append(self._mixed(state.event, state.mask, part, gate, asked))
        return torch.cat(logits, 1).to(h.dtype).masked_fill(~candidates.mask, NEGATIVE)

    def loss(self, batch: Batch, generator: torch.Generator) -> Loss:
        """Return cross-entropy over the real candidates and the contrastive loss of the gate: `bce`, `cl`.

        Raises:
            DataError: the model is built for queries and the batch has none.
        """
        config = self.config
        if config.query is not None and batch.request.query is None:
            raise DataError(
                f'aw_moe with query = "{config.query}": these requests do not say what was asked for; leave query out '
                'and use gate = "target"'
            )
        row_of = hide_items(self.items, config.unknown_rate, generator)
        event, mask = self._events(batch.history, row_of)
        if config.masking_alone:
            mask = masked_view(mask, config.masking, generator)
        h = self.inner(self.fields.candidate(batch.candidates.item, row_of))  # [B, C, D]
        asked = self._asked(batch.request.query, h)
        context = h if asked is None or config.gate == "target" else asked
        if self.activation is None:
            units, gate = None, self._gate(event, mask, context)
        else:
            units = self._gate_units(event, None if config.gate == "none" else context)
            gate = self._attended(*units, mask)
        logits = self._mixed(event, mask, h, gate, asked).masked_fill(~batch.candidates.mask, NEGATIVE)
        bce = binary_cross_entropy(logits, batch.label, batch.weight, batch.log_q)
        if units is None or not config.contrast:
            return Loss(bce, {"bce": bce.detach()})
        cl = self._contrast(batch, units, gate, mask, generator)
        return Loss(bce + config.contrast * cl, {"bce": bce.detach(), "cl": cl.detach()})

    def _contrast(
        self, batch: Batch, units: tuple[Tensor, Tensor], gate: Tensor, mask: Tensor, generator: torch.Generator
    ) -> Tensor:
        """Return L_cl of one gate vector per request: where the gate sees a candidate, its first positive's."""
        config = self.config
        weight, unit = units
        row = torch.arange(len(mask), device=mask.device)
        first = (batch.label > 0).byte().argmax(1) if gate.shape[1] > 1 else torch.zeros_like(row)  # [B]
        view = masked_view(mask, config.masking, generator)
        seen = self._attended(weight[row, first][:, None], unit[row, first][:, None], view).squeeze(1)  # [B, K]
        known = batch.history.padded(config.window).item
        if batch.request.query is not None and self.queries is not None:
            known = torch.cat([batch.request.query.to(known.dtype)[:, None], known], 1)
        negative = others(known, mask)
        if config.negatives is not None:
            negative = some_of(negative, config.negatives, generator)
        return contrastive_loss(
            gate[row, first], seen, negative, mask.any(1), config.variant, config.similarity, config.temperature
        )

    def _events(self, history: History, row_of: Tensor) -> tuple[Tensor, Tensor]:
        """Return h_j [B, T, D], zero at padding, and which are real, bool [B, T]."""
        padded = history.padded(self.config.window)
        h = self.inner(self.fields.history(padded, None, row_of))
        return h.masked_fill(~padded.mask.unsqueeze(-1), 0.0), padded.mask

    @staticmethod
    def _query_part(config: AwMoeConfig, items: ItemTable) -> tuple[ItemEmbedding | None, nn.Module | None]:
        """Return the table of queries and MLP_q; raises `ConfigError` if the items have no such column."""
        if config.query is None:
            return None, None
        there = (*items.columns, *items.multi_columns)
        if config.query not in there:
            raise ConfigError(
                f'query = "{config.query}": the items have no such column, only {", ".join(there) or "none at all"}; '
                'leave query out and use gate = "target"'
            )
        layers = Layers(*linear_layers(QUERY_WIDTH, 64, config.width), nn.ReLU())
        return ItemEmbedding(items.codes(config.query), QUERY_WIDTH), layers

    def _asked(self, query: Tensor | None, h: Tensor) -> Tensor | None:
        """Return h_q [B, 1, D] of queries [B], 0 where there is none; None for a model without queries."""
        if self.queries is None or self.asking is None:
            return None
        if query is None:
            return h.new_zeros(len(h), 1, h.shape[2])
        asked: Tensor = self.asking(self.queries(query[:, None]))
        return asked.masked_fill((query == PAD)[:, None, None], 0.0)

    @torch.no_grad()
    def _start(self) -> None:
        """Draw initial weights that keep the size of what they carry through layers of ReLU; biases are zero."""
        for table in (*self.fields.parameters(), *(() if self.queries is None else self.queries.parameters())):
            table.mul_(EMBEDDING_STD / INIT_STD)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                nn.init.zeros_(module.bias)
        for unit in (self.attention, self.activation, self.gate_unit):
            if unit is not None:
                unit.last.weight.mul_(UNIT_SCALE)

    def _wide(self, x: Tensor) -> Tensor:
        """Return x in float64 unless training, for sums whose order would show in a score's last float32 digit."""
        return x if self.training else x.double()

    def _gate(self, event: Tensor, mask: Tensor, context: Tensor | None) -> Tensor:
        """Return g [B, C, K] of contexts c [B, C, D]; without one C is 1."""
        if self.mixture is not None:
            assert context is not None
            return self._wide(self.mixture(context)).softmax(-1)
        if self.activation is None:
            return torch.full((len(event), 1, self.config.experts), 1 / self.config.experts, device=event.device)
        return self._attended(*self._gate_units(event, context), mask)

    def _gate_units(self, event: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return w [B, C, T] and G [B, C, T, K] of contexts c [B, C, D]; without one C is 1."""
        assert self.activation is not None
        assert self.gate_unit is not None
        inputs = (event,) if context is None else (event, context)
        return self.activation(*inputs), self.gate_unit(*inputs)

    def _attended(self, weight: Tensor, unit: Tensor, mask: Tensor) -> Tensor:
        """Return g [B, C, K] of the units' outputs over the events in mask [B, T]."""
        g = attended(self._wide(weight), self._wide(unit), mask, self.config.activation == "softmax")
        if self.base is not None:
            g = g + self.base
        return g.softmax(-1) if self.config.gate_softmax else g

    def _mixed(self, event: Tensor, mask: Tensor, h: Tensor, gate: Tensor, asked: Tensor | None) -> Tensor:
        """Return logits [B, C] of candidates h [B, C, D] under a gate [B, C, K] or [B, 1, K], queries h_q [B, 1, D]."""
        if self.attention is None:
            real = mask.unsqueeze(-1)
            mean = (self._wide(event) * real).sum(1, keepdim=True) / real.sum(1, keepdim=True).clamp_min(1)  # [B, 1, D]
            pooled = mean.expand_as(h)
        else:
            pooled = experts_view(self._wide(self.attention(event, h)), event, mask)
        parts = [pooled.to(h.dtype), h] if asked is None else [pooled.to(h.dtype), h, asked.expand_as(h)]
        s = self._wide(self.experts(torch.cat(parts, -1)))  # [B, C, K]
        return (gate.to(s.dtype) * s).sum(-1)


class Experts(nn.Module):
    """K networks width -> 80 -> 40 -> 1 side by side.

    Args:
        width: columns of their input.
        experts: K.
    """

    def __init__(self, width: int, experts: int) -> None:
        super().__init__()
        self.each = nn.ModuleList(Layers(*linear_layers(width, 80, 40, 1)) for _ in range(experts))

    def forward(self, x: Tensor) -> Tensor:
        """Return what each expert says, [..., K], of inputs [..., width]."""
        return torch.cat([expert(x) for expert in self.each], -1)


def linear_layers(*widths: int) -> list[nn.Module]:
    """Return linear layers of these widths with a ReLU between them, none after the last."""
    found: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        found += [nn.Linear(before, after), nn.ReLU()]
    return found[:-1]


def experts_view(weight: Tensor, event: Tensor, mask: Tensor) -> Tensor:
    """Return sum_j mu_j a_j h_j, [B, C, D], for weights a [B, C, T] and events [B, T, D]."""
    return weight.masked_fill(~mask[:, None, :], 0.0) @ event.to(weight.dtype)


def attended(weight: Tensor, unit: Tensor, mask: Tensor, softmax: bool = False) -> Tensor:
    """Return sum_j mu_j w_j G_j, [B, C, K], for w [B, C, T], G [B, C, T, K], mu [B, T]; masked before the softmax."""
    real = mask[:, None, :].expand_as(weight)
    weight = masked_softmax(weight, real) if softmax else weight.masked_fill(~real, 0.0)
    return (weight.unsqueeze(-2) @ unit).squeeze(-2)
