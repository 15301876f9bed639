"""MVP: all candidates of a query reranked by one encoder pass and one decoder step per view.

"Multi-View-guided Passage Reranking with Large Language Models", EMNLP 2025, arXiv 2509.07485. Marks: (paper),
(code) the authors' released code, (ours) a choice of ours.

    x_i  = view_1 .. view_m | query | passage i           every passage is read beside the query, alone
    E    = encoder(x)[:, :m]            [B, n, m, d]      a relevance vector per passage and view
    a_k  = decoder(start_k; e_1k .. e_nk)   [B, m, d]     an anchor per view, from one step over the list
    s_i  = mean_k a_k . e_ik            [B, n]            no cosine, no position anywhere: order cannot matter

Two paths. A T5 encoder-decoder is the paper's: sentinels as view tokens, one start vector for all views, plain dot
products. An encoder-only backbone (ours, the default without network) gets a fresh decoder of two cross-attention
blocks, unused vocabulary rows as view tokens, a start vector of width 1 per view since a fresh decoder's anchors would
otherwise coincide (with N(0, 0.02^2) their cosine begins at .98 and the orthogonal term at 11.6 of 12), and scores
divided by sqrt(d), since they must start near the temperature. View tokens are rows of the backbone's table: they learn
at its rate, and not at all where it is frozen, so that encodings can be kept.

Scores belong to one list: they may be neither cached per passage nor merged from chunks. Encodings E may be cached.

    B queries    n passages of a list    P pairs    L tokens    m views    d width
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ranking.pair_prompt import PairPrompt
from ranking.pair_reranker import PairReranker
from ranking.text_backbone import TOKENS_PER_PASS, TextTokenizer, device_of, load_transformer
from ranking.text_models import Vectors
from recsys.errors import ConfigError
from recsys.progress import Progress, silent


@dataclass(frozen=True)
class MvpConfig:
    """Options of the model."""

    backbone: str = "minilm"
    views: int = 4
    view_pool: Literal["mean", "max", "logmeanexp"] = "mean"
    decoder_layers: int = 2
    """of the encoder-only path"""
    decoder_heads: int = 12
    shared_start: bool = False
    score_scale: Literal["none", "sqrt_d"] = "sqrt_d"
    max_query_len: int = 64
    max_len: int = 256
    tokens_per_pass: int = TOKENS_PER_PASS

    def __post_init__(self) -> None:
        if self.views < 1:
            raise ConfigError(f"[model] views is {self.views}; expected at least 1")


class CrossBlock(nn.Module):
    """One pre-norm block of the fresh decoder: masked cross-attention and a feed-forward of 4 d, both residual."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.norm_ff = nn.LayerNorm(width)
        self.ff = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, vectors: Tensor, padding: Tensor) -> Tensor:
        """Return [G, 1, d] for x [G, 1, d], vectors [G, n, d] and padding bool [G, n]."""
        seen, _ = self.attention(self.norm(x), vectors, vectors, key_padding_mask=padding, need_weights=False)
        x = x + seen
        out: Tensor = x + self.ff(self.norm_ff(x))
        return out


class CrossDecoder(nn.Module):
    """The fresh decoder: blocks of cross-attention and a final norm; no self-attention, since there is one position."""

    def __init__(self, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([CrossBlock(width, heads) for _ in range(layers)])
        self.final = nn.LayerNorm(width)

    def forward(self, start: Tensor, vectors: Tensor, padding: Tensor) -> Tensor:
        """Return anchors [G, 1, d] of starts [G, 1, d]."""
        x = start
        for block in self.blocks:
            x = block(x, vectors, padding)
        out: Tensor = self.final(x)
        return out


def pooled_views(scores: Tensor, how: Literal["mean", "max", "logmeanexp"]) -> Tensor:
    """Return [B, n] of view scores [B, n, m]."""
    if how == "max":
        return scores.amax(dim=-1)
    if how == "logmeanexp":
        return torch.logsumexp(scores, dim=-1) - float(np.log(scores.shape[-1]))
    return scores.mean(dim=-1)


def scores_by_view(anchors: Tensor, vectors: Tensor) -> Tensor:
    """Return s_ik [B, n, m] = a_k . e_ik of anchors [B, m, d] and vectors [B, n, m, d].

    Each is summed on its own, not in a product of matrices: there equal vectors differ by their place in the last bit.
    """
    return (anchors.unsqueeze(1) * vectors).sum(dim=-1)


class Mvp(PairReranker):
    """A `TextReranker`.

    Args:
        config: options.
        transformer: the backbone; an encoder-decoder takes the paper's path.
        tokenizer: its tokenizer.
    """

    kind, options = "mvp", MvpConfig
    reads_by_decoder = whole_list = True
    config: MvpConfig

    def __init__(self, config: MvpConfig, transformer: nn.Module, tokenizer: TextTokenizer) -> None:
        super().__init__(config, transformer, tokenizer)
        config = self.config
        about: Any = transformer.config
        self.t5 = bool(about.is_encoder_decoder)
        self.width = int(about.hidden_size)
        self.view_ids = _view_ids(tokenizer, config.views, self.t5)
        self.prompt = _prompt(config, tokenizer, self.view_ids, self.t5)
        self.start_id = int(about.decoder_start_token_id or 0) if self.t5 else 0
        if not self.t5:
            if self.width % config.decoder_heads:
                raise ConfigError(f"[model] decoder_heads = {config.decoder_heads} does not divide {self.width}")
            self.decoder = CrossDecoder(self.width, config.decoder_layers, config.decoder_heads)
            self.start = nn.Parameter(torch.randn(1 if config.shared_start else config.views, self.width))
        self.eval()

    @staticmethod
    def of(config: MvpConfig = MvpConfig()) -> "Mvp":
        """Load the backbone of a config; what is fresh is drawn from torch's global generator."""
        transformer = load_transformer(config.backbone)
        model = Mvp(config, transformer, TextTokenizer.of(config.backbone))
        model.begin()
        return model

    def begin(self) -> None:
        """Give the view tokens of an encoder-only backbone their first vectors: that of [CLS] and a little noise."""
        if self.t5 or not self.tokenizer.prefix:
            return
        table = self.transformer.get_input_embeddings().weight  # type: ignore[operator]
        with torch.no_grad():
            # The same for every seed: runs that leave the backbone as it is share their encodings.
            generator = torch.Generator().manual_seed(0)
            noise = torch.randn(len(self.view_ids), self.width, generator=generator) * 0.02
            table[self.view_ids] = table[self.tokenizer.prefix[0]] + noise

    @property
    def scale(self) -> float:
        """What scores are divided by."""
        return self.width**0.5 if self.config.score_scale == "sqrt_d" and not self.t5 else 1.0

    # From texts to relevance vectors.

    def encode(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Return relevance vectors [P, m, d] of pairs; every row must begin with the view tokens."""
        views = torch.tensor(self.view_ids, device=ids.device)
        assert bool((ids[:, : len(views)] == views).all()), "view tokens are not at the first places"
        body: Any = self.transformer.encoder if self.t5 else self.transformer
        hidden: Tensor = body(input_ids=ids, attention_mask=mask).last_hidden_state  # [P, L, d]
        return hidden[:, : len(views)]

    def encode_pairs(self, query: str, passages: Sequence[str], progress: Progress = silent) -> Vectors:
        """Return relevance vectors float32 [n, m, d], which depend on one pair each and may be cached."""
        vectors = self.read([query], [passages], self.encode, progress)[0]
        return vectors.reshape(len(passages), self.config.views, self.width)

    # From relevance vectors to scores.

    def decode(self, vectors: Tensor, mask: Tensor) -> Tensor:
        """Return anchors [B, m, d] of vectors [B, n, m, d] and mask bool [B, n]: one step, views in the batch."""
        B, n, m, d = vectors.shape
        per_view = vectors.transpose(1, 2).reshape(B * m, n, d)
        list_mask = mask.unsqueeze(1).expand(B, m, n).reshape(B * m, n)
        if self.t5:
            body: Any = self.transformer
            start = torch.full((B * m, 1), self.start_id, dtype=torch.int64, device=vectors.device)
            out = body.decoder(
                input_ids=start,
                encoder_hidden_states=per_view,
                encoder_attention_mask=list_mask.to(torch.int64),
                use_cache=False,
            ).last_hidden_state  # [B * m, 1, d]
        else:
            start = self.start.expand(m, d).repeat(B, 1).unsqueeze(1)  # [B * m, 1, d]
            out = self.decoder(start, per_view, ~list_mask)
        anchors: Tensor = out.reshape(B, m, d)
        return anchors

    def score(self, vectors: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Return scores [B, n], -inf where the list mask is off, and the anchors [B, m, d]."""
        anchors = self.decode(vectors, mask)
        each = scores_by_view(anchors, vectors) / self.scale
        return pooled_views(each, self.config.view_pool).masked_fill(~mask, -torch.inf), anchors

    def rank_vectors(self, lists: Sequence[Vectors]) -> list[Vectors]:
        """Return scores of ragged lists of relevance vectors [n, m, d]; the decoder runs once for all of them."""
        if not any(len(one) for one in lists):
            return [np.empty(0, np.float32) for _ in lists]
        vectors, mask = ragged(lists)
        live = mask.any(dim=1)
        out = [np.empty(0, np.float32) for _ in lists]
        with torch.inference_mode():
            device = device_of(self)
            scores, _ = self.score(vectors[live].to(device), mask[live].to(device))
        for place, row in zip(torch.nonzero(live).flatten().tolist(), scores.float().cpu().numpy(), strict=True):
            out[place] = row[: len(lists[place])].copy()
        return out

    def rerank_many(
        self, queries: Sequence[str], lists: Sequence[Sequence[str]], progress: Progress = silent
    ) -> list[Vectors]:
        """Rerank one list per query; the pairs of all lists are encoded together, batched by length."""
        return self.rank_vectors(self.read(queries, lists, self.encode, progress))

    # Diagnostics.

    def anchors(self, query: str, passages: Sequence[str]) -> Vectors:
        """Return the anchor of each view over one list, float32 [m, d]."""
        return self._explained(query, passages)[0]

    def view_scores(self, query: str, passages: Sequence[str]) -> Vectors:
        """Return float32 [n, m], what each view scores each passage; pooled over views they are what `rerank` gives."""
        return self._explained(query, passages)[1]

    def _explained(self, query: str, passages: Sequence[str]) -> tuple[Vectors, Vectors]:
        if not len(passages):
            m = self.config.views
            return np.full((m, self.width), np.nan, np.float32), np.empty((0, m), np.float32)
        device = device_of(self)
        vectors = torch.from_numpy(self.encode_pairs(query, passages))[None].to(device)  # [1, n, m, d]
        with torch.inference_mode():
            anchors = self.decode(vectors, torch.ones(vectors.shape[:2], dtype=torch.bool, device=device))
            each = scores_by_view(anchors, vectors) / self.scale
        return anchors[0].float().cpu().numpy(), each[0].float().cpu().numpy()


def ragged(lists: Sequence[Vectors]) -> tuple[Tensor, Tensor]:
    """Return vectors [B, n, m, d], zeros past the end of a list, and the mask bool [B, n]."""
    longest = max(len(one) for one in lists)
    vectors = np.zeros((len(lists), longest, *lists[0].shape[1:]), np.float32)
    mask = np.zeros((len(lists), longest), bool)
    for place, one in enumerate(lists):
        vectors[place, : len(one)] = one
        mask[place, : len(one)] = True
    return torch.from_numpy(vectors), torch.from_numpy(mask)


def _view_ids(tokenizer: TextTokenizer, views: int, t5: bool) -> list[int]:
    names = [f"<extra_id_{k}>" if t5 else f"[unused{k}]" for k in range(views)]
    ids = tokenizer.special(*names)
    if len(ids) < views:
        raise ConfigError(f"[model] views = {views}: the vocabulary has {len(ids)} view tokens like {names[0]}")
    return ids


def _prompt(config: MvpConfig, tokenizer: TextTokenizer, view_ids: list[int], t5: bool) -> PairPrompt:
    if t5:
        query_mark, context_mark = tokenizer.pieces(["| Query:", "| Context:"])  # as published
        lead, middle = (*view_ids, *query_mark), tuple(context_mark)
    else:
        lead, middle = (*view_ids, *tokenizer.prefix), tokenizer.suffix
    return PairPrompt(tokenizer, lead, middle, tokenizer.suffix, config.max_query_len, config.max_len)


# Targets and losses (section 3).


def targets(ranks: Tensor, tau: float, grades: Tensor | None = None) -> Tensor:
    """Return y [..., n] = softmax((1 / r) / tau) of teacher ranks from 1; slots of rank 0 are padding and get 0.

    With grades, passages of one grade share the mean of their 1 / r (ours).
    """
    present = ranks > 0
    inverse = torch.where(present, 1.0 / ranks.clamp(min=1), 0.0)
    if grades is not None:
        same = (grades.unsqueeze(-1) == grades.unsqueeze(-2)) & present.unsqueeze(-1) & present.unsqueeze(-2)
        share = same.to(inverse.dtype)
        inverse = (share @ inverse.unsqueeze(-1)).squeeze(-1) / share.sum(dim=-1).clamp(min=1)
    y = torch.softmax((inverse / tau).masked_fill(~present, -torch.inf), dim=-1)
    return y.masked_fill(~present, 0.0)


def rank_loss(scores: Tensor, y: Tensor, tau: float, variant: Literal["single", "released"] = "single") -> Tensor:
    """Return the mean over lists of - sum_i y_i log p_i, p = softmax(s / tau); scores -inf are padding.

    `released` is the authors' code, whose cross-entropy applies a softmax to p again: for parity only.
    """
    present = scores != -torch.inf  # a score that is no number is no padding: the loss must tell of it
    logits = scores / tau
    if variant == "released":
        logits = torch.softmax(logits, dim=-1).masked_fill(~present, -torch.inf)
    log_p = torch.log_softmax(logits, dim=-1).masked_fill(~present, 0.0)
    return -(y * log_p).sum(dim=-1).mean()


def orthogonal_loss(anchors: Tensor) -> Tensor:
    """Return the mean over lists of || A^ A^T - I ||_F^2, A^ [B, m, d] the anchors at length 1; in [0, m (m - 1)]."""
    unit = F.normalize(anchors, dim=-1)
    gram = unit @ unit.transpose(-1, -2) - torch.eye(anchors.shape[-2], dtype=anchors.dtype, device=anchors.device)
    return gram.square().sum(dim=(-1, -2)).mean()
