"""Encodings of (query, passage) pairs on disk: a backbone that is not trained reads each pair once, ever.

Pools, shuffled input, seeds and numbers of views then cost a decoder step, since neither MVP's encoding of a pair nor
a cross-encoder's depends on the list the pair is in.

    P pairs    k vectors of a pair    d width
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from pipelines.text_cache import VectorCache
from ranking.pair_prompt import PairPrompt
from ranking.text_backbone import digest_of, in_passes
from ranking.text_models import Report, Vectors

BETWEEN = "\0"
"""Stands between query and passage in the key of a pair; no text of a corpus holds it."""


class PairModel(Protocol):
    """What reads pairs: MVP and the cross-encoder do."""

    transformer: nn.Module
    prompt: PairPrompt

    def encode(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Give vectors [P, k, d] of pairs."""
        ...


@dataclass(frozen=True)
class PairVectors:
    """Vectors of pairs, from the cache or computed and kept.

    Args:
        model: reads pairs; its backbone must not change as long as this is used.
        cache: of its vectors.
        encode: gives vectors [P, k, d] of ids and mask [P, L].
        keep: which of the k vectors are given.
    """

    model: PairModel
    cache: VectorCache
    encode: Callable[[Tensor, Tensor], Tensor]
    keep: slice = field(default_factory=lambda: slice(None))

    @staticmethod
    def of(model: PairModel, root: Path, encode: Callable[[Tensor, Tensor], Tensor] | None = None) -> "PairVectors":
        """Open the cache of a model under `root`; another `encode` than the model's must go with another root."""
        digest = digest_of(model.transformer, model.prompt.layout)
        return PairVectors(model, VectorCache(root / digest / "pairs"), encode or model.encode)

    def get(self, queries: Sequence[str], passages: Sequence[str], report: Report | None = None) -> Vectors:
        """Give float32 [P, k, d] of pairs of a query and a passage each."""
        pairs = [f"{query}{BETWEEN}{passage}" for query, passage in zip(queries, passages, strict=True)]
        return self.cache.get(pairs, self._compute, report)[:, self.keep]

    def _compute(self, pairs: Sequence[str]) -> Vectors:
        prompt = self.model.prompt
        split = [pair.split(BETWEEN, 1) for pair in pairs]
        rows = [prompt.rows(query, [passage])[0] for query, passage in split]
        self.model.transformer.eval()  # what is not trained drops nothing out
        return in_passes(rows, prompt.tokenizer.pad, torch.device("cpu"), self.encode)
