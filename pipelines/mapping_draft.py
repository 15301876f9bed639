"""The commented mapping that `recsys init` writes: every guess with what it rests on, and what to check."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import polars as pl

from pipelines.guess import (
    MULTI_SEPARATORS,
    NAMES,
    POSITIVE,
    TAKEN,
    TEXTS,
    Guess,
    Time,
    as_numbers,
    guess_columns,
    guess_item_key,
    guess_numbers,
    guess_time,
    plain,
    read_sample,
    share_of_numbers,
)
from pipelines.mapping import NumbersConfig
from pipelines.sources import Table, find_files, open_table

MOST_ACTIONS = 10
"""Actions that are named, the most frequent first."""
_MOST_VALUES = 0.5
"""of the rows: a text column with more different values than this is not a category"""
_MOSTLY_NUMBERS = 0.9
"""of the values of a numeric column: `ingest` takes the others as missing"""
_FEWEST_NUMBERS = 20
"""different values of a column of numbers that are no categories"""
_UNKNOWN = "?"
_MOST = "# max_user_events = 10000  # users with more are left out, as machines and shared accounts"


def write_mapping(events: Path, items: Path | None, folder: Path) -> str:
    """Return the commented TOML for an events file and an items file, or globs of them, relative to `folder`.

    Raises:
        DataError: a file that cannot be read, or an empty one.
    """
    table = open_table(_first(events))
    sample = read_sample(table)
    catalogue = open_table(_first(items)) if items else None
    rows = read_sample(catalogue) if catalogue else None
    numbers = guess_numbers([*sample, *(() if rows is None else rows)])
    guesses = guess_columns(table, sample, rows, numbers)
    sample = read_sample(table, guesses.values())
    time = guess_time(sample, guesses["timestamp"].column) if "timestamp" in guesses else None
    parts = [
        "# How this log is read. Made by `recsys init` from the first rows; check every line with a (?) or a guess.\n",
        _source(events, items, folder),
        _columns(guesses, table),
    ]
    if catalogue is not None and rows is not None:
        key = guess_item_key(sample, guesses["item_id"].column if "item_id" in guesses else None, rows)
        parts.append(_items(catalogue, rows, key, numbers))
    parts += [_time(time), _numbers(numbers), _sessions(guesses, sample), _filters(guesses, sample, numbers)]
    parts += [_requests(guesses, sample), _QUALITY]
    return "\n".join(parts)


def _first(path: Path) -> Path:
    """Return the file itself, or the first that a glob means."""
    return path if path.exists() or not set("*?[") & set(str(path)) else find_files(str(path), Path(), "init")[0]


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
    lines = [
        "[source]  # paths or globs, from this file's own folder; CSV, Parquet, JSON Lines by their suffix, .gz too"
    ]
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
            lines.append(f"{canonical} = {_quoted(_UNKNOWN)}  # (?) could not be guessed: name the column")
        elif canonical not in ("timestamp", "position"):
            lines.append(f'# {canonical} = ""')
        elif canonical == "position":
            lines.append('# position = ""  # instead of timestamp, where only the order is known')
    return "\n".join(lines) + "\n"


def _items(table: Table, sample: pl.DataFrame, key: Guess | None, style: NumbersConfig) -> str:
    """Write [items]: id, texts, categories, multi-valued and numeric columns by name and content."""
    by_name = {plain(name): name for name in reversed(list(table.columns))}
    left = [name for name in table.columns if key is None or name != key.column]
    texts = [by_name[name] for name in TEXTS if by_name.get(name) in left]
    multi, numeric, categorical, odd, unused = {}, [], [], dict[str, int](), []
    for name in left:
        if name in texts:
            continue
        values = sample[name].drop_nulls()
        separator = _separator(values)
        if separator is not None:
            multi[name] = separator
        elif (share := share_of_numbers(values, style)) > _MOSTLY_NUMBERS and values.n_unique() > _FEWEST_NUMBERS:
            numeric.append(name)
            if share < 1:
                odd[name] = round((1 - share) * len(values))
        elif values.dtype == pl.String and not texts and values.n_unique() > _MOST_VALUES * sample.height:
            texts.append(name)
        elif not values.dtype.is_nested() and values.n_unique() <= max(20, _MOST_VALUES * sample.height):
            categorical.append(name)
        else:
            unused.append(name)
    told = ", ".join(f"{n:,} of {_one_line(name)}" for name, n in odd.items())
    numbers = f"  # no numbers, taken as missing: {told} in the first {sample.height:,} rows" if odd else ""
    rest = f"# not used: {_one_line(', '.join(unused))}\n" if unused else ""
    pairs = ", ".join(f"{_quoted(name)} = {_quoted(separator)}" for name, separator in multi.items())
    name_of = f"name = {_quoted(texts[0])}  # what an item is shown by; its text begins with it\n" if texts[1:] else ""
    id_ = key or Guess(_UNKNOWN, "(?) could not be guessed: name the column")
    return (
        f"[items]  # it has: {_one_line(', '.join(table.columns))}\n"
        f"item_id = {_quoted(id_.column)}  # {id_.why}\n"
        f"text = {_listed(texts)}  # joined into the item's text\n"
        f"{name_of}"
        f"categorical = {_listed(categorical)}  # one value each\n"
        f"multi = {{ {pairs} }}  # column = what separates its values\n"
        f"numeric = {_listed(numeric)}{numbers}\n"
        '# repeated = "refuse"  # stops at an id with rows of different values; else its last row is kept\n'
        f"{rest}"
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
        f"decimal = {_quoted(style.decimal)}{'  # a guess: CHECK' if style != NumbersConfig() else ''}\n"
        f"thousands = {_quoted(style.thousands)}  # what stands between them\n"
        + (f"currency = {_quoted(style.currency)}  # amounts in another one are no numbers\n" if style.currency else "")
    )


def _sessions(guesses: Mapping[str, Guess], sample: pl.DataFrame) -> str:
    """Write [sessions]: cut where several actions may be steps of one visit, which must not be each other's history."""
    if "session_id" in guesses:
        return "[sessions]\n# the log has sessions of its own\n"
    cut = 'gap = "30m"  # a session ends where a user was away longer'
    steps = "action" in guesses and sample[guesses["action"].column].drop_nulls().n_unique() > 1
    if "timestamp" not in guesses or not steps:
        return f"[sessions]\n# {cut}; without, every moment is its own\n"
    return (
        f"[sessions]\n{cut}, and is one request. Without, every moment is its own:\n"
        "# the view and the cart of seconds before a purchase are then its history, and give it away\n"
    )


def _filters(guesses: Mapping[str, Guess], sample: pl.DataFrame, style: NumbersConfig) -> str:
    needed = [guesses[name].column for name in ("user_id", "item_id") if name in guesses]
    empty = [name for name in needed if sample[name].null_count()]
    shares = ", ".join(f"{sample[name].null_count() / sample.height:.1%} of {_one_line(name)}" for name in empty)
    amounts = [name for name in sample.columns if plain(name) in POSITIVE]
    amounts = [name for name in amounts if share_of_numbers(sample[name], style) > 0.9]
    low = [name for name in amounts if (as_numbers(sample[name], style) <= 0).any()]
    lines = ["[filters]  # rows left out on purpose; they are counted apart from bad ones"]
    if empty:
        lines.append(f"drop_null = {_listed(empty)}  # {shares} is missing in the first {sample.height:,} rows")
    else:
        lines.append("drop_null = []")
    lines.append(
        f"positive = {_listed(low)}  # columns that must be above 0, e.g. a quantity where returns are negative"
    )
    return "\n".join([*lines, "min_user_events = 1", "min_item_events = 1", _MOST]) + "\n"


def _requests(guesses: Mapping[str, Guess], sample: pl.DataFrame) -> str:
    lines = ["[requests]  # which events are positives; histories keep them all"]
    if "action" in guesses:
        column = sample[guesses["action"].column].cast(pl.String).drop_nulls()
        names = column.value_counts(sort=True).to_series().to_list()
        taken = [name for name in names if plain(name) in TAKEN]
        if taken and len(names) > len(taken):
            others = ", ".join([name for name in names if name not in taken][:MOST_ACTIONS])
            lines.append(f"positive.actions = {_listed(taken)}  # by their names; besides {_one_line(others)}")
        else:
            lines.append(f"# positive.actions = {_one_line(_listed(names[:MOST_ACTIONS]))}")
    if "value" in guesses:
        lines.append("# positive.min_value = 4")
    return "\n".join(lines) + "\n"


_QUALITY = "[quality]\nmax_bad_share = 0.01  # of the rows read; with more bad ones than this the job stops\n"
