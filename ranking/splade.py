"""Learned sparse retrieval (SPLADE, Formal et al. 2021, arXiv 2107.05720): vocabulary weights from a masked-LM head.

w(t) = log(1 + ReLU(max_j z_jt))      z [L, V] the head's logits, the maximum over positions that are not padding

N texts    L tokens    V vocabulary
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from scipy import sparse
from torch import nn

from ranking.fusion import Ranking, best
from ranking.products import fast_linear
from ranking.text_backbone import TextTokenizer, device_of, digest_of, load_transformer, padded, passes
from ranking.text_pooling import max_pooled
from recsys.progress import Progress, silent

TOKENS = 1024
"""Most tokens of a pass: each of them makes a row of V logits."""


@dataclass(frozen=True)
class Splade:
    """A sparse encoder."""

    model: nn.Module  # with a masked-LM head
    tokenizer: TextTokenizer
    max_len: int = 256

    @staticmethod
    def of(backbone: str = "splade-tiny", device: torch.device | str = "cpu") -> "Splade":
        """Load a backbone that has a masked-LM head, to run on a device."""
        return Splade(load_transformer(backbone, "mlm").to(device), TextTokenizer.of(backbone))

    @cached_property
    def digest(self) -> str:
        """Digest of what decides the weights of a text."""
        return digest_of(self.model, self.max_len, self.tokenizer, self.model)

    def encode(self, texts: Sequence[str], progress: Progress = silent) -> Any:
        """Return a float32 scipy CSR matrix [N, V]."""
        rows = self.tokenizer.encode(texts, self.max_len)
        width = len(self.tokenizer)
        parts, order, done = [], [], 0
        for chosen in passes([len(row) for row in rows], TOKENS):
            ids, mask = padded([rows[place] for place in chosen], self.tokenizer.pad, device_of(self.model))
            with torch.inference_mode(), fast_linear(ids.numel()):
                weights = max_pooled(self.model(input_ids=ids, attention_mask=mask).logits, mask)
            parts.append(sparse.csr_matrix(weights.cpu().numpy()))
            order.append(chosen)
            done += len(chosen)
            progress(done, len(rows))
        if not parts:
            return sparse.csr_matrix((0, width), dtype=np.float32)
        return sparse.vstack(parts).tocsr()[np.argsort(np.concatenate(order))]


def sparse_search(queries: Any, passages: Any, places: int = 100) -> Ranking:
    """Rank passages (CSR [N, V]) by their inner product with queries (CSR [Q, V])."""
    scores = (queries @ passages.T).toarray()  # [Q, N]
    return best(np.where(scores > 0, scores, -np.inf), places)
