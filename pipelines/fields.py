"""What a value of a file means: ids, times, positions and numbers, each with the ways in which it can be wrong.

A field turns a column of whatever type the file has into the canonical type and, beside it, conditions that make the
row a bad one. Nothing is decided row by row in Python: all of it is polars expressions over the stream.
"""

import re
import time
from collections.abc import Callable
from dataclasses import dataclass

import polars as pl

from pipelines.mapping import MICROSECONDS, NumbersConfig, TimeConfig
from recsys.errors import DataError
from recsys.history import DAY, EARLIEST, LATEST, POSITIONS

_TIME_OF_DAY = ("%H", "%I", "%k", "%l", "%T", "%R", "%X", "%c", "%s")
"""parts of a format without which a text is a date"""
AHEAD = (
    "a time that is not in the future ([time] future = true takes them): one moves the periods that validate and test"
)
FINITE = "a finite number"
MONEY = r"(?:\p{Sc}|USD|EUR|GBP|CHF|JPY|CNY|INR|KRW|SEK|NOK|DKK|PLN|CZK|HUF|RON|TRY|RUB|UAH|BRL|MXN|CAD|AUD|NZD|ZAR)"
"""a sign of a currency, or a code of the most used ones"""
_MARKED = rf"^[+-]?(?:\d[\d.,' ]*\d|{MONEY}\s*[+-]?\d[\d.,' ]*|\d[\d.,' ]*{MONEY})$"
"""a number, whatever its marks"""
CONTAINER = r'(?s)^(\[\s*(["\d\[{-].*|true.*|false.*|null.*)?\]|\{\s*(".*)?\})\s*$'
"""a list or an object of JSON; `[deleted]` and `[3M] tape` are ids"""
_OFFSET = r"\s*(Z|UTC|GMT|[+-]\d{2}:?\d{2})$"


@dataclass(frozen=True)
class Problem:
    """A condition (bool, never null) that makes a row bad, and what was expected instead."""

    holds: pl.Expr
    expected: str


@dataclass(frozen=True)
class Field:
    """A column in its canonical type and what can be wrong with it.

    Attributes:
        value: the column parsed.
        problems: given an expression of the parsed column, so that it is parsed once however many conditions use it.
    """

    value: pl.Expr
    problems: Callable[[pl.Expr], tuple[Problem, ...]]


Reader = Callable[[str, pl.DataType, str], Field]
"""(column, its type, the file's name for messages) -> field"""


def read_id(column: str, kind: pl.DataType, file: str) -> Field:
    """Return an id as text, exactly as it stands; a missing or empty one makes the row bad."""
    text, odd = _id_text(column, kind, file)
    return Field(
        text,
        lambda parsed: (
            Problem(odd, "an id without decimals"),
            Problem(parsed.str.contains(CONTAINER).fill_null(False), "an id, not a list or an object of JSON"),
            Problem(parsed.is_null() | (parsed == ""), "an id"),
        ),
    )


def read_name(column: str, kind: pl.DataType, file: str) -> Field:
    """Return a text that may be missing: an action, a session, an event id."""
    text, odd = _id_text(column, kind, file)
    return Field(pl.when(text != "").then(text), lambda _: (Problem(odd, "a name or a number without decimals"),))


def number_reader(config: NumbersConfig) -> Reader:
    """Return the reader of float64 that may be missing; text that is no number, or one that is not finite, is bad."""

    def read(column: str, kind: pl.DataType, file: str) -> Field:
        if kind != pl.String:
            return Field(_number(column, kind, file), lambda parsed: (_not_finite(parsed, pl.lit(False)),))
        text = pl.col(column).str.strip_chars()

        def problems(parsed: pl.Expr) -> tuple[Problem, ...]:
            unreadable = parsed.is_null() & (text != "").fill_null(False)
            marked = unreadable & text.str.contains(_MARKED).fill_null(False)
            found = f"a number as {config.example}; other marks are named in [numbers] decimal, thousands and currency"
            return Problem(marked, found), _not_finite(parsed, unreadable)

        return Field(parse_numbers(text, config), problems)

    return read


def parse_numbers(text: pl.Expr, config: NumbersConfig) -> pl.Expr:
    """Return text, without blanks around it, as float64; what is written otherwise is null.

    Thousands stand in threes or without a mark: of `1.23` with points between thousands nobody knows what it means.
    """
    if config.currency:
        mark = re.escape(config.currency)
        text = text.str.replace(rf"^([+-]?)\s*{mark}\s*", "${1}").str.replace(rf"\s*{mark}$", "")
    if config != NumbersConfig(currency=config.currency):
        digits, decimal = r"\d+", re.escape(config.decimal)
        if config.thousands:
            digits = rf"([1-9]\d{{0,2}}({re.escape(config.thousands)}\d{{3}})+|\d+)"
        written = text.str.contains(rf"^[+-]?{digits}({decimal}\d*)?$")
        plain = text.str.replace_all(config.thousands, "", literal=True) if config.thousands else text
        text = pl.when(written).then(plain.str.replace(config.decimal, ".", literal=True))
    return text.cast(pl.Float64, strict=False)


def _not_finite(number: pl.Expr, unreadable: pl.Expr) -> Problem:
    return Problem(unreadable | ~number.is_finite().fill_null(True), FINITE)


def read_label(column: str, kind: pl.DataType, file: str) -> Field:
    """Return 1.0 for a click or the like and 0.0 for none; anything else makes the row bad."""
    number = pl.col(column).cast(pl.Float64) if kind == pl.Boolean else _number(column, kind, file)
    if kind == pl.String:
        flag = pl.col(column).str.to_lowercase().replace_strict(["true", "false"], [1.0, 0.0], default=None)
        number = pl.coalesce(flag, number)
    return Field(number, lambda parsed: (Problem(~parsed.is_in([0.0, 1.0]).fill_null(False), "a label, 0 or 1"),))


def read_position(column: str, kind: pl.DataType, file: str) -> Field:
    """Return an int64 that says only which event came first."""
    number = _number(column, kind, file, "positions, whole numbers")

    def problems(parsed: pl.Expr) -> tuple[Problem, ...]:
        return (
            Problem(parsed.is_null() | (number != number.floor()).fill_null(False), "a position, a whole number"),
            Problem(
                ~parsed.is_between(-POSITIONS, POSITIONS, closed="none").fill_null(True),
                f"a position of less than {len(str(POSITIONS))} digits; a time is named by [columns] timestamp",
            ),
        )

    return Field(_whole(column, kind, number), problems)


def time_reader(config: TimeConfig) -> Reader:
    """Return the reader of times in a stated unit and zone; it gives int64 microseconds UTC."""

    def read(column: str, kind: pl.DataType, file: str) -> Field:
        if isinstance(kind, pl.Date | pl.Datetime):
            moment = pl.col(column).cast(pl.Datetime("us", getattr(kind, "time_zone", None)))
            return Field(
                _localised(moment, kind, config), lambda parsed: _moment_problems(column, kind, parsed, config)
            )
        if config.unit == "datetime":
            if kind != pl.String:
                raise DataError(
                    f'{file}: column {column!r} is {kind}, expected datetimes because [time] unit = "datetime"; for '
                    "numbers since 1970 state the unit: s, ms or us"
                )
            text = _parsed_text(pl.col(column), config)
            return Field(text, lambda parsed: _moment_problems(column, kind, parsed, config))
        scale = MICROSECONDS[config.unit]
        number = _number(column, kind, file, f"numbers of {config.unit} since 1970")
        whole = _whole(column, kind, number)
        rounded = (number * scale).round().cast(pl.Int64, strict=False)
        time = pl.when(whole == number).then(whole * scale).otherwise(rounded)
        return Field(time, lambda _: _number_problems(column, number, config))

    return read


def _moment_problems(column: str, kind: pl.DataType, parsed: pl.Expr, config: TimeConfig) -> tuple[Problem, ...]:
    """Tell apart a missing datetime, a number, a text that cannot be read and one out of the calendar."""
    value = pl.col(column)
    missing = value.is_null() if kind != pl.String else value.is_null() | (value == "")
    wanted = f"a time as {config.format}" if config.format else "a time such as 2017-01-31 18:05:00"
    number = value.cast(pl.String).str.contains(r"^\d{9,16}$").fill_null(False)
    outside = ~parsed.is_between(EARLIEST, LATEST, closed="left").fill_null(True)
    return (
        Problem(missing, "a time, found nothing"),
        Problem(parsed.is_null() & number, f'{wanted}; a number since 1970 needs [time] unit = "s", "ms" or "us"'),
        Problem(parsed.is_null(), wanted),
        Problem(outside, "a time between 1980 and 2199"),
        Problem((parsed > _latest(config)).fill_null(False), AHEAD),
    )


def _number_problems(column: str, number: pl.Expr, config: TimeConfig) -> tuple[Problem, ...]:
    """Tell apart a missing time, one that is no number, one in another unit and one out of the calendar.

    Floats are compared: whole microseconds of a time in the wrong unit may not fit 64 bits.
    """
    unit = config.unit
    outside = ~_inside(number, unit)
    others = [other for other in MICROSECONDS if other != unit]
    return (
        Problem(pl.col(column).is_null(), "a time, found nothing"),
        Problem(number.is_null(), f"a number of {unit} since 1970"),
        *(
            Problem(
                outside & _inside(number, other), f"a time in {unit}, and this is one in {other}: two units in one log"
            )
            for other in others
        ),
        Problem(outside, f"a time in {unit} between 1980 and 2199"),
        Problem((number > _latest(config) / MICROSECONDS[unit]).fill_null(False), AHEAD),
    )


def _latest(config: TimeConfig) -> int:
    """Return the latest moment an event may have: a day ahead of the clock, as the service takes them."""
    return LATEST if config.future else time.time_ns() // 1000 + DAY


def _inside(number: pl.Expr, unit: str) -> pl.Expr:
    scale = MICROSECONDS[unit]
    return number.is_between(EARLIEST / scale, LATEST / scale, closed="left").fill_null(False)


def _parsed_text(text: pl.Expr, config: TimeConfig) -> pl.Expr:
    """Return int64 microseconds UTC of text: year first, with or without a time, a fraction, an offset; or `format`.

    Cost: 0.5 us a row, most of it the parse; so every shape is brought into one and parsed once.
    """
    text = text.str.strip_chars()
    naive = pl.Datetime("us")
    if config.format:
        if "%z" in config.format:
            return text.str.to_datetime(config.format, time_unit="us", time_zone="UTC", strict=False).cast(pl.Int64)
        if not any(part in config.format for part in _TIME_OF_DAY):
            return _localised(text.str.to_date(config.format, strict=False).cast(naive), naive, config)
        return _localised(text.str.to_datetime(config.format, time_unit="us", strict=False), naive, config)
    offset = pl.when(text.str.contains(r"\d:\d{2}.*" + _OFFSET)).then(text.str.extract(_OFFSET))
    plain = pl.when(offset.is_null()).then(text).otherwise(text.str.replace(_OFFSET, ""))
    date, rest = plain.str.slice(0, 10), plain.str.slice(11)
    between = plain.str.slice(10, 1).is_in(["T", " ", ""])
    seconds = pl.when(rest == "").then(pl.lit("00:00:00")).when(rest.str.len_bytes() == 5).then(rest + ":00")
    whole = pl.when(between).then(date + " " + seconds.otherwise(rest))
    local = whole.str.to_datetime("%Y-%m-%d %H:%M:%S%.f", time_unit="us", strict=False)
    digits = offset.str.replace(":", "", literal=True)
    hours, minutes = (digits.str.slice(place, 2).cast(pl.Int64, strict=False) for place in (1, 3))
    east = (hours * 60 + minutes).fill_null(0) * 60_000_000
    ahead = pl.when(digits.str.starts_with("-")).then(-east).otherwise(east)
    if config.zone == "UTC":
        return local.cast(pl.Int64) - ahead
    return pl.when(offset.is_null()).then(_localised(local, naive, config)).otherwise(local.cast(pl.Int64) - ahead)


def _localised(moment: pl.Expr, kind: pl.DataType, config: TimeConfig) -> pl.Expr:
    """Return int64 microseconds UTC of a datetime; a naive one is read in the stated zone.

    A moment the zone's clocks skip does not exist and becomes null; of one they pass twice the first is meant.
    """
    if getattr(kind, "time_zone", None) is None and config.zone != "UTC":
        moment = moment.dt.replace_time_zone(config.zone, ambiguous="earliest", non_existent="null")
    return moment.cast(pl.Int64)


def _id_text(column: str, kind: pl.DataType, file: str) -> tuple[pl.Expr, pl.Expr]:
    """Return an id as text, and where a number with decimals makes it odd."""
    value = pl.col(column)
    if kind.is_float():  # a column of whole numbers with gaps comes out of pandas as floats
        whole = value.cast(pl.Int64, strict=False)
        return whole.cast(pl.String), value.is_not_null() & ((whole != value) | whole.is_null()).fill_null(True)
    if kind.is_integer() or isinstance(kind, pl.String | pl.Categorical | pl.Enum):
        return value.cast(pl.String), pl.lit(False)
    raise DataError(f"{file}: column {column!r} is {kind}; expected text or whole numbers: ids")


def _number(column: str, kind: pl.DataType, file: str, expected: str = "numbers") -> pl.Expr:
    value = pl.col(column)
    if kind == pl.String:
        return value.str.strip_chars().cast(pl.Float64, strict=False)
    if kind.is_numeric():
        return value.cast(pl.Float64)
    raise DataError(f"{file}: column {column!r} is {kind}; expected {expected}")


def _whole(column: str, kind: pl.DataType, number: pl.Expr) -> pl.Expr:
    """Return int64, exact where the file has whole numbers: floats hold them up to 2^53 only."""
    if kind.is_float():
        return number.cast(pl.Int64, strict=False)
    value = pl.col(column).str.strip_chars() if kind == pl.String else pl.col(column)
    return pl.coalesce(value.cast(pl.Int64, strict=False), number.cast(pl.Int64, strict=False))
