"""How a query and a passage are laid out for a model that reads them together. The passage alone is cut, at its end.

lead | query, at most `max_query_len` tokens | middle | passage | tail      at most `max_len` tokens in all
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ranking.text_backbone import TextTokenizer


@dataclass(frozen=True)
class PairPrompt:
    """Token ids of pairs. Two models of one backbone and equal `layout` encode a pair alike."""

    tokenizer: TextTokenizer
    lead: tuple[int, ...]
    middle: tuple[int, ...]
    tail: tuple[int, ...]
    max_query_len: int
    max_len: int

    @property
    def layout(self) -> tuple[object, ...]:
        """All but the tokenizer."""
        return (self.lead, self.middle, self.tail, self.max_query_len, self.max_len)

    def rows(self, query: str, passages: Sequence[str]) -> list[list[int]]:
        """Return the token ids of every pair."""
        head = self.head(query)
        room = self._room(head)
        return [[*head, *ids[:room], *self.tail] for ids in self.tokenizer.pieces(passages)]

    def truncated(self, query: str, passages: Sequence[str]) -> NDArray[np.bool_]:
        """Return bool [n]: which passages are cut beside this query."""
        room = self._room(self.head(query))
        return np.array([len(ids) > room for ids in self.tokenizer.pieces(passages)], bool)

    def head(self, query: str) -> list[int]:
        """Return the token ids of every pair up to its passage."""
        most = min(self.max_query_len, max(self.max_len - len(self.lead) - len(self.middle) - len(self.tail), 0))
        return [*self.lead, *self.tokenizer.pieces([query])[0][:most], *self.middle]

    def _room(self, head: Sequence[int]) -> int:
        return max(self.max_len - len(head) - len(self.tail), 0)
