"""What rerankers have in common that read a query and a passage together: layout, batches, one list or many.

P pairs    L tokens    n passages of a list
"""

from collections.abc import Callable, Sequence
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ranking.pair_prompt import PairPrompt
from ranking.text_backbone import TextModel, device_of, in_passes
from ranking.text_models import Vectors
from recsys.progress import Progress, silent


class PairReranker(TextModel):
    """A `TextReranker` whose `forward` gives scores [P] of pairs.

    Attributes:
        prompt: how a pair is laid out.
    """

    whole_list: ClassVar[bool] = False
    prompt: PairPrompt

    @property
    def pad(self) -> int:
        """What fills up a row of `rows`."""
        return self.tokenizer.pad

    def rows(self, query: str, passages: Sequence[str]) -> list[list[int]]:
        """Return the token ids of every pair."""
        return self.prompt.rows(query, passages)

    def truncated(self, query: str, passages: Sequence[str]) -> NDArray[np.bool_]:
        """Return bool [n]: which passages are cut beside this query."""
        return self.prompt.truncated(query, passages)

    def read(
        self,
        queries: Sequence[str],
        lists: Sequence[Sequence[str]],
        forward: Callable[[Tensor, Tensor], Tensor],
        progress: Progress = silent,
    ) -> list[Vectors]:
        """Return what `forward(ids, mask) -> [P, ...]` makes of the pairs of each list, equal ones read once."""
        rows = [
            tuple(row) for query, passages in zip(queries, lists, strict=True) for row in self.rows(query, passages)
        ]
        distinct = {row: place for place, row in enumerate(dict.fromkeys(rows))}
        each = in_passes(list(distinct), self.pad, device_of(self), forward, progress, self.config.tokens_per_pass)
        found = each[[distinct[row] for row in rows]]
        ends = np.cumsum([len(one) for one in lists])[:-1]
        return np.split(found, ends) if len(lists) else []

    def rerank(self, query: str, passages: Sequence[str], progress: Progress = silent) -> Vectors:
        """Return float32 [n], higher is better."""
        return self.rerank_many([query], [passages], progress)[0]

    def rerank_many(
        self, queries: Sequence[str], lists: Sequence[Sequence[str]], progress: Progress = silent
    ) -> list[Vectors]:
        """Rerank one list per query, all pairs batched by length."""
        return self.read(queries, lists, self, progress)
