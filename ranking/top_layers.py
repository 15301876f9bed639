"""A BERT-like transformer cut in two: layers below that stay as they are, and the top ones, which learn.

What the layers below make of a text never changes, so it is computed once and kept. A step of training then costs the
top layers alone: with two of six a third of the forward pass, and no gradient below.

    N texts    L tokens    d hidden width
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from recsys.errors import ConfigError


@dataclass(frozen=True)
class TopLayers:
    """The two parts of one transformer, which share its weights.

    Args:
        embeddings: of tokens and places.
        below: layers that stay as they are.
        top: layers that learn.
    """

    embeddings: nn.Module
    below: tuple[nn.Module, ...]
    top: tuple[nn.Module, ...]

    @staticmethod
    def of(transformer: nn.Module, layers: int) -> "TopLayers":
        """Cut off the top `layers`, and let nothing else of the transformer learn.

        Raises:
            ConfigError: a transformer with fewer layers, or that is not built like BERT.
        """
        embeddings = getattr(transformer, "embeddings", None)
        found: Any = getattr(getattr(transformer, "encoder", None), "layer", None)
        if not isinstance(embeddings, nn.Module) or not isinstance(found, nn.ModuleList):
            raise ConfigError(f"layers = {layers}: {type(transformer).__name__} is not built like BERT; set layers = 0")
        if not 1 <= layers <= len(found):
            raise ConfigError(f"layers is {layers}; expected 1 to {len(found)}, or 0 to train all of the backbone")
        transformer.requires_grad_(False)
        made = TopLayers(embeddings, tuple(found[:-layers]), tuple(found[-layers:]))
        for layer in made.top:
            layer.requires_grad_(True)
        return made

    @torch.no_grad()
    def read(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Return the states [N, L, d] below the top layers of ids and mask [N, L]; nothing is dropped out."""
        for module in (self.embeddings, *self.below):
            module.eval()
        hidden: Tensor = self.embeddings(input_ids=ids)
        for layer in self.below:
            hidden = layer(hidden, _bias(mask, hidden))
        return hidden

    def finish(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """Return the last hidden states [N, L, d] of states of `read`."""
        for layer in self.top:
            hidden = layer(hidden, _bias(mask, hidden))
        return hidden


def _bias(mask: Tensor, hidden: Tensor) -> Tensor:
    """Return what is added to attention scores, [N, 1, 1, L]: 0 at tokens, the least number there is at padding."""
    least = torch.finfo(hidden.dtype).min
    return torch.zeros(mask.shape, dtype=hidden.dtype, device=mask.device).masked_fill(mask == 0, least)[:, None, None]
