"""Bad input as a newcomer brings it, through the command line: file, row, column, what was found and what is wanted."""

import gzip
from pathlib import Path

import polars as pl
import pytest
from typer.testing import CliRunner

from recsys.cli import app
from recsys.errors import ConfigError, DataError

T = 1_700_000_000
GOOD = "u,i,t\n" + "".join(f"a{n % 3},x{n % 5},{T + n * 1000}\n" for n in range(40))
ITEMS = '[items]\nitem_id = "i"\ntext = ["name"]\n'


def parquet(**columns: list[object]) -> pl.DataFrame:
    return pl.DataFrame({"u": ["a"] * 3, "i": ["x"] * 3, "t": [T] * 3} | columns, strict=False)


def mapping(events: str, more: str = "", source: str = "", time: str = 's"', user: str = "u") -> str:
    return (
        f'[source]\nevents = "{events}"\n{source}\n[columns]\nuser_id = "{user}"\nitem_id = "i"\ntimestamp = "t"\n'
        f'[time]\nunit = "{time}\n{more}'
    )


def refusal(folder: Path, toml: str, *more: str) -> tuple[type[BaseException], str]:
    """Ingest in a folder of files; give the error that a user reads."""
    (folder / "my.toml").write_text(toml)
    done = CliRunner().invoke(app, ["ingest", "--config", str(folder / "my.toml"), "-w", str(folder / "ws"), *more])
    assert done.exception is not None, done.output
    assert not (folder / "ws" / "log").exists()
    return type(done.exception), str(done.exception).replace(f"{folder}/", "")


@pytest.mark.parametrize("number", ["1700000000000", "-1000000000000"])
def test_a_position_that_would_pass_for_a_time_is_a_bad_row(number: str, tmp_path: Path) -> None:
    rows = [f"a1,x1,{place}\n" for place in (1, 2, -999_999_999_999, 999_999_999_999, number)]
    (tmp_path / "log.csv").write_text("u,i,t\n" + "".join(rows))
    words = mapping("log.csv").replace("timestamp", "position").partition("[time]")[0]
    kind, told = refusal(tmp_path, words)
    expected = "expected a position of less than 13 digits; a time is named by [columns] timestamp (1 such rows)"
    assert f"log.csv, row 5, column 't', found '{number}': {expected}" in told
    assert kind is DataError


LOGS = {
    "a missing quote": (
        GOOD + 'a1,"x broken,1700000001\na2,x3,1700000002\n',
        "log.csv, line 42, column 'i': the quote opened at '\"x broken,1700000001' is not closed: the file ends before",
    ),
    "two units": (
        GOOD + f"a1,x1,{T * 1000}\n",
        "1 of 41 rows of events are bad (2.44%), more than [quality] max_bad_share = 0.01. log.csv, row 41, "
        "column 't', found '1700000000000': expected a time in s, and this is one in ms: two units in one log",
    ),
    "Latin-1": (
        GOOD.encode() + b"a1,caf\xe9,1700000001\n",
        "log.csv, line 42, column 'i': byte 0xe9 is not UTF-8 (as Latin-1 it reads 'a1,café,1700000001'); expected "
        "UTF-8, e.g. iconv -f latin1",
    ),
    "UTF-16": (
        GOOD.encode("utf-16"),
        "log.csv, line 1: begins as UTF-16 (byte 0xff); expected UTF-8, e.g. iconv -f utf-16",
    ),
    "too many fields": (
        GOOD + "a1,x1,1700000001,more\n",
        "log.csv, row 41: expected no more fields than there are columns (1 such rows)",
    ),
    "an id missing beside a bad time": (  # what was found is of the column that is named
        GOOD + "a1,,n.a.\n",
        "log.csv, row 41, column 'i': expected an id (1 such rows)",
    ),
    "nothing": ("", "log.csv: empty; expected a first line with the names of the columns"),
    "a header alone": ("u,i,t\n", "log.csv: no row of events; expected at least one"),
    "a name twice": ("u,i,t,t\na,b,1,2\n", "log.csv, line 1: column 't' stands 2 times; expected one name each"),
    "another name": (
        "user,i,t\na,b,1\n",
        "log.csv: no column 'u' ([columns] user_id); found user, i, t",
    ),
}


@pytest.mark.parametrize("case", LOGS)
def test_a_log_in_text_is_refused_in_words(case: str, tmp_path: Path) -> None:
    content, words = LOGS[case]
    (tmp_path / "log.csv").write_bytes(content.encode() if isinstance(content, str) else content)
    kind, message = refusal(tmp_path, mapping("log.csv"))
    assert kind is DataError
    assert words in message


TYPES = {
    "ids with decimals": (
        parquet(i=[1.5] * 3),
        "log.parquet, row 1, column 'i', found '1.5': expected an id without dec",
    ),
    "lists for ids": (parquet(i=[[1]] * 3), "column 'i' is List(Int64); expected text or whole numbers: ids"),
    "flags for times": (parquet(t=[True] * 3), "column 't' is Boolean; expected numbers of s since 1970"),
    "no time": (
        parquet(t=[None] * 3).cast({"t": pl.Int64}),
        "row 1, column 't': expected a time, found nothing (3 such rows)",
    ),
}


@pytest.mark.parametrize("case", TYPES)
def test_a_parquet_of_wrong_types_is_refused_in_words(case: str, tmp_path: Path) -> None:
    frame, words = TYPES[case]
    frame.write_parquet(tmp_path / "log.parquet")
    kind, message = refusal(tmp_path, mapping("log.parquet"))
    assert kind is DataError
    assert words in message


def test_a_line_of_five_gigabytes_is_refused_without_being_read(tmp_path: Path) -> None:
    with (tmp_path / "log.csv").open("wb") as file:
        file.write(GOOD.encode() + b"a1,")
        file.truncate(5 << 30)  # a hole: it takes no room on the disk
    _, message = refusal(tmp_path, mapping("log.csv"))
    assert "log.csv, line 42: longer than 16,777,216 bytes; expected one row per line" in message


def test_json_lines_and_other_files_are_refused_in_words(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text('{"u": "a", "i": "x", "t": 1700000000}\n{"u": "a",\n')
    assert "log.jsonl, row 2: expected one JSON object (1 such rows)" in refusal(tmp_path, mapping("log.jsonl"))[1]
    (tmp_path / "list.json").write_text("[1]")
    assert "list.json, line 1: not a JSON object (found list)" in refusal(tmp_path, mapping("list.json"))[1]
    (tmp_path / "log.parquet").write_text("hello")
    assert "log.parquet: not a Parquet file" in refusal(tmp_path, mapping("log.parquet"))[1]
    (tmp_path / "log.csv.zip").write_bytes(b"PK")
    assert "unpack it first" in refusal(tmp_path, mapping("log.csv.zip"))[1]
    (tmp_path / "log.csv.gz").write_bytes(gzip.compress(GOOD.encode())[:-9])
    assert "log.csv.gz: cannot be" in refusal(tmp_path, mapping("log.csv.gz"))[1]


MAPPINGS = {
    "no file": (
        mapping("lag.csv"),
        DataError,
        "[source] events: no file lag.csv; did you mean 'log.csv'?; expected a path",
    ),
    "no match": (
        mapping("days/*.csv"),
        DataError,
        "[source] events: no file days/*.csv; expected a path or a glob, from",
    ),
    "an unknown key": (
        mapping("log.csv", "[filters]\ndropnull = []\n"),
        ConfigError,
        "my.toml [filters]: unknown key 'dropnull'; did you mean 'drop_null'?",
    ),
    "all filtered": (
        mapping("log.csv", '[filters]\npositive = ["q"]\n'),
        DataError,
        "log.csv: no row of events is left of 40: [filters] took out 40 by positive = 'q'",
    ),
    "items twice": (
        mapping("log.csv", ITEMS + 'repeated = "refuse"\n', 'items = "items.csv"'),
        DataError,
        "items.csv, row 3: item_id 'x1' stands already, with other values, in items.csv, row 1; expected one row",
    ),
    "users of another name": (
        mapping("log.csv", source='users = "users.csv"'),
        DataError,
        "users.csv: no column 'u' ([columns] user_id; 'user_id' would do as well); found id, age",
    ),
    "labels beyond 0 and 1": (
        mapping("log.csv", source='impressions = "shown.csv"'),
        DataError,
        "1 of 2 rows of impressions are bad (50.00%), more than [quality] max_bad_share = 0.01. shown.csv, row 2, "
        "column 'label', found '2': expected a label, 0 or 1",
    ),
    "impressions of other names": (
        mapping("log.csv", source='impressions = "users.csv"'),
        DataError,
        "users.csv: no column 'request_id' ([impressions] request_id)",
    ),
    "no such zone": (mapping("log.csv", time='s"\nzone = "Mars"'), ConfigError, "[time] zone: no time zone 'Mars'"),
}


@pytest.mark.parametrize("case", MAPPINGS)
def test_a_mapping_that_does_not_fit_is_refused_in_words(case: str, tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text("u,i,t,q\n" + "".join(f"a,x1,{T + n},-1\n" for n in range(40)))
    (tmp_path / "items.csv").write_text("i,name\nx1,A\nx2,B\nx1,C\n")
    (tmp_path / "users.csv").write_text("id,age\na,3\n")
    shown = "request_id,user_id,item_id,timestamp,label\n"
    (tmp_path / "shown.csv").write_text(f"{shown}r1,a,x1,{T},1\nr1,a,x2,{T},2\n")
    toml, kind, words = MAPPINGS[case]
    found, message = refusal(tmp_path, toml)
    assert found is kind
    assert words in message
