"""Training the rerankers: short lists out of the first stage's pool, with a teacher's order.

The rerankers see the same lists at the same steps with the same targets, so they differ in the model alone.
With `train = "fusion"` the backbone is frozen and each pair is encoded once (`pipelines.pair_vectors`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from pipelines.pair_vectors import PairVectors
from pipelines.text_config import TextTrainConfig
from pipelines.text_corpus import Corpus, Queries, normalised
from pipelines.text_measures import measure
from ranking.cross_encoder import CrossEncoder
from ranking.fusion import NONE, Ranking
from ranking.mvp import Mvp, orthogonal_loss, rank_loss, targets
from ranking.mvp_apart import MvpApart
from ranking.text_backbone import device_of, padded
from recsys.errors import ConfigError, DataError
from recsys.randomness import generator

Reranker: TypeAlias = Mvp | MvpApart | CrossEncoder
DEV_PLACES = 20
"""Passages reranked per dev query: a tenth of a full evaluation's time."""


@dataclass(frozen=True)
class Pool:
    """Queries with the passages a first stage found for each."""

    queries: Queries
    ranking: Ranking


def rerank_pool(
    model: Reranker,
    corpus: Corpus,
    pool: Pool,
    places: int,
    order: Sequence[int] | None = None,
    vectors: PairVectors | None = None,
) -> Ranking:
    """Rerank each query's first places; equal scores keep the first stage's order.

    Args:
        model: the reranker.
        corpus: of the passages.
        pool: what the first stage found.
        places: how many of them are read.
        order: in which order the candidates are handed over, for checks that it does not matter.
        vectors: of the pairs, where they are kept; else the model reads them.
    """
    rows = pool.ranking.top(places).rows
    scores = np.full(rows.shape, -np.inf, np.float32)
    for query, found in enumerate(rows):
        present = [place for place in (order or range(len(found))) if found[place] != NONE]
        passages = [corpus.passages[found[place]] for place in present]
        text = pool.queries.texts[query]
        if vectors is None:
            scores[query, present] = model.rerank(text, passages)
        elif present:
            scores[query, present] = model.rank_vectors([vectors.get([text] * len(passages), passages)])[0]
    best = np.argsort(-scores, axis=1, kind="stable")
    return Ranking(np.take_along_axis(rows, best, axis=1), np.take_along_axis(scores, best, axis=1))


@dataclass
class RerankerTask:
    """The task of `pipelines.text_train` for the rerankers.

    Args:
        config: the run; `rows` lists of `group` passages a step.
        model: with its initial weights.
        corpus: the passages.
        train: training queries with their pools; those without a positive are skipped.
        dev: dev queries with their pools.
        vectors: of the pairs, for a frozen backbone; else the model reads them at every step.
    """

    config: TextTrainConfig
    model: Reranker
    corpus: Corpus
    train: Pool
    dev: Pool
    vectors: PairVectors | None = None

    def __post_init__(self) -> None:
        grades = self.train.queries.grades
        self.usable = [place for place, known in enumerate(grades) if any(grade > 0 for grade in known.values())]
        if not self.usable:
            raise DataError("0 training queries with a relevant passage; train on a split, keywords or spans")
        if self.config.train == "fusion":
            self.model.transformer.requires_grad_(False)
        if not any(parameter.requires_grad for parameter in self.model.parameters()):
            raise ConfigError("train = 'fusion' leaves nothing of an encoder-decoder to train; set train = 'full'")

    @property
    def fresh(self) -> Sequence[nn.Parameter]:
        """What is not the backbone's."""
        backbone = {id(parameter) for parameter in self.model.transformer.parameters()}
        return [parameter for parameter in self.model.parameters() if id(parameter) not in backbone]

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return device_of(self.model)

    @cached_property
    def texts(self) -> list[str]:
        """Normalised passages: one of the same text as a relevant one is no negative."""
        return [normalised(text) for text in self.corpus.passages]

    def lists(self, step: int) -> tuple[list[str], list[list[int]], Tensor, Tensor]:
        """Return queries, passages, teacher ranks [B, n] and grades [B, n] of one step; rank 0 is padding."""
        draws = generator(self.config.seed, step, "lists")
        queries, passages = [], []
        ranks = torch.zeros(self.config.rows, self.config.group)
        grades = torch.zeros(self.config.rows, self.config.group, dtype=torch.int64)
        for line, place in enumerate(draws.choice(self.usable, self.config.rows)):
            known = self.train.queries.grades[place]
            pool = [int(row) for row in self.train.ranking.rows[place] if row != NONE]
            positives = [row for row, grade in known.items() if grade > 0]
            relevant = {self.texts[row] for row in positives}
            positives = draws.permutation(positives)[: min(self.config.positives, self.config.group - 1)].tolist()
            negatives = [
                row for row in pool[1 : self.config.depth] if row not in known and self.texts[row] not in relevant
            ]  # a grade of 0 is no hard negative either
            most = self.config.group - len(positives)
            chosen = [*positives, *draws.permutation(negatives)[:most].tolist()]
            silver = {row: at for at, row in enumerate(pool)}
            forced = self.config.force_positive_first  # the authors' one labelled passage is always rank 1
            key = {
                row: (forced and known.get(row, 0) > 0, self._grade(known, row), -silver.get(row, len(pool)))
                for row in chosen
            }
            order = sorted(chosen, key=lambda row: key[row], reverse=True)
            for at, row in enumerate(chosen):
                ranks[line, at] = order.index(row) + 1
                grades[line, at] = known.get(row, 0)
            queries.append(self.train.queries.texts[place])
            passages.append(chosen)
        return queries, passages, ranks, grades

    def loss(self, step: int) -> tuple[Tensor, dict[str, float]]:
        """Return the listwise loss of one step, and MVP's orthogonal term."""
        queries, lists, ranks, grades = self.lists(step)
        tau, variant = self.config.rank_tau, self.config.loss_variant
        y = targets(ranks, tau, grades if self.config.teacher == "qrels" else None).to(self.device)
        vectors = self._encoded(queries, lists)
        mask = (ranks > 0).to(self.device)
        if isinstance(self.model, CrossEncoder):
            ranked = rank_loss(self.model.score(vectors, mask), y, tau, variant)
            return ranked, {"rank": float(ranked.detach())}
        scores, anchors = self.model.score(vectors, mask)
        ranked, apart = rank_loss(scores, y, tau, variant), orthogonal_loss(anchors)
        parts = {"rank": float(ranked.detach()), "orthogonal": float(apart.detach())}
        return ranked + self.config.orthogonal * apart, parts

    def validate(self) -> dict[str, float]:
        """Return nDCG@10 and MRR@10 of the reranked dev pools."""
        ranking = rerank_pool(self.model, self.corpus, self.dev, DEV_PLACES, vectors=self.vectors)
        values = measure(ranking, self.dev.queries)
        return {name: float(values[name].mean()) for name in ("ndcg_at_10", "mrr_at_10")}

    def _grade(self, known: dict[int, int], row: int) -> int:
        return 0 if self.config.teacher == "silver" else known.get(row, 0)

    def _encoded(self, queries: Sequence[str], lists: Sequence[Sequence[int]]) -> Tensor:
        """Return vectors [B, n, m, d] of all pairs, zeros past the end of a list."""
        texts = [[self.corpus.passages[passage] for passage in passages] for passages in lists]
        asked = [query for query, passages in zip(queries, texts, strict=True) for _ in passages]
        read = [passage for passages in texts for passage in passages]
        if self.vectors is not None:
            flat = torch.from_numpy(self.vectors.get(asked, read)).to(self.device)
        else:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.bfloat16):
                flat = self._read(queries, texts).float()
        encoded = list(torch.split(flat, [len(one) for one in lists]))
        widest = encoded[0].new_zeros(self.config.group, *encoded[0].shape[1:])
        whole = nn.utils.rnn.pad_sequence([*encoded, widest], batch_first=True)
        return whole[:-1]

    def _read(self, queries: Sequence[str], lists: Sequence[Sequence[str]]) -> Tensor:
        """Let the model read the pairs of all lists, with a gradient: [P, m, d]."""
        if isinstance(self.model, MvpApart):
            asked = [query for query, passages in zip(queries, lists, strict=True) for _ in passages]
            return self.model.pairs(asked, [passage for passages in lists for passage in passages])
        rows = [row for query, texts in zip(queries, lists, strict=True) for row in self.model.rows(query, texts)]
        return self.model.encode(*padded(rows, self.model.tokenizer.pad, self.device))
