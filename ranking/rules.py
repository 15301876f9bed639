"""Rules over a whole answer: how many of its items may share a value."""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ranking.attributes import Attributes
from ranking.recommender_config import Cap


class Selection(NamedTuple):
    """What rules let through.

    Attributes:
        places: int64 [n], places among the ordered rows, ascending.
        passed_over: place -> which rule was full.
        full: (number of the rule, code) of every value that no more items may have.
    """

    places: NDArray[np.int64]
    passed_over: dict[int, str]
    full: list[tuple[int, int]]


class Rules:
    """Picks the best items of an order such that no cap is passed.

    Items are taken best first, and an item is passed over if one of its values is full; an item of several values in
    a column counts for each of them. With one cap of a column of single values no other choice holds more items or a
    better one at any place; otherwise the order of scores decides.

    Args:
        attributes: item columns.
        caps: of the config.

    Raises:
        ConfigError: a cap names a column that the bundle does not have.
    """

    def __init__(self, attributes: Attributes, caps: Sequence[Cap]) -> None:
        self._caps = tuple(caps)
        self._attributes = attributes
        self._values = [attributes.values(cap.column) for cap in caps]

    def __len__(self) -> int:
        return len(self._caps)

    def select(self, rows: NDArray[np.int32], k: int) -> Selection:
        """Return up to k of the rows int32 [C], which stand best first."""
        if not self._caps:
            return Selection(np.arange(min(k, len(rows))), {}, [])
        codes = zip(*(values.of(rows) for values in self._values), strict=True)
        taken: Counter[tuple[int, int]] = Counter()
        places: list[int] = []
        passed_over: dict[int, str] = {}
        for place, by_rule in enumerate(codes):
            if len(places) == k:
                break
            counted = [(number, code) for number, some in enumerate(by_rule) for code in some]
            full = next((one for one in counted if taken[one] >= self._caps[one[0]].at_most), None)
            if full is None:
                places.append(place)
                taken.update(counted)
            else:
                passed_over[place] = self._text(*full)
        full_values = [one for one, count in taken.items() if count >= self._caps[one[0]].at_most]
        return Selection(np.array(places, np.int64), passed_over, full_values)

    def without(self, allowed: NDArray[np.bool_], full: Sequence[tuple[int, int]]) -> None:
        """Clear, in bool [V], the rows that have a full value."""
        for number, values in enumerate(self._values):
            codes = [code for rule, code in full if rule == number]
            if codes:
                allowed &= ~values.having(codes)

    def _text(self, number: int, code: int) -> str:
        cap = self._caps[number]
        return f"at most {cap.at_most} with {cap.column} {self._attributes.value(cap.column, code)!r}"
