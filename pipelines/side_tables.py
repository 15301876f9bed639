"""The item and user tables of a mapping: read whole, each bad row told apart, an id that stands twice settled.

They are read before the events: what is wrong with a catalogue is known in seconds, and all of it at once.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import polars as pl

from pipelines.fields import FINITE, Field, Reader, number_reader, read_id
from pipelines.mapping import IngestConfig, ItemsConfig, Repeated
from pipelines.quarantine import FILE, SHOWN, Example, too_bad
from pipelines.sources import BROKEN, ROW, WHOLE_ROW, Table, find_files, open_table
from recsys.columns import ITEM_ID, TEXT, USER_ID
from recsys.errors import ConfigError, DataError

MOST_UNREADABLE = 0.1
"""of the values of a numeric column: with more that are no numbers, other marks are likelier than odd values"""
_COLUMN, _EXPECTED, _FOUND = "_column", "_expected", "_found"
_WRONG = (_COLUMN, _EXPECTED, _FOUND)
_ODD, _WANTED = "_odd ", "_wanted "


@dataclass(frozen=True)
class SideTable:
    """A table read whole.

    Attributes:
        name: items or users.
        rows: those kept, in canonical columns, one per id.
        read: rows read.
        bad: invalid rows: file, row, column, found, expected.
        settled: rows left out and values taken as missing, by what they were.
        refused: why the table cannot be taken at all; empty if it can.
    """

    name: str
    rows: pl.DataFrame
    read: int
    bad: pl.DataFrame
    settled: Mapping[str, int] = field(default_factory=dict)
    refused: str = ""

    def why_not(self, max_bad_share: float, quarantine: Path) -> str:
        """Return all that speaks against taking it, in words; empty if nothing does."""
        complaint = ""
        if self.bad.height > max_bad_share * self.read:
            complaint = too_bad(self.name, self.bad.height, self.read, max_bad_share, self._examples(), quarantine)
        return " ".join(filter(None, (complaint, self.refused)))

    def _examples(self) -> list[Example]:
        ways = self.bad.group_by("column", "expected", maintain_order=True).agg(
            pl.first("file", "row", "found"), pl.len().alias("count")
        )
        most = ways.sort("count", descending=True, maintain_order=True)
        return [Example(**row) for row in most.head(SHOWN).iter_rows(named=True)]

    def bad_by_rule(self) -> dict[str, int]:
        """Return how many rows are bad in each way, most first."""
        rules = Counter(self.bad.select("column", "expected").iter_rows())
        return {f"{self.name}, {column or 'row'}: expected {words}": n for (column, words), n in rules.most_common()}


def read_items(config: IngestConfig, folder: Path) -> SideTable | None:
    """Return item_id, text where the mapping names columns for it, and the attributes in canonical types.

    A numeric value that is no number is missing, as long as a column has at most `MOST_UNREADABLE` of them; else their
    rows are bad ones. So are those of numbers in other marks than the mapping tells.

    Raises:
        DataError: a file that cannot be read, a column that is not there.
    """
    if config.source.items is None:
        return None
    tables = _tables(config.source.items, folder, "items")
    rows = [_item_rows(place, table, config.items, number_reader(config.numbers)) for place, table in enumerate(tables)]
    return _whole_table("items", tables, rows, ITEM_ID, config.items.repeated, config.items.numeric)


def read_users(config: IngestConfig, folder: Path) -> SideTable | None:
    """Return user_id, named as in the events, and every other column as it is; raises as `read_items` does."""
    if config.source.users is None:
        return None
    tables = _tables(config.source.users, folder, "users")
    frames = [_user_rows(place, table, config.columns.user_id) for place, table in enumerate(tables)]
    return _whole_table("users", tables, frames, USER_ID, "refuse")


def _tables(pattern: str, folder: Path, what: str) -> list[Table]:
    return [open_table(path) for path in find_files(pattern, folder, f"[source] {what}")]


def _item_rows(place: int, table: Table, config: ItemsConfig, read_number: Reader) -> pl.LazyFrame:
    file = str(table.path)
    key = read_id(config.item_id, table.require(config.item_id, "[items] item_id"), file)
    values: dict[str, pl.Expr] = {ITEM_ID: key.value}
    texts = [name for name in config.text if name != config.name]
    if texts or config.name:
        values[TEXT] = _item_text(table, config.name, texts)
    for name in config.categorical:
        values[name] = _text(name, table.require(name, "[items] categorical"))
    for name, separator in config.multi.items():
        values[name] = _values(table, name, separator)
    odd: list[pl.Expr] = []
    for name in config.numeric:
        number = read_number(name, table.require(name, "[items] numeric"), file)
        values[name] = number.value
        problems = number.problems(number.value)
        wanted = pl.coalesce(*(pl.when(problem.holds).then(pl.lit(problem.expected)) for problem in problems))
        odd += [
            wanted.alias(f"{_WANTED}{name}"),
            pl.when(wanted.is_not_null()).then(_shown(name)).alias(f"{_ODD}{name}"),
        ]
    named = [config.name] if config.name else []
    names = [config.item_id, *named, *texts, *config.categorical, *config.multi, *config.numeric]
    return table.rows(names).select(
        pl.lit(place, pl.UInt32).alias(FILE),
        ROW,
        *_wrong(table, config.item_id, key),
        *odd,
        *(value.alias(name) for name, value in values.items()),
    )


def _item_text(table: Table, name: str | None, texts: Sequence[str]) -> pl.Expr:
    """Return an item's text: its name, on a line of its own if it has one, then the other columns."""
    parts = [_text(column, table.require(column, "[items] text")) for column in texts]
    rest = pl.concat_str(parts, separator=", ", ignore_nulls=True) if parts else pl.lit(None, pl.String)
    rest = _some(rest.str.replace_all(r"[\r\n]+", " "))
    if name is None:
        return rest
    line = _text(name, table.require(name, "[items] name")).str.replace_all(r"\s+", " ")
    return _some(pl.concat_str(line, rest, separator="\n", ignore_nulls=True))


def _user_rows(place: int, table: Table, user_id: str) -> pl.LazyFrame:
    column = user_id if user_id in table.columns else USER_ID
    if column not in table.columns:
        table.require(user_id, f"[columns] user_id; {USER_ID!r} would do as well")
    key = read_id(column, table.require(column, "[columns] user_id"), str(table.path))
    others = [name for name in table.columns if name not in (column, USER_ID)]
    return table.rows([column, *others]).select(
        pl.lit(place, pl.UInt32).alias(FILE), ROW, *_wrong(table, column, key), key.value.alias(USER_ID), *others
    )


def _wrong(table: Table, column: str, key: Field) -> list[pl.Expr]:
    """Return what is wrong with a row's shape or id as column, expected and found; null, null, null for nothing."""
    problems = key.problems(key.value)
    holds = pl.any_horizontal(problem.holds for problem in problems)
    wanted = pl.coalesce(*(pl.when(problem.holds).then(pl.lit(problem.expected)) for problem in problems))
    broken = pl.col(BROKEN)
    return [
        pl.when(broken).then(pl.lit("")).when(holds).then(pl.lit(column)).alias(_COLUMN),
        pl.when(broken).then(pl.lit(WHOLE_ROW[table.kind])).otherwise(wanted).alias(_EXPECTED),
        pl.when(~broken & holds).then(_shown(column)).alias(_FOUND),
    ]


def _values(table: Table, name: str, separator: str) -> pl.Expr:
    """Return the distinct values of a multi-valued column, in their order; none is null."""
    kind = table.require(name, "[items] multi")
    if isinstance(kind, pl.List):
        values = pl.col(name).cast(pl.List(pl.String))
    elif kind == pl.String and separator:
        values = pl.col(name).str.split(separator)
    else:
        raise ConfigError(
            f"[items] multi: column {name!r} of {table.path} is {kind} and its separator {separator!r}; expected text "
            'and its separator, e.g. genres = "|", or a list'
        )
    cleaned = values.list.eval(_some(pl.element().str.strip_chars())).list.drop_nulls()
    distinct = cleaned.list.unique(maintain_order=True)
    return pl.when(distinct.list.len() > 0).then(distinct)


def _whole_table(
    name: str,
    tables: Sequence[Table],
    frames: Sequence[pl.LazyFrame],
    key: str,
    repeated: Repeated,
    numeric: Sequence[str] = (),
) -> SideTable:
    """Read a table whole, tell its bad rows apart, and settle ids that stand twice.

    Rows that are equal in all columns that are read are one. Of others of one id the last is kept, or all are refused.
    """
    try:
        rows = pl.concat(frames, how="diagonal_relaxed").collect(engine="streaming")
    except pl.exceptions.PolarsError as error:
        raise DataError(f"{', '.join(str(table.path) for table in tables)}: cannot be read ({error})") from None
    rows = rows.sort(FILE, ROW, maintain_order=True)
    files, settled = [str(table.path) for table in tables], dict[str, int]()
    for column in numeric:
        rows, missing = _numbers(rows, column)
        if missing:
            settled[f"values of {column!r} that are no numbers, taken as missing"] = missing
    wrong = pl.col(_EXPECTED).is_not_null()
    bad = rows.filter(wrong).select(
        pl.col(FILE).replace_strict(list(range(len(files))), files, return_dtype=pl.String).alias("file"),
        pl.col(ROW).alias("row"),
        *(pl.col(one).cast(pl.String).alias(one[1:]) for one in (_COLUMN, _FOUND, _EXPECTED)),
    )
    good = rows.filter(~wrong).drop(_WRONG)
    distinct = good.unique(good.drop(FILE, ROW).columns, keep="last", maintain_order=True)
    kept = distinct.unique(key, keep="last", maintain_order=True)
    refused = ""
    if gone := good.height - distinct.height:
        settled["rows that stand again in full"] = gone
    if gone := distinct.height - kept.height:
        if repeated == "refuse":
            refused = _repeated(distinct, key, files, name)
        settled["earlier rows of an id that stands again with other values"] = gone
    return SideTable(
        name, kept.drop(FILE, ROW), rows.height, bad, {f"{name}: {why}": n for why, n in settled.items()}, refused
    )


def _numbers(rows: pl.DataFrame, column: str) -> tuple[pl.DataFrame, int]:
    """Take a few values that are no numbers as missing and give how many; make the rows of many bad ones.

    Rows of numbers in other marks than expected are bad ones always: `1,299.00` is a price.
    """
    odd, wanted = f"{_ODD}{column}", f"{_WANTED}{column}"
    strange, none = pl.col(wanted).is_not_null(), (pl.col(wanted) == FINITE).fill_null(False)
    count, there = rows.select(none.sum(), (strange | pl.col(column).is_not_null()).sum().alias("there")).row(0)
    few = count <= MOST_UNREADABLE * there
    new = (strange & ~none if few else strange) & pl.col(_EXPECTED).is_null()
    says = {_COLUMN: pl.lit(column), _EXPECTED: pl.col(wanted), _FOUND: pl.col(odd)}
    rows = rows.with_columns(
        pl.when(~strange).then(pl.col(column)).alias(column),
        *(pl.when(new).then(value).otherwise(pl.col(name)).alias(name) for name, value in says.items()),
    )
    return rows.drop(odd, wanted), count if few else 0


def _repeated(rows: pl.DataFrame, key: str, files: Sequence[str], name: str) -> str:
    """Return the first two rows of an id that has several, in words."""
    twice = rows.filter(pl.col(key).is_duplicated())
    one, other = twice.filter(pl.col(key) == twice[key][0]).head(2).iter_rows(named=True)
    keep = '; [items] repeated = "last" keeps the last' if name == "items" else ""
    return (
        f"{files[other[FILE]]}, row {other[ROW]:,}: {key} {other[key]!r} stands already, with other values, in "
        f"{files[one[FILE]]}, row {one[ROW]:,}; expected one row per id (repeated ids: {twice[key].n_unique():,}){keep}"
    )


def _text(name: str, kind: pl.DataType) -> pl.Expr:
    """Return a column as text without blanks around it; nothing, or blanks only, is null."""
    if kind.is_nested():
        return _some(pl.col(name).cast(pl.List(pl.String)).list.join(" "))
    return _some(pl.col(name).cast(pl.String).str.strip_chars())


def _some(text: pl.Expr) -> pl.Expr:
    return pl.when(text != "").then(text)


def _shown(name: str) -> pl.Expr:
    return pl.col(name).cast(pl.String, strict=False)
