"""Training LexSemBridge in full by passages: each brings queries cut from it, and its neighbours are their negatives.

An in-batch step by queries reads two long texts for each short one, and most of its negatives are easy. Here a step
draws groups of passages that the plain encoder places near each other and cuts `cuts` queries from each: long texts
are few, short ones many, and what a query has to be told from is what it is mistaken for. Passages are windows of
`train_tokens` tokens at a place of their own. Of the backbone the top `layers` learn (0: all); what lies below reads
each window once (`ranking.top_layers`). Several corpora train together; natural queries, where there are any, join as
they are. Of a catalogue, many texts of which share words, a span is of whole words, every text that a query fits is
relevant to it, and no query has the words of one that held-out texts are judged by.

With `train = "fusion"` the backbone is frozen: passage vectors are known, so every query is asked among all training
documents, whole, at the cost of a product.

    B queries    C passages    L tokens    d width
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from pipelines.first_stages import FirstStages, dense_search
from pipelines.text_config import TextTrainConfig
from pipelines.text_corpus import Queries, normalised
from pipelines.text_measures import measure
from pipelines.text_pairs import PairSource, words_of
from pipelines.text_train import contrastive_loss
from ranking.lexsembridge import LexSemBridge
from ranking.text_backbone import device_of, padded, passes
from ranking.text_models import Vectors
from ranking.text_pooling import pool
from ranking.top_layers import TopLayers
from recsys.errors import ConfigError, DataError
from recsys.randomness import generator

NEIGHBOURS, REACH = 12, 2
"""Passages of a group, and of how many times as many nearest ones they are drawn: the nearer, the harder to tell."""
KEYWORDS = 0.25
"""Share of the cut queries that are of keywords, 3 to 5 of the best `TERMS`; the rest are spans."""
TERMS = 8
SPANS = (8, 16, 16, 24)
"""Tokens of a span, drawn evenly."""
NATURAL = 6
"""Natural queries of a step, where there are any: each brings a passage of its own."""
DISTRACTORS = 300
"""Other passages in the dev search."""
QUERY_TOKENS = 1024
"""of a forward pass of queries"""


TRIES = 8
"""Cuts from a text of a catalogue until one is of words that nothing is judged by; after that there is none."""


@dataclass(frozen=True)
class Source:
    """What one corpus gives.

    Attributes:
        stages: first stages over it.
        pairs: cuts queries from its passages.
        natural: training queries that people wrote, empty if it has none.
        dev: dev queries by kind.
        judged: of a catalogue, the words (`text_pairs.words_of`) of the queries that held-out texts are judged by.
    """

    stages: FirstStages
    pairs: PairSource
    natural: Queries
    dev: dict[str, Queries]
    judged: frozenset[tuple[str, ...]] = frozenset()

    @property
    def shares_words(self) -> bool:
        """Whether a query may fit several texts: of a catalogue."""
        return self.stages.corpus.items is not None


@dataclass(frozen=True)
class Window:
    """A training document's window.

    Attributes:
        ids: tokens [L], without special ones.
        words: of which word each is a part.
        text: what the document has there, as it is written.
        offsets: where in it each token stands.
    """

    ids: list[int]
    words: list[int | None]
    text: str
    offsets: list[tuple[int, int]]

    def whole(self, start: int, end: int) -> tuple[int, int]:
        """Return the places of the whole words that the tokens from `start` to `end` are of."""
        while start > 0 and self.words[start - 1] == self.words[start]:
            start -= 1
        while end < len(self.words) and self.words[end] == self.words[end - 1]:
            end += 1
        return start, end

    def cut(self, start: int, end: int) -> "Window":
        """Return the tokens from `start` to `end`."""
        return Window(self.ids[start:end], self.words[start:end], self.text, self.offsets[start:end])

    def of_whole_words(self, start: int, end: int) -> "Window":
        """Return the tokens from `start` to `end` without words that are cut there; all if that leaves nothing."""
        first, last = start, end
        while 0 < first < last and self.words[first - 1] == self.words[first]:
            first += 1
        while first < last < len(self.words) and self.words[last - 1] == self.words[last]:
            last -= 1
        return self.cut(first, last) if first < last else self.cut(start, end)

    @property
    def written(self) -> str:
        """The text of the tokens."""
        return self.text[self.offsets[0][0] : self.offsets[-1][1]] if self.ids else ""


@dataclass
class NeighbourTask:
    """The task of `pipelines.text_train` for a `LexSemBridge` that learns by passages.

    Args:
        config: the run; `rows` passages a step.
        model: with its initial weights.
        sources: corpora whose training documents it learns from, with the dev queries that choose the best step.
        read: states below the top layers, by text; runs over one backbone, cut at one layer, may share them.
    """

    config: TextTrainConfig
    model: LexSemBridge
    sources: Sequence[Source]
    read: dict[tuple[int, ...], Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.model.config.weights == "clr" or self.model.config.fusion_passages:
            raise ConfigError("batches = 'passages' trains slr, llr and the controls, with plain passages")
        self.frozen = self.config.train == "fusion"
        if self.frozen:
            self.model.transformer.requires_grad_(False)
        learns = self.config.layers > 0 and not self.frozen
        self.cut = TopLayers.of(self.model.transformer, self.config.layers) if learns else None
        self.documents = [(source, row) for source in self.sources for row in source.pairs.rows("train")]
        if len(self.documents) < 2:
            raise DataError(f"{len(self.documents)} training documents; expected at least 2")

    @property
    def device(self) -> torch.device:
        """Where the model is; what is kept between steps is in the CPU's memory."""
        return device_of(self.model)

    @property
    def fresh(self) -> Sequence[nn.Parameter]:
        """The fusion's parameters."""
        return list(self.model.lexicon.parameters())

    # What is drawn.

    @cached_property
    def windows(self) -> list[Window]:
        """A window of each training document."""
        room = self.config.train_tokens - len(self.model.tokenizer.prefix) - len(self.model.tokenizer.suffix)
        made = []
        for source, row in self.documents:
            corpus = source.stages.corpus
            found = self.model.tokenizer.tokenizer.encode(corpus.passages[row], add_special_tokens=False)
            draws = generator(0, 0, f"window/{corpus.name}/{corpus.ids[row]}")
            start = int(draws.integers(max(len(found.ids) - room, 0) + 1))
            whole, end = Window(found.ids, found.word_ids, corpus.passages[row], found.offsets), start + room
            made.append(whole.of_whole_words(start, end) if source.shares_words else whole.cut(start, end))
        return made

    @cached_property
    def _place(self) -> dict[tuple[int, int], int]:
        return {(id(source), row): at for at, (source, row) in enumerate(self.documents)}

    @cached_property
    def keywords(self) -> list[list[str]]:
        """The best terms of each training document."""
        found: list[list[str]] = []
        for source in self.sources:
            found += [terms.split() for terms in source.pairs.best_terms(source.pairs.rows("train"), TERMS)]
        return found

    @cached_property
    def vectors(self) -> Vectors:
        """Plain vectors of the training documents, which say who is near to whom."""
        rows = [(source.stages.passage_vectors, source.pairs.rows("train")) for source in self.sources]
        return np.concatenate([vectors[own] for vectors, own in rows])

    @cached_property
    def natural(self) -> list[tuple[str, list[int]]]:
        """Natural training queries with the places of their documents among the training ones."""
        found = []
        for source in self.sources:
            for text, grades in zip(source.natural.texts, source.natural.grades, strict=True):
                own = [self._place.get((id(source), row), -1) for row, grade in grades.items() if grade > 0]
                found.append((text, [at for at in own if at >= 0]))
        return [one for one in found if one[1]]

    @cached_property
    def texts(self) -> list[str]:
        """Normalised training documents: equal ones are never each other's negatives."""
        return [normalised(source.stages.corpus.passages[row]) for source, row in self.documents]

    def batch(self, step: int) -> tuple[list[int], list[list[int]], list[int], list[list[int]]]:
        """Return passages, the token ids of queries, and each query's passage by its column, of one step.

        Last come all training documents that are relevant to each query: none of them is its negative.
        """
        draws = generator(self.config.seed, step, "passage batch")
        passages: list[int] = []
        wanted = min(self.config.rows, len(self.documents))
        while len(passages) < wanted:
            seed = int(draws.integers(len(self.documents)))
            near = np.argsort(-(self.vectors @ self.vectors[seed]), kind="stable")[: REACH * NEIGHBOURS].tolist()
            group = [seed, *draws.permutation(near)[: NEIGHBOURS - 1].tolist()]
            passages += [one for one in dict.fromkeys(group) if one not in passages]
        passages = passages[:wanted]
        queries, target = [], []
        relevant: list[list[int]] = []
        for column, passage in enumerate(passages):
            for query, own in filter(None, (self._cut(passage, draws) for _ in range(self.config.cuts))):
                queries.append(query)
                target.append(column)
                relevant.append(own)
        chosen = draws.permutation(len(self.natural))[:NATURAL].tolist()
        for text, own in (self.natural[one] for one in chosen):
            passages.append(own[int(draws.integers(len(own)))])
            queries.append(self.model.tokenizer.encode([text], self.model.config.max_query_len)[0])
            target.append(len(passages) - 1)
            relevant.append(own)
        if not queries:
            raise DataError(
                f"0 of {self.config.cuts * len(passages)} cuts from {len(passages)} texts are of words that no "
                "held-out text is judged by; train with batches = 'queries'"
            )
        return passages, queries, target, relevant

    def _cut(self, passage: int, draws: np.random.Generator) -> tuple[list[int], list[int]] | None:
        """Return the token ids of a query cut from a passage and all training documents it fits; None if none may."""
        source, row = self.documents[passage]
        if not source.shares_words:
            return self._tokens(passage, draws, whole=False)[0], [passage]
        for _ in range(TRIES):
            query, text, contiguous = self._tokens(passage, draws, whole=True)
            if words_of(text) not in source.judged:
                fitting = source.pairs.relevant(row, text, contiguous)
                return query, [at for one in sorted(fitting) if (at := self._place.get((id(source), one))) is not None]
        return None

    def _tokens(self, passage: int, draws: np.random.Generator, whole: bool) -> tuple[list[int], str, bool]:
        """Return the ids of keywords or of a span, of whole words if so wanted, its text, and whether it is a span."""
        tokenizer, words, window = self.model.tokenizer, self.keywords[passage], self.windows[passage]
        if words and draws.random() < KEYWORDS:
            some = sorted(draws.permutation(len(words))[: int(draws.integers(3, 6))].tolist())
            text = " ".join(words[place] for place in some)
            return tokenizer.encode([text], self.model.config.max_query_len)[0], text, False
        length = min(int(draws.choice(SPANS)), len(window.ids))
        start = int(draws.integers(len(window.ids) - length + 1))
        start, end = window.whole(start, start + length) if whole else (start, start + length)
        span = window.cut(start, end)
        return [*tokenizer.prefix, *span.ids, *tokenizer.suffix], span.written, True

    # A step.

    def loss(self, step: int) -> tuple[Tensor, dict[str, float]]:
        """Return the contrastive loss of one step, and how far the fusion turns the queries."""
        passages, queries, target, relevant = self.batch(step)
        if self.frozen:
            return self._frozen_loss(queries, [passages[column] for column in target], relevant)
        tokenizer = self.model.tokenizer
        windows = [[*tokenizer.prefix, *self.windows[one].ids, *tokenizer.suffix] for one in passages]
        targets = torch.tensor(target, device=self.device)
        also = self._alike(torch.tensor(passages, device=self.device), targets, relevant)
        plain, enhanced = self._queries(queries)
        found = self._plain(windows, keep=True)
        each = (len(self.documents) - 1) / max(len(passages) - 1, 1)
        loss = contrastive_loss(enhanced, found, targets, also, self.config.tau, max(each, 1.0))
        return loss, {"cosine_to_plain": float(F.cosine_similarity(plain, enhanced).mean().detach())}

    def _frozen_loss(
        self, queries: list[list[int]], passages: list[int], relevant: list[list[int]]
    ) -> tuple[Tensor, dict[str, float]]:
        targets = torch.tensor(passages, device=self.device)
        also = self._alike(torch.arange(len(self.documents), device=self.device), targets, relevant)
        plain, enhanced = self._queries(queries)
        among = torch.from_numpy(self.vectors).to(self.device)
        loss = contrastive_loss(enhanced, among, targets, also, self.config.tau)
        return loss, {"cosine_to_plain": float(F.cosine_similarity(plain, enhanced).mean().detach())}

    def _alike(self, passages: Tensor, targets: Tensor, relevant: Sequence[Sequence[int]]) -> Tensor:
        """Return bool [B, C]: which of the passages [C] have the text of a relevant one, but that at `targets` [B]."""
        text = self._same[passages]
        also = text[None] == text[targets][:, None]
        for query, own in enumerate(relevant):
            if len(own) > 1:
                also[query] = torch.isin(text, self._same[own])
        also[torch.arange(len(targets), device=self.device), targets] = False
        return also

    @cached_property
    def _same(self) -> Tensor:
        number: dict[str, int] = {}
        return torch.tensor([number.setdefault(text, len(number)) for text in self.texts], device=self.device)

    def _hidden(self, rows: Sequence[Sequence[int]], keep: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Return ids and mask [N, L] and the last hidden states [N, L, d] in float32; `keep` those below for later."""
        ids, mask = padded(rows, self.model.tokenizer.pad, self.device)
        if self.frozen:
            self.model.transformer.eval()  # what is not trained drops nothing out
        with (
            torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen),
            torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.bfloat16),
        ):
            if self.cut is None:
                return ids, mask, self.model.transformer(input_ids=ids, attention_mask=mask).last_hidden_state.float()
            below = self._below(rows, ids, mask) if keep else self.cut.read(ids, mask)
            return ids, mask, self.cut.finish(below, mask).float()

    def _below(self, rows: Sequence[Sequence[int]], ids: Tensor, mask: Tensor) -> Tensor:
        assert self.cut is not None
        keys = [tuple(row) for row in rows]
        missing = [place for place, key in enumerate(keys) if key not in self.read]
        if missing:
            for place, states in zip(missing, self.cut.read(ids[missing], mask[missing]), strict=True):
                self.read[keys[place]] = states[: len(rows[place])].half().cpu()
        return nn.utils.rnn.pad_sequence([self.read[key] for key in keys], batch_first=True).to(self.device).float()

    def _plain(self, rows: Sequence[Sequence[int]], keep: bool) -> Tensor:
        _, mask, hidden = self._hidden(rows, keep)
        return F.normalize(pool(hidden, mask, self.model.config.pool), dim=-1)

    def _queries(self, rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Return plain and enhanced vectors [B, d] of queries, read in passes of like length."""
        plain: list[Tensor] = []
        enhanced: list[Tensor] = []
        order: list[NDArray[np.int64]] = []
        for chosen in passes([len(row) for row in rows], QUERY_TOKENS):
            ids, mask, hidden = self._hidden([rows[place] for place in chosen], keep=False)
            raw = pool(hidden, mask, self.model.config.pool)
            plain.append(F.normalize(raw, dim=-1))
            enhanced.append(self.model.lexicon(plain[-1], ids, mask, hidden, raw))
            order.append(chosen)
        back = torch.from_numpy(np.argsort(np.concatenate(order), kind="stable")).to(self.device)
        return torch.cat(plain)[back], torch.cat(enhanced)[back]

    # Dev.

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Return the mean nDCG@10 over the kinds of dev queries, then that of each."""
        found = {}
        model = self.model
        for source in self.sources:
            for kind, queries in source.dev.items():
                passages, judged = self._dev_passages(source, queries)
                _, asked = self._queries(model.tokenizer.encode(queries.texts, model.config.max_query_len))
                values = measure(dense_search(asked.cpu().numpy(), passages), judged)
                found[f"{source.stages.corpus.name}/{kind}/ndcg_at_10"] = float(values["ndcg_at_10"].mean())
        return {"ndcg_at_10": float(np.mean(list(found.values()))), **found}

    def _dev_passages(self, source: Source, queries: Queries) -> tuple[Vectors, Queries]:
        """Return the vectors that dev queries are asked among, and the queries with grades of those rows."""
        corpus, model = source.stages.corpus, self.model
        if self.frozen:
            return source.stages.passage_vectors, queries
        judged = {row for grades in queries.grades for row in grades}
        others = generator(0, 0, "distractors").permutation(len(corpus))[:DISTRACTORS]
        rows = sorted(judged | set(others.tolist()))
        place = {row: new for new, row in enumerate(rows)}
        tokens = model.tokenizer.encode([corpus.passages[row] for row in rows], model.config.max_passage_len)
        vectors = torch.empty(len(rows), model.dim)
        for chosen in passes([len(one) for one in tokens]):
            vectors[chosen] = self._plain([tokens[at] for at in chosen], keep=True).cpu()
        grades = [{place[row]: grade for row, grade in one.items()} for one in queries.grades]
        return vectors.numpy(), Queries(queries.ids, queries.texts, grades)
