"""DIN: target attention over the whole history, exact and affordable.

Zhou et al., "Deep Interest Network for Click-Through Rate Prediction", KDD 2018, arXiv 1706.06978.

    a(q, s) = w2 . PReLU(W [q ; s ; q - s ; q * s] + b) + c        one number per candidate q and event s
    h       = sum_t a(q, s_t) s_t                                  raw weights, as in the paper: intensity counts
    logit   = head([v ; h ; v*h])

Same fields and head as DARE, so that only the attention differs. What we change is how it is computed, not what:

* W [q ; s ; q-s ; q*s] = (Wa + Wc) q + ((Wb - Wc) + Wd diag(q)) s: one matrix per candidate, applied to the history by
  one batched product, in place of a [B, C, T, 4D] tensor.
* PReLU(z) = slope z + (1 - slope) relu(z), and w2 . z is linear in s too, so only relu(z) is ever held.
* Candidates go through in chunks, so that memory does not grow with C.

Ours: a field for what an event was, where the log has several actions (`ranking.embeddings`).
`weights = "softmax"` is the variant of DARE's authors: softmax(a / D) over the real events.
"""

from dataclasses import dataclass, field
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from ranking.attention import Attention
from ranking.batch import Batch, Candidates, History, Request
from ranking.embeddings import Fields, FieldWidths, PositionMode, hide_items, positions
from ranking.items import ItemTable
from ranking.layers import AttentionNetwork, ScoringHead, candidate_chunks, interaction, masked_softmax, score_real
from ranking.losses import pointwise_loss
from ranking.ranker import Loss, TrainsOn
from recsys.errors import ConfigError


@dataclass(frozen=True)
class DinConfig:
    """Attributes of the model.

    Attributes:
        window: newest events read; a small one is the control "DIN-short".
        widths: columns of the fields.
        category: item column used as category; None for none.
        pos_mode: whether events of one moment share a position.
        hidden: width of the attention network.
        weights: `raw` sums, `softmax` averages.
        unknown_rate: share of items hidden behind the unknown row in a training step.
    """

    window: int = 200
    widths: FieldWidths = field(default_factory=FieldWidths)
    category: str | None = "category"
    pos_mode: PositionMode = "slot"
    hidden: int = 36
    weights: Literal["raw", "softmax"] = "raw"
    unknown_rate: float = 0.02

    def __post_init__(self) -> None:
        if self.window < 1 or self.hidden < 1 or not 0 <= self.unknown_rate < 1:
            raise ConfigError(
                f"window={self.window}, hidden={self.hidden}, unknown_rate={self.unknown_rate}: "
                "expected window and hidden at least 1, rate in [0, 1)"
            )


class DinState(NamedTuple):
    """The embedded history."""

    event: Tensor  # float32 [B, T, D], zero at padding
    mask: Tensor  # bool [B, T]


class Din(nn.Module):
    """Scores a candidate by what its own attention finds in the history."""

    trains_on: ClassVar[TrainsOn] = "requests"

    def __init__(self, config: DinConfig, items: ItemTable) -> None:
        super().__init__()
        self.config = config
        self.items = items
        self.fields = Fields(items, config.widths, config.category, config.window)
        self.attention = AttentionNetwork(self.fields.width, config.hidden)
        self.head = ScoringHead(3 * self.fields.width)

    @property
    def window(self) -> int | None:
        """Newest events read."""
        return self.config.window

    def encode(self, history: History) -> DinState:
        """Return the embedded newest events, once for all candidates."""
        return self._encode(history, self.items.embedding_row)

    def score(self, state: DinState, request: Request, candidates: Candidates) -> Tensor:
        """Return logits float32 [B, C]; cost O(C T D hidden), memory bounded by `CHUNK_ELEMENTS`."""
        return self._score(state, candidates, self.items.embedding_row)

    def loss(self, batch: Batch, generator: torch.Generator) -> Loss:
        """Return binary cross-entropy over the real candidates."""
        row_of = hide_items(self.items, self.config.unknown_rate, generator)
        logits = self._score(self._encode(batch.history, row_of), batch.candidates, row_of)
        return pointwise_loss(logits, batch)

    def attention_of(self, history: History, candidates: Candidates) -> Attention:
        """Return the weights of all events of the window; nothing is approximated."""
        state = self.encode(history)
        v = self.fields.candidate(candidates.item, self.items.embedding_row)
        weight = self._weights(state, v)
        return Attention(weight, weight, state.event.to(weight.dtype))

    def _encode(self, history: History, row_of: Tensor) -> DinState:
        padded = history.padded(self.config.window)
        position = positions(padded.time, padded.mask, self.config.pos_mode)
        return DinState(self.fields.history(padded, position, row_of), padded.mask)

    def _score(self, state: DinState, candidates: Candidates, row_of: Tensor) -> Tensor:
        v = self.fields.candidate(candidates.item, row_of)  # [B, C, D]
        elements = max(state.mask.numel(), state.mask.shape[1] * self.config.hidden)  # the network goes by requests
        pooled = [self._pool(state, v[:, chunk]) for chunk in candidate_chunks(v.shape[1], elements)]
        return score_real(self.head, interaction(v, torch.cat(pooled, 1)), candidates.mask)

    def _pool(self, state: DinState, v: Tensor) -> Tensor:
        """Return what each candidate [B, C, D] finds in the history, [B, C, D]."""
        weight = self._weights(state, v)
        if self.training:
            return weight @ state.event
        return (weight.double() @ state.event.double()).to(v.dtype)

    def _weights(self, state: DinState, v: Tensor) -> Tensor:
        """Return the attention of candidates [B, C, D] to the events, [B, C, T]."""
        weight: Tensor = self.attention(v, state.event)  # [B, C, T]
        mask = state.mask[:, None, :]
        if self.config.weights == "softmax":
            return masked_softmax(weight / v.shape[-1], mask.expand_as(weight))
        return weight.masked_fill(~mask, 0.0)
