"""The plain dual encoder: one transformer, pooled and normalised, for queries and passages alike.

H = transformer(ids)  [N, L, d];   e = pool(H, mask) / |pool(H, mask)|  [N, d];   sim(q, p) = e_q . e_p
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

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
    locate,
)
from ranking.text_models import Vectors
from ranking.text_pooling import pool
from ranking.windows import Windows, windows_of
from recsys.errors import ConfigError
from recsys.files import read_json
from recsys.progress import Progress, silent

Pool = Literal["cls", "mean"]


@dataclass(frozen=True)
class DenseConfig:
    """Options of a plain encoder."""

    backbone: str = "minilm"
    """alias of an installed package, local directory or Hugging Face name"""
    pool: Pool = "mean"
    max_query_len: int = 256
    """tokens, special ones included"""
    max_passage_len: int = 256
    query_prefix: str = ""
    """what the backbone was trained to see before a query, e.g. "query: " """
    passage_prefix: str = ""


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

    def encode_queries(self, texts: Sequence[str], progress: Progress = silent) -> Vectors:
        """Return float32 [N, D] in input order."""
        return self._encode(self.config.query_prefix, texts, self.config.max_query_len, progress)

    def encode_passages(self, texts: Sequence[str], progress: Progress = silent) -> Vectors:
        """Return float32 [N, D] in input order."""
        return self._encode(self.config.passage_prefix, texts, self.config.max_passage_len, progress)

    def truncated(self, texts: Sequence[str]) -> NDArray[np.bool_]:
        """Return bool [N]: of which passages only the beginning is read."""
        return self.tokenizer.truncated(_prefixed(self.config.passage_prefix, texts), self.config.max_passage_len)

    def windows(self, texts: Sequence[str]) -> Windows:
        """Return what to encode so that all of every passage is read."""
        prefix = self.config.passage_prefix
        taken = len(self.tokenizer.pieces([prefix])[0]) if prefix else 0
        return windows_of(texts, self.tokenizer, self.tokenizer.room(self.config.max_passage_len) - taken)

    def _encode(self, prefix: str, texts: Sequence[str], max_len: int, progress: Progress) -> Vectors:
        rows = self.tokenizer.encode(_prefixed(prefix, texts), max_len)
        return in_passes(rows, self.tokenizer.pad, device_of(self), self, progress).reshape(len(texts), self.dim)


def _prefixed(prefix: str, texts: Sequence[str]) -> list[str]:
    return [prefix + text for text in texts] if prefix else list(texts)


def described(source: str) -> DenseConfig:
    """Return the options that the files of sentence-transformers beside a backbone ask for: pooling, prompts, length.

    Args:
        source: an alias of an installed package, a local directory or a Hugging Face name.

    Raises:
        ConfigError: it pools, or goes on, in a way that is not built here.
    """
    steps = [str(one.get("type", "")).rpartition(".")[2] for one in _beside(source, "modules.json") or ()]
    if odd := [step for step in steps if step not in ("Transformer", "Pooling", "Normalize")]:
        raise ConfigError(f"encoder {source!r}: has a step {odd[0]}; expected Transformer, Pooling and Normalize alone")
    prompts = (_beside(source, "config_sentence_transformers.json") or {}).get("prompts") or {}
    most = (_beside(source, "sentence_bert_config.json") or {}).get("max_seq_length") or DenseConfig.max_passage_len
    return DenseConfig(
        backbone=source,
        pool=pooling_of(source) or "mean",
        max_query_len=min(DenseConfig.max_query_len, most),
        max_passage_len=min(DenseConfig.max_passage_len, most),
        query_prefix=prompts.get("query", ""),
        passage_prefix=prompts.get("passage", prompts.get("document", "")),
    )


def pooling_of(source: str) -> Pool | None:
    """Return how a backbone was trained to be pooled, by the files of sentence-transformers beside it; None without.

    Raises:
        ConfigError: it pools in a way that is not built here.
    """
    pooling = _beside(source, "1_Pooling/config.json")
    if pooling is None:
        return None
    modes = [name.removeprefix("pooling_mode_") for name, on in pooling.items() if on is True and "_mode_" in name]
    if modes not in (["mean_tokens"], ["cls_token"]):
        raise ConfigError(f"encoder {source!r}: pools by {' and '.join(modes)}; expected mean_tokens or cls_token")
    return "cls" if modes == ["cls_token"] else "mean"


def _beside(source: str, name: str) -> Any:
    """Return a JSON file of a backbone's folder, None if it has none."""
    from transformers.utils.hub import cached_file

    path = cached_file(
        locate(source),
        name,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        _raise_exceptions_for_gated_repo=False,
    )
    return read_json(Path(path)) if path else None
