"""Training LexSemBridge: queries cut from the training documents (and natural ones), in-batch and BM25 hard negatives.

With `train = "fusion"` the backbone is frozen: passage vectors come from the cache, and what the fusion needs of each
query, training or dev, is computed once and kept, so a step and a validation cost the fusion alone.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipelines.first_stages import FirstStages, dense_search
from pipelines.text_config import TextTrainConfig
from pipelines.text_corpus import Queries, normalised
from pipelines.text_measures import measure
from pipelines.text_pairs import PairSource
from pipelines.text_train import contrastive_loss
from ranking.lexsembridge import LexSemBridge
from ranking.text_backbone import device_of, padded
from ranking.text_models import Vectors
from recsys.errors import ConfigError, DataError
from recsys.randomness import generator

HARD_RANKS = slice(1, 50)
"""BM25 places hard negatives are drawn from"""
DISTRACTORS = 500
"""Other passages in the dev search of full training, which encodes its passages anew at every validation."""

QUERIES_PER_PASS = 64

logger = logging.getLogger(__name__)

State = tuple[Tensor | None, Tensor, Tensor | None]
"""hidden [L, d] if the code's LLR needs it, pooled [d], and CLR's weights [V] of one query"""


@dataclass
class EncoderTask:
    """The task of `pipelines.text_train` for a `LexSemBridge`.

    Args:
        config: the run.
        model: with its initial weights.
        stages: first stages over the corpus, whose encoder is the model's plain backbone.
        train: training queries of each kind; a batch mixes the kinds evenly, and each length of span is one.
        dev: dev queries of each kind.
        states: of the frozen backbone, by query; runs over one backbone and kind of weights may share them.
    """

    config: TextTrainConfig
    model: LexSemBridge
    stages: FirstStages
    train: dict[str, Queries]
    dev: dict[str, Queries]
    states: dict[str, State] = field(default_factory=dict)
    _hard: dict[str, list[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.train = {kind: queries.with_positive() for kind, queries in self.train.items()}
        if not any(len(queries) for queries in self.train.values()):
            raise DataError(
                "0 training queries with a relevant passage; train on a split, keywords or spans the passages are long "
                "enough for"
            )
        self.frozen = self.config.train == "fusion"
        if self.frozen and self.model.config.fusion_passages:
            raise ConfigError(
                "[model] fusion_passages = true with train = 'fusion': passages would be plain in training alone; "
                "set train = 'full', or leave fusion_passages out"
            )
        if self.frozen:
            self.model.transformer.requires_grad_(False)

    @property
    def fresh(self) -> Sequence[nn.Parameter]:
        """The fusion's parameters."""
        return list(self.model.lexicon.parameters())

    @property
    def device(self) -> torch.device:
        """Where the model is; what is kept between steps is in the CPU's memory."""
        return device_of(self.model)

    @cached_property
    def texts(self) -> list[str]:
        """Normalised passages: equal ones are never each other's negatives."""
        return [normalised(text) for text in self.stages.corpus.passages]

    @cached_property
    def held_out(self) -> frozenset[int]:
        """Documents that are no negatives, since queries cut from them are judged."""
        return PairSource(self.stages.corpus).held_out if self.config.corpus.cut else frozenset()

    @cached_property
    def _free(self) -> list[int]:
        return [row for row in range(len(self.texts)) if row not in self.held_out]

    def batch(self, step: int) -> tuple[list[str], list[dict[int, int]], list[list[int]]]:
        """Return texts, grades and passages (a positive, then hard negatives) of one step's queries."""
        draws = generator(self.config.seed, step, "text batch")
        kinds = [queries for queries in self.train.values() if len(queries)]
        texts, grades, groups = [], [], []
        for place in range(self.config.rows):
            queries = kinds[place % len(kinds)]
            chosen = int(draws.integers(len(queries)))
            text, known = queries.texts[chosen], queries.grades[chosen]
            positives = [row for row, grade in known.items() if grade > 0]
            if not positives:
                continue
            hard = [row for row in self._negatives(text) if row not in known]
            hard = hard or [self._free[int(draws.integers(len(self._free)))]]
            picked = draws.choice(hard, self.config.group - 1, replace=len(hard) < self.config.group - 1)
            texts.append(text)
            grades.append(known)
            groups.append([positives[int(draws.integers(len(positives)))], *picked.tolist()])
        return texts, grades, groups

    def loss(self, step: int) -> tuple[Tensor, dict[str, float]]:
        """Return the contrastive loss of one step, and how far the fusion turns the queries."""
        texts, grades, groups = self.batch(step)
        columns = [row for group in groups for row in group]
        target = torch.arange(len(groups)) * self.config.group
        also = self.left_out(texts, grades, columns, target).to(self.device)
        plain, queries = self.query_vectors(texts)
        passages = self.passage_vectors(columns)
        loss = contrastive_loss(queries, passages, target.to(self.device), also, self.config.tau)
        return loss, {"cosine_to_plain": float(F.cosine_similarity(plain, queries).mean().detach())}

    def left_out(
        self, texts: Sequence[str], grades: Sequence[dict[int, int]], columns: Sequence[int], target: Tensor
    ) -> Tensor:
        """Return bool [B, C]: which columns are no negatives of a row.

        Those are relevant to it, equal its positive in text, or belong to another row of the same query; its own hard
        negatives stay.
        """
        also = torch.zeros(len(texts), len(columns), dtype=torch.bool)
        for place, (text, known) in enumerate(zip(texts, grades, strict=True)):
            positive = self.texts[columns[int(target[place])]]
            for column, row in enumerate(columns):
                other = column // self.config.group
                again = other != place and texts[other] == text
                also[place, column] = known.get(row, 0) > 0 or self.texts[row] == positive or again
        also[torch.arange(len(texts)), target] = False
        return also

    def query_vectors(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return plain and enhanced vectors [B, d]."""
        model = self.model
        rows = model.tokenizer.encode(texts, model.config.max_query_len)
        if not self.frozen:
            return self._read(rows, fused=True)
        ids, mask = padded(rows, model.tokenizer.pad, self.device)
        hidden, raw, clr = self._kept(texts, ids, mask)
        plain = F.normalize(raw, dim=-1)
        return plain, model.lexicon(plain, ids, mask, hidden, raw, clr)

    def passage_vectors(self, rows: Sequence[int]) -> Tensor:
        """Return vectors [C, d] of passages, with a gradient in full training."""
        if self.frozen:
            return torch.from_numpy(self.stages.passage_vectors[list(rows)]).to(self.device)
        model = self.model
        texts = [self.stages.corpus.passages[row] for row in rows]
        fused = model.config.fusion_passages
        return self._read(model.tokenizer.encode(texts, model.config.max_passage_len), fused)[1]

    def _read(self, rows: Sequence[Sequence[int]], fused: bool) -> tuple[Tensor, Tensor]:
        """Return plain and enhanced vectors [B, d] of token ids, with a gradient; plain twice unless `fused`."""
        model = self.model
        ids, mask = padded(rows, model.tokenizer.pad, self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.bfloat16):
            hidden, raw = model.states(ids, mask)
            clr = model.contextual(ids, mask) if fused else None
        hidden, raw = hidden.float(), raw.float()
        plain = F.normalize(raw, dim=-1)
        return plain, model.lexicon(plain, ids, mask, hidden, raw, clr) if fused else plain

    def validate(self) -> dict[str, float]:
        """Return the mean nDCG@10 over the kinds of dev queries, then that of each and how strong the fusion is."""
        found: dict[str, float] = {}
        strength: dict[str, float] = {}
        for kind, queries in self.dev.items():
            if self.frozen:
                ranking, judged = dense_search(self._dev_vectors(queries.texts), self.stages.passage_vectors), queries
            else:
                vectors = self.model.encode_queries(queries.texts)
                rows = self._dev_rows(queries)
                place = {row: new for new, row in enumerate(rows)}
                passages = self.model.encode_passages([self.stages.corpus.passages[row] for row in rows])
                grades = [{place[row]: grade for row, grade in one.items()} for one in queries.grades]
                ranking, judged = dense_search(vectors, passages), Queries(queries.ids, queries.texts, grades)
            found[f"{kind}/ndcg_at_10"] = float(measure(ranking, judged)["ndcg_at_10"].mean())
            strength |= {f"{kind}/{name}": value for name, value in self.strength(queries.texts, kind).items()}
        return {"ndcg_at_10": float(np.mean(list(found.values()))), **found, **strength}

    @torch.no_grad()
    def strength(self, texts: Sequence[str], kind: str) -> dict[str, float]:
        """Return means over the first queries of a kind: cosine to the plain vector, and `Lexicon.strength`."""
        model, texts = self.model, texts[:QUERIES_PER_PASS]
        ids, mask = padded(model.tokenizer.encode(texts, model.config.max_query_len), model.tokenizer.pad, self.device)
        if self.frozen:
            states: State = self._kept(texts, ids, mask)
        else:
            states = (*model.states(ids, mask), model.contextual(ids, mask))
        plain = F.normalize(states[1], dim=-1)
        enhanced = model.lexicon(plain, ids, mask, *states)
        found = {"cosine_to_plain": F.cosine_similarity(plain, enhanced)} | model.lexicon.strength(ids, mask, *states)
        means = {name: float(each.double().mean()) for name, each in found.items()}
        if means.get("non_zeros") == 0:
            logger.warning(
                "no term of %d dev queries (%s) has a weight: every query is multiplied by the same numbers; "
                "with weights = clr set clr_pool = max",
                len(texts),
                kind,
            )
        return means

    def _dev_rows(self, queries: Queries) -> list[int]:
        judged = {row for grades in queries.grades for row in grades}
        others = generator(0, 0, "distractors").permutation(len(self.texts))[:DISTRACTORS]
        return sorted(judged | set(others.tolist()))

    def _negatives(self, text: str) -> list[int]:
        if text not in self._hard:
            rows = self.stages.bm25.search([text], HARD_RANKS.stop).rows[0]
            self._hard[text] = [int(row) for row in rows[HARD_RANKS] if row >= 0 and row not in self.held_out]
        return self._hard[text]

    @torch.no_grad()
    def _dev_vectors(self, texts: Sequence[str]) -> Vectors:
        if not self.model.config.fusion_at_test:
            return self.stages.query_vectors(texts)
        parts = [
            self.query_vectors(texts[first : first + QUERIES_PER_PASS])[1]
            for first in range(0, len(texts), QUERIES_PER_PASS)
        ]
        vectors: Vectors = torch.cat(parts).cpu().numpy()
        return vectors

    @torch.no_grad()
    def _kept(self, texts: Sequence[str], ids: Tensor, mask: Tensor) -> tuple[Tensor | None, Tensor, Tensor | None]:
        missing = [place for place, text in enumerate(texts) if text not in self.states]
        if missing:
            training = self.model.training
            self.model.eval()  # a frozen backbone drops nothing out
            hidden, raw = self.model.states(ids[missing], mask[missing])
            clr = self.model.contextual(ids[missing], mask[missing])
            hidden, raw, clr = hidden.cpu(), raw.cpu(), None if clr is None else clr.cpu()
            for row, place in enumerate(missing):
                own = hidden[row, : int(mask[place].sum())].clone() if self.model.lexicon.reads_hidden else None
                weights = None if clr is None else clr[row].to_sparse()
                self.states[texts[place]] = (own, raw[row].clone(), weights)
            self.model.train(training)
        states = [self.states[text] for text in texts]
        tokens = [state[0] for state in states if state[0] is not None]
        sparse = [state[2].to_dense() for state in states if state[2] is not None]
        return (
            nn.utils.rnn.pad_sequence(tokens, batch_first=True).to(self.device) if tokens else None,
            torch.stack([state[1] for state in states]).to(self.device),
            torch.stack(sparse).to(self.device) if sparse else None,
        )
