"""LexSemBridge: a dense encoder whose query vector is re-weighted by the query's own words.

"LexSemBridge: Fine-Grained Dense Representation Enhancement through Token-Aware Embedding Augmentation", 2025,
arXiv 2508.17858. Marks: (paper) what is printed, (code) the authors' released code, (ours) a choice of ours.

    e  = pool(H, mask)                    [B, d]   the plain encoder
    w  = weights of the query's terms     [B, V]   SLR, LLR or CLR, see `Lexicon`
    v  = softmax(w W + c)                 [B, d]   over the d hidden dimensions
    e' = v * e / |v * e|                  [B, d]   passages keep e, so an index of the plain encoder stays valid

What differs: W and c start at 0, which is the plain encoder exactly (ours); the authors' evaluation never applies the
fusion, so `fusion_at_test` switches it off at encoding time; `c_only`, `linear_map` (e + M e) and `off` are the
controls that every claim of the method is measured against. The score is a query-dependent diagonal re-weighting of
the plain one: it cannot add to a passage's vector what the encoder dropped.

    B queries    L tokens    d width    V vocabulary
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy import sparse
from torch import Tensor, nn

from ranking.text_backbone import (
    TextModel,
    TextTokenizer,
    build_transformer,
    device_of,
    in_passes,
    load_transformer,
    padded,
)
from ranking.text_models import Vectors
from ranking.text_pooling import max_pooled, pool
from ranking.windows import Windows, windows_of
from recsys.errors import ConfigError
from recsys.progress import Progress, silent

Kind = Literal["slr", "llr", "clr", "c_only", "linear_map", "off"]


@dataclass(frozen=True)
class LexSemBridgeConfig:
    """Options of the model."""

    backbone: str = "minilm"
    pool: Literal["cls", "mean"] = "mean"
    max_query_len: int = 64
    max_passage_len: int = 256
    weights: Kind = "slr"
    variant: Literal["paper", "code"] = "code"
    clr_pool: Literal["cls", "max"] = "max"
    clr_backbone: str = "splade-tiny"
    """whose masked-LM head gives CLR's weights; "own" for a head on the backbone itself"""
    ignore_special: bool = True
    """what stands before a text ([CLS]), padding and unknown words never count"""
    ignore_sep: bool = False
    """nor does what stands after it ([SEP]), which counts in the authors' code"""
    fusion_init: Literal["zero", "linear"] = "zero"
    fusion_passages: bool = False
    fusion_at_test: bool = True
    normalized: bool = True
    """enhanced vectors have length 1; else v counts d times, and training takes a temperature of 1 (code)"""

    def __post_init__(self) -> None:
        if not self.normalized and self.weights in ("linear_map", "off"):
            raise ConfigError(
                f"[model] normalized = false would do nothing with weights = {self.weights}; leave it out"
            )
        if self.weights == "llr" and self.variant == "code" and not self.ignore_special:
            raise ConfigError("[model] weights = llr in the code's reading always leaves out special tokens")


def first_places(ids: Tensor, counted: Tensor) -> Tensor:
    """Return bool [B, L]: at which places a counted id stands for the first time in its row."""
    same = (ids.unsqueeze(2) == ids.unsqueeze(1)) & counted.unsqueeze(1)  # [B, L, L]: place i, earlier place j
    earlier = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool, device=ids.device).tril(-1)
    return counted & ~(same & earlier).any(dim=2)


def enhance(vectors: Tensor, z: Tensor, normalized: bool = True) -> Tensor:
    """Return e' [B, d] of vectors e [B, d] and z [B, d]: softmax over the d dimensions, product, length 1.

    Where the length stays as it is v counts d times: its mean is 1 / d, and e' would be as much shorter than e.
    """
    v = torch.softmax(z, dim=-1)
    return F.normalize(v * vectors, dim=-1, eps=1e-30) if normalized else v * z.shape[-1] * vectors


class Lexicon(nn.Module):
    """From a query's tokens to z [B, d] (sections 3 and 4).

    SLR: w(t) = a if t occurs (code), log 2 (paper). LLR: w(t) = max over places of t of ReLU(u h + b) (code),
    log(1 + ReLU(e U + b)) over the whole vocabulary (paper). CLR: log(1 + ReLU(logits)) of a masked-LM head.
    The code's SLR and LLR touch only the query's own terms: rows of W are gathered and summed, never w [B, V] formed.
    """

    def __init__(self, config: LexSemBridgeConfig, width: int, vocabulary: int, excluded: Sequence[int]) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("excluded", torch.tensor(list(excluded), dtype=torch.int64), persistent=False)
        self.excluded: Tensor
        kind = config.weights
        if kind in ("slr", "llr", "clr"):
            self.W = nn.Parameter(torch.zeros(vocabulary, width))  # transposed: one row per term
        if kind in ("slr", "llr", "clr", "c_only"):
            self.c = nn.Parameter(torch.zeros(width))
        if kind == "slr" and config.variant == "code":
            self.a = nn.Parameter(torch.ones(()))
        if kind == "llr":
            self.u = nn.Parameter(torch.empty(width, 1 if config.variant == "code" else vocabulary))
            self.b = nn.Parameter(torch.zeros(self.u.shape[1]))
            nn.init.normal_(self.u, std=0.02)
        if kind == "linear_map":
            self.M = nn.Parameter(torch.zeros(width, width))
        if config.fusion_init == "linear" and kind in ("slr", "llr", "clr"):
            bound = vocabulary**-0.5  # of torch's Linear
            nn.init.uniform_(self.W, -bound, bound)
            nn.init.uniform_(self.c, -bound, bound)

    def counted(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Return bool [B, L]: which places hold a term that counts."""
        return (mask > 0) & ~torch.isin(ids, self.excluded)

    def at_places(self, ids: Tensor, mask: Tensor, hidden: Tensor | None) -> Tensor:
        """Return w at the first place of each term, 0 elsewhere: [B, L], for SLR and the code's LLR."""
        counted = self.counted(ids, mask)
        first = first_places(ids, counted)
        if self.config.weights == "slr":
            weight = self.a if self.config.variant == "code" else torch.log(torch.tensor(2.0, dtype=self.W.dtype))
            return first.to(self.W.dtype) * weight
        assert hidden is not None, "the code's LLR reads every token's state"
        r = torch.relu(hidden.to(self.u.dtype) @ self.u + self.b).squeeze(-1)  # [B, L]
        same = (ids.unsqueeze(2) == ids.unsqueeze(1)) & counted.unsqueeze(1)  # [B, L, L]
        highest = r.unsqueeze(1).masked_fill(~same, -torch.inf).amax(dim=2)  # [B, L]
        return torch.where(first, highest, torch.zeros_like(highest))

    def over_vocabulary(self, raw: Tensor, logits: Tensor | None) -> Tensor:
        """Return w [B, V] for the paper's LLR (from the pooled state) and CLR (`logits` are its finished weights)."""
        if self.config.weights == "llr":
            return torch.log1p(torch.relu(raw.to(self.u.dtype) @ self.u + self.b))
        assert logits is not None
        return logits

    def z(self, ids: Tensor, mask: Tensor, hidden: Tensor | None, raw: Tensor, clr: Tensor | None = None) -> Tensor:
        """Return z [B, d] in float32 or wider, whatever the precision of the body."""
        if self.config.weights == "c_only":
            return self.c.expand(len(ids), -1)
        if self.sparse:
            places = self.at_places(ids, mask, hidden)
            return torch.einsum("bl,bld->bd", places, self.W[ids]) + self.c
        return self.over_vocabulary(raw, clr).to(self.W.dtype) @ self.W + self.c

    @property
    def sparse(self) -> bool:
        """Whether w is non-zero at the query's own terms alone."""
        return self.config.weights == "slr" or (self.config.weights == "llr" and self.config.variant == "code")

    @property
    def reads_hidden(self) -> bool:
        """Whether the states of single tokens are needed."""
        return self.config.weights == "llr" and self.config.variant == "code"

    def weights(
        self, ids: Tensor, mask: Tensor, hidden: Tensor | None, raw: Tensor, clr: Tensor | None = None
    ) -> Tensor:
        """Return w [B, V], for diagnostics and tests."""
        if not self.sparse:
            return self.over_vocabulary(raw, clr)
        places = self.at_places(ids, mask, hidden)
        empty = torch.zeros(len(ids), len(self.W), dtype=places.dtype, device=places.device)
        return empty.scatter_add(1, ids, places)

    def strength(
        self, ids: Tensor, mask: Tensor, hidden: Tensor | None, raw: Tensor, clr: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Return how far each query may be turned [B]: R = max z - min z, k = max v / min v, and terms with a weight.

        The cosine of e' and e is at least 1 / cosh(R / 2). Controls without terms or without z have no such numbers.
        """
        if self.config.weights in ("linear_map", "off"):
            return {}
        z = self.z(ids, mask, hidden, raw, clr)
        spread = z.amax(dim=-1) - z.amin(dim=-1)
        found = {"R": spread, "k": spread.exp()}
        if self.config.weights == "c_only":
            return found
        w = self.at_places(ids, mask, hidden) if self.sparse else self.over_vocabulary(raw, clr)
        return {**found, "non_zeros": (w != 0).sum(dim=-1)}

    def forward(
        self, vectors: Tensor, ids: Tensor, mask: Tensor, hidden: Tensor | None, raw: Tensor, clr: Tensor | None = None
    ) -> Tensor:
        """Return the enhanced vectors e' [B, d] of plain ones [B, d]."""
        if self.config.weights == "off":
            return vectors
        if self.config.weights == "linear_map":
            return F.normalize(vectors + vectors.to(self.M.dtype) @ self.M.T, dim=-1)
        return enhance(vectors, self.z(ids, mask, hidden, raw, clr), self.config.normalized)


class LexSemBridge(TextModel):
    """A `TextEncoder` whose query side is enhanced."""

    kind, options = "lexsembridge", LexSemBridgeConfig
    config: LexSemBridgeConfig

    def __init__(
        self,
        config: LexSemBridgeConfig,
        transformer: nn.Module,
        tokenizer: TextTokenizer,
        lexical: nn.Module | None = None,
    ) -> None:
        super().__init__(config, transformer, tokenizer)
        config = self.config
        if config.weights == "clr" and lexical is None and config.clr_backbone != "own":
            raise ConfigError("[model] weights = clr needs a masked-LM head: name a clr_backbone")
        self.lexical = lexical
        excluded = {tokenizer.pad}
        if config.ignore_special:
            excluded |= {*tokenizer.prefix, *tokenizer.unknown}
        if config.ignore_sep:
            excluded |= set(tokenizer.suffix)
        self.lexicon = Lexicon(config, self.dim, len(tokenizer), sorted(excluded))
        self.eval()

    @staticmethod
    def of(config: LexSemBridgeConfig = LexSemBridgeConfig()) -> "LexSemBridge":
        """Load the backbones of a config; the fusion starts at the plain encoder."""
        own = config.weights == "clr" and config.clr_backbone == "own"
        lexical = None
        if config.weights == "clr" and not own:
            lexical = load_transformer(config.clr_backbone, "mlm").requires_grad_(False)
        transformer = load_transformer(config.backbone, "mlm" if own else "none")
        return LexSemBridge(config, transformer, TextTokenizer.of(config.backbone), lexical)

    @property
    def dim(self) -> int:
        """Length of a vector."""
        return self.hidden_size

    def states(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Return the last hidden states [B, L, d] and the pooled state before normalisation [B, d]."""
        if self.config.weights == "clr" and self.lexical is None:
            out = self.transformer(input_ids=ids, attention_mask=mask, output_hidden_states=True)
            hidden = out.hidden_states[-1]
        else:
            hidden = self.transformer(input_ids=ids, attention_mask=mask).last_hidden_state
        return hidden, pool(hidden, mask, self.config.pool)

    def contextual(self, ids: Tensor, mask: Tensor) -> Tensor | None:
        """Return CLR's weights [B, V]; None for the other kinds."""
        if self.config.weights != "clr":
            return None
        head: Any = self.lexical if self.lexical is not None else self.transformer
        logits = head(input_ids=ids, attention_mask=mask).logits.float()  # [B, L, V]
        return max_pooled(logits, mask) if self.config.clr_pool == "max" else torch.log1p(torch.relu(logits[:, 0]))

    def plain(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Return the plain encoder's vectors [B, d]."""
        return F.normalize(self.states(ids, mask)[1], dim=-1)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Return enhanced vectors [B, d]."""
        hidden, raw = self.states(ids, mask)
        return self.lexicon(F.normalize(raw, dim=-1), ids, mask, hidden, raw, self.contextual(ids, mask))  # type: ignore[no-any-return]

    def encode_queries(self, texts: Sequence[str], progress: Progress = silent) -> Vectors:
        """Return float32 [N, D], enhanced unless `fusion_at_test` is off."""
        return self._encode(texts, self.config.max_query_len, self.config.fusion_at_test, progress)

    def encode_passages(self, texts: Sequence[str], progress: Progress = silent) -> Vectors:
        """Return float32 [N, D], plain unless `fusion_passages`."""
        return self._encode(texts, self.config.max_passage_len, self.config.fusion_passages, progress)

    def truncated(self, texts: Sequence[str]) -> NDArray[np.bool_]:
        """Return bool [N]: of which passages only the beginning is read."""
        return self.tokenizer.truncated(texts, self.config.max_passage_len)

    def windows(self, texts: Sequence[str]) -> Windows:
        """Return what to encode so that all of every passage is read."""
        return windows_of(texts, self.tokenizer, self.tokenizer.room(self.config.max_passage_len))

    # Diagnostics.

    def weights(self, texts: Sequence[str]) -> sparse.csr_matrix:
        """Return the terms' weights w of queries, float32 CSR [N, V]; all zero for the kinds without any."""
        if not isinstance(getattr(self.lexicon, "W", None), nn.Parameter):
            return sparse.csr_matrix((len(texts), len(self.tokenizer)), dtype=np.float32)
        rows = [self._explained(text)[0] for text in texts]
        return sparse.vstack([sparse.csr_matrix(row.numpy()) for row in rows], format="csr")

    def enhancement(self, texts: Sequence[str]) -> Vectors:
        """Return what the queries' vectors are multiplied by, v float32 [N, d], rows of sum 1.

        Raises:
            ConfigError: `off` and `linear_map` multiply nothing.
        """
        if not isinstance(getattr(self.lexicon, "c", None), nn.Parameter):
            raise ConfigError(f"weights = {self.config.weights!r} has no enhancement; slr, llr, clr and c_only have")
        return np.concatenate([self._explained(text)[1].numpy() for text in texts] or [np.empty((0, self.dim))])

    @torch.no_grad()
    def _explained(self, text: str) -> tuple[Tensor, Tensor]:
        rows = self.tokenizer.encode([text], self.config.max_query_len)
        ids, mask = padded(rows, self.tokenizer.pad, device_of(self))
        hidden, raw = self.states(ids, mask)
        clr = self.contextual(ids, mask)
        w = torch.zeros(1, 0) if self.config.weights == "c_only" else self.lexicon.weights(ids, mask, hidden, raw, clr)
        share = torch.softmax(self.lexicon.z(ids, mask, hidden, raw, clr), dim=-1)
        return w.float().cpu(), share.float().cpu()

    def transformers(self) -> dict[str, nn.Module]:
        """Return the backbone, and the masked-LM head where it is a model of its own."""
        return super().transformers() | ({"lexical": self.lexical} if self.lexical is not None else {})

    @classmethod
    def built(cls, config: LexSemBridgeConfig, about: dict[str, Any], tokenizer: TextTokenizer) -> Self:
        """Build the model of a config.json, weights not yet read."""
        own = config.weights == "clr" and config.clr_backbone == "own"
        lexical = build_transformer(about["lexical"], "mlm").requires_grad_(False) if "lexical" in about else None
        return cls(config, build_transformer(about["architecture"], "mlm" if own else "none"), tokenizer, lexical)

    def _encode(self, texts: Sequence[str], max_len: int, fused: bool, progress: Progress) -> Vectors:
        rows = self.tokenizer.encode(texts, max_len)
        forward = self.forward if fused else self.plain
        return in_passes(rows, self.tokenizer.pad, device_of(self), forward, progress).reshape(len(texts), self.dim)
