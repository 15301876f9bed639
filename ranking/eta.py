"""ETA: the history is searched by hash codes of the embeddings that the network itself learns.

Chen et al., "End-to-End User Behavior Retrieval in Click-Through Rate Prediction Model", 2021, arXiv 2108.04468.

    code(x) = [x . r_1 > 0, ..., x . r_32 > 0]        32 fixed random directions, so one integer per event (SimHash)
    S       = the K events whose codes differ least from the candidate's, ties to the newer
    h       = sum_S softmax(<e, v> / sqrt(D)) e       logit = head([v ; h ; v*h])

The share of bits in which two codes differ estimates the angle between the vectors, so the search follows the very
vectors that attention then reads, at 4 bytes an event. Codes are made anew from today's embeddings; they have no
gradient, and what is not found is not trained by this request.

Kept: the hash search inside the network, K found events, target attention over them. As with all references here,
fields and head are DARE's, so that only the search differs; the paper has several attention heads, the user's profile
and a second, short history beside this one. Ours: a field for what an event was, hashed with the others, where the log
has several actions.
"""

import math
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from ranking.attention import Attention, of_found
from ranking.batch import Batch, Candidates, History, Request
from ranking.embeddings import Fields, FieldWidths, PositionMode, hide_items, positions
from ranking.items import ItemTable
from ranking.layers import ScoringHead, attend, candidate_chunks, interaction, score_real, search
from ranking.losses import pointwise_loss
from ranking.ranker import Loss, TrainsOn
from recsys.errors import ConfigError
from recsys.randomness import generator

BITS = 32

MOST_EVENTS = 2**24 // (BITS + 1)
"""Longest window whose (distance, slot) pairs are whole numbers that float32 holds exactly."""


@dataclass(frozen=True)
class EtaConfig:
    """Attributes of the model.

    Attributes:
        window: newest events read (T).
        retrieved: events kept by the search for each candidate (K).
        widths: columns of the fields.
        category: item column used as category; None for none.
        pos_mode: whether events of one moment share a position.
        unknown_rate: share of items hidden behind the unknown row in a training step.
    """

    window: int = 200
    retrieved: int = 20
    widths: FieldWidths = field(default_factory=FieldWidths)
    category: str | None = "category"
    pos_mode: PositionMode = "slot"
    unknown_rate: float = 0.02

    def __post_init__(self) -> None:
        if not 1 <= self.retrieved <= self.window <= MOST_EVENTS:
            raise ConfigError(
                f"retrieved={self.retrieved}, window={self.window}: expected 1 <= retrieved <= window <= {MOST_EVENTS}"
            )
        if not 0 <= self.unknown_rate < 1:
            raise ConfigError(f"unknown_rate={self.unknown_rate}: expected a rate in [0, 1)")


class EtaState(NamedTuple):
    """The embedded history and its codes."""

    event: Tensor  # float32 [B, T, D], zero at padding
    code: Tensor  # int32 [B, T]
    mask: Tensor  # bool [B, T]


class Eta(nn.Module):
    """Scores a candidate by the K events with the nearest hash codes."""

    trains_on: ClassVar[TrainsOn] = "requests"
    planes: Tensor

    def __init__(self, config: EtaConfig, items: ItemTable) -> None:
        super().__init__()
        self.config = config
        self.items = items
        self.fields = Fields(items, config.widths, config.category, config.window)
        self.head = ScoringHead(3 * self.fields.width)
        # Saved with the weights, which have learned to live with these directions.
        planes = generator(0, 0, "eta/planes").standard_normal((self.fields.width, BITS), "float32")
        self.register_buffer("planes", torch.from_numpy(planes))

    @property
    def window(self) -> int | None:
        """Newest events read."""
        return self.config.window

    def encode(self, history: History) -> EtaState:
        """Return the newest events embedded and hashed, once for all candidates."""
        return self._encode(history, self.items.embedding_row)

    def score(self, state: EtaState, request: Request, candidates: Candidates) -> Tensor:
        """Return logits float32 [B, C]; cost O(C T) integer operations and O(C K D) for attention, by chunks of C."""
        v = self.fields.candidate(candidates.item, self.items.embedding_row)  # [B, C, D]
        code = self._code(v)
        state, v = state._replace(event=state.event.double()), v.double()  # see `layers`
        chunks = candidate_chunks(v.shape[1], state.mask.numel())
        h = torch.cat([self._pool(state, v[:, chunk], code[:, chunk]) for chunk in chunks], 1)
        return score_real(self.head, interaction(v, h), candidates.mask)

    def loss(self, batch: Batch, generator: torch.Generator) -> Loss:
        """Return binary cross-entropy over the real candidates."""
        row_of = hide_items(self.items, self.config.unknown_rate, generator)
        state = self._encode(batch.history, row_of)
        v = self.fields.candidate(batch.candidates.item, row_of)
        h = self._pool(state, v, self._code(v))
        logits = score_real(self.head, interaction(v, h), batch.candidates.mask)
        return pointwise_loss(logits, batch)

    def attention_of(self, history: History, candidates: Candidates) -> Attention:
        """Return the weights of the K nearest events, beside softmax attention over all of the window."""
        state = self.encode(history)
        v = self.fields.candidate(candidates.item, self.items.embedding_row)
        index, found = search(nearness(state.code, self._code(v)), state.mask, self.config.retrieved)
        scores = v.double() @ state.event.double().mT / math.sqrt(v.shape[-1])
        return of_found(scores, state.mask, index, found, state.event)

    def _encode(self, history: History, row_of: Tensor) -> EtaState:
        padded = history.padded(self.config.window)
        position = positions(padded.time, padded.mask, self.config.pos_mode)
        event = self.fields.history(padded, position, row_of)
        return EtaState(event, self._code(event), padded.mask)

    @torch.no_grad()
    def _code(self, x: Tensor) -> Tensor:
        """Return the codes int32 [...] of vectors [..., D].

        In float64 for scores: no sign may hang on how the batch was shaped.
        """
        x = x if self.training else x.double()
        place = torch.arange(BITS, dtype=torch.int32, device=x.device)
        bit = torch.ones_like(place) << place
        return ((x @ self.planes.to(x.dtype) > 0) * bit).sum(-1, dtype=torch.int32)

    def _pool(self, state: EtaState, v: Tensor, code: Tensor) -> Tensor:
        """Return h [B, C, D] for candidates [B, C, D] and their codes [B, C]."""
        index, found = search(nearness(state.code, code), state.mask, self.config.retrieved)
        return attend(v, state.event, index, found)


def hamming(event: Tensor, candidate: Tensor) -> Tensor:
    """Count the bits in which codes int32 [B, T] and [B, C] differ, int32 [B, C, T]."""
    x = candidate[:, :, None] ^ event[:, None, :]
    # Sums over 2, 4, then 8 neighbouring bits; the product adds up the bytes (Warren, Hacker's Delight, 5-1).
    x -= (x >> 1) & 0x55555555
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return (x * 0x01010101) >> 24


def nearness(event: Tensor, candidate: Tensor) -> Tensor:
    """Return [B, C, T] in which nearer codes are larger and, at equal distance, newer slots: no two are equal."""
    length = event.shape[1]
    slot = torch.arange(length, device=event.device, dtype=torch.int32)
    return (slot - length * hamming(event, candidate)).float()
