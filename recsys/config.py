"""Strict TOML: an unknown key is an error that names the nearest known one; a wrong value names its key."""

import dataclasses
import difflib
import math
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import ConfigDict, TypeAdapter, ValidationError

from recsys.errors import ConfigError

T = TypeVar("T")


def read_toml(path: Path, assignments: Sequence[str] = ()) -> dict[str, Any]:
    """Read a TOML file and apply `section.key=value` assignments (values in TOML syntax, bare words are strings)."""
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from None
    for assignment in assignments:
        assign(table, assignment)
    return table


def assign(table: dict[str, Any], assignment: str) -> None:
    """Set one `section.key=value` in a table, making sections that are not there."""
    name, equals, text = assignment.partition("=")
    *sections, key = name.strip().split(".")
    if not equals or not key:
        raise ConfigError(f"--set {assignment!r}: expected section.key=value")
    target = table
    for section in sections:
        target = target.setdefault(section, {})
        if not isinstance(target, dict):
            raise ConfigError(f"--set {assignment!r}: {section!r} is a value, not a section")
    target[key] = _toml_value(text.strip())


def overlaid(table: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Return a table with the values of another laid over it, section by section."""
    merged = dict(table)
    for key, value in above.items():
        below = merged.get(key)
        merged[key] = overlaid(below, value) if isinstance(below, Mapping) and isinstance(value, Mapping) else value
    return merged


def _toml_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def parse(kind: type[T], table: Mapping[str, Any], where: str) -> T:
    """Build a frozen config dataclass from a table.

    Args:
        kind: a dataclass; nested dataclass fields are nested tables.
        table: what the TOML holds.
        where: how messages name this table, e.g. `train.toml [model]`.

    Raises:
        ConfigError: an unknown key, a missing key, a value of the wrong type (text is no number, nor is true) or range,
            or NaN, which passes any range.
    """
    _refuse_unknown(kind, table, where)
    _refuse_nan(table, where)
    try:
        return TypeAdapter(kind, config=_config(kind)).validate_python(dict(table))
    except ValidationError as error:
        raise ConfigError(f"{where}: {first_problem(error)}") from None


def first_problem(error: ValidationError) -> str:
    """Return the first thing wrong in a table that pydantic refused: its key, what is wanted, and what was found."""
    first = error.errors(include_url=False)[0]
    key = ".".join(str(part) for part in first["loc"]) or "(whole table)"
    found = "" if first["type"] == "missing" else f", found {first['input']!r}"
    return f"{key}: {first['msg']}{found}"


def _refuse_nan(table: Mapping[str, Any], where: str) -> None:
    for key, value in table.items():
        if isinstance(value, Mapping):
            _refuse_nan(value, f"{where} [{key}]")
        elif any(isinstance(one, float) and math.isnan(one) for one in (value if isinstance(value, list) else [value])):
            raise ConfigError(f"{where}: {key}: expected a number, found {value!r}")


def _config(kind: type[Any]) -> ConfigDict | None:
    return None if dataclasses.is_dataclass(kind) else ConfigDict(extra="forbid")


def nearest_first(name: str, known: Sequence[str]) -> list[str]:
    """Return the known names, the likest to a misspelled one first."""
    return sorted(known, key=lambda one: -difflib.SequenceMatcher(None, name, one).ratio())


def _refuse_unknown(kind: Any, table: Mapping[str, Any], where: str) -> None:
    if not (isinstance(kind, type) and dataclasses.is_dataclass(kind)):
        return
    fields = {field.name: field for field in dataclasses.fields(kind)}
    for key, value in table.items():
        if key not in fields:
            nearest = difflib.get_close_matches(key, fields, n=1, cutoff=0.0)
            hint = f"did you mean {nearest[0]!r}?" if nearest else "there is nothing to set"
            raise ConfigError(f"{where}: unknown key {key!r}; {hint}")
        types = set(_types(fields[key].type))
        for one in value if isinstance(value, list) else [value]:
            _refuse_coerced(types, one, f"{where}: {key}")
            for nested in types if isinstance(one, Mapping) else ():
                _refuse_unknown(nested, one, f"{where} [{key}]")


def _types(annotation: Any) -> Iterator[Any]:
    """Yield an annotation and all within it: of `tuple[Cap, ...] | None` also Cap."""
    yield annotation
    for inner in get_args(annotation):
        yield from _types(inner)


def _refuse_coerced(types: set[Any], value: Any, where: str) -> None:
    """Refuse text for a number or a flag, and a flag for a number: pydantic would take both."""
    names = {int: "a whole number", float: "a number", bool: "true or false"}
    wanted = [name for kind, name in names.items() if kind in types]
    text = isinstance(value, str) and str not in types and value not in types
    flag = isinstance(value, bool) and bool not in types
    if wanted and (text or flag):
        raise ConfigError(f"{where}: expected {wanted[-1]}, found {value!r}")
