"""MVP's listwise step for an encoder that never read two texts together: query and passage are read apart (ours).

After "Multi-View-guided Passage Reranking with Large Language Models" (arXiv 2509.07485), whose views, one attention
over the list, anchors and dot products stay. What differs is where the relevance vectors come from. A dual encoder's
first positions say nothing about a pair it is shown for the first time; its token states, each text read as it was
trained to, say much. And a view starts from the query, so that the one step over the list is relevance feedback:

    R_i1  the passage whole: mean of its token states            every R at length 1, [m, d]
    R_i2  of each query token the passage token nearest to it, their mean
    R_i3  of windows of 32 tokens the one nearest to the query
    R_i4  its first 24 tokens
    b_i   words: BM25's sum over the query's tokens, as a share of the sum of their idf
    r_i = mean_k q_k . R_ik + u b_i                    q_k = (1 + D_k) * q
    a_k = q_k + beta_k (1 + G_k) * sum_i softmax_i(r_i / T) R_ik          the anchor
    s_i = c (mean_k a_k . R_ik + w b_i)

D and G start at 0, u and w at 0.3, which is about what words weigh in a hybrid search: an untrained model is feedback
by words and vectors. Nothing knows a passage's place, so order
cannot matter. `listwise = false` takes the step over the list out, beta = 0: the control that scores each passage by
itself, equal in all else, the loss over the list too.
As for MVP, scores speak of one list.

    B queries    n passages of a list    P pairs    L tokens    m views    d width
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from ranking.products import fast_linear
from ranking.text_backbone import (
    TOKENS_PER_PASS,
    TextModel,
    TextTokenizer,
    digest_of,
    load_transformer,
    padded,
    passes,
)
from ranking.text_models import Vectors
from recsys.errors import ConfigError
from recsys.progress import Progress, silent

READINGS = 4
WINDOW, STRIDE, OPENING = 32, 8, 24
"""tokens"""
K1, B = 0.9, 0.4
"""of BM25"""
TEMPERATURE, SCALE, WORDS = 1 / 30, 2.0, 0.3
"""where T, c, and u and w start"""


@dataclass(frozen=True)
class MvpApartConfig:
    """Options of the model."""

    backbone: str = "minilm"
    views: int = READINGS
    """the first so many of the readings above"""
    listwise: bool = True
    words: bool = True
    max_query_len: int = 64
    max_len: int = 256
    """tokens of a passage"""
    tokens_per_pass: int = TOKENS_PER_PASS

    def __post_init__(self) -> None:
        if not 1 <= self.views <= READINGS:
            raise ConfigError(f"[model] views is {self.views}; expected 1 to {READINGS}")


@dataclass(frozen=True)
class States:
    """Token states of one text, [L, d], and its ids int64 [L]."""

    hidden: Tensor
    ids: Tensor


class MvpApart(TextModel):
    """A `TextReranker`.

    Args:
        config: options.
        transformer: the backbone, of a dual encoder with mean pooling.
        tokenizer: its tokenizer.
    """

    kind, options = "mvp_apart", MvpApartConfig
    whole_list = True
    config: MvpApartConfig

    def __init__(self, config: MvpApartConfig, transformer: nn.Module, tokenizer: TextTokenizer) -> None:
        super().__init__(config, transformer, tokenizer)
        config = self.config
        self.width = self.hidden_size
        m, d = config.views, self.width
        self.D = nn.Parameter(torch.zeros(m, d))
        self.c = nn.Parameter(torch.tensor(math.log(SCALE)))
        if config.listwise:
            self.G = nn.Parameter(torch.zeros(m, d))
            self.beta = nn.Parameter(torch.ones(m))
            self.T = nn.Parameter(torch.tensor(math.log(TEMPERATURE)))
        if config.words:
            self.w = nn.Parameter(torch.tensor(WORDS))
        if config.words and config.listwise:
            self.u = nn.Parameter(torch.tensor(WORDS))
        self.idf: Tensor
        self.mean_length: Tensor
        self.register_buffer("idf", torch.ones(len(tokenizer)))
        self.register_buffer("mean_length", torch.tensor(float(config.max_len)))
        self.eval()

    @staticmethod
    def of(config: MvpApartConfig = MvpApartConfig()) -> "MvpApart":
        """Load the backbone of a config; nothing is drawn."""
        return MvpApart(config, load_transformer(config.backbone), TextTokenizer.of(config.backbone))

    @property
    def reading(self) -> str:
        """Digest of what decides the vectors of a pair: backbone, tokenizer, lengths, and the words' idf."""
        options = (self.config.views, self.config.max_query_len, self.config.max_len, WINDOW, STRIDE, OPENING)
        words = digest_of(nn.ParameterList([self.idf, self.mean_length]), options, self.tokenizer)
        return digest_of(self.transformer, words, self.tokenizer, self.transformer)

    def count_words(self, passages: Sequence[str]) -> None:
        """Take idf and mean length from a corpus; until then every token counts alike."""
        found = self.tokenizer.encode(passages, self.config.max_len)
        held = torch.zeros(len(self.tokenizer))
        for ids in found:
            held[list(set(ids))] += 1
        self.idf.copy_(torch.log(1 + (len(found) - held + 0.5) / (held + 0.5)))
        self.mean_length.fill_(sum(map(len, found)) / max(len(found), 1))

    def truncated(self, query: str, passages: Sequence[str]) -> NDArray[np.bool_]:
        """Return bool [n]: which passages are cut."""
        return self.tokenizer.truncated(passages, self.config.max_len)

    # From texts to the vectors of pairs.

    def states(self, texts: Sequence[str], max_len: int, progress: Progress = silent) -> list[States]:
        """Read texts, batched by length, in input order; gradients flow where they are on."""
        rows = self.tokenizer.encode(texts, max_len)
        found: dict[int, States] = {}
        for chosen in passes([len(row) for row in rows], self.config.tokens_per_pass):
            ids, mask = padded([rows[place] for place in chosen], self.tokenizer.pad, self.idf.device)
            with fast_linear(0 if torch.is_grad_enabled() else ids.numel()):
                hidden = self.transformer(input_ids=ids, attention_mask=mask).last_hidden_state.float()  # [P, L, d]
            for place, one, own in zip(chosen.tolist(), hidden, ids, strict=True):
                length = len(rows[place])
                found[place] = States(one[:length], own[:length])
            progress(len(found), len(rows))
        return [found[place] for place in range(len(rows))]

    def read(self, query: States, passages: Sequence[States]) -> Tensor:
        """Return the vectors of pairs of one query [n, m + 1, d + 1].

        Rows: the views, then the query. The last column holds the words' share b, alike in every row of a pair.
        """
        hidden = nn.utils.rnn.pad_sequence([one.hidden for one in passages], batch_first=True)  # [n, L, d]
        lengths = torch.tensor([len(one.ids) for one in passages], device=hidden.device)
        views = readings(query.hidden, hidden, lengths)[:, : self.config.views]
        own = F.normalize(query.hidden.mean(dim=0), dim=-1).expand(len(passages), 1, -1)
        share = torch.stack([self.share(query.ids, one.ids) for one in passages])
        rows = torch.cat([views, own], dim=1)  # [n, m + 1, d]
        return torch.cat([rows, share[:, None, None].expand(-1, rows.shape[1], 1)], dim=-1)

    def share(self, query: Tensor, passage: Tensor) -> Tensor:
        """Return b, from 0 to K1 + 1, of token ids int64 [L] of a query and of a passage."""
        marks = torch.tensor([*self.tokenizer.prefix, *self.tokenizer.suffix], device=query.device)
        asked = torch.unique(query[~torch.isin(query, marks)])
        if not len(asked):
            return self.idf.new_zeros(())
        times = (asked[:, None] == passage[None]).sum(dim=1)  # [U]
        length = 1 - B + B * len(passage) / self.mean_length
        idf = self.idf[asked]
        found: Tensor = (idf * times * (K1 + 1) / (times + K1 * length)).sum() / idf.sum()
        return found

    def pairs(self, queries: Sequence[str], passages: Sequence[str]) -> Tensor:
        """Return the vectors [P, m + 1, d + 1] of pairs of a query and a passage each; every text is read once."""
        asked, held = list(dict.fromkeys(queries)), list(dict.fromkeys(passages))
        of_query = dict(zip(asked, self.states(asked, self.config.max_query_len), strict=True))
        of_passage = dict(zip(held, self.states(held, self.config.max_len), strict=True))
        return self.joined(queries, passages, of_query, of_passage)

    def joined(
        self,
        queries: Sequence[str],
        passages: Sequence[str],
        of_query: dict[str, States],
        of_passage: dict[str, States],
    ) -> Tensor:
        """Return the vectors [P, m + 1, d + 1] of pairs whose texts have been read."""
        out: list[Tensor | None] = [None] * len(queries)
        for query in dict.fromkeys(queries):
            places = [place for place, text in enumerate(queries) if text == query]
            found = self.read(of_query[query], [of_passage[passages[place]] for place in places])
            for place, one in zip(places, found, strict=True):
                out[place] = one
        return torch.stack([one for one in out if one is not None])

    # From vectors to scores.

    def score(self, vectors: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Return scores [B, n], -inf where the list mask is off, and the anchors [B, m, d], of vectors of `read`."""
        views, words = vectors[:, :, :-1, :-1], vectors[:, :, 0, -1]  # [B, n, m, d], [B, n]
        own = vectors[:, :, -1, :-1]
        query = (own * mask[..., None]).sum(dim=1) / mask.sum(dim=1, keepdim=True).clamp(min=1)  # the same in all
        anchors = query.unsqueeze(1) * (1 + self.D)  # [B, m, d]
        if self.config.listwise:
            near = torch.einsum("bmd,bnmd->bnm", anchors, views).mean(dim=-1)
            if self.config.words:
                near = near + self.u * words
            share = torch.softmax((near * torch.exp(-self.T)).masked_fill(~mask, -1e9), dim=-1)  # [B, n]
            heard = torch.einsum("bn,bnmd->bmd", share * mask, views)
            anchors = anchors + self.beta[:, None] * (1 + self.G) * heard
        scores = torch.einsum("bmd,bnmd->bnm", anchors, views).mean(dim=-1)
        if self.config.words:
            scores = scores + self.w * words
        return (scores * torch.exp(self.c)).masked_fill(~mask, -torch.inf), anchors

    def rank_vectors(self, lists: Sequence[Vectors]) -> list[Vectors]:
        """Return scores float32 [n] of ragged lists of vectors [n, m + 1, d + 1]."""
        out = []
        with torch.inference_mode():
            for one in lists:
                if not len(one):
                    out.append(np.empty(0, np.float32))
                    continue
                vectors = torch.from_numpy(one)[None].to(self.idf.device)
                scores, _ = self.score(vectors, torch.ones(vectors.shape[:2], dtype=torch.bool, device=vectors.device))
                out.append(scores[0].cpu().numpy())
        return out

    def rerank(self, query: str, passages: Sequence[str], progress: Progress = silent) -> Vectors:
        """Return float32 [n], higher is better."""
        return self.rerank_many([query], [passages], progress)[0]

    def rerank_many(
        self, queries: Sequence[str], lists: Sequence[Sequence[str]], progress: Progress = silent
    ) -> list[Vectors]:
        """Rerank one list per query; the passages of all lists are read together, batched by length, each text once."""
        held = list(dict.fromkeys(text for passages in lists for text in passages))
        with torch.inference_mode():
            of_passage = dict(zip(held, self.states(held, self.config.max_len, progress), strict=True))
            of_query = self.states(queries, self.config.max_query_len)
            found = [
                self.read(query, [of_passage[text] for text in passages]).cpu().numpy()
                if len(passages)
                else np.empty((0, self.config.views + 1, self.width + 1), np.float32)
                for query, passages in zip(of_query, lists, strict=True)
            ]
        return self.rank_vectors(found)


def readings(query: Tensor, hidden: Tensor, lengths: Tensor) -> Tensor:
    """Return the four readings [P, 4, d], each of length 1, of one query's states and padded ones of passages.

    Args:
        query: [Lq, d].
        hidden: [P, L, d], whatever past a passage's end.
        lengths: int64 [P], at least 1.
    """
    live = torch.arange(hidden.shape[1], device=hidden.device) < lengths[:, None]  # [P, L]
    hidden = hidden * live[..., None]
    whole = hidden.sum(dim=1) / lengths[:, None]
    asked = F.normalize(query.mean(dim=0), dim=-1)

    tokens = F.normalize(hidden, dim=-1)
    near = torch.einsum("qd,pld->pql", F.normalize(query, dim=-1), tokens).masked_fill(~live[:, None], -torch.inf)
    best = near.argmax(dim=-1)  # [P, Lq]
    nearest = torch.gather(tokens, 1, best[..., None].expand(-1, -1, tokens.shape[-1])).mean(dim=1)

    window = whole
    if hidden.shape[1] > WINDOW:
        sums = F.pad(hidden.cumsum(dim=1), (0, 0, 1, 0))  # [P, L + 1, d]
        starts = torch.arange(0, hidden.shape[1] - WINDOW + 1, STRIDE, device=hidden.device)
        means = F.normalize(sums[:, starts + WINDOW] - sums[:, starts], dim=-1)  # [P, S, d]
        inside = starts + WINDOW <= lengths[:, None]
        chosen = (means @ asked).masked_fill(~inside, -torch.inf).argmax(dim=-1)
        found = means[torch.arange(len(means), device=hidden.device), chosen]
        window = torch.where((lengths > WINDOW)[:, None], found, whole)
    opening = hidden[:, :OPENING].sum(dim=1)
    return F.normalize(torch.stack([whole, nearest, window, opening], dim=1), dim=-1)
