"""Rows told apart: kept, filtered on purpose, bad; and the bad ones written down with file, row, column and reason.

`check_rows` streams files into one Parquet file of canonical columns in which every row carries a verdict: 0 to keep
it, else the number of the rule that took it out. What follows reads that file, so that a log is parsed once.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import polars as pl

from pipelines.derived import ENTRY
from pipelines.fields import Field, Reader
from pipelines.mapping import FiltersConfig
from pipelines.sources import BROKEN, ROW, WHOLE_ROW, Table
from recsys.columns import EVENT_ID
from recsys.errors import DataError
from recsys.files import whole_file

FILE, VERDICT, FOUND = "_file", "_verdict", "_found"
KEPT = 0
_PARSED = "_parsed "
_LONGEST_FOUND = 200
SHOWN = 3
"""ways in which rows are bad that a message gives an example of"""
_QUARANTINED = ("file", "row", "column", "found", "expected")


@dataclass(frozen=True)
class Rule:
    """Why a row was taken out: a filter somebody asked for, or something wrong with a column."""

    kind: Literal["filtered", "bad"]
    column: str
    words: str


@dataclass(frozen=True)
class Wanted:
    """A canonical column, the file's name of it, how it is read, and the section of the mapping that asks for it."""

    name: str
    column: str
    reader: Reader
    section: str = "columns"


@dataclass(frozen=True)
class Checked:
    """Files in canonical columns with a verdict per row.

    Attributes:
        path: Parquet: the canonical columns, `FILE` (place in `files`), `ROW`, `VERDICT`, `FOUND`.
        files: the files it came from.
        rules: rule of verdict i + 1.
        counts: rows by verdict.
    """

    path: Path
    files: tuple[Path, ...]
    rules: tuple[Rule, ...]
    counts: dict[int, int]

    @property
    def read(self) -> int:
        """Rows read."""
        return sum(self.counts.values())

    @property
    def bad(self) -> int:
        """Bad rows."""
        return sum(self.by_rule("bad").values())

    def by_rule(self, kind: Literal["filtered", "bad"]) -> dict[Rule, int]:
        """Return the rows each rule of a kind took out, most first."""
        found = {rule: self.counts.get(code, 0) for code, rule in enumerate(self.rules, 1) if rule.kind == kind}
        return dict(sorted(((rule, n) for rule, n in found.items() if n), key=lambda entry: -entry[1]))

    def rows(self) -> pl.LazyFrame:
        """Return the kept rows in canonical columns, with `FILE` and `ROW`."""
        return pl.scan_parquet(self.path).filter(pl.col(VERDICT) == KEPT).drop(VERDICT, FOUND)


@dataclass(frozen=True)
class Example:
    """The first row that is bad in some way, and how many are."""

    file: str
    row: int
    column: str
    found: str | None
    expected: str
    count: int

    def __str__(self) -> str:
        column = f", column {self.column!r}" if self.column else ""
        found = "" if self.found is None else f", found {self.found!r}"
        return f"{self.file}, row {self.row:,}{column}{found}: expected {self.expected} ({self.count:,} such rows)."


def check_rows(
    tables: Sequence[Table], wanted: Sequence[Wanted], filters: FiltersConfig, read_number: Reader, out: Path
) -> Checked:
    """Read files into `out` (Parquet), every row with its verdict.

    A filter on missing values comes before everything wrong with a row, and that before a filter on numbers: a row
    without a customer that nobody wants is not a bad one.

    Raises:
        DataError: a column that is not there or of an unusable type, a file that cannot be parsed.

    Cost: streaming; memory does not grow with the number of rows.
    """
    files = tuple(table.path for table in tables)
    try:
        codes = _write(tables, wanted, filters, read_number, out)
    except (pl.exceptions.PolarsError, OSError) as error:
        raise DataError(f"{', '.join(map(str, files))}: cannot be read ({error})") from None
    counted = pl.scan_parquet(out).group_by(VERDICT).agg(pl.len()).collect(engine="streaming")
    return Checked(out, files, tuple(codes), dict(counted.iter_rows()))


def _write(
    tables: Sequence[Table], wanted: Sequence[Wanted], filters: FiltersConfig, read_number: Reader, out: Path
) -> dict[Rule, int]:
    """Write all tables' rows with verdicts; give the rules' numbers.

    JSON Lines are trusted at first, and read line by line only if that fails.
    """
    trusted = [replace(table, trusted=table.kind == "jsonl") for table in tables]
    for attempt in (trusted, tables) if trusted != list(tables) else (tables,):
        codes: dict[Rule, int] = {}
        frames = [
            _with_verdicts(place, table, wanted, filters, read_number, codes) for place, table in enumerate(attempt)
        ]
        try:
            pl.concat(frames).sink_parquet(out, compression="lz4")
            break
        except pl.exceptions.PolarsError:
            if attempt is tables:
                raise
    return codes


def _with_verdicts(
    place: int,
    table: Table,
    wanted: Sequence[Wanted],
    filters: FiltersConfig,
    read_number: Reader,
    codes: dict[Rule, int],
) -> pl.LazyFrame:
    """Return one file's rows in canonical columns with verdicts; `codes` numbers the rules and grows."""
    file = str(table.path)
    fields = {
        one.name: one.reader(one.column, table.require(one.column, f"[{one.section}] {one.name}"), file)
        for one in wanted
    }
    sizes = {name: read_number(name, table.require(name, "[filters] positive"), file) for name in filters.positive}
    parsed = {
        f"{_PARSED}{name}": field for name, field in (fields | {f"size {n}": f for n, f in sizes.items()}).items()
    }
    taken = _nulls(table, filters)
    taken.append((Rule("bad", "", WHOLE_ROW[table.kind]), pl.col(BROKEN), pl.lit(None, pl.String)))
    for one in wanted:
        taken += _wrong(one.column, fields[one.name], f"{_PARSED}{one.name}")
    for name, field in sizes.items():
        taken += _wrong(name, field, f"{_PARSED}size {name}")
        small = (pl.col(f"{_PARSED}size {name}") <= 0).fill_null(True)
        taken.append((Rule("filtered", name, "positive"), small, _text(name)))
    numbered = [(codes.setdefault(rule, len(codes) + 1), holds, found) for rule, holds, found in taken]
    verdict = pl.coalesce(*(pl.when(holds).then(pl.lit(code, pl.UInt16)) for code, holds, _ in numbered), KEPT)
    found = pl.lit(None, pl.String)
    for _, holds, text in reversed(numbered):  # of the rule that decides, though it found nothing there
        found = pl.when(holds).then(text).otherwise(found)
    names = [one.column for one in wanted] + [*filters.drop_null, *filters.positive]
    # Two steps: the conditions are many, and each would parse its column anew.
    rows = table.rows(names)
    entries = ENTRY in rows.collect_schema()
    rows = rows.with_columns(field.value.alias(name) for name, field in parsed.items())
    if entries and EVENT_ID in fields:  # an order's id is that of several events
        own = pl.col(f"{_PARSED}{EVENT_ID}")
        of_entry = pl.when(pl.col(ENTRY) > 0).then(pl.concat_str(own, pl.lit("#"), pl.col(ENTRY))).otherwise(own)
        rows = rows.with_columns(of_entry.alias(f"{_PARSED}{EVENT_ID}"))
    return rows.select(
        pl.lit(place, pl.UInt32).alias(FILE),
        ROW,
        *(pl.col(f"{_PARSED}{name}").alias(name) for name in fields),
        verdict.cast(pl.UInt16).alias(VERDICT),
        found.str.slice(0, _LONGEST_FOUND).alias(FOUND),
    )


_Taken = tuple[Rule, pl.Expr, pl.Expr]
"""rule, where it holds, what was found there"""


def _text(column: str) -> pl.Expr:
    return pl.col(column).cast(pl.String, strict=False)


def _wrong(column: str, field: Field, parsed: str) -> list[_Taken]:
    problems = field.problems(pl.col(parsed))
    return [(Rule("bad", column, problem.expected), problem.holds, _text(column)) for problem in problems]


def _nulls(table: Table, filters: FiltersConfig) -> list[_Taken]:
    taken = []
    for column in filters.drop_null:
        kind = table.require(column, "[filters] drop_null")
        empty = pl.col(column).is_null()
        if kind == pl.String:
            empty |= (pl.col(column) == "").fill_null(False)
        elif kind.is_float():
            empty |= pl.col(column).is_nan().fill_null(False)
        # A broken line has no values at all: nobody meant to filter it.
        taken.append((Rule("filtered", column, "drop_null"), empty & ~pl.col(BROKEN), pl.lit(None, pl.String)))
    return taken


def write_quarantine(tables: Mapping[str, Checked], out: Path, found: Mapping[str, pl.DataFrame]) -> None:
    """Write the bad rows of checked tables, and those `found` in others, to `out`; without any, remove an earlier one.

    Columns: table, file, row (from 1, a CSV's header not counted), column, found, expected. Parquet.
    """
    if not any(checked.bad for checked in tables.values()) and not any(map(len, found.values())):
        out.unlink(missing_ok=True)
        return
    frames = {name: _bad_rows(checked) for name, checked in tables.items()}
    frames |= {name: rows.lazy().select(*_QUARANTINED) for name, rows in found.items()}
    out.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(out) as temporary:
        named = [rows.select(pl.lit(name).alias("table"), pl.all()) for name, rows in frames.items()]
        pl.concat(named).sink_parquet(temporary, compression="zstd")


def _bad_rows(checked: Checked) -> pl.LazyFrame:
    """Return the bad rows as file, row, column, found, expected."""
    bad = {code: rule for code, rule in enumerate(checked.rules, 1) if rule.kind == "bad"}
    codes, rules = list(bad), list(bad.values())
    files = [str(path) for path in checked.files]
    return (
        pl.scan_parquet(checked.path)
        .filter(pl.col(VERDICT).is_in(codes))
        .select(
            pl.col(FILE).replace_strict(list(range(len(files))), files, return_dtype=pl.String).alias("file"),
            pl.col(ROW).alias("row"),
            *(
                pl.col(VERDICT).replace_strict(codes, values, return_dtype=pl.String).alias(name)
                for name, values in (
                    ("column", [rule.column for rule in rules]),
                    ("expected", [rule.words for rule in rules]),
                )
            ),
            pl.col(FOUND).alias("found"),
        )
        .select(*_QUARANTINED)
    )


def refuse_if_too_bad(name: str, checked: Checked, max_bad_share: float, quarantine: Path) -> None:
    """Stop where more than a share of the rows read is bad, or nothing is left.

    Raises:
        DataError: with what is wrong most often, and for each the first place: file, row, column, found, wanted.
    """
    if checked.read == 0:
        raise DataError(f"{', '.join(map(str, checked.files))}: no row of {name}; expected at least one")
    if checked.bad > max_bad_share * checked.read:
        raise DataError(too_bad(name, checked.bad, checked.read, max_bad_share, _examples(checked), quarantine))
    if checked.counts.get(KEPT, 0) == 0:
        filtered = ", ".join(
            f"{n:,} by {rule.words} = {rule.column!r}" for rule, n in checked.by_rule("filtered").items()
        )
        raise DataError(
            f"{', '.join(map(str, checked.files))}: no row of {name} is left of {checked.read:,}: [filters] took out "
            f"{filtered or 'none'}, {checked.bad:,} are bad; loosen the filters or mend the column names"
        )


def too_bad(name: str, bad: int, read: int, max_bad_share: float, examples: Sequence[Example], quarantine: Path) -> str:
    """Return in words that more rows are bad than may be, with an example of each of the most frequent problems."""
    return (
        f"{bad:,} of {read:,} rows of {name} are bad ({bad / read:.2%}), more than [quality] max_bad_share = "
        f"{max_bad_share:g}. {' '.join(map(str, examples))} All are listed in {quarantine}"
    )


def _examples(checked: Checked) -> list[Example]:
    """Return the first row of each of the most frequent problems."""
    examples = []
    for rule, count in list(checked.by_rule("bad").items())[:SHOWN]:
        code = checked.rules.index(rule) + 1
        row = pl.scan_parquet(checked.path).filter(pl.col(VERDICT) == code).head(1).collect().row(0, named=True)
        file = str(checked.files[row[FILE]])
        examples.append(Example(file, row[ROW], rule.column, row[FOUND], rule.words, count))
    return examples
