"""SIM with hard search: the newest events of the candidate's own category, and nothing else.

Pi et al., "Search-based User Interest Modeling with Lifelong Sequential Behavior Data for Click-Through Rate
Prediction", CIKM 2020, arXiv 2006.05639.

    S = the newest K events whose category is the candidate's; fewer if there are fewer
    h = sum_S softmax(<e, v> / sqrt(D)) e, 0 if S is empty            logit = head([v ; h ; v*h])

Kept: the index by category (the paper's behaviour tree) and attention over what it finds. Changed: fields and head are
DARE's, so that only the search differs; no profile and no second, short history beside it; single-headed attention; no
filling up with other recent events, so that "nothing of this category" stays visible. Ours: a field for what an event
was, where the log has several actions.

A history is sorted by category once. What a candidate needs then lies side by side, and the search is two binary
searches: O(C log T), whatever the length of the history.
"""

import math
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from ranking.attention import Attention, of_found
from ranking.batch import Batch, Candidates, History, Padded, Request
from ranking.embeddings import Fields, FieldWidths, PositionMode, hide_items, positions, take
from ranking.items import ItemTable
from ranking.layers import ScoringHead, attend, candidate_chunks, interaction, score_real
from ranking.losses import pointwise_loss
from ranking.ranker import Loss, TrainsOn
from recsys.errors import ConfigError


@dataclass(frozen=True)
class SimHardConfig:
    """Attributes of the model.

    Attributes:
        window: newest events read (T).
        retrieved: most events kept for each candidate (K).
        widths: columns of the fields.
        category: item column that is searched by, and embedded.
        pos_mode: whether events of one moment share a position.
        unknown_rate: share of items hidden behind the unknown row in a training step.
    """

    window: int = 200
    retrieved: int = 20
    widths: FieldWidths = field(default_factory=FieldWidths)
    category: str = "category"
    pos_mode: PositionMode = "slot"
    unknown_rate: float = 0.02

    def __post_init__(self) -> None:
        if not 1 <= self.retrieved <= self.window:
            raise ConfigError(
                f"retrieved={self.retrieved}, window={self.window}: expected retrieved in 1..window, it cannot keep "
                "more than it reads"
            )
        if not 0 <= self.unknown_rate < 1:
            raise ConfigError(f"unknown_rate={self.unknown_rate}: expected a rate in [0, 1)")


class SimHardState(NamedTuple):
    """A history ordered by category, oldest first inside each; padding (category 0) comes first of all."""

    category: Tensor  # int32 [B, T], ascending
    event: Tensor  # float32 [B, T, D] in that order, zero at padding


class SimHard(nn.Module):
    """Scores a candidate by the newest events of its category."""

    trains_on: ClassVar[TrainsOn] = "requests"

    def __init__(self, config: SimHardConfig, items: ItemTable) -> None:
        super().__init__()
        self.config = config
        self.items = items
        items.column(config.category)  # refused here if there is none
        self.fields = Fields(items, config.widths, config.category, config.window)
        self.head = ScoringHead(3 * self.fields.width)

    @property
    def window(self) -> int | None:
        """Newest events read."""
        return self.config.window

    def encode(self, history: History) -> SimHardState:
        """Return the newest events embedded and ordered by category, once for all candidates."""
        return self._encode(history, self.items.embedding_row)

    def score(self, state: SimHardState, request: Request, candidates: Candidates) -> Tensor:
        """Return logits float32 [B, C]; cost O(C K D), by chunks of C."""
        v = self.fields.candidate(candidates.item, self.items.embedding_row).double()  # [B, C, D], see `layers`
        state = state._replace(event=state.event.double())
        category = take(self.items.column(self.config.category), candidates.item)
        elements = min(self.config.retrieved, state.category.shape[1]) * v.shape[0] * v.shape[2]
        chunks = candidate_chunks(v.shape[1], elements)
        h = torch.cat([self._pool(state, v[:, chunk], category[:, chunk]) for chunk in chunks], 1)
        return score_real(self.head, interaction(v, h), candidates.mask)

    def loss(self, batch: Batch, generator: torch.Generator) -> Loss:
        """Return binary cross-entropy over the real candidates."""
        row_of = hide_items(self.items, self.config.unknown_rate, generator)
        v = self.fields.candidate(batch.candidates.item, row_of)
        category = take(self.items.column(self.config.category), batch.candidates.item)
        h = self._pool(self._encode(batch.history, row_of), v, category)
        logits = score_real(self.head, interaction(v, h), batch.candidates.mask)
        return pointwise_loss(logits, batch)

    def attention_of(self, history: History, candidates: Candidates) -> Attention:
        """Return the weights of the found events, beside softmax attention over all of the window, any category."""
        row_of, padded = self.items.embedding_row, history.padded(self.config.window)
        v = self.fields.candidate(candidates.item, row_of).double()
        position = positions(padded.time, padded.mask, self.config.pos_mode)
        event = self.fields.history(padded, position, row_of).double()
        ordered, order = self._by_category(padded)
        place, found = newest_of(
            ordered, take(self.items.column(self.config.category), candidates.item), self.config.retrieved
        )
        index = order[:, None, :].expand(-1, place.shape[1], -1).gather(2, place)
        return of_found(v @ event.mT / math.sqrt(v.shape[-1]), padded.mask, index, found, event)

    def _by_category(self, padded: Padded) -> tuple[Tensor, Tensor]:
        """Return the categories of the events [B, T], ascending, and the slots they came from."""
        found = take(self.items.column(self.config.category), padded.item).sort(dim=1, stable=True)
        return found.values, found.indices

    def _encode(self, history: History, row_of: Tensor) -> SimHardState:
        padded = history.padded(self.config.window)
        position = positions(padded.time, padded.mask, self.config.pos_mode)
        category, order = self._by_category(padded)
        sorted_ = Padded(*(tensor.gather(1, order) for tensor in padded))
        return SimHardState(category, self.fields.history(sorted_, position.gather(1, order), row_of))

    def _pool(self, state: SimHardState, v: Tensor, category: Tensor) -> Tensor:
        """Return h [B, C, D] for candidates [B, C, D] and their categories int32 [B, C]."""
        index, found = newest_of(state.category, category, self.config.retrieved)
        return attend(v, state.event, index, found)


def newest_of(ordered: Tensor, wanted: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Find the last k places of each wanted number in ascending rows.

    Args:
        ordered: int32 [B, T], ascending along T.
        wanted: int32 [B, C].
        k: most places to find.

    Returns:
        Places int64 [B, C, min(k, T)], the last first and all distinct, and bool of that shape: False past the first.
    """
    length, wanted = ordered.shape[1], wanted.contiguous()
    start = torch.searchsorted(ordered, wanted)  # [B, C]
    end = torch.searchsorted(ordered, wanted, right=True)
    place = (end - 1)[:, :, None] - torch.arange(min(k, length), device=ordered.device)  # [B, C, K]
    return place.remainder(length), place >= start[:, :, None]
