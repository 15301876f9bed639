"""Mean pooling: the history is the mean of its events, whatever the candidate.

The control for every attention model: same fields, same head, same budget, no attention. Its gap to DIN or DARE is
what looking at the candidate is worth. The idea is the sum pooling of Covington, Adams and Sargin, "Deep Neural
Networks for YouTube Recommendations", RecSys 2016; the head is the one of DARE's authors, so that only pooling differs.

Ours: a field for what an event was, where the log has several actions (`ranking.embeddings`).

    u = sum_t m_t e_t / max(n, 1)      logit = head([v ; u ; v*u])
"""

from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from ranking.batch import Batch, Candidates, History, Request
from ranking.embeddings import Fields, FieldWidths, PositionMode, hide_items, positions
from ranking.items import ItemTable
from ranking.layers import ScoringHead, interaction, score_real
from ranking.losses import pointwise_loss
from ranking.ranker import Loss, TrainsOn
from recsys.errors import ConfigError


@dataclass(frozen=True)
class MeanPoolingConfig:
    """Attributes of the model.

    Attributes:
        window: newest events read.
        widths: columns of the fields.
        category: item column used as category; None for none.
        pos_mode: whether events of one moment share a position.
        unknown_rate: share of items hidden behind the unknown row in a training step.
    """

    window: int = 200
    widths: FieldWidths = field(default_factory=FieldWidths)
    category: str | None = "category"
    pos_mode: PositionMode = "slot"
    unknown_rate: float = 0.02

    def __post_init__(self) -> None:
        if self.window < 1 or not 0 <= self.unknown_rate < 1:
            raise ConfigError(
                f"window={self.window}, unknown_rate={self.unknown_rate}: expected window at least 1, rate in [0, 1)"
            )


class MeanPoolingState(NamedTuple):
    """One vector per user."""

    user: Tensor  # float32 [B, D]


class MeanPooling(nn.Module):
    """Scores a candidate against the mean of the history."""

    trains_on: ClassVar[TrainsOn] = "requests"

    def __init__(self, config: MeanPoolingConfig, items: ItemTable) -> None:
        super().__init__()
        self.config = config
        self.items = items
        self.fields = Fields(items, config.widths, config.category, config.window)
        self.head = ScoringHead(3 * self.fields.width)

    @property
    def window(self) -> int | None:
        """Newest events read."""
        return self.config.window

    def encode(self, history: History) -> MeanPoolingState:
        """Return the mean of the newest events' vectors; zero for an empty history."""
        return self._encode(history, self.items.embedding_row)

    def score(self, state: MeanPoolingState, request: Request, candidates: Candidates) -> Tensor:
        """Return logits float32 [B, C]; cost O(C), whatever the length of the history."""
        return self._score(state, candidates, self.items.embedding_row)

    def loss(self, batch: Batch, generator: torch.Generator) -> Loss:
        """Return binary cross-entropy over the real candidates."""
        row_of = hide_items(self.items, self.config.unknown_rate, generator)
        logits = self._score(self._encode(batch.history, row_of), batch.candidates, row_of)
        return pointwise_loss(logits, batch)

    def _encode(self, history: History, row_of: Tensor) -> MeanPoolingState:
        padded = history.padded(self.config.window)
        position = positions(padded.time, padded.mask, self.config.pos_mode)
        e = self.fields.history(padded, position, row_of)  # [B, T, D]
        return MeanPoolingState(e.sum(1) / padded.mask.sum(1, keepdim=True).clamp_min(1))

    def _score(self, state: MeanPoolingState, candidates: Candidates, row_of: Tensor) -> Tensor:
        v = self.fields.candidate(candidates.item, row_of)  # [B, C, D]
        u = state.user[:, None, :].expand_as(v)
        return score_real(self.head, interaction(v, u), candidates.mask)
