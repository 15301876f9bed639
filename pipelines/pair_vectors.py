"""Encodings of (query, passage) pairs on disk: a backbone that is not trained reads each pair once, ever.

Pools, shuffled input, seeds and numbers of views then cost a decoder step, since neither MVP's encoding of a pair nor
a cross-encoder's depends on the list the pair is in. A model that reads texts apart reads each text once.

    P pairs    k vectors of a pair    d width
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, TypeAlias

import torch
from torch import Tensor, nn

from pipelines.text_cache import VectorCache
from ranking.mvp_apart import MvpApart, States
from ranking.pair_prompt import PairPrompt
from ranking.text_backbone import device_of, digest_of, in_passes
from ranking.text_models import Vectors
from recsys.progress import Progress, silent

BETWEEN = "\0"
"""Stands between query and passage in the key of a pair; no text of a corpus holds it."""
TOKENS_KEPT = 2_000_000
"""Token states in memory, 3 GB at MiniLM's width; beyond that passages are read again."""


class PairModel(Protocol):
    """What reads pairs: MVP and the cross-encoder do."""

    transformer: nn.Module
    prompt: PairPrompt

    def encode(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Return vectors [P, k, d] of pairs."""
        ...


Read: TypeAlias = Callable[[Sequence[str], Sequence[str]], Vectors]


@dataclass(frozen=True)
class PairVectors:
    """Vectors of pairs, from the cache or computed and kept.

    Args:
        model: reads pairs; its backbone must not change as long as this is used.
        cache: of its vectors.
        read: gives vectors [P, k, d] of queries and passages.
        keep: which of the k vectors are given.
    """

    model: PairModel | MvpApart
    cache: VectorCache
    read: Read
    keep: slice | list[int] = field(default_factory=lambda: slice(None))

    @staticmethod
    def of(
        model: PairModel | MvpApart, root: Path, encode: Callable[[Tensor, Tensor], Tensor] | None = None
    ) -> "PairVectors":
        """Open the cache of a model under `root`; another `encode` than the model's must go with another root."""
        if isinstance(model, MvpApart):
            return PairVectors(model, VectorCache(root / model.reading / "pairs"), _ReadApart(model))
        digest = digest_of(model.transformer, model.prompt.layout, model.prompt.tokenizer, model.transformer)
        return PairVectors(model, VectorCache(root / digest / "pairs"), _together(model, encode or model.encode))

    def get(self, queries: Sequence[str], passages: Sequence[str], progress: Progress = silent) -> Vectors:
        """Return float32 [P, k, d] of pairs of a query and a passage each."""
        pairs = [f"{query}{BETWEEN}{passage}" for query, passage in zip(queries, passages, strict=True)]
        return self.cache.get(pairs, self._compute, progress)[:, self.keep]

    def _compute(self, pairs: Sequence[str]) -> Vectors:
        split = [pair.split(BETWEEN, 1) for pair in pairs]
        self.model.transformer.eval()  # what is not trained drops nothing out
        return self.read([query for query, _ in split], [passage for _, passage in split])


def _together(model: PairModel, encode: Callable[[Tensor, Tensor], Tensor]) -> Read:
    def read(queries: Sequence[str], passages: Sequence[str]) -> Vectors:
        prompt = model.prompt
        rows = [prompt.rows(query, [passage])[0] for query, passage in zip(queries, passages, strict=True)]
        return in_passes(rows, prompt.tokenizer.pad, device_of(model.transformer), encode)

    return read


class _ReadApart:
    """Reads pairs by texts, keeping the states of those it has read."""

    def __init__(self, model: MvpApart) -> None:
        self.model = model
        self.queries: dict[str, States] = {}
        self.passages: dict[str, States] = {}

    @torch.inference_mode()
    def __call__(self, queries: Sequence[str], passages: Sequence[str]) -> Vectors:
        config = self.model.config
        for texts, known, length in (
            (queries, self.queries, config.max_query_len),
            (passages, self.passages, config.max_len),
        ):
            if sum(len(one.ids) for one in known.values()) > TOKENS_KEPT:
                known.clear()
            missing = [text for text in dict.fromkeys(texts) if text not in known]
            known.update(zip(missing, self.model.states(missing, length), strict=True))
        vectors: Vectors = self.model.joined(queries, passages, self.queries, self.passages).cpu().numpy()
        return vectors
