"""A pointwise cross-encoder: the control MVP is measured against, same backbone, same tokens but for the view tokens.

s_i = W h_[CLS](query, passage i) + b

P pairs    L tokens    d width
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ranking.pair_prompt import PairPrompt
from ranking.text_backbone import (
    TOKENS_PER_PASS,
    TextTokenizer,
    build_transformer,
    device_of,
    digest_of,
    in_passes,
    load_transformer,
    load_weights,
    save_model,
    saved_parts,
    within,
)
from ranking.text_models import Report, Vectors
from recsys.config import parse


@dataclass(frozen=True)
class CrossEncoderConfig:
    """Options of the model."""

    backbone: str = "minilm"
    max_query_len: int = 64
    max_len: int = 252
    """tokens of a pair: MVP's 256 without its 4 view tokens"""
    tokens_per_pass: int = TOKENS_PER_PASS


class CrossEncoder(nn.Module):
    """A `TextReranker` that reads every pair on its own."""

    def __init__(self, config: CrossEncoderConfig, transformer: nn.Module, tokenizer: TextTokenizer) -> None:
        super().__init__()
        config = within(config, transformer)
        self.config, self.tokenizer = config, tokenizer
        self.transformer = transformer
        lengths = config.max_query_len, config.max_len
        self.prompt = PairPrompt(tokenizer, tokenizer.prefix, tokenizer.suffix, tokenizer.suffix, *lengths)
        self.head = nn.Linear(int(transformer.config.hidden_size), 1)  # type: ignore[union-attr, arg-type]
        self.eval()

    @staticmethod
    def of(config: CrossEncoderConfig = CrossEncoderConfig()) -> "CrossEncoder":
        """Load the backbone of a config; the head is drawn from torch's global generator."""
        return CrossEncoder(config, load_transformer(config.backbone), TextTokenizer.of(config.backbone))

    @cached_property
    def digest(self) -> str:
        """Digest of weights and options; stale after further training."""
        return digest_of(self, self.config)

    def rows(self, query: str, passages: Sequence[str]) -> list[list[int]]:
        """Give the token ids of every pair."""
        return self.prompt.rows(query, passages)

    def truncated(self, query: str, passages: Sequence[str]) -> NDArray[np.bool_]:
        """Tell bool [n] which passages are cut beside this query."""
        return self.prompt.truncated(query, passages)

    def encode(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Give the first position's state [P, 1, d] of pairs."""
        hidden: Tensor = self.transformer(input_ids=ids, attention_mask=mask).last_hidden_state
        return hidden[:, :1]

    def score(self, vectors: Tensor, mask: Tensor) -> Tensor:
        """Give scores [B, n] of vectors [B, n, 1, d], -inf where the list mask is off."""
        scores: Tensor = self.head(vectors[:, :, 0]).squeeze(-1)
        return scores.masked_fill(~mask, -torch.inf)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Give scores [P] of pairs."""
        scores: Tensor = self.head(self.encode(ids, mask)[:, 0]).squeeze(-1)
        return scores

    def rank_vectors(self, lists: Sequence[Vectors]) -> list[Vectors]:
        """Give scores of lists of vectors [n, 1, d]."""
        with torch.inference_mode():
            vectors = [torch.from_numpy(one[:, 0]).to(device_of(self)) for one in lists]
            return [self.head(one).squeeze(-1).cpu().numpy() for one in vectors]

    def rerank(self, query: str, passages: Sequence[str], report: Report | None = None) -> Vectors:
        """Give float32 [n], higher is better."""
        return self.rerank_many([query], [passages], report)[0]

    def rerank_many(
        self, queries: Sequence[str], lists: Sequence[Sequence[str]], report: Report | None = None
    ) -> list[Vectors]:
        """Rerank one list per query, all pairs batched by length."""
        rows = [row for query, passages in zip(queries, lists, strict=True) for row in self.rows(query, passages)]
        scores = in_passes(rows, self.tokenizer.pad, device_of(self), self, report, self.config.tokens_per_pass)
        ends = np.cumsum([len(one) for one in lists])[:-1]
        return np.split(scores, ends) if len(lists) else []

    def save(self, directory: Path) -> None:
        """Write encoder and head."""
        options = dataclasses.asdict(self.config)
        save_model(directory, self, "cross_encoder", options, self.tokenizer, {"architecture": self.transformer})

    @staticmethod
    def load(directory: Path) -> "CrossEncoder":
        """Read what `save` wrote."""
        about, tokenizer = saved_parts(directory)
        config = parse(CrossEncoderConfig, about["options"], str(directory))
        model = CrossEncoder(config, build_transformer(about["architecture"]), tokenizer)
        load_weights(directory, model)
        return model
