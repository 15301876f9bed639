"""Finds items by a part of their name."""

import unicodedata
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ranking.batch import FIRST_ITEM


class NameSearch:
    """All names as one text, a line each, the most frequent item first: a search is one scan that ends early.

    Args:
        names: by model row; an item without a name is found by its id.
        item_ids: by model row.
        count: int [V] events of each item in the training period.

    Cost: 3 us a name to build; a search that finds nothing reads the whole text, 1.5 ms for 70,000 names.
    """

    def __init__(self, names: Sequence[str], item_ids: Sequence[str], count: NDArray[np.int64]) -> None:
        self._rows = FIRST_ITEM + np.argsort(-count[FIRST_ITEM:], kind="stable")
        lines = [fold(names[row] or item_ids[row]) for row in self._rows.tolist()]
        self._text = "\n".join(lines)
        lengths = np.fromiter(map(len, lines), np.int64, len(lines))
        self._starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths + 1)])  # one more than lines

    def find(self, part: str, limit: int) -> list[int]:
        """Return the rows of up to `limit` items whose name holds `part`, whatever the case, most frequent first.

        An empty part is in every name.
        """
        wanted = fold(part)
        rows: list[int] = []
        line = 0
        while line < len(self._rows) and len(rows) < limit:
            position = self._text.find(wanted, int(self._starts[line]))
            if position < 0:
                break
            line = int(np.searchsorted(self._starts, position, side="right")) - 1
            rows.append(int(self._rows[line]))
            line += 1
        return rows


def fold(text: str) -> str:
    """Return a text as it is compared: without case, compatibility forms made one, white space made single spaces."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())
