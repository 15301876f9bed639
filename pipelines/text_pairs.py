"""Queries cut from passages: keyword and part-of-passage ones, with the hold-out that keeps their figures honest.

A query's own passage is relevant. In a catalogue many items fit a short query, so there every passage that holds all
its words (keyword) or the whole span (part of passage) is relevant, and a query that fits more than 100 is left out.
So a query cut from a training document may fit held-out ones, and several documents give the same words: in training
held-out documents are neither positives nor negatives (`PairSource.to_learn`), and no query has the words of one that
is cut from them (`unasked`).
"""

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import log
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from pipelines.text_corpus import Corpus, Queries, normalised
from ranking.text_backbone import TextTokenizer
from recsys.errors import ConfigError
from recsys.randomness import generator

Split = Literal["train", "dev", "test"]
Unit = Literal["token", "word", "char"]
VERSION = 2
"""of what is cut and held out: a run that learned from an earlier one's queries is trained again"""
MOST_RELEVANT = 100
SHORTEST_TERM = 3
TENTHS: dict[Split, range] = {"train": range(7), "dev": range(7, 8), "test": range(8, 10)}
WORD = re.compile(r"\w+")


def split_of(collection: str, key: str) -> Split:
    """Return the split of a document: sha1(collection + "/" + key) mod 10; 0-6 train, 7 dev, 8-9 test."""
    tenth = int(hashlib.sha1(f"{collection}/{key}".encode(), usedforsecurity=False).hexdigest(), 16) % 10
    return next(split for split, tenths in TENTHS.items() if tenth in tenths)


@dataclass(frozen=True)
class PairSource:
    """Cuts queries from the passages of a corpus.

    Args:
        corpus: the passages.
        tokenizer: of the backbone, for lengths in tokens; only needed for those.
    """

    corpus: Corpus
    tokenizer: TextTokenizer | None = None

    @cached_property
    def eligible(self) -> list[int]:
        """Rows of the passages that are not empty and whose normalised text no other passage has."""
        texts = [normalised(text) for text in self.corpus.passages]
        count = Counter(texts)
        return [row for row, text in enumerate(texts) if text and count[text] == 1]

    def rows(self, split: Split) -> list[int]:
        """Return the eligible rows of one split; a catalogue is held out by its text, since ids share texts."""
        return self._rows[split]

    @cached_property
    def _rows(self) -> dict[Split, list[int]]:
        corpus = self.corpus
        keys = corpus.ids if corpus.items is None else corpus.passages
        made: dict[Split, list[int]] = {split: [] for split in TENTHS}
        for row in self.eligible:
            made[split_of(corpus.name, keys[row])].append(row)
        return made

    @cached_property
    def held_out(self) -> frozenset[int]:
        """Rows of the dev and test documents."""
        return frozenset(self.rows("dev") + self.rows("test"))

    def to_learn(self, queries: Queries) -> Queries:
        """Return queries to train on: held-out documents count 0 for them, and those without another are gone.

        A document of grade 0 is neither a positive nor a hard negative.
        """
        held = self.held_out
        grades = [{row: 0 if row in held else grade for row, grade in known.items()} for known in queries.grades]
        return Queries(queries.ids, queries.texts, grades).with_positive()

    @cached_property
    def document_frequency(self) -> Counter[str]:
        """In how many passages each term occurs."""
        return Counter(term for text in self.corpus.passages for term in set(WORD.findall(text.lower())))

    @cached_property
    def _holders(self) -> dict[str, set[int]]:
        holders: dict[str, set[int]] = defaultdict(set)
        for row, text in enumerate(self.corpus.passages):
            for word in WORD.findall(text.lower()):
                holders[word].add(row)
        return holders

    def keyword(self, rows: Sequence[int], terms: int = 5) -> Queries:
        """Return one query per passage, its `best_terms`."""
        return self._queries(f"keyword-{terms}", rows, self.best_terms(rows, terms))

    def best_terms(self, rows: Sequence[int], terms: int) -> list[str]:
        """Return the `terms` best terms of each passage by tf * ln(N / df), best first, ties by first place.

        Stop-words and terms under three letters are left out.
        """
        from bm25s.stopwords import STOPWORDS_EN

        stop, total = set(STOPWORDS_EN), len(self.corpus)
        made = []
        for row in rows:
            words = WORD.findall(self.corpus.passages[row].lower())
            count = Counter(word for word in words if word not in stop and len(word) >= SHORTEST_TERM)
            ranked = sorted(count, key=lambda term: -count[term] * log(total / self.document_frequency[term]))
            made.append(" ".join(ranked[:terms]))  # Counter keeps first occurrence, sorted is stable
        return made

    def part_of_passage(
        self, rows: Sequence[int], length: int, unit: Unit = "token", seed: int = 0, start: str = "uniform"
    ) -> Queries:
        """Return one contiguous span of `length` units of each passage that has so many.

        Args:
            rows: source passages.
            length: of a span.
            unit: tokens of the backbone, words between blanks, or characters.
            seed: of the start places, each drawn by (seed, _id).
            start: "uniform", or "first" for the beginning of the passage.
        """
        made = []
        for row in rows:
            text = self.corpus.passages[row]
            spans = self._units(text, unit)
            if len(spans) < length:
                made.append("")
                continue
            draws = generator(seed, length, f"part of passage/{self.corpus.ids[row]}")
            first = 0 if start == "first" else int(draws.integers(len(spans) - length + 1))
            made.append(text[spans[first][0] : spans[first + length - 1][1]])
        return self._queries(f"pop-{length}-{unit}", rows, made)

    def long_enough(self, rows: Sequence[int], length: int, unit: Unit = "token") -> list[int]:
        """Return the rows whose passages have at least `length` units: all lengths of a table use the same sources."""
        return [row for row in rows if len(self._units(self.corpus.passages[row], unit)) >= length]

    def _units(self, text: str, unit: Unit) -> list[tuple[int, int]]:
        if unit == "char":
            return [(place, place + 1) for place in range(len(text))]
        if unit == "word":
            return [found.span() for found in re.finditer(r"\S+", text)]
        if self.tokenizer is None:
            raise ConfigError("part-of-passage lengths in tokens need the backbone's tokenizer")
        offsets: list[tuple[int, int]] = self.tokenizer.tokenizer.encode(text, add_special_tokens=False).offsets
        return offsets

    def _queries(self, kind: str, rows: Sequence[int], texts: Sequence[str]) -> Queries:
        made = []
        for row, text in zip(rows, texts, strict=True):
            if not text.strip():
                continue
            relevant = self.relevant(row, text, kind.startswith("pop"))
            if len(relevant) <= MOST_RELEVANT:
                made.append((f"{kind}/{self.corpus.ids[row]}", text, dict.fromkeys(sorted(relevant), 1)))
        return Queries([one[0] for one in made], [one[1] for one in made], [one[2] for one in made])

    def relevant(self, row: int, text: str, contiguous: bool) -> set[int]:
        """Return the rows a query cut from one fits: that alone, or in a catalogue all that hold its words or span."""
        return {row} if self.corpus.items is None else self._fitting(text, contiguous) | {row}

    def _fitting(self, text: str, contiguous: bool) -> set[int]:
        words = WORD.findall(text.lower())
        sets = sorted((self._holders.get(word, set()) for word in set(words)), key=len)
        rows = set.intersection(*sets) if sets else set()
        if not contiguous:
            return rows
        span = f" {' '.join(words)} "
        return {row for row in rows if span in f" {' '.join(WORD.findall(self.corpus.passages[row].lower()))} "}


def unasked(queries: Queries, others: Iterable[Queries]) -> Queries:
    """Return the queries whose words, in whatever order, none of the others has."""
    known = {words_of(text) for other in others for text in other.texts}
    return queries.only([place for place, text in enumerate(queries.texts) if words_of(text) not in known])


def words_of(text: str) -> tuple[str, ...]:
    """Return the words of a text in one order, by which two queries are the same."""
    return tuple(sorted(WORD.findall(text.lower())))


def sample(queries: Queries, most: int, seed: int) -> Queries:
    """Return at most so many of the queries, drawn without replacement, in their order."""
    if len(queries) <= most:
        return queries
    chosen: NDArray[np.int64] = generator(seed, most, "queries").choice(len(queries), most, replace=False)
    return queries.only(sorted(chosen.tolist()))
