"""From the states of tokens to one vector of a text, for the encoders that share a way to do it.

N texts    L tokens    d hidden width    V vocabulary
"""

from typing import Literal

import torch
from torch import Tensor


def pool(hidden: Tensor, mask: Tensor, how: Literal["cls", "mean"]) -> Tensor:
    """Pool hidden states [N, L, d] to [N, d]: the first position, or the mean over those not padding."""
    if how == "cls":
        return hidden[:, 0]
    weight = mask.unsqueeze(-1).to(hidden.dtype)  # [N, L, 1]
    return (hidden * weight).sum(dim=1) / weight.sum(dim=1).clamp(min=1)


def max_pooled(logits: Tensor, mask: Tensor) -> Tensor:
    """Return SPLADE's weights [N, V] of logits [N, L, V]; the maximum is taken first: the same, and far cheaper."""
    highest = logits.masked_fill(mask.unsqueeze(-1) == 0, -torch.inf).amax(dim=1)  # [N, V]
    return torch.log1p(torch.relu(highest))
