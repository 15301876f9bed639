"""Item attributes by column name, as filters and rules ask for them: values as text, numbers by row."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from ranking.batch import FIRST_ITEM
from ranking.bundle import Bundle
from recsys.errors import ConfigError

logger = logging.getLogger(__name__)

ITEM_ID = "item_id"
FIRST_CODE = 2
"""Codes 0 and 1 of a categorical column are padding and missing."""
TOLD = 5
MOST_COMPARED = 10_000
"""Values among which the likest to a misspelt one is looked for, which takes some 5 us of each."""
LONGEST = 100
"""Characters of a value that are told, and compared."""


@dataclass(frozen=True)
class Values:
    """A column of values, one or several per item: row v has code[first[v]..first[v + 1]], at least one.

    Attributes:
        code: int32 [entries]; below `FIRST_CODE` is no value.
        first: int64 [V + 1].
        count: number of codes there are.
    """

    code: NDArray[np.int32]
    first: NDArray[np.int64]
    count: int

    def of(self, rows: NDArray[np.int32]) -> list[list[int]]:
        """Return the codes of some rows; an item without a value has none."""
        starts, ends = self.first[rows].tolist(), self.first[rows + 1].tolist()
        codes = (self.code[start:end].tolist() for start, end in zip(starts, ends, strict=True))
        return [[code for code in some if code >= FIRST_CODE] for some in codes]

    def having(self, codes: Sequence[int]) -> NDArray[np.bool_]:
        """Return bool [V], True at rows with one of the codes."""
        wanted = np.zeros(self.count, bool)
        wanted[list(codes)] = True
        found = wanted[self.code]
        if len(found) == len(self.first) - 1:
            return found
        either: NDArray[np.bool_] = np.logical_or.reduceat(found, self.first[:-1])
        return either


class Attributes:
    """The item columns of a bundle.

    Args:
        bundle: items and the values behind their codes.
    """

    def __init__(self, bundle: Bundle) -> None:
        self._bundle = bundle

    @property
    def columns(self) -> list[str]:
        """Names of all columns."""
        items = self._bundle.items
        return [ITEM_ID, *items.columns, *items.multi_columns, *items.numeric]

    def listed(self) -> NDArray[np.bool_] | None:
        """Return bool [V], True at rows that the catalogue has; None if it has all that was trained on.

        None too, with a warning, if it has less than half of that: its ids must be written in another way.
        """
        items = self._bundle.items
        unlisted = items.unlisted.cpu().numpy()
        count, trained = int((items.unlisted & items.trained).sum()), int(items.trained.sum())
        if 2 * count > trained:
            logger.warning("%d of %d items are in no catalogue, too many to leave them out", count, trained)
            return None
        if count:
            logger.warning("%d of %d items are in no catalogue and left out", count, trained)
        return ~unlisted if unlisted.any() else None

    def having(self, column: str, values: Iterable[str]) -> NDArray[np.bool_]:
        """Return bool [V], True at rows with one of the values, among several where a column has several per item.

        A value no item has matches none.

        Raises:
            ConfigError: no column of that name holds values.
        """
        if column == ITEM_ID:
            found = np.zeros(len(self._bundle.items), bool)
            found[[row for value in values if (row := self._bundle.row_of.get(value)) is not None]] = True
            return found
        column_values, known = self.values(column), self._code_of(column)
        return column_values.having([code for value in values if (code := known.get(value)) is not None])

    def unknown(self, column: str, values: Iterable[str], compared: int = MOST_COMPARED) -> list[str]:
        """Return the values that no item has, quoted, the first few with the likest one there is.

        Args:
            column: of the values.
            values: what to look for.
            compared: a column of more values is not searched for the likest, but for one that differs in case alone.
        """
        there: Mapping[str, int] = self._bundle.row_of if column == ITEM_ID else self._code_of(column)
        missing = [value for value in values if value not in there]
        known = self._by_lower(column, there) if missing and len(there) <= MOST_COMPARED else {}
        told = [f"{_short(value)!r}{_likest(value, known, compared)}" for value in missing[:TOLD]]
        return told + [f"{len(missing) - TOLD:,} more"] * (len(missing) > TOLD)

    def between(self, column: str, least: float | None, most: float | None) -> NDArray[np.bool_]:
        """Return bool [V], True at rows whose number is in [least, most]; None leaves that side open.

        A row without a number is in no range. A bundle written before missing numbers were kept has 0 there.

        Raises:
            ConfigError: no column of that name holds numbers.
        """
        items = self._bundle.items
        if column not in items.numeric:
            raise ConfigError(
                f"no item column of numbers {column!r}; there are {', '.join(items.numeric) or 'none'}"
                + ("; its values are filtered with allow and deny" if column in self.columns else "")
            )
        place = items.numeric.index(column)
        number = items.dense[:, place].cpu().numpy()
        found: NDArray[np.bool_] = number >= (-np.inf if least is None else least)
        found &= number <= (np.inf if most is None else most)
        found &= ~items.missing[:, place].cpu().numpy()
        found[:FIRST_ITEM] = False
        return found

    def values(self, column: str) -> Values:
        """Return a column of values, one or several per item. Raises `ConfigError` if there is none of that name."""
        items = self._bundle.items
        if column in items.multi_columns:
            several = items.multi(column)
            return Values(several.code.cpu().numpy(), several.offsets.cpu().numpy(), items.codes(column))
        if column not in items.columns:
            known = ", ".join([ITEM_ID, *items.columns, *items.multi_columns])
            raise ConfigError(
                f"no item column of values {column!r}; there are {known}"
                + ("; its numbers are filtered with at_least and at_most" if column in items.numeric else "")
            )
        codes: NDArray[np.int32] = np.ascontiguousarray(items.column(column).cpu().numpy())
        return Values(codes, np.arange(len(codes) + 1), items.codes(column))

    def value(self, column: str, code: int) -> str:
        """Return the text behind a code."""
        values = self._bundle.vocabulary.get(column, [])
        return values[code - FIRST_CODE] if FIRST_CODE <= code < len(values) + FIRST_CODE else str(code)

    def _code_of(self, column: str) -> dict[str, int]:
        if column not in self._codes:
            values = self._bundle.vocabulary.get(column, [])
            self._codes[column] = {str(value): code for code, value in enumerate(values, FIRST_CODE)}
        return self._codes[column]

    def _by_lower(self, column: str, there: Mapping[str, int]) -> dict[str, str]:
        if column not in self._lower:
            self._lower[column] = {value.lower(): value for value in there}
        return self._lower[column]

    @cached_property
    def _codes(self) -> dict[str, dict[str, int]]:
        return {}

    @cached_property
    def _lower(self) -> dict[str, dict[str, str]]:
        return {}


def _short(value: str) -> str:
    return value if len(value) <= LONGEST else f"{value[:LONGEST]}..."


def _likest(value: str, known: Mapping[str, str], compared: int) -> str:
    """Return, in brackets, the known value that is most like another one; `known` has each by its lower case."""
    low = value.lower()
    if low in known:
        return f" (but {known[low]!r})"
    near = get_close_matches(low, known, 1) if len(known) <= compared and len(value) <= LONGEST else []
    return "".join(f" (but {_short(known[one])!r})" for one in near)
