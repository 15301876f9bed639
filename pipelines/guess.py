"""A first mapping of files nobody has described yet: what each column probably is, why, and what to check.

Names come first: logs of twenty years call their columns a few dozen ways. Where no name helps, the content does: a
date, a number that is a time in some unit, ids that come again. Every guess says on what it rests, so that a person can
overrule it. What is not in one column is looked for in several, or in the entries of a list (`pipelines.derived`).
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import polars as pl

from pipelines.derived import JOINED_BY
from pipelines.fields import CONTAINER, MONEY, parse_numbers, time_reader
from pipelines.mapping import MICROSECONDS, NumbersConfig, TimeConfig, Unit
from pipelines.sources import BROKEN, Table
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
TAKEN = (
    "purchase", "purchased", "purchases", "buy", "bought", "order", "ordered", "ordercompleted", "orderplaced",
    "transaction", "sale", "sold", "paid", "payment",
)  # fmt: skip
"""actions that the others lead to"""
_FORMATS = (
    "%d/%m/%Y %H:%M:%S", "%d/%m/%Y %H:%M", "%d/%m/%Y", "%m/%d/%Y %H:%M:%S", "%m/%d/%Y %H:%M", "%m/%d/%Y",
    "%d.%m.%Y %H:%M:%S", "%d.%m.%Y %H:%M", "%d.%m.%Y", "%Y/%m/%d %H:%M:%S", "%Y/%m/%d", "%Y%m%d",
    "%m/%d/%Y %I:%M:%S %p", "%m/%d/%Y %I:%M %p", "%d/%m/%Y %I:%M:%S %p", "%d/%m/%Y %I:%M %p",
    "%Y-%m-%d %I:%M:%S %p", "%Y-%m-%d %I:%M %p", "%Y/%m/%d %H:%M", "%Y%m%d %H:%M:%S", "%Y%m%d %H:%M",
    "%m/%d/%y %H:%M", "%d/%m/%y %H:%M", "%d-%b-%Y %H:%M:%S",
    "%d-%b-%Y %H:%M", "%d-%b-%Y",
)  # fmt: skip
MULTI_SEPARATORS = ("|", ";", " > ")
"""what may stand between the values of a column, and between the steps of a category's path"""
_LISTS = "|;,"
"""what may stand between the articles of an order"""
_CLOCKS = (
    "time", "timeofday", "clock", "hour", "hours", "eventtime", "ordertime", "purchasetime", "transactiontime",
    "transtime", "saletime", "uhrzeit", "zeit", "heure", "hora", "orario",
)  # fmt: skip
"""names of columns of times of day"""
_FEW = 100
"""rows of which lists are looked into"""
STYLES = (NumbersConfig(), NumbersConfig(","), NumbersConfig(",", "."), NumbersConfig(".", ","))
"""ways of writing numbers that are tried, the likeliest first"""
_ENOUGH_SHARED = 0.5
_FEWEST_LISTS = 0.2
"""of the rows of a column of lists that have more than one entry"""


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


def read_sample(table: Table, guesses: Iterable[Guess] = ()) -> pl.DataFrame:
    """Return the first rows with all columns of the file and those that guesses make of them.

    Raises:
        DataError: a file that cannot be read, or an empty one.
    """
    names = list(dict.fromkeys([*table.columns, *(guess.column for guess in guesses)]))
    try:
        rows = table.rows(names).filter(~pl.col(BROKEN)).head(SAMPLE).collect()
    except (pl.exceptions.PolarsError, OSError) as error:
        raise DataError(f"{table.path}: cannot be read ({error})") from None
    if rows.is_empty():
        raise DataError(f"{table.path}: no row; expected at least one")
    return rows.select(names)


def plain(name: str) -> str:
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
        by_name = {plain(name.rpartition(".")[2]): name for name in reversed(left)}  # product.sku is a sku
        by_name |= {plain(name): name for name in reversed(left)}
        for name in (canonical.replace("_", ""), *known):
            if name in by_name and _fits(canonical, sample, by_name[name], style):
                take(canonical, by_name[name], "by its name")
                break
    if "timestamp" not in guesses and "position" not in guesses:
        for column in left:
            if guess_time(sample, column) is not None:
                take("timestamp", column, "by its content: times")
                break
    if "timestamp" in guesses and (clock := _clock_beside(sample, left, guesses["timestamp"].column)):
        guesses["timestamp"] = _with_clock(table, guesses["timestamp"], clock)
        if JOINED_BY in guesses["timestamp"].column:
            left.remove(clock)
    if "item_id" not in guesses and items is not None:
        shares = {column: max(_shared(sample[column], items[key]) for key in items.columns) for column in left}
        if shares and max(shares.values()) > _ENOUGH_SHARED:
            take("item_id", max(shares, key=lambda column: shares[column]), "its values are the catalogue's")
    if "item_id" not in guesses and (listed := _listed_items(sample, left)):
        guesses["item_id"] = Guess(listed, "its entries: one event each; CHECK")
        value = _key_among(sample[listed.partition("[")[0]], NAMES["value"], style) if "." in listed else None
        if "value" not in guesses and value:
            guesses["value"] = Guess(f"{listed.partition('[')[0]}[].{value}", "of the entry, by its name")
    for canonical in ("user_id", "item_id"):
        if canonical not in guesses and (likely := _most_like_ids(sample, left, canonical)):
            take(canonical, likely, "by its content: ids that come again; CHECK")
    if "user_id" not in guesses and "session_id" in guesses:
        guesses["user_id"] = Guess(guesses.pop("session_id").column, "nothing names users: each session is one; CHECK")
    return guesses


def _clock_beside(sample: pl.DataFrame, columns: Sequence[str], timestamp: str) -> str | None:
    """Return the column of times of day beside one of dates: the one named as such, else the first."""
    if not _are_days(sample, timestamp):
        return None
    clocks = [name for name in columns if _is_clock(sample[name])]
    return next((name for name in clocks if plain(name) in _CLOCKS), clocks[0] if clocks else None)


def _with_clock(table: Table, day: Guess, clock: str) -> Guess:
    """Join a date with its time of day if both can be read as one for every row that has the date; else tell of it."""
    joined = Guess(f"{day.column}{JOINED_BY}{clock}", f"{day.why}, with the times of day beside it")
    sample = read_sample(table, [joined])
    dates, moments = sample[day.column].drop_nulls(), sample[joined.column].drop_nulls()
    if plain(clock) in _CLOCKS and len(moments) >= len(dates) and guess_time(sample, joined.column) is not None:
        return joined
    told = f"; CHECK: the times of day in {json.dumps(clock)} are not read"
    return Guess(day.column, day.why + told)


def _listed_items(sample: pl.DataFrame, columns: Sequence[str]) -> str | None:
    """Return how a mapping names the items in a column of lists: objects with an item's name first, then a column's."""
    known = NAMES["item_id"]
    for column in columns:
        if key := _key_among(sample[column], known):
            return f"{column}[].{key}"
    for column in columns:
        if not {plain(column).removesuffix("s"), plain(column)} & {*known, "basket", "cart"}:
            continue
        if key := _key_among(sample[column], ("id",)):
            return f"{column}[].{key}"
        values = sample[column].drop_nulls().head(_FEW)
        if any(_entries(value) for value in values.to_list()):
            return f"{column}[]"
        if values.dtype == pl.String and (mark := _mark_between(values)):
            return f"{column}[{mark}]"
    return None


def _key_among(values: pl.Series, known: Sequence[str], style: NumbersConfig | None = None) -> str | None:
    """Return the key of the objects in a column of lists that is named so; in a style of numbers, if it holds some."""
    entries = [entry for value in values.drop_nulls().head(_FEW).to_list() for entry in _entries(value)]
    objects = [entry for entry in entries if isinstance(entry, dict)]
    if not objects or len(objects) < len(entries):
        return None
    by_name = {plain(key): key for entry in objects for key in reversed(entry)}
    for name in known:
        found = [
            str(entry[by_name[name]]) for entry in objects if name in by_name and entry.get(by_name[name]) is not None
        ]
        if found and (style is None or share_of_numbers(pl.Series("v", found), style) > 0.9):
            return str(by_name[name])
    return None


def _mark_between(values: pl.Series) -> str | None:
    """Return what separates the values of texts that are lists: some come again, and after commas there is no blank."""
    for mark in _LISTS:
        if float(values.str.contains(mark, literal=True).mean() or 0) <= _FEWEST_LISTS:  # type: ignore[arg-type]
            continue
        parts = values.str.split(mark).explode()
        again = parts.n_unique() < len(parts) or len(values) < 20
        if again and not (mark == "," and parts.str.starts_with(" ").any()):
            return mark
    return None


def _entries(value: object) -> list[object]:
    """Return the entries of a list, or of JSON's text of one; none of anything else."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except ValueError:
            return []
    return value if isinstance(value, list) else []


def _fits(canonical: str, sample: pl.DataFrame, column: str, style: NumbersConfig) -> bool:
    """Whether a column's content can be what its name says."""
    if canonical == "timestamp":
        return guess_time(sample, column) is not None
    if canonical == "value":
        return share_of_numbers(sample[column], style) > 0.9
    if canonical == "position":
        return share_of_numbers(sample[column], STYLES[0]) > 0.9
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
    by_name = {plain(name): name for name in reversed(items.columns)}
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
    mark = _currency(columns)
    styles = [*STYLES, *(replace(style, currency=mark) for style in STYLES if mark)]
    return max(styles, key=lambda style: sum(share_of_numbers(values, style) > 0.9 for values in columns))


def _currency(columns: Iterable[pl.Series]) -> str:
    """Return the sign or code of a currency that most values of some column bear, the most frequent; "" for none."""
    found: Counter[str] = Counter()
    for values in columns:
        if values.dtype == pl.String and len(known := values.drop_nulls().str.strip_chars()):
            marks = known.str.extract(rf"^[+-]?\s*({MONEY})\s*[+-]?\s*\d").fill_null(
                known.str.extract(rf"\d\s*({MONEY})$")
            )
            if marks.count() > len(known) / 2:
                found.update(marks.drop_nulls().to_list())
    return found.most_common(1)[0][0] if found else ""


def share_of_numbers(values: pl.Series, style: NumbersConfig) -> float:
    """Return the share of the values there are that are numbers."""
    known = values.drop_nulls()
    if known.is_empty() or not (known.dtype.is_numeric() or known.dtype == pl.String):
        return 0.0
    return as_numbers(known, style).count() / len(known)


def as_numbers(values: pl.Series, style: NumbersConfig) -> pl.Series:
    """Return values as float64; what is no number in this style is null."""
    if values.dtype != pl.String:
        return values.cast(pl.Float64)
    return values.to_frame().select(parse_numbers(pl.col(values.name).str.strip_chars(), style)).to_series()
