"""What a candidate reads of a history: the weights a model gives its events, and those it stands in for.

Models that cannot afford attention over all events search for a few, or hash them into sums. Beside what they do stands
what they approximate, so that a report can say how far apart the two are, and which events were looked at.
"""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ranking.batch import Candidates, History
from ranking.layers import masked_softmax


class Attention(NamedTuple):
    """Weights of the events in `history.padded(window)`, newest last, 0 at padding; their scale means nothing.

    `weight` @ `event` is what the model reads of the history, `exact` @ `event` what it would read without its
    approximation. A model that attends to all its events has the same in both.
    """

    weight: Tensor  # float [B, C, T]
    exact: Tensor  # float [B, C, T]
    event: Tensor  # float [B, T, D], zero at padding

    @property
    def elsewhere(self) -> Tensor:
        """Return the share of attention that the exact one puts on other events, [B, C]: total variation, in 0..1.

        1 where the model finds nothing at all, NaN where the exact attention has nothing to attend to.
        """
        weight, exact = (each.abs() / each.abs().sum(-1, keepdim=True) for each in (self.weight, self.exact))
        common: Tensor = torch.minimum(weight.nan_to_num(0.0), exact).sum(-1)
        return (1 - common).clamp_min(0.0)

    @property
    def turned(self) -> Tensor:
        """Return 1 - cosine between what is read and what the exact attention reads, [B, C]; NaN where that is zero."""
        read, wanted = self.weight @ self.event, self.exact @ self.event  # [B, C, D]
        cosine = torch.cosine_similarity(read, wanted, dim=-1)
        return (1 - cosine).masked_fill(wanted.norm(dim=-1) == 0, torch.nan)


class Attentive(Protocol):
    """A ranker whose candidates look at single events of a history."""

    def attention_of(self, history: History, candidates: Candidates) -> Attention:
        """Return the weights of all events for every candidate; for reports, not for the request path."""
        ...


def of_found(scores: Tensor, mask: Tensor, index: Tensor, found: Tensor, event: Tensor) -> Attention:
    """Return softmax attention over found events, beside that over all of them.

    Args:
        scores: [B, C, T], attention logits.
        mask: bool [B, T], True at real events.
        index: int64 [B, C, K], distinct slots.
        found: bool [B, C, K], which of them count.
        event: [B, T, D].
    """
    weight = torch.zeros_like(scores).scatter(-1, index, masked_softmax(scores.gather(-1, index), found))
    return Attention(weight, masked_softmax(scores, mask[:, None, :].expand_as(scores)), event.to(scores.dtype))
