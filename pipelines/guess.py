"""A first mapping of files nobody has described yet: what each column probably is, why, and what to check.

Names come first: logs of twenty years call their columns a few dozen ways. Where no name helps, the content does: a
date, a number that is a time in some unit, ids that come again. Every guess says on what it rests, so that a person can
overrule it.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import polars as pl

from pipelines.fields import CONTAINER, parse_numbers, time_reader
from pipelines.mapping import MICROSECONDS, NumbersConfig, TimeConfig, Unit
from pipelines.sources import BROKEN, Table, find_files, open_table
from recsys.errors import DataError
from recsys.history import DAY, EARLIEST, LATEST

SAMPLE = 10_000
"""rows looked at"""
NAMES: dict[str, tuple[str, ...]] = {
    "user_id": (
        "userid", "user", "uid", "customerid", "customer", "householdid", "household", "visitorid", "memberid",
        "clientid", "accountid", "reviewerid", "userkey", "personid", "buyerid", "custid",
    ),
    "item_id": (
        "itemid", "item", "iid", "productid", "product", "sku", "asin", "parentasin", "stockcode", "movieid",
        "articleid", "newsid", "businessid", "trackid", "songid", "bookid", "isbn", "videoid", "gameid", "artid",
        "contentid", "itemkey", "adid", "recipeid", "courseid", "article", "movie", "song", "track", "book", "news",
    ),
    "timestamp": (
        "timestamp", "time", "ts", "datetime", "date", "eventtime", "createdat", "invoicedate", "unixreviewtime",
        "unixtime", "tdat", "orderdate", "purchasedate", "reviewtime", "transactiontimestamp", "eventtimestamp",
        "createtime", "when", "at",
    ),
    "position": ("position", "pos", "seq", "sequence", "step", "order", "rank", "idx"),
    "action": (
        "action", "event", "eventtype", "eventname", "behavior", "behaviour", "behaviortype", "type",
        "what", "verb",
    ),
    "value": ("value", "rating", "stars", "overall", "score", "price", "amount", "quantity", "salesvalue", "total"),
    "session_id": (
        "sessionid", "session", "usersession", "basketid", "basket", "orderid", "invoiceno", "invoice", "invoiceid",
        "visitid", "transactionid", "cartid",
    ),
    "event_id": ("eventid", "rowid", "uuid"),
}  # fmt: skip
TEXTS = ("title", "name", "productname", "itemname", "movietitle", "headline", "text", "description", "abstract")
POSITIVE = ("quantity", "qty", "units", "pieces")
_FORMATS = (
    "%d/%m/%Y %H:%M:%S", "%d/%m/%Y %H:%M", "%d/%m/%Y", "%m/%d/%Y %H:%M:%S", "%m/%d/%Y %H:%M", "%m/%d/%Y",
    "%d.%m.%Y %H:%M:%S", "%d.%m.%Y %H:%M", "%d.%m.%Y", "%Y/%m/%d %H:%M:%S", "%Y/%m/%d", "%Y%m%d",
    "%m/%d/%Y %I:%M:%S %p", "%m/%d/%Y %I:%M %p", "%m/%d/%y %H:%M", "%d/%m/%y %H:%M", "%d-%b-%Y %H:%M:%S",
    "%d-%b-%Y %H:%M", "%d-%b-%Y",
)  # fmt: skip
MULTI_SEPARATORS = "|;"
STYLES = (NumbersConfig(), NumbersConfig(","), NumbersConfig(",", "."), NumbersConfig(".", ","))
"""ways of writing numbers that are tried, the likeliest first"""
_MOST_VALUES = 0.5
"""of the rows: a text column with more different values than this is not a category"""
_FEWEST_NUMBERS = 20
"""different values of a column of numbers that are no categories"""
_ENOUGH_SHARED = 0.5
UNKNOWN = "?"


@dataclass(frozen=True)
class Guess:
    """What a column is taken for, and why."""

    column: str
    why: str


@dataclass(frozen=True)
class Time:
    """How times are written: unit, format of text that is not year first, and why."""

    unit: Unit
    format: str | None
    why: str


def write_mapping(events: Path, items: Path | None, folder: Path) -> str:
    """Return the commented TOML for an events file and an items file, or globs of them, relative to `folder`.

    Raises:
        DataError: a file that cannot be read, or an empty one.
    """
    table = open_table(_first(events))
    sample = _sample(table)
    catalogue = open_table(_first(items)) if items else None
    rows = _sample(catalogue) if catalogue else None
    numbers = guess_numbers([*sample, *(() if rows is None else rows)])
    guesses = guess_columns(table, sample, rows, numbers)
    time = guess_time(sample, guesses["timestamp"].column) if "timestamp" in guesses else None
    parts = [
        "# How this log is read. Made by `recsys init` from the first rows; check every line with a (?) or a guess.\n",
        _source(events, items, folder),
        _columns(guesses, table),
    ]
    if catalogue is not None and rows is not None:
        key = guess_item_key(sample, guesses["item_id"].column if "item_id" in guesses else None, rows)
        parts.append(_items(catalogue, rows, key, numbers))
    parts += [_time(time), _numbers(numbers), _sessions(guesses), _filters(guesses, sample, numbers)]
    parts += [_requests(guesses, sample), _QUALITY]
    return "\n".join(parts)


def _first(path: Path) -> Path:
    """Return the file itself, or the first that a glob means."""
    return path if path.exists() or not set("*?[") & set(str(path)) else find_files(str(path), Path(), "init")[0]


def _sample(table: Table) -> pl.DataFrame:
    try:
        rows = table.rows(list(table.columns)).filter(~pl.col(BROKEN)).head(SAMPLE).collect()
    except pl.exceptions.PolarsError as error:
        raise DataError(f"{table.path}: cannot be read ({error})") from None
    if rows.is_empty():
        raise DataError(f"{table.path}: no row; expected at least one")
    return rows.select(list(table.columns))


def _plain(name: str) -> str:
    """Return a name without case, punctuation and the type some tools append (`user_id:token`)."""
    return re.sub(r"[^a-z0-9]", "", name.split(":")[0].lower())


def guess_columns(
    table: Table, sample: pl.DataFrame, items: pl.DataFrame | None = None, style: NumbersConfig = STYLES[0]
) -> dict[str, Guess]:
    """Return canonical name -> column, for those that could be guessed; `timestamp` or `position`, never both.

    `items`, the first rows of the catalogue, tells which column names items where its name does not; `style` is how
    numbers are written.
    """
    guesses: dict[str, Guess] = {}
    left = list(table.columns)

    def take(canonical: str, column: str, why: str) -> None:
        guesses[canonical] = Guess(column, why)
        left.remove(column)

    for canonical, known in NAMES.items():
        if canonical == "position" and "timestamp" in guesses:
            continue
        by_name = {_plain(name.rpartition(".")[2]): name for name in reversed(left)}  # product.sku is a sku
        by_name |= {_plain(name): name for name in reversed(left)}
        for plain in (canonical.replace("_", ""), *known):
            if plain in by_name and _fits(canonical, sample, by_name[plain], style):
                take(canonical, by_name[plain], "by its name")
                break
    if "timestamp" not in guesses and "position" not in guesses:
        for column in left:
            if guess_time(sample, column) is not None:
                take("timestamp", column, "by its content: times")
                break
    if (
        "timestamp" in guesses
        and _are_days(sample, guesses["timestamp"].column)
        and (clock := next((name for name in left if _is_clock(sample[name])), None))
    ):
        told = f"; CHECK: the times of day in {_one_line(clock)} are not read, join the two first"
        guesses["timestamp"] = replace(guesses["timestamp"], why=guesses["timestamp"].why + told)
    if "item_id" not in guesses and items is not None:
        shares = {column: max(_shared(sample[column], items[key]) for key in items.columns) for column in left}
        if shares and max(shares.values()) > _ENOUGH_SHARED:
            take("item_id", max(shares, key=lambda column: shares[column]), "its values are the catalogue's")
    for canonical in ("user_id", "item_id"):
        if canonical not in guesses and (likely := _most_like_ids(sample, left, canonical)):
            take(canonical, likely, "by its content: ids that come again; CHECK")
    if "user_id" not in guesses and "session_id" in guesses:
        guesses["user_id"] = Guess(guesses.pop("session_id").column, "nothing names users: each session is one; CHECK")
    return guesses


def _fits(canonical: str, sample: pl.DataFrame, column: str, style: NumbersConfig) -> bool:
    """Whether a column's content can be what its name says."""
    if canonical == "timestamp":
        return guess_time(sample, column) is not None
    if canonical == "value":
        return _share_of_numbers(sample[column], style) > 0.9
    if canonical == "position":
        return _share_of_numbers(sample[column], STYLES[0]) > 0.9
    if sample.schema[column] == pl.String:
        return not bool((sample[column].str.contains(CONTAINER).mean() or 0) > _ENOUGH_SHARED)  # type: ignore[operator]
    return sample.schema[column].is_integer() or sample.schema[column] == pl.Float64


def guess_item_key(sample: pl.DataFrame, item_id: str | None, items: pl.DataFrame) -> Guess | None:
    """Return the catalogue's column of item ids: the one that holds the log's ids, else by its name."""
    if item_id is not None:
        shares = {name: _shared(sample[item_id], items[name]) for name in items.columns}
        best = max(shares, key=lambda name: shares[name])
        if shares[best] > _ENOUGH_SHARED:
            return Guess(best, f"it has {shares[best]:.0%} of the log's first {sample.height:,} ids")
    by_name = {_plain(name): name for name in reversed(items.columns)}
    known = ("itemid", *NAMES["item_id"], "id")
    return next((Guess(by_name[name], "by its name") for name in known if name in by_name), None)


def _shared(ids: pl.Series, keys: pl.Series) -> float:
    """Return the share of the ids that are among the keys; 0 where the keys are not one per row."""
    if ids.dtype.is_nested() or keys.dtype.is_nested() or keys.n_unique() < len(keys):
        return 0.0
    known = ids.drop_nulls().cast(pl.String)
    return float(known.is_in(keys.cast(pl.String).drop_nulls().implode()).mean() or 0)  # type: ignore[arg-type]


def _most_like_ids(sample: pl.DataFrame, columns: Sequence[str], canonical: str) -> str | None:
    """Return the column of text or whole numbers whose values come again; users come more often than items."""
    counts = {}
    for name in columns:
        kind = sample.schema[name]
        if not (kind.is_integer() or kind == pl.String) or not _may_be_ids(sample[name]):
            continue
        different = sample[name].n_unique()
        if 1 < different < sample.height or sample.height < 20:
            counts[name] = different
    if not counts:
        return None
    fewest_first = sorted(counts, key=lambda name: counts[name])
    return fewest_first[-1] if canonical == "item_id" else fewest_first[max(0, len(fewest_first) - 2)]


def _are_days(sample: pl.DataFrame, column: str) -> bool:
    """Whether a column of times holds dates without a time of day."""
    time, kind = guess_time(sample, column), sample.schema[column]
    if time is None:
        return False
    read = time_reader(TimeConfig(time.unit, format=time.format))(column, kind, "").value
    return bool((sample.select(read).to_series() % DAY == 0).all())


def _is_clock(values: pl.Series) -> bool:
    """Whether a column holds times of day, such as 18:05 or 6:05:00 pm."""
    if values.dtype == pl.Time:
        return True
    known = values.drop_nulls()
    if values.dtype != pl.String or known.is_empty():
        return False
    return bool(known.str.contains(r"(?i)^\s*\d{1,2}:\d{2}(:\d{2}(\.\d+)?)?\s*([ap]m)?\s*$").all())


def _may_be_ids(values: pl.Series) -> bool:
    """Whether a column holds neither lists and objects of JSON nor numbers with decimals."""
    if values.dtype != pl.String:
        return True
    known = values.drop_nulls()
    odd = known.str.contains(CONTAINER) | known.str.contains(r"^-?\d[\d.,' ]*[.,]\d{1,2}$")
    return not bool((odd.mean() or 0) > _ENOUGH_SHARED)  # type: ignore[operator]


def guess_time(sample: pl.DataFrame, column: str) -> Time | None:
    """Return how a column writes times, or None if it has none: datetimes, numbers by magnitude, text by trial."""
    values = sample.select(pl.col(column).drop_nulls())
    kind = values.schema[column]
    if values.is_empty():
        return None
    if isinstance(kind, pl.Date | pl.Datetime):
        return Time("datetime", None, f"the column is {kind}")
    if not (kind.is_numeric() or kind == pl.String):
        return None
    numbers = values[column].cast(pl.Float64, strict=False).drop_nulls()
    if len(numbers) > 0.9 * values.height:
        middle = float(numbers.median() or 0)  # type: ignore[arg-type]
        for unit, scale in MICROSECONDS.items():
            if EARLIEST <= middle * scale < LATEST:
                return Time(unit, None, f"the middle value {middle:.0f} is a time of 1980 to 2199 only in {unit}")  # type: ignore[arg-type]
    if kind != pl.String:
        return None
    inside: dict[str | None, int] = {}
    for form in (None, *_FORMATS):
        parsed = values.select(time_reader(TimeConfig("datetime", format=form))(column, kind, "").value).to_series()
        inside[form] = int(parsed.is_between(EARLIEST, LATEST).sum())
    best = max(inside, key=lambda form: inside[form])
    return Time("datetime", best, f"text such as {values[column][0]}") if inside[best] > 0.9 * values.height else None


def guess_numbers(columns: Iterable[pl.Series]) -> NumbersConfig:
    """Return the way of writing numbers by which most columns are numbers, the likeliest of equals."""
    columns = list(columns)
    return max(STYLES, key=lambda style: sum(_share_of_numbers(values, style) > 0.9 for values in columns))


def _share_of_numbers(values: pl.Series, style: NumbersConfig) -> float:
    known = values.drop_nulls()
    if known.is_empty() or not (known.dtype.is_numeric() or known.dtype == pl.String):
        return 0.0
    return _as_numbers(known, style).count() / len(known)


def _as_numbers(values: pl.Series, style: NumbersConfig) -> pl.Series:
    if values.dtype != pl.String:
        return values.cast(pl.Float64)
    return values.to_frame().select(parse_numbers(pl.col(values.name).str.strip_chars(), style)).to_series()


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _listed(names: Sequence[str]) -> str:
    return "[" + ", ".join(map(_quoted, names)) + "]"


def _relative(path: Path, folder: Path) -> str:
    try:
        return path.resolve().relative_to(folder.resolve()).as_posix()
    except ValueError:
        return str(path.resolve())


def _source(events: Path, items: Path | None, folder: Path) -> str:
    lines = ["[source]  # paths or globs, from this file's own folder; CSV, Parquet, JSON Lines by their suffix"]
    lines.append(f"events = {_quoted(_relative(events, folder))}")
    if items is None:
        lines.append('# items = "items.csv"')
    else:
        lines.append(f"items = {_quoted(_relative(items, folder))}")
    lines += ['# users = "users.csv"', '# impressions = "impressions.csv"']
    return "\n".join(lines) + "\n"


def _columns(guesses: Mapping[str, Guess], table: Table) -> str:
    """Write [columns]: what was guessed, what could not be, and what is there besides."""
    lines = [f"[columns]  # canonical name = name in the file; it has: {_one_line(', '.join(table.columns))}"]
    needed = {"user_id", "item_id", "position" if "position" in guesses else "timestamp"}
    for canonical in NAMES:
        if canonical in guesses:
            guess = guesses[canonical]
            lines.append(f"{canonical} = {_quoted(guess.column)}  # {guess.why}")
        elif canonical in needed:
            lines.append(f"{canonical} = {_quoted(UNKNOWN)}  # (?) could not be guessed: name the column")
        elif canonical not in ("timestamp", "position"):
            lines.append(f'# {canonical} = ""')
        elif canonical == "position":
            lines.append('# position = ""  # instead of timestamp, where only the order is known')
    return "\n".join(lines) + "\n"


def _items(table: Table, sample: pl.DataFrame, key: Guess | None, style: NumbersConfig) -> str:
    """Write [items]: id, texts, categories, multi-valued and numeric columns by name and content."""
    by_name = {_plain(name): name for name in reversed(list(table.columns))}
    left = [name for name in table.columns if key is None or name != key.column]
    texts = [by_name[name] for name in TEXTS if by_name.get(name) in left]
    multi, numeric, categorical = {}, [], []
    for name in left:
        if name in texts:
            continue
        values = sample[name].drop_nulls()
        separator = _separator(values)
        if separator is not None:
            multi[name] = separator
        elif _share_of_numbers(values, style) == 1.0 and values.n_unique() > _FEWEST_NUMBERS:
            numeric.append(name)
        elif values.dtype == pl.String and not texts and values.n_unique() > _MOST_VALUES * sample.height:
            texts.append(name)
        elif not values.dtype.is_nested() and values.n_unique() <= max(20, _MOST_VALUES * sample.height):
            categorical.append(name)
    pairs = ", ".join(f"{_quoted(name)} = {_quoted(separator)}" for name, separator in multi.items())
    id_ = key or Guess(UNKNOWN, "(?) could not be guessed: name the column")
    return (
        f"[items]  # it has: {_one_line(', '.join(table.columns))}\n"
        f"item_id = {_quoted(id_.column)}  # {id_.why}\n"
        f"text = {_listed(texts)}  # joined into the item's text\n"
        f"categorical = {_listed(categorical)}  # one value each\n"
        f"multi = {{ {pairs} }}  # column = what separates its values\n"
        f"numeric = {_listed(numeric)}\n"
    )


def _separator(values: pl.Series) -> str | None:
    """Return what separates the values of a multi-valued column ("" for a list), or None if it is not one."""
    if isinstance(values.dtype, pl.List):
        return ""
    if values.dtype != pl.String or values.is_empty():
        return None
    shares = {mark: values.str.contains(mark, literal=True).mean() for mark in MULTI_SEPARATORS}
    best = max(shares, key=lambda mark: float(shares[mark] or 0))  # type: ignore[arg-type]
    return best if float(shares[best] or 0) > 0.2 else None  # type: ignore[arg-type]


def _one_line(text: str) -> str:
    return re.sub(r"[\x00-\x08\x0a-\x1f\x7f]", " ", text)


def _time(time: Time | None) -> str:
    unit, form, why = (time.unit, time.format, time.why) if time else ("datetime", None, "(?) no time was found")
    lines = ["[time]", f"unit = {_quoted(unit)}  # s, ms, us or datetime; {_one_line(why)}"]
    if form:
        lines.append(f"format = {_quoted(form)}  # CHECK that day and month are not the other way round")
    lines.append('zone = "UTC"  # of datetimes that carry none, e.g. "Europe/Berlin"')
    return "\n".join(lines) + "\n"


def _numbers(style: NumbersConfig) -> str:
    return (
        f"[numbers]  # in text, such as {style.example}\n"
        f"decimal = {_quoted(style.decimal)}{'  # a guess: CHECK' if style != STYLES[0] else ''}\n"
        f"thousands = {_quoted(style.thousands)}  # what stands between them\n"
    )


def _sessions(guesses: Mapping[str, Guess]) -> str:
    line = '# gap = "30m"  # cut a session where a user was away longer; without, every moment is its own'
    return f"[sessions]\n{line if 'session_id' not in guesses else '# the log has sessions of its own'}\n"


def _filters(guesses: Mapping[str, Guess], sample: pl.DataFrame, style: NumbersConfig) -> str:
    needed = [guesses[name].column for name in ("user_id", "item_id") if name in guesses]
    empty = [name for name in needed if sample[name].null_count()]
    shares = ", ".join(f"{sample[name].null_count() / sample.height:.1%} of {_one_line(name)}" for name in empty)
    amounts = [name for name in sample.columns if _plain(name) in POSITIVE]
    amounts = [name for name in amounts if _share_of_numbers(sample[name], style) > 0.9]
    low = [name for name in amounts if (_as_numbers(sample[name], style) <= 0).any()]
    lines = ["[filters]  # rows left out on purpose; they are counted apart from bad ones"]
    if empty:
        lines.append(f"drop_null = {_listed(empty)}  # {shares} is missing in the first {sample.height:,} rows")
    else:
        lines.append("drop_null = []")
    lines.append(
        f"positive = {_listed(low)}  # columns that must be above 0, e.g. a quantity where returns are negative"
    )
    return "\n".join([*lines, "min_user_events = 1", "min_item_events = 1"]) + "\n"


def _requests(guesses: Mapping[str, Guess], sample: pl.DataFrame) -> str:
    lines = ["[requests]  # which events are positives; histories keep them all"]
    if "action" in guesses:
        column = sample[guesses["action"].column].cast(pl.String).drop_nulls()
        names = column.value_counts(sort=True).head(10).to_series().to_list()
        lines.append(f"# positive.actions = {_one_line(_listed(names))}")
    if "value" in guesses:
        lines.append("# positive.min_value = 4")
    return "\n".join(lines) + "\n"


_QUALITY = "[quality]\nmax_bad_share = 0.01  # of the rows read; with more bad ones than this the job stops\n"
