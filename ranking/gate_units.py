"""The networks of AW-MoE's attention and gate (our reading of arXiv 2306.05011), each over every event and context.

ActUnit([h_j ; c ; h_j*c ; h_j - c])   one weight per event
GateUnit([h_j ; c])                    one number per event and expert

B requests   T events   C contexts   D width   K experts

Unless they are training, an output does not depend on the other events and contexts, and has no gradient.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from ranking.layers import Layers, by_requests, linear
from ranking.products import steady, steady_each

HIDDEN = 32
"""First layer of both."""


class ActivationUnit(nn.Module):
    """MLP [h ; c ; h*c ; h - c] -> 32 -> 16 -> 1 of every event h and every context c, or of the event alone.

    The first layer is W_h h + W_c c + W_p (h*c) + W_d (h - c) = (W_h + W_d + W_p diag(c)) h + (W_c - W_d) c: one matrix
    per context, applied to the history by one product, in place of a [B, C, T, 4D] tensor.

    Args:
        width: columns of events.
        context: columns of contexts; 0 for none.
    """

    def __init__(self, width: int, context: int) -> None:
        super().__init__()
        self.first = nn.Linear(4 * width if context else width, HIDDEN)
        self.middle = Layers(nn.ReLU(), nn.Linear(HIDDEN, 16), nn.ReLU())
        self.last = nn.Linear(16, 1)

    def forward(self, event: Tensor, context: Tensor | None = None) -> Tensor:
        """Return [B, C, T] for events [B, T, D] and contexts [B, C, D]; [B, 1, T] without contexts."""
        if context is None:
            return self._weights(linear(self.first, event).unsqueeze(2))
        return by_requests(self._weights_of, event.shape[1] * context.shape[1] * HIDDEN, event, context)

    def _weights_of(self, event: Tensor, context: Tensor) -> Tensor:
        batch, count, width = context.shape
        wh, wc, wp, wd = self.first.weight.view(-1, 4, width).unbind(1)  # [32, D] each
        matrix = (context[:, :, None, :] * wp + (wh + wd)).flatten(1, 2)  # [B, C * 32, D]
        constant = _rows(context, wc - wd, self.training) + self.first.bias  # [B, C, 32]
        z = event @ matrix.mT if self.training else steady_each(event, matrix)
        return self._weights(z.view(batch, event.shape[1], count, HIDDEN) + constant[:, None])

    def _weights(self, z: Tensor) -> Tensor:
        """Return [B, C, T] of the first layer's outputs [B, T, C, 32]."""
        return linear(self.last, self.middle(z)).squeeze(-1).mT


class GateUnit(nn.Module):
    """MLP [h ; c] -> 32 -> K of every event h and every context c, or of the event alone.

    Args:
        width: columns of events.
        context: columns of contexts; 0 for none.
        experts: K.
    """

    def __init__(self, width: int, context: int, experts: int) -> None:
        super().__init__()
        self.first = nn.Linear(width + context, HIDDEN)
        self.last = nn.Linear(HIDDEN, experts)

    def forward(self, event: Tensor, context: Tensor | None = None) -> Tensor:
        """Return [B, C, T, K] for events [B, T, D] and contexts [B, C, D]; [B, 1, T, K] without contexts."""
        width = event.shape[-1]
        first = self.first.weight
        z = (_rows(event, first[:, :width], self.training) + self.first.bias)[:, None]  # [B, 1, T, 32]
        if context is None:
            return self._unit(z)
        c = _rows(context, first[:, width:], self.training)[:, :, None, :]  # [B, C, 1, 32]
        return by_requests(lambda z, c: self._unit(z + c), z.shape[2] * c.shape[1] * HIDDEN, z, c)

    def _unit(self, z: Tensor) -> Tensor:
        return linear(self.last, z.relu())


def _rows(x: Tensor, weight: Tensor, training: bool) -> Tensor:
    """Return x @ weight.T."""
    return F.linear(x, weight) if training else steady(x, weight)
