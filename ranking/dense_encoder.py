"""The plain dual encoder: one transformer, pooled and normalised, for queries and passages alike.

H = transformer(ids)  [N, L, d];   e = pool(H, mask) / |pool(H, mask)|  [N, d];   sim(q, p) = e_q . e_p
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from ranking.text_backbone import (
    TextModel,
    TextTokenizer,
    device_of,
    in_passes,
    load_transformer,
)
from ranking.text_models import Report, Vectors
from ranking.text_pooling import pool


@dataclass(frozen=True)
class DenseConfig:
    """Options of a plain encoder."""

    backbone: str = "minilm"
    """alias of an installed package, local directory or Hugging Face name"""
    pool: Literal["cls", "mean"] = "mean"
    max_query_len: int = 256
    """tokens, special ones included"""
    max_passage_len: int = 256


class DenseEncoder(TextModel):
    """A `TextEncoder` without anything added.

    Args:
        config: options.
        transformer: the backbone's weights.
        tokenizer: the backbone's tokenizer.
    """

    kind, options = "dense", DenseConfig
    config: DenseConfig

    def __init__(self, config: DenseConfig, transformer: nn.Module, tokenizer: TextTokenizer) -> None:
        super().__init__(config, transformer, tokenizer)
        self.eval()

    @staticmethod
    def of(config: DenseConfig = DenseConfig()) -> "DenseEncoder":
        """Load the backbone of a config."""
        return DenseEncoder(config, load_transformer(config.backbone), TextTokenizer.of(config.backbone))

    @property
    def dim(self) -> int:
        """Length of a vector."""
        return self.hidden_size

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Return vectors [N, d] of length 1 for ids and mask [N, L]."""
        hidden = self.transformer(input_ids=ids, attention_mask=mask).last_hidden_state  # [N, L, d]
        return F.normalize(pool(hidden, mask, self.config.pool), dim=-1)

    def encode_queries(self, texts: Sequence[str], report: Report | None = None) -> Vectors:
        """Return float32 [N, D] in input order."""
        return self._encode(texts, self.config.max_query_len, report)

    def encode_passages(self, texts: Sequence[str], report: Report | None = None) -> Vectors:
        """Return float32 [N, D] in input order."""
        return self._encode(texts, self.config.max_passage_len, report)

    def truncated(self, texts: Sequence[str]) -> NDArray[np.bool_]:
        """Return bool [N]: of which passages only the beginning is read."""
        return self.tokenizer.truncated(texts, self.config.max_passage_len)

    def _encode(self, texts: Sequence[str], max_len: int, report: Report | None) -> Vectors:
        rows = self.tokenizer.encode(texts, max_len)
        return in_passes(rows, self.tokenizer.pad, device_of(self), self, report).reshape(len(texts), self.dim)
