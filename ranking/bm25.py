"""BM25 over passages, by `bm25s`: Lucene's form, k1 0.9, b 0.4, over the words of `ranking.words`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ranking.fusion import Ranking, best
from ranking.words import RULES, UNSPELT, codes_of, folded, letters_of, words_of
from recsys.errors import DataError
from recsys.files import read_json, write_json

K1, B = 0.9, 0.4
WORDS = "words.json"
"""file of an index that tells the rules of its words; indexes of the first rules have none"""
UNKNOWN = 2
"""Words a query must have for each that no passage holds, to be covered by one."""


@dataclass(frozen=True)
class Bm25:
    """An index over passages in the order they were given."""

    retriever: Any  # bm25s.BM25
    passages: int
    rules: int = RULES
    """of `ranking.words`, by which its words were taken"""

    @staticmethod
    def build(texts: Sequence[str]) -> "Bm25":
        """Index passages; raises `DataError` for none at all."""
        import bm25s

        if not texts:
            raise DataError("0 passages to index; expected at least one")
        retriever = bm25s.BM25(method="lucene", k1=K1, b=B)
        words = words_of(texts)
        if not any(words):  # nothing but stop-words: an index of one word that nobody will ask for
            words = [["\u2014nothing"]] * len(texts)
        retriever.index(words, show_progress=False)
        return Bm25(retriever, len(texts))

    def scores(self, query: str) -> NDArray[np.float32]:
        """Return float32 [passages], 0 where no word of the query occurs."""
        known = [word for word in words_of([query], self.rules)[0] if word in self.retriever.vocab_dict]
        if not known:
            return np.zeros(self.passages, np.float32)
        scores: NDArray[np.float32] = self.retriever.get_scores(known).astype(np.float32)
        return scores

    def search(self, queries: Sequence[str], places: int = 100, allowed: NDArray[np.bool_] | None = None) -> Ranking:
        """Rank the passages that share a word with each query, those alone that `allowed`, bool [passages], lets in."""
        found = [self.scores(query) for query in queries]
        some = np.True_ if allowed is None else allowed
        rows = [best(np.where((one > 0) & some, one, -np.inf)[None], places) for one in found]
        width = min(places, self.passages)
        return Ranking(
            np.concatenate([one.rows for one in rows] or [np.empty((0, width), np.int32)]),
            np.concatenate([one.scores for one in rows] or [np.empty((0, width), np.float32)]),
        )

    def coverage(self, queries: Sequence[str], found: Ranking, text_of: Callable[[int], str]) -> NDArray[np.float64]:
        """Return [Q] the share of each query's words, weighed by idf, that the first passage found for it holds.

        Words that no passage holds tell passages no better apart and count nothing: a span cut inside a word keeps what
        it has. Where there is more than one of them to two others the query is in the reader's own words, or misspelt,
        and gives 0; so does one of stop-words alone. A letter on its own is no word of the index, so that passages are
        found without it; it counts as a word of mean idf, and is looked for in the text of the passage.

        Args:
            queries: the texts.
            found: what `search` found for them.
            text_of: gives the text of a passage.
        """
        return np.array([self.held(query, found.rows[n, :1], text_of)[0] for n, query in enumerate(queries)])

    def held(self, query: str, rows: NDArray[np.int32], text_of: Callable[[int], str]) -> NDArray[np.float64]:
        """Return [n] the share of a query's words that each of some passages holds, as in `coverage`."""
        postings, starts = self.retriever.scores["indices"], self.retriever.scores["indptr"]
        words = self._one_way(query)
        total, held, unknown = 0.0, np.zeros(len(rows)), 0
        for word in sorted(words):
            token = self.retriever.vocab_dict.get(word)
            holders = postings[:0] if token is None else postings[starts[token] : starts[token + 1]]
            if not len(holders):
                unknown += 1
                continue
            idf = float(np.log1p((self.passages - len(holders) + 0.5) / (len(holders) + 0.5)))
            total += idf
            held += idf * np.isin(rows, holders)
        known = len(words) - unknown
        if not total or UNKNOWN * unknown > known:
            return np.zeros(len(rows))
        if letters := letters_of(query):
            for place in np.flatnonzero(held).tolist():
                held[place] += total / known * len(letters & letters_of(text_of(int(rows[place]))))
            total *= 1 + len(letters) / known
        return held / total

    def _one_way(self, query: str) -> set[str]:
        """Return the words of a query, each code written in one way: as one word if passages do that, else in parts.

        A digit that is a part of a code says nothing beside it: passages that write it as one word lack that digit.
        """
        words, known = set(words_of([query], self.rules)[0]), self.retriever.vocab_dict
        for parts in codes_of(folded(query, self.rules).lower()):
            if (joined := "".join(parts)) not in known:
                words.discard(joined)
            elif any(part in words and part not in known for part in parts):
                words.difference_update(parts)
            else:
                words.difference_update(part for part in parts if len(part) == 1)
        return words

    def save(self, directory: Path) -> None:
        """Write the index as arrays and JSON into a directory."""
        self.retriever.save(str(directory), show_progress=False, allow_pickle=False)
        write_json(directory / WORDS, {"rules": self.rules})

    @staticmethod
    def load(directory: Path) -> "Bm25":
        """Read what `save` wrote; raises `DataError` for anything else."""
        import bm25s

        try:
            retriever = bm25s.BM25.load(str(directory), allow_pickle=False)
        except (OSError, ValueError, KeyError) as error:
            raise DataError(f"{directory}: not a BM25 index ({error}); publish again") from None
        rules = read_json(directory / WORDS)["rules"] if (directory / WORDS).exists() else UNSPELT
        if rules not in (UNSPELT, RULES):
            raise DataError(
                f"{directory}: words by rules {rules}, this version knows {UNSPELT} and {RULES}; publish again"
            )
        return Bm25(retriever, int(retriever.scores["num_docs"]), rules)
