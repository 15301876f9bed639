"""A cross-encoder: the control MVP is measured against, same backbone, same tokens but for the view tokens.

s_i = W h_[CLS](query, passage i) + b

A score looks at one pair at a time, whatever else is in the list. Training does not: its loss is MVP's, over the list.

P pairs    L tokens    d width
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ranking.pair_prompt import PairPrompt
from ranking.pair_reranker import PairReranker
from ranking.text_backbone import TOKENS_PER_PASS, TextTokenizer, device_of, load_transformer
from ranking.text_models import Vectors


@dataclass(frozen=True)
class CrossEncoderConfig:
    """Options of the model."""

    backbone: str = "minilm"
    max_query_len: int = 64
    max_len: int = 252
    """tokens of a pair: MVP's 256 without its 4 view tokens"""
    tokens_per_pass: int = TOKENS_PER_PASS


class CrossEncoder(PairReranker):
    """A `TextReranker` that reads every pair on its own."""

    kind, options = "cross_encoder", CrossEncoderConfig
    config: CrossEncoderConfig

    def __init__(self, config: CrossEncoderConfig, transformer: nn.Module, tokenizer: TextTokenizer) -> None:
        super().__init__(config, transformer, tokenizer)
        config = self.config
        lengths = config.max_query_len, config.max_len
        self.prompt = PairPrompt(tokenizer, tokenizer.prefix, tokenizer.suffix, tokenizer.suffix, *lengths)
        self.head = nn.Linear(self.hidden_size, 1)
        self.eval()

    @staticmethod
    def of(config: CrossEncoderConfig = CrossEncoderConfig()) -> "CrossEncoder":
        """Load the backbone of a config; the head is drawn from torch's global generator."""
        return CrossEncoder(config, load_transformer(config.backbone), TextTokenizer.of(config.backbone))

    def encode(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Return the first position's state [P, 1, d] of pairs."""
        hidden: Tensor = self.transformer(input_ids=ids, attention_mask=mask).last_hidden_state
        return hidden[:, :1]

    def score(self, vectors: Tensor, mask: Tensor) -> Tensor:
        """Return scores [B, n] of vectors [B, n, 1, d], -inf where the list mask is off."""
        scores: Tensor = self.head(vectors[:, :, 0]).squeeze(-1)
        return scores.masked_fill(~mask, -torch.inf)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Return scores [P] of pairs."""
        scores: Tensor = self.head(self.encode(ids, mask)[:, 0]).squeeze(-1)
        return scores

    def rank_vectors(self, lists: Sequence[Vectors]) -> list[Vectors]:
        """Return scores of lists of vectors [n, 1, d]."""
        with torch.inference_mode():
            vectors = [torch.from_numpy(one[:, 0]).to(device_of(self)) for one in lists]
            return [self.head(one).squeeze(-1).cpu().numpy() for one in vectors]
