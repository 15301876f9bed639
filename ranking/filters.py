"""Which items may be recommended at all: by attribute, by what is available now, by what the user has seen.

A filter is a mask over item rows. All masks are joined before the sources are asked, and every source proposes allowed
rows only, so that a filter never thins out an answer: a source digs deeper instead. Masks of the config are made once
per bundle, that of availability once per change of its table, those of requests are kept for the next like request.
At 1 M items a mask takes 1 MB, joining and packing it for the index some 0.1 ms.
"""

import logging
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from threading import Lock
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from ranking.attributes import MOST_COMPARED, Attributes
from ranking.batch import FIRST_ITEM
from ranking.users import User
from recsys.errors import ConfigError, RequestError
from recsys.files import sha256_json
from recsys.history import DAY
from recsys.messages import ItemFilter, RecommendRequest

logger = logging.getLogger(__name__)

KEPT_VALUES = 1_000
"""Values of a filter above which its mask is not kept: what it is found by would be larger than the mask."""

KEPT_MASKS = 64
"""Masks of requests that are kept, the least recently used go first."""
ASKED_COMPARED = 300
"""Values of a column in which the likest to a request's unknown one is looked for; 1.5 ms for each that is told."""


class Unavailable(NamedTuple):
    """Items that cannot be had now; `version` changes whenever they do."""

    version: int
    item_ids: frozenset[str]


class Availability(Protocol):
    """A live table of what cannot be had; an item it does not name is available."""

    def unavailable(self) -> Unavailable:
        """Return the items of this moment; called once per request."""
        ...


class Allowed(NamedTuple):
    """Rows that may be recommended: bool [V], None for all known ones; `blocked` counts the rows that may not."""

    mask: NDArray[np.bool_] | None
    blocked: int


class _Mask(NamedTuple):
    """Rows that pass one filter, and what of it no item has."""

    mask: NDArray[np.bool_]
    warnings: tuple[str, ...] = ()


class Filters:
    """Gives the rows that a request may be answered with.

    Args:
        attributes: item columns.
        rows: V.
        config: filters of every request.
        availability: what cannot be had now, None if there is no such table.
        in_catalogue_only: whether items that only the log knows are left out.

    Raises:
        ConfigError: a filter names a column that the bundle does not have.
    """

    def __init__(
        self,
        attributes: Attributes,
        rows: int,
        config: Sequence[ItemFilter] = (),
        availability: Availability | None = None,
        in_catalogue_only: bool = False,
    ) -> None:
        self._attributes = attributes
        self._rows = rows
        self._config = tuple(config)
        self._availability = availability
        self._lock = Lock()
        self._masks: OrderedDict[object, _Mask] = OrderedDict()
        self._joined: tuple[object, Allowed] | None = None
        self._digest = (-1, "")
        self._always = [(f"filter of {one.column}", self._of_attribute(one)) for one in self._config]
        listed = attributes.listed() if in_catalogue_only else None
        if listed is not None:
            self._always.append(("not in the catalogue", listed))
        for one in self._config:
            for told in self._unknown(one):
                logger.warning("the filter of %s", told)

    def allowed(self, request: RecommendRequest, seen: NDArray[np.int32]) -> Allowed:
        """Return what passes every filter and is not among the rows `seen`.

        Raises:
            RequestError: 422 for a filter of a column that the bundle does not have.
        """
        base = self._base(request)
        if not len(seen):
            return base
        mask = self._known() if base.mask is None else base.mask.copy()
        mask[seen] = False
        return Allowed(mask, len(mask) - int(np.count_nonzero(mask)))

    def reasons(self, request: RecommendRequest, seen: NDArray[np.int32], rows: NDArray[np.int32]) -> list[str | None]:
        """Give, for each row, the first filter it does not pass, None if it passes all."""
        found: list[str | None] = [None] * len(rows)
        known = set(seen.tolist())
        parts = self._parts(request, self._unavailable())
        for place, row in enumerate(rows.tolist()):
            if row in known:
                found[place] = "seen"
            else:
                found[place] = next((name for name, mask in parts if not mask[row]), None)
        return found

    def warnings(self, filters: Sequence[ItemFilter]) -> list[str]:
        """Name the values of a request's filters that no item has.

        Raises:
            RequestError: 422 for a filter of a column that the bundle does not have.
        """
        return [f"filters[{n}] of {told}" for n, one in enumerate(filters) for told in self._asked(n, one).warnings]

    def unavailable_digest(self) -> str:
        """Name what cannot be had now; hashed once per change of the table."""
        table = self._unavailable()
        if self._digest[0] != table.version:
            self._digest = (table.version, sha256_json(sorted(table.item_ids)))
        return self._digest[1]

    def _base(self, request: RecommendRequest) -> Allowed:
        """Return what passes all filters but that of the seen items; like requests share one mask."""
        unavailable = self._unavailable()
        key = (unavailable.version, tuple(request.filters))
        joined = self._joined
        if joined is not None and joined[0] == key:
            return joined[1]
        parts = self._parts(request, unavailable)
        allowed = Allowed(None, 0)
        if parts:
            mask = self._known()
            for _, part in parts:
                mask &= part
            allowed = Allowed(mask, len(mask) - int(np.count_nonzero(mask)))
        if all(map(_short, request.filters)):
            self._joined = (key, allowed)
        return allowed

    def _unavailable(self) -> Unavailable:
        return Unavailable(0, frozenset()) if self._availability is None else self._availability.unavailable()

    def _parts(self, request: RecommendRequest, unavailable: Unavailable) -> list[tuple[str, NDArray[np.bool_]]]:
        """Return every filter of a request with its mask."""
        parts = list(self._always)
        if unavailable.item_ids:
            parts.append(("unavailable", self._kept(("unavailable", unavailable.version), unavailable.item_ids).mask))
        for number, one in enumerate(request.filters):
            parts.append((f"filter of {one.column} in the request", self._asked(number, one).mask))
        return parts

    def _asked(self, number: int, one: ItemFilter) -> "_Mask":
        try:
            return self._kept(one, one) if _short(one) else self._made(one)
        except ConfigError as error:
            raise RequestError(422, "unknown_column", f"filters[{number}]: {error}") from None

    def _kept(self, key: object, what: ItemFilter | frozenset[str]) -> "_Mask":
        with self._lock:
            if key in self._masks:
                self._masks.move_to_end(key)
                return self._masks[key]
        mask = self._made(what)
        with self._lock:
            self._masks[key] = mask
            while len(self._masks) > KEPT_MASKS:
                self._masks.popitem(last=False)
        return mask

    def _made(self, what: ItemFilter | frozenset[str]) -> "_Mask":
        if isinstance(what, ItemFilter):
            return _Mask(self._of_attribute(what), tuple(self._unknown(what, ASKED_COMPARED)))
        return _Mask(~self._attributes.having("item_id", what))

    def _of_attribute(self, one: ItemFilter) -> NDArray[np.bool_]:
        mask = self._known()
        if one.allow is not None:
            mask &= self._attributes.having(one.column, one.allow)
        if one.deny is not None:
            mask &= ~self._attributes.having(one.column, one.deny)
        if one.at_least is not None or one.at_most is not None:
            mask &= self._attributes.between(one.column, one.at_least, one.at_most)
        return mask

    def _unknown(self, one: ItemFilter, compared: int = MOST_COMPARED) -> Iterator[str]:
        for verb, values in (("allows", one.allow), ("denies", one.deny)):
            if unknown := self._attributes.unknown(one.column, values or (), compared):
                yield f"{one.column} {verb} what no item has: {', '.join(unknown)}"

    def _known(self) -> NDArray[np.bool_]:
        mask = np.ones(self._rows, bool)
        mask[:FIRST_ITEM] = False
        return mask


def _short(one: ItemFilter) -> bool:
    return len(one.allow or ()) + len(one.deny or ()) <= KEPT_VALUES


def seen_rows(
    request: RecommendRequest, user: User, days: float, actions: NDArray[np.uint8] | None = None
) -> NDArray[np.int32]:
    """Return the distinct rows that a user has seen too lately to see again, those of exactly so many days ago too.

    Args:
        request: asks for all of the history, for its own number of days, or for neither.
        user: the history.
        days: the config's number of days, where the request has none.
        actions: codes of the actions whose events count; None counts all events.
    """
    rows, begin = user.rows, 0
    if not request.exclude_seen:
        days = days if request.exclude_seen_days is None else request.exclude_seen_days
        if days == 0:
            return rows[:0]
        begin = int(np.searchsorted(user.events.time, user.at - int(days * DAY)))
    rows = rows[begin:]
    if actions is not None:
        rows = rows[np.isin(user.events.action[begin:], actions)]
    return np.unique(rows)
