"""A ready-made cross-encoder: a sequence classifier with one logit, as Hugging Face holds them.

s_i = classifier(query, passage i)[0]

Pairs are laid out as the tokenizer's own post-processor lays out a pair, segments of BERT included. Where a pair is too
long the passage is cut, and the query only beyond `max_query_len` tokens.

P pairs    L tokens
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

from torch import Tensor, nn

from ranking.pair_prompt import PairPrompt
from ranking.pair_reranker import PairReranker
from ranking.text_backbone import TOKENS_PER_PASS, TextTokenizer, build_transformer, load_transformer
from recsys.errors import DataError


@dataclass(frozen=True)
class SequenceRerankerConfig:
    """Options of the model."""

    backbone: str
    max_query_len: int = 128
    max_len: int = 512
    """tokens of a pair; the model's positions if they are fewer"""
    tokens_per_pass: int = TOKENS_PER_PASS


class SequenceReranker(PairReranker):
    """A `TextReranker` that somebody else has trained."""

    kind, options = "sequence", SequenceRerankerConfig
    config: SequenceRerankerConfig

    def __init__(self, config: SequenceRerankerConfig, transformer: nn.Module, tokenizer: TextTokenizer) -> None:
        about: Any = transformer.config
        if about.num_labels != 1:
            raise DataError(
                f"reranker {config.backbone!r}: {about.num_labels} logits for a pair; expected a cross-encoder with "
                "one, such as cross-encoder/ms-marco-MiniLM-L-6-v2"
            )
        most = min(config.max_len, _positions(transformer) or config.max_len)
        fitting = replace(config, max_len=most, max_query_len=min(config.max_query_len, most))
        super().__init__(fitting, transformer, tokenizer)
        lead, middle, tail, self._second = _layout(tokenizer, config.backbone)
        self.prompt = PairPrompt(tokenizer, lead, middle, tail, self.config.max_query_len, self.config.max_len)
        takes = "token_type_ids" in inspect.signature(transformer.forward).parameters
        self._segments = takes and getattr(about, "type_vocab_size", 0) > 1
        self.eval()

    @staticmethod
    def of(source: str) -> "SequenceReranker":
        """Load a local folder or a Hugging Face name; raises `DataError` unless it gives one logit."""
        config = SequenceRerankerConfig(source)
        return SequenceReranker(config, load_transformer(source, "sequence"), TextTokenizer.of(source))

    @classmethod
    def built(cls, config: Any, about: dict[str, Any], tokenizer: TextTokenizer) -> Self:
        """Build the model of a config.json, weights not yet read."""
        return cls(config, build_transformer(about["architecture"], "sequence"), tokenizer)

    @property
    def pad(self) -> int:
        """What fills up a row of `rows`: the padding token in the first segment."""
        return 2 * self.tokenizer.pad

    def rows(self, query: str, passages: Sequence[str]) -> list[list[int]]:
        """Return every pair's tokens as 2 id + segment, so that a token keeps its segment wherever it is batched."""
        first = len(self.prompt.head(query))
        return [
            [2 * id_ + (self._second if place >= first else 0) for place, id_ in enumerate(ids)]
            for ids in self.prompt.rows(query, passages)
        ]

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Return scores [P] of tokens int64 [P, L] as `rows` gives them."""
        segments = {"token_type_ids": tokens % 2} if self._segments else {}
        logits: Tensor = self.transformer(input_ids=tokens // 2, attention_mask=mask, **segments).logits
        return logits[:, 0]


def _layout(tokenizer: TextTokenizer, name: str) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], int]:
    """Return what the tokenizer puts before, between and after two texts, and the segment of the second, 0 or 1."""
    pair = tokenizer.tokenizer.encode("a", "a")
    own: list[int | None] = list(pair.sequence_ids)
    if 0 not in own or 1 not in own or own.index(0) > own.index(1):
        raise DataError(f"reranker {name!r}: its tokenizer does not put two texts one after the other")
    begins, ends = own.index(0), len(own) - own[::-1].index(0)
    second, last = own.index(1), len(own) - own[::-1].index(1)
    segments = pair.type_ids
    if any(segments[:second]) or len(set(segments[second:])) > 1 or max(segments) > 1:
        raise DataError(f"reranker {name!r}: its tokenizer's segments are {segments}; expected 0 and then 0 or 1")
    ids = pair.ids
    return tuple(ids[:begins]), tuple(ids[ends:second]), tuple(ids[last:]), segments[second]


def _positions(transformer: nn.Module) -> int | None:
    """Return the tokens that a model has positions for, None if it needs none; RoBERTa begins behind its padding."""
    embeddings = getattr(getattr(transformer, "base_model", None), "embeddings", None)
    table = getattr(embeddings, "position_embeddings", None)
    if not isinstance(table, nn.Embedding):
        return None
    return table.num_embeddings - (0 if table.padding_idx is None else table.padding_idx + 1)
