"""Columns that a file does not have as such, made of those it has.

A mapping writes them as a name:

    date + time      both as one text, a blank between: a date and its time of day, or an id of two parts
    items[;]         a row for every value of `items` between semicolons (or any other mark)
    items[]          a row for every entry of a list: of Parquet, or JSON in a text
    lines[].sku      the same where the entries are objects: what stands under `sku` there

So an order with a list of articles becomes an event per article. A column that has such a name itself comes first.
Entries are numbered from 0 (`ENTRY`), so that an id of the order can become one of the entry.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import polars as pl
from polars.datatypes import DataTypeClass

from recsys.errors import DataError

JOINED_BY = " + "
ENTRY = "_entry"
"""number of an entry in its row; there only where rows have entries"""
_MIDNIGHT = r"[ T]00:00(:00(\.0+)?)?(Z|\s*UTC)?$"
_SURROGATE = re.compile("[\ud800-\udfff]")
"""half of a pair: no text"""
_ENTRIES = re.compile(r"(?P<column>.+)\[(?P<mark>[^\[\]]*)\](\.(?P<keys>.+))?")


@dataclass(frozen=True)
class Derived:
    """A column that can be made.

    Attributes:
        needs: columns of the file it is made of.
        value: how; a list where `entries`.
        kind: type of a value, of an entry where `entries`.
        entries: whether every entry gets a row of its own.
    """

    needs: tuple[str, ...]
    value: pl.Expr
    kind: pl.DataType
    entries: bool = False


def derive(name: str, columns: Mapping[str, pl.DataType], path: Path) -> Derived | None:
    """Return how a column of this name is made of the columns a file has, or None where it cannot be.

    Raises:
        DataError: entries of a column that has none.
    """
    parts = name.split(JOINED_BY)
    if len(parts) > 1 and all(part in columns for part in parts):
        return Derived(tuple(parts), _joined({part: columns[part] for part in parts}), pl.String())
    found = _ENTRIES.fullmatch(name)
    if found is None or found["column"] not in columns:
        return None
    column, mark, keys = found["column"], found["mark"], tuple(found["keys"].split(".")) if found["keys"] else ()
    kind = columns[column]
    if isinstance(kind, pl.List) and not mark:
        value, inner = pl.col(column), _inner(kind.inner, keys)
        if inner is not None:
            return Derived((column,), _under(value, keys), inner, entries=True)
    if kind == pl.String and mark and not keys:
        return Derived((column,), _between(pl.col(column), mark), kind, entries=True)
    if kind == pl.String and not mark:
        return Derived((column,), _json_entries(pl.col(column), keys), kind, entries=True)
    raise DataError(
        f"{path}: {name!r} cannot be read: column {column!r} is {kind}; expected a list (items[], lines[].sku), or "
        "text and what separates its values (items[;])"
    )


def with_derived(frame: pl.LazyFrame, derived: Mapping[str, Derived], broken: pl.Expr) -> pl.LazyFrame:
    """Add the columns; where they have entries a row becomes as many as it has, or one without any.

    Lists of one row that differ in length say nothing about which entries belong together: they have none. Nor has a
    broken row.
    """
    frame = frame.with_columns(one.value.alias(name) for name, one in derived.items())
    lists = [name for name, one in derived.items() if one.entries]
    if not lists:
        return frame
    lengths = [pl.col(name).list.len() for name in lists]
    alike = pl.all_horizontal(length == lengths[0] for length in lengths)
    frame = frame.with_columns(pl.when(alike & ~broken).then(pl.col(name)).alias(name) for name in lists)
    frame = frame.with_columns(pl.int_ranges(pl.col(lists[0]).list.len()).alias(ENTRY))
    return frame.explode([*lists, ENTRY], empty_as_null=True)


def _joined(columns: Mapping[str, pl.DataType]) -> pl.Expr:
    parts: list[pl.Expr] = []
    for name, kind in columns.items():
        value = pl.col(name)
        text = (value.dt.date() if isinstance(kind, pl.Datetime) else value).cast(pl.String).str.strip_chars()
        text = text.str.replace(_MIDNIGHT, "") if not parts else text  # of a date that has one beside its clock
        parts.append(pl.when(text != "").then(text))
    return pl.concat_str(parts, separator=" ")


def _inner(kind: DataTypeClass | pl.DataType, keys: tuple[str, ...]) -> pl.DataType | None:
    """Return the type under keys of a struct; None if there is no such field, or it is nested itself."""
    for key in keys:
        fields = {field.name: field.dtype for field in kind.fields} if isinstance(kind, pl.Struct) else {}
        if key not in fields:
            return None
        kind = fields[key]
    return kind if isinstance(kind, pl.DataType) and not kind.is_nested() else None


def _under(entries: pl.Expr, keys: tuple[str, ...]) -> pl.Expr:
    for key in keys:
        entries = entries.list.eval(pl.element().struct.field(key))
    return entries


def _between(text: pl.Expr, mark: str) -> pl.Expr:
    values = text.str.split(mark).list.eval(pl.element().str.strip_chars())
    return values.list.eval(pl.element().filter(pl.element() != ""))


def _json_entries(text: pl.Expr, keys: tuple[str, ...]) -> pl.Expr:
    """Return the entries of a list of JSON as texts; what is no such list has none.

    Cost: read in Python, some 3 us a list: polars fails on a column whole where one value is odd.
    """

    def read(values: pl.Series) -> pl.Series:
        return pl.Series(values.name, [_entries(value, keys) for value in values], pl.List(pl.String))

    return text.map_batches(read, pl.List(pl.String()), is_elementwise=True)


def _entries(text: str | None, keys: tuple[str, ...]) -> list[str | None] | None:
    try:
        entries = json.loads(text or "")
    except (ValueError, RecursionError):
        return None
    return [_entry(entry, keys) for entry in entries] if isinstance(entries, list) else None


def _entry(entry: object, keys: tuple[str, ...]) -> str | None:
    """Return what stands under the keys as text; JSON again where it is a list or an object."""
    for key in keys:
        entry = entry.get(key) if isinstance(entry, dict) else None
    text = entry if entry is None or isinstance(entry, str) else json.dumps(entry, ensure_ascii=False)
    return None if text is None or _SURROGATE.search(text) else text
