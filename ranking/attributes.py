"""Item attributes by column name, as filters and rules ask for them: values as text, numbers by row."""

from collections.abc import Iterable
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from ranking.batch import FIRST_ITEM
from ranking.bundle import Bundle
from recsys.errors import ConfigError

ITEM_ID = "item_id"
FIRST_CODE = 2
"""Codes 0 and 1 of a categorical column are padding and missing."""


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

    def having(self, column: str, values: Iterable[str]) -> NDArray[np.bool_]:
        """Give bool [V], True at rows with one of the values, among several where a column has several per item.

        A value no item has matches none.

        Raises:
            ConfigError: no column of that name holds values.
        """
        if column == ITEM_ID:
            found = np.zeros(len(self._bundle.items), bool)
            found[[row for value in values if (row := self._bundle.row_of.get(value)) is not None]] = True
            return found
        items = self._bundle.items
        several = items.multi(column) if column in items.multi_columns else None
        codes = self.codes(column) if several is None else several.code.cpu().numpy()
        known = self._code_of(column)
        wanted = np.zeros(items.codes(column), bool)
        wanted[[code for value in values if (code := known.get(value)) is not None]] = True
        if several is None:
            return wanted[codes]
        matches: NDArray[np.bool_] = np.logical_or.reduceat(wanted[codes], several.offsets[:-1].cpu().numpy())
        return matches

    def between(self, column: str, least: float | None, most: float | None) -> NDArray[np.bool_]:
        """Give bool [V], True at rows whose number is in [least, most]; None leaves that side open.

        Raises:
            ConfigError: no column of that name holds numbers.
        """
        items = self._bundle.items
        if column not in items.numeric:
            raise ConfigError(
                f"no item column of numbers {column!r}; there are {', '.join(items.numeric) or 'none'}"
                + ("; its values are filtered with allow and deny" if column in self.columns else "")
            )
        number = items.dense[:, items.numeric.index(column)].cpu().numpy()
        found: NDArray[np.bool_] = number >= (-np.inf if least is None else least)
        found &= number <= (np.inf if most is None else most)
        found[:FIRST_ITEM] = False
        return found

    def codes(self, column: str) -> NDArray[np.int32]:
        """Give a categorical column, int32 [V] codes; below `FIRST_CODE` is no value. Raises `ConfigError` if none."""
        items = self._bundle.items
        if column not in items.columns:
            raise ConfigError(
                f"no item column of values {column!r}; there are {', '.join([ITEM_ID, *items.columns])}"
                + ("; its numbers are filtered with at_least and at_most" if column in items.numeric else "")
            )
        codes: NDArray[np.int32] = np.ascontiguousarray(items.column(column).cpu().numpy())
        return codes

    def value(self, column: str, code: int) -> str:
        """Give the text behind a code."""
        values = self._bundle.vocabulary.get(column, [])
        return values[code - FIRST_CODE] if FIRST_CODE <= code < len(values) + FIRST_CODE else str(code)

    def _code_of(self, column: str) -> dict[str, int]:
        if column not in self._codes:
            values = self._bundle.vocabulary.get(column, [])
            self._codes[column] = {str(value): code for code, value in enumerate(values, FIRST_CODE)}
        return self._codes[column]

    @cached_property
    def _codes(self) -> dict[str, dict[str, int]]:
        return {}
