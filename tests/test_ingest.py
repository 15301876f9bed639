"""Ingest of files nobody has seen: the same log from any format, every wrong row told apart, every wrong file named."""

import csv
import gzip
import io
import json
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from zoneinfo import ZoneInfo

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines import thinning
from pipelines.cards import prepare_defaults
from pipelines.datasets import RawLog
from pipelines.event_facts import measure_events, write_users
from pipelines.fields import number_reader, time_reader
from pipelines.ingest import ingest, ingest_files
from pipelines.mapping import IngestConfig, NumbersConfig, PositiveRule, QualityConfig, TimeConfig, load_mapping
from pipelines.prepare import PrepareConfig, prepare
from pipelines.sources import open_table
from pipelines.textfiles import check_text, read_header
from recsys.config import overlaid, parse
from recsys.errors import ConfigError, DataError

SECOND = 1_000_000
START = 1_600_000_000
COLUMNS = {"user_id": "who", "item_id": "what", "timestamp": "when", "value": "paid"}


def mapping(**sections: object) -> IngestConfig:
    return parse(
        IngestConfig, {"source": {"events": "events.*"}, "columns": COLUMNS, "time": {"unit": "s"}, **sections}, ""
    )


def run(config: IngestConfig, folder: Path):
    card = ingest_files(config, folder, folder / "log", "a log")
    return card, pl.read_parquet(folder / "log" / "events.parquet")


@dataclass(frozen=True)
class Line:
    """A row as a file may have it; what is None is missing."""

    who: str | None
    what: str | None
    when: str | None
    paid: str | None
    pieces: str | None


ids = st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs")), min_size=1, max_size=6)
lines = st.builds(
    Line,
    who=st.one_of(st.sampled_from(['a "b"', "é,ü", "7", " x "]), ids, st.none()),
    what=st.one_of(st.sampled_from(["1", "tea;|\tpot", '"']), ids, st.none()),
    when=st.one_of(
        st.integers(START, START + 99).map(str), st.sampled_from(["soon", "12", str(START * 1000)]), st.none()
    ),
    paid=st.sampled_from(["1", "2.5", "-3e2", "free", "nan", None]),
    pieces=st.sampled_from(["1", "0", "-1", "2.0", "few", None]),
)


def verdict(line: Line) -> str:
    """Decide by plain rules what must become of a row: drop_null of `pieces`, then what is wrong, then positive."""
    if line.pieces is None:
        return "filtered"
    wrong = (
        line.who is None or line.what is None or line.when is None or not line.when.isdigit() or len(line.when) != 10
    )
    if wrong or line.paid in ("free", "nan") or line.pieces == "few":
        return "bad"
    return "kept" if float(line.pieces) > 0 else "filtered"


def written(rows: list[Line], kind: str, path: Path) -> None:
    names = list(Line.__dataclass_fields__)
    table = [{name: getattr(row, name) for name in names} for row in rows]
    if kind == "csv":
        text = io.StringIO()
        writer = csv.DictWriter(text, names, lineterminator="\r\n" if len(rows) % 2 else "\n")
        writer.writeheader()
        writer.writerows(table)
        path.write_bytes((b"\xef\xbb\xbf" if len(rows) % 3 == 0 else b"") + text.getvalue().encode())
    elif kind == "jsonl":
        # What is missing is absent in most rows; the first has every key, so that the columns are known.
        present = [{k: v for k, v in row.items() if v is not None or place == 0} for place, row in enumerate(table)]
        numbers = [{k: int(v) if v in ("7", "1") else v for k, v in row.items()} for row in present]
        path.write_text("".join(json.dumps(row, ensure_ascii=len(row) % 2 == 0) + "\n" for row in numbers))
    else:
        pl.DataFrame(table, schema=dict.fromkeys(names, pl.String), orient="row").write_parquet(path)


@given(rows=st.lists(lines, min_size=1, max_size=40), kind=st.sampled_from(["csv", "jsonl", "parquet"]))
@settings(max_examples=60, deadline=None)
def test_every_row_is_kept_filtered_or_bad_as_plain_rules_say(rows: list[Line], kind: str) -> None:
    expected = Counter(map(verdict, rows))
    config = mapping(filters={"drop_null": ["pieces"], "positive": ["pieces"]}, quality={"max_bad_share": 1})
    with TemporaryDirectory() as name:
        folder = Path(name)
        written(rows, kind, folder / f"events.{kind}")
        if not expected["kept"]:
            with pytest.raises(DataError, match="no row of events is left"):
                run(config, folder)
            return
        card, events = run(config, folder)
        kept = [row for row in rows if verdict(row) == "kept"]
        assert events.to_dict(as_series=False) == {  # in the file's order
            "user_id": [row.who for row in kept],
            "item_id": [row.what for row in kept],
            "timestamp": [int(row.when or 0) * SECOND for row in kept],
            "value": [None if row.paid is None else float(row.paid) for row in kept],
        }
        assert (card.read, card.events) == (len(rows), expected["kept"])
        assert (sum(card.filtered.values()), sum(card.bad.values())) == (expected["filtered"], expected["bad"])
        assert card.repeated_share == pytest.approx(1 - len({(r.who, r.what) for r in kept}) / len(kept))
        quarantine = folder / "quarantine.parquet"
        assert quarantine.exists() == (expected["bad"] > 0)
        if expected["bad"]:
            found = pl.read_parquet(quarantine)
            assert found["row"].to_list() == [n for n, row in enumerate(rows, 1) if verdict(row) == "bad"]
            assert set(found["file"]) == {str(folder / f"events.{kind}")}
            assert found["expected"].null_count() == 0


def test_lines_that_are_no_rows_are_bad_ones_and_the_others_stay(tmp_path: Path) -> None:
    rows = [f"a,x,{START},1", f"b,x,{START},1,9", f"c,x,{START},1,9,9", "d,x", "", f"e,y,{START},"]
    (tmp_path / "events.csv").write_text("\n".join(["who,what,when,paid", *rows]))
    objects = [
        f'{{"who": "f", "what": 3, "when": {START}, "paid": 1}}',
        "not json",
        '["g"]',
        '{"who": "h", "what": ',
        "{bad}",
    ]
    objects.append(f'{{"who": "h", "what": 3, "when": {START}.5}}')
    (tmp_path / "events.jsonl").write_text("\n".join(objects))
    card, events = run(mapping(quality={"max_bad_share": 1}, filters={"drop_null": ["who"]}), tmp_path)
    assert events["user_id"].to_list() == ["a", "e", "f", "h"]
    assert events["timestamp"].to_list()[-1] == START * SECOND + SECOND // 2
    bad = pl.read_parquet(tmp_path / "quarantine.parquet").sort("file", "row")
    places = {(Path(file).name, row) for file, row in bad.select("file", "row").iter_rows()}
    assert {*(("events.csv", n) for n in (2, 3, 4)), *(("events.jsonl", n) for n in (2, 3, 4, 5))} <= places
    assert card.read == card.events + sum(card.bad.values()) + sum(card.filtered.values())


def test_an_order_is_an_event_for_every_entry_whatever_the_file(tmp_path: Path) -> None:
    """Three baskets, one empty and one that is no list, in six ways of writing them."""
    baskets = [["a", "b c"], ["b c"], [], None]
    who, when = ["u", "v", "w", "x"], [START + n for n in range(4)]
    frame = pl.DataFrame({"who": who, "when": when, "what": baskets, "paid": [[1, 2], [3], [], None]})
    objects = [
        None if b is None else [{"sku": item, "n": {"paid": n}} for item, n in zip(b, p, strict=True)]
        for b, p in zip(baskets, frame["paid"].to_list(), strict=True)
    ]
    struct = frame.with_columns(pl.Series("what", objects))
    marked = frame.with_columns(
        pl.col("what").list.join(" |").fill_null("|"), pl.col("paid").cast(pl.List(pl.String)).list.join("|")
    )
    in_text = frame.with_columns(
        pl.Series("what", [json.dumps(b) if b is not None else "[1" for b in baskets]),
        pl.Series("paid", [json.dumps(b) for b in frame["paid"].to_list()]),
    )
    written = {
        "list.parquet": (frame, "what[]", "paid[]"),
        "struct.parquet": (struct, "what[].sku", "what[].n.paid"),
        "list.jsonl": (frame, "what[]", "paid[]"),
        "struct.jsonl": (struct, "what[].sku", "what[].n.paid"),
        "marked.csv": (marked, "what[|]", "paid[|]"),
        "text.csv": (in_text, "what[]", "paid[]"),
    }
    for name, (table, item_id, value) in written.items():
        {"parquet": table.write_parquet, "jsonl": table.write_ndjson, "csv": table.write_csv}[name.split(".")[1]](
            tmp_path / name
        )
        columns = {**COLUMNS, "item_id": item_id, "value": value}
        wanted = mapping(source={"events": name}, columns=columns, quality={"max_bad_share": 0.5})
        card, events = run(wanted, tmp_path)
        assert card.read == 5, name
        assert list(events.select("user_id", "item_id", "value").iter_rows()) == [
            ("u", "a", 1.0),
            ("u", "b c", 2.0),
            ("v", "b c", 3.0),
        ], name
        bad = pl.read_parquet(tmp_path / "quarantine.parquet")
        assert bad["row"].to_list() == [3, 4], name
        assert set(bad["column"]) == {item_id}
        packed = tmp_path / f"{name}.gz"
        if not name.endswith("parquet"):
            packed.write_bytes(gzip.compress((tmp_path / name).read_bytes()))
            assert run(replace(wanted, source=replace(wanted.source, events=packed.name)), tmp_path)[1].equals(events)


def test_every_article_of_an_order_stays_under_an_id_of_its_own(tmp_path: Path) -> None:
    orders = [f"o{n // 2},u,a;b;c,{START + n // 2}" for n in range(8)]  # each order twice
    broken = f"o9,u,a;b;c,{START},more,and more"
    (tmp_path / "events.csv").write_text("\n".join(["id,who,what,when", *orders, broken]))
    columns = {"user_id": "who", "item_id": "what[;]", "timestamp": "when", "event_id": "id"}
    card, events = run(mapping(columns=columns, quality={"max_bad_share": 0.5}), tmp_path)
    assert (card.events, card.filtered) == (12, {"repeated id": 12})
    assert events["event_id"].to_list()[:4] == ["o0", "o0#1", "o0#2", "o1"]
    assert pl.read_parquet(tmp_path / "quarantine.parquet")["row"].to_list() == [9]


def test_half_of_a_surrogate_pair_in_a_list_is_a_bad_row(tmp_path: Path) -> None:
    (tmp_path / "events.csv").write_text(f'who,what,when,paid\nu,"[""\\ud83d"",""c""]",{START},\n')
    columns = {**COLUMNS, "item_id": "what[]"}
    card, events = run(mapping(columns=columns, quality={"max_bad_share": 0.5}), tmp_path)
    assert (events["item_id"].to_list(), sum(card.bad.values())) == (["c"], 1)
    (tmp_path / "events.csv").unlink()
    (tmp_path / "events.csv.gz").write_bytes(gzip.compress(f"who,what,when,paid\nu,i,{START},\n".encode()) + b"\0" * 64)
    with suppress(DataError):  # Python reads it, polars may not: read whole or refused in words
        assert run(mapping(), tmp_path)[0].events == 1


def test_columns_made_of_others_are_named_where_they_cannot_be(tmp_path: Path) -> None:
    pl.DataFrame({"a": ["x"], "b": [1], "c": [[{"d": 1}]]}).write_parquet(tmp_path / "t.parquet")
    table = open_table(tmp_path / "t.parquet")
    for name in ("b[]", "b[;]", "c[]", "c[].e", "c[;]", "a[;].d"):
        with pytest.raises(DataError, match=r"t.parquet: '.*' cannot be read: column '[abc]' is .*; expected a list"):
            table.require(name, "[columns] item_id")
    with pytest.raises(DataError, match=r"no column 'a \+ e'"):
        table.require("a + e", "[columns] user_id")
    assert table.rows(["a + b", "c[].d"]).collect().row(0)[2:] == (0, "x 1", 1)
    uneven = pl.DataFrame({"i": ["p|q", "p"], "n": ["1", "2"]})
    uneven.write_csv(tmp_path / "u.csv")
    found = open_table(tmp_path / "u.csv").rows(["i[|]", "n[|]"]).collect()
    assert found["i[|]"].to_list() == [None, "p"]  # of the first nobody knows which has the 1


def test_a_time_to_come_and_a_list_for_an_id_are_bad_rows(tmp_path: Path) -> None:
    ahead = int(time.time()) + 3 * 86_400
    objects = [
        f'{{"who": "a", "what": 3, "when": {START}, "paid": 1}}',
        f'{{"who": "[deleted]", "what": "[3M] tape", "when": {START}, "paid": 1}}',
        f'{{"who": "a", "what": 3, "when": {ahead}, "paid": 1}}',
        f'{{"who": "a", "what": ["x", "y"], "when": {START}, "paid": 1}}',
        f'{{"who": {{"id": 7}}, "what": 3, "when": {START}, "paid": 1}}',
    ]
    (tmp_path / "events.jsonl").write_text("\n".join(objects))
    _, events = run(mapping(quality={"max_bad_share": 1}), tmp_path)
    assert events["user_id"].to_list() == ["a", "[deleted]"]
    bad = pl.read_parquet(tmp_path / "quarantine.parquet").sort("row")
    assert bad["row"].to_list() == [3, 4, 5]
    assert "not in the future" in bad["expected"][0]
    assert bad["expected"].to_list()[1:] == ["an id, not a list or an object of JSON"] * 2
    _, events = run(mapping(quality={"max_bad_share": 1}, time={"unit": "s", "future": True}), tmp_path)
    assert events["timestamp"].max() == ahead * SECOND
    now = datetime.now(UTC).replace(tzinfo=None)
    for days, future, fine in ((0, False, True), (3, False, False), (3, True, True)):
        field = time_reader(TimeConfig("datetime", future=future))("at", pl.String(), "t.csv")
        table = pl.DataFrame({"at": [str(now + timedelta(days=days))]})
        problems = field.problems(field.value)
        assert table.select(pl.any_horizontal(one.holds for one in problems)).item() != fine


def test_ids_that_the_catalogue_writes_otherwise_are_told(tmp_path: Path) -> None:
    events = pl.DataFrame({"user_id": ["a", "b", "b"], "item_id": ["1.0", "2.0", "3"], "timestamp": [START, 2, 3]})
    items = pl.DataFrame({"item_id": ["1", "2", "3"]})
    card = ingest(RawLog("shop", events.lazy(), items.lazy()), tmp_path / "log")
    assert (card.items, card.in_catalogue, card.not_in_catalogue) == (3, 1, ("1.0", "2.0"))
    assert "Only 1 of 3 items" in card.doubts()[0]
    assert "'1.0', '2.0'" in card.doubts()[0]
    assert ingest(RawLog("shop", events.lazy(), None), tmp_path / "alone").doubts() == []


def test_actions_are_counted_and_those_that_are_written_in_two_ways_told(tmp_path: Path) -> None:
    did = ["view"] * 5 + ["VIEW", "purchase", None]
    events = pl.DataFrame({"user_id": "a", "item_id": "1", "timestamp": range(START, START + len(did)), "action": did})
    card = ingest(RawLog("shop", events.lazy(), positive=PositiveRule(("buy", "purchase"))), tmp_path / "log")
    assert card.actions == {"view": 5, "": 1, "VIEW": 1, "purchase": 1}
    assert ("actions", "view 5, none 1, VIEW 1, purchase 1") in card.describe()
    written, unknown = card.doubts()[-2:]
    assert "'view' (5) and 'VIEW' (1) are several here" in written
    assert "names 'buy', which no event has; there are 'view', 'VIEW', 'purchase'" in unknown
    none = events.with_columns(action=pl.lit(None, pl.String)).lazy()
    nothing = ingest(RawLog("shop", none, positive=PositiveRule(("buy",))), tmp_path / "none")
    assert nothing.doubts()[-1].endswith("which no event has; there are none.")


def test_too_many_bad_rows_stop_the_job_with_examples_and_keep_the_quarantine(tmp_path: Path) -> None:
    rows = [f"u{n % 7},i{n % 5},{(START + n) * (1000 if n % 4 == 0 else 1)},1" for n in range(200)]
    (tmp_path / "events.csv").write_text("\n".join(["who,what,when,paid", *rows]))
    wanted = (
        r"50 of 200 rows of events are bad \(25.00%\), more than \[quality\] max_bad_share = 0.01. "
        r".*events.csv, row 1, column 'when', found '1600000000000': expected a time in s, and this is one in ms"
    )
    with pytest.raises(DataError, match=wanted):
        run(mapping(), tmp_path)
    assert pl.read_parquet(tmp_path / "quarantine.parquet").height == 50
    assert not (tmp_path / "log").exists()
    card, _ = run(mapping(quality={"max_bad_share": 0.25}), tmp_path)
    assert card.events == 150
    (tmp_path / "events.csv").write_text("\n".join(["who,what,when,paid", *rows[1:4]]))
    run(mapping(), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["events.csv", "log"]


# Without empty fields and separators inside: with them a lost quote may leave another table that is whole again.
quoted_rows = st.lists(
    st.tuples(*[st.text(st.sampled_from('ab"é '), min_size=1, max_size=4)] * 3), min_size=1, max_size=12
)


@given(rows=quoted_rows, draw=st.data())
@settings(max_examples=100, deadline=None)
def test_a_quote_that_is_missing_is_always_found_in_its_own_line(rows: list[tuple[str, ...]], draw) -> None:
    text = io.StringIO()
    csv.writer(text, quoting=csv.QUOTE_ALL, lineterminator="\n").writerows([("p", "q", "r"), *rows])
    whole = text.getvalue()
    quotes = [n for n, letter in enumerate(whole) if letter == '"' and n > whole.index("\n")]
    lost = draw.draw(st.sampled_from(quotes))
    with TemporaryDirectory() as name:
        path = Path(name) / "t.csv"
        path.write_text(whole)
        check_text(path, read_header(path))  # as it was, it is fine
        path.write_text(whole[:lost] + whole[lost + 1 :])
        with pytest.raises(
            DataError, match=rf"t.csv, line {whole[:lost].count(chr(10)) + 1}, column '[pqr]'.*expected"
        ):
            check_text(path, read_header(path))


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        (
            "t.csv",
            b'id,name\n1,"tea\n2,jam\n3,"rye"\n',
            r"line 2, column 'name': the quote opened at '\"tea' is not closed",
        ),
        ("t.csv", b'id,name\n1,"tea\n2,jam\n', r"line 2, column 'name': .* the file ends before the next quote"),
        ("t.csv", b'id,name\n1,5" pipe\n', r"line 2, column 'name': a quote inside a field"),
        (
            "t.csv",
            "id,name\n1,tea\n2,café\n".encode("latin-1"),
            r"line 3, column 'name': byte 0xe9 is not UTF-8 .*'2,café'",
        ),
        ("t.csv", "id;prix é\n".encode("latin-1"), r"line 1, the names of the columns: byte 0xe9 is not UTF-8"),
        ("t.jsonl", '{"id": "café"}\n'.encode("latin-1"), r"line 1: byte 0xe9 is not UTF-8"),
        ("t.csv", b"id,name\n1,caf\xc3", r"line 2, column 'name': byte 0xc3 is not UTF-8"),
        ("t.csv", b"", r"t.csv: empty; expected a first line"),
        ("t.csv", b"id,id\n1,2\n", r"line 1: column 'id' stands 2 times"),
        ("t.jsonl", b"[1, 2]\n", r"line 1: not a JSON object \(found list\)"),
        ("t.jsonl", b"", r"t.jsonl: empty"),
        ("t.parquet", b"id,name\n", r"t.parquet: not a Parquet file"),
        ("t.csv.zst", b"id", r"suffix '.zst' is none of .csv.*unpack it first"),
        ("t.log.gz", b"id", r"suffix '.log' is none of .csv"),
        ("t.parquet.gz", b"id", r"Parquet is packed by itself; unpack it first"),
        ("t.csv.gz", b"id,name", r"t.csv.gz: cannot be read \(Not a gzipped file"),
        ("t.csv.gz", gzip.compress(b"id,name\n1,2\n")[:-6], r"t.csv.gz: cannot be unpacked"),
        ("t.csv.gz", gzip.compress(b'id,name\n1,5" pipe\n'), r"line 2, column 'name': a quote inside a field"),
        ("t.jsonl.gz", gzip.compress('{"id": "café"}\n'.encode("latin-1")), r"line 1: byte 0xe9 is not UTF-8"),
    ],
)
def test_a_file_that_cannot_be_parsed_is_named_with_its_line(
    tmp_path: Path, name: str, data: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=message):
        open_table(tmp_path / name)


@pytest.mark.parametrize("name", ["t.csv", "t.jsonl"])
def test_an_endless_line_is_refused_without_being_read(tmp_path: Path, name: str) -> None:
    """A sparse file of 5 GB, no line end in it: the answer comes after the first megabytes."""
    path = tmp_path / name
    with path.open("wb") as file:
        file.write(b'{"a": 1}\n{"a": "' if name == "t.jsonl" else b"a,b\n1,")
        file.truncate(5 << 30)
    with pytest.raises(DataError, match=r"line 2: longer than 1,000 bytes; expected one row per line"):
        open_table(path, max_line=1000)


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("who", [[1], [2]], r"events.parquet: column 'who' is List\(Int64\); expected text or whole numbers: ids"),
        ("who", [True, False], r"column 'who' is Boolean; expected text"),
        ("when", [True, False], r"events.parquet: column 'when' is Boolean; expected numbers of s since 1970"),
        ("when", [{"at": 1}, {"at": 2}], r"column 'when' is Struct"),
        ("paid", [b"1", b"2"], r"column 'paid' is Binary; expected numbers"),
        ("who", [1.5, 2.0], r"row 1, column 'who', found '1.5': expected an id without decimals"),
    ],
)
def test_parquet_of_wrong_types_is_refused_by_column(tmp_path: Path, column: str, values: list, message: str) -> None:
    good = {"who": ["a", "b"], "what": [1, 2], "when": [START, START], "paid": [1, 2]}
    pl.DataFrame({**good, column: values}).write_parquet(tmp_path / "events.parquet")
    with pytest.raises(DataError, match=message):
        run(mapping(), tmp_path)


STYLES = [NumbersConfig(d, t) for d in ".," for t in ("", ".", ",", " ", "'") if d != t]


@given(st.integers(-(10**9), 10**9), st.sampled_from(STYLES), st.sampled_from(["$", "€", "EUR", "kr."]))
def test_amounts_of_the_currency_that_is_named_are_numbers_and_others_are_not(cents, style, currency) -> None:
    sign = "-" if cents < 0 else ""
    marks = str.maketrans({".": style.decimal, ",": style.thousands})
    written = f"{abs(cents) / 100:,.2f}".translate(marks)
    ways = [f"{sign}{currency}{written}", f"{currency} {sign}{written}", f"{sign}{written} {currency}", sign + written]
    others = [f"{sign}£{written}", f"{currency}", f"{written} {currency} {written}"]
    rows = pl.DataFrame({"paid": ways + others})
    field = number_reader(replace(style, currency=currency))("paid", pl.String(), "events.csv")
    assert rows.select(field.value).to_series().to_list() == [cents / 100] * len(ways) + [None] * len(others)


@given(st.lists(st.integers(-(10**9), 10**9), min_size=1, max_size=20), st.sampled_from(STYLES))
def test_numbers_are_read_as_they_are_written(cents: list[int], style: NumbersConfig) -> None:
    """With its decimals a number is never taken for another: in another style it is itself or a bad row."""
    marks = str.maketrans({".": style.decimal, ",": style.thousands})
    rows = pl.DataFrame({"paid": [f"{number / 100:,.2f}".translate(marks) for number in cents]})
    for other in STYLES:
        field = number_reader(other)("paid", pl.String(), "events.csv")
        parsed = rows.select(field.value).to_series()
        bad = rows.select(pl.any_horizontal(one.holds for one in field.problems(field.value))).to_series()
        assert (bad == parsed.is_null()).all()
        assert all(found in (number / 100, None) for found, number in zip(parsed, cents, strict=True))
        assert other != style or not bad.any()


def test_marks_of_numbers_are_named_where_they_are_missing(tmp_path: Path) -> None:
    (tmp_path / "events.csv").write_text(f'who,what,when,paid\na,x,{START},"1.012,50"\nb,x,{START},-\n')
    with pytest.raises(DataError, match=r"found '1.012,50': expected a number as 1234.5; other marks are named in \["):
        run(mapping(), tmp_path)
    marks = {"decimal": ",", "thousands": "."}
    with pytest.raises(DataError, match=r"row 2, column 'paid', found '-': expected a finite number"):
        run(mapping(numbers=marks), tmp_path)
    card, events = run(mapping(numbers=marks, quality={"max_bad_share": 0.5}), tmp_path)
    assert (card.read, events["value"].to_list()) == (2, [1012.5])
    with pytest.raises(ConfigError, match=r"\[numbers\] currency: found '5 \$'; expected a sign or code alone"):
        mapping(numbers={"currency": "5 $"})
    with pytest.raises(ConfigError, match=r"\[numbers\] currency: found '.'; expected"):
        mapping(numbers={"currency": "."})
    with pytest.raises(ConfigError, match=r"\[items\] name: found ''; expected a column"):
        mapping(items={"item_id": "id", "text": ["name"], "name": ""})
    with pytest.raises(ConfigError, match=r"\[numbers\]: decimal and thousands are both ','; expected two marks"):
        mapping(numbers={"decimal": ",", "thousands": ","})


def test_types_may_differ_between_files_and_float_ids_are_whole_numbers(tmp_path: Path) -> None:
    stamps = [datetime(2020, 9, 13, 12, 26, 40), None]
    pl.DataFrame({"who": [17850.0, None], "what": [1, 2], "when": stamps, "paid": [1, 2]}).write_parquet(
        tmp_path / "events.1.parquet"
    )
    (tmp_path / "events.2.csv").write_text(f"paid;when;what;who\n1;{START};1;17850\n")
    config = mapping(filters={"drop_null": ["who"]})
    card, events = run(config, tmp_path)
    assert events.rows() == [("17850", "1", START * SECOND, 1.0)] * 2
    assert card.filtered == {"drop_null who": 1}
    with pytest.raises(
        DataError, match=r"events.2.csv: no column 'whom' \(\[columns\] user_id\); did you mean 'who'\?; found paid"
    ):
        run(
            replace(
                config, columns=replace(config.columns, user_id="whom"), source=replace(config.source, events="*.2.csv")
            ),
            tmp_path,
        )


def test_all_rows_filtered_says_which_filter_took_them(tmp_path: Path) -> None:
    (tmp_path / "events.csv").write_text(f"who,what,when,paid\na,x,{START},-1\nb,x,{START},\n")
    with pytest.raises(
        DataError, match=r"events.csv: no row of events is left of 2: .*2 by positive = 'paid', 0 are bad"
    ):
        run(mapping(filters={"positive": ["paid"]}), tmp_path)
    with pytest.raises(DataError, match=r"no event is left of 2: no users with min_user_events = 2 have items"):
        run(mapping(filters={"min_user_events": 2}), tmp_path)


def test_an_item_id_that_stands_twice_keeps_its_last_row_or_names_both(tmp_path: Path) -> None:
    (tmp_path / "events.csv").write_text(f"who,what,when,paid\na,x,{START},1\n")
    rows = ["x,X,1990,a|b", "y,Y,1991,", "x,Z,1992,a", "y,Y,1991,", "x,Z,1992,a"]
    (tmp_path / "items.csv").write_text("\n".join(["id,name,year,tags", *rows]))
    items = {"item_id": "id", "text": ["name"], "numeric": ["year"], "multi": {"tags": "|"}}
    config = mapping(source={"events": "events.csv", "items": "items.csv"}, items=items)
    card, _ = run(config, tmp_path)
    assert pl.read_parquet(tmp_path / "log" / "items.parquet").rows() == [
        ("y", "Y", None, 1991),
        ("x", "Z", ["a"], 1992),
    ]
    assert card.settled == {
        "items: rows that stand again in full": 2,
        "items: earlier rows of an id that stands again with other values": 1,
    }
    assert ("  settled", "2 items: rows that stand again in full") in card.describe()
    file = tmp_path / "items.csv"
    file.write_text(file.read_text() + "\nx,X,1990,a|b")  # the first row once more: it is the last now
    run(config, tmp_path)
    assert pl.read_parquet(tmp_path / "log" / "items.parquet")["text"].to_list() == ["Y", "X"]
    wanted = r"items.csv, row 6: item_id 'x' stands already, with other values, in .*items.csv, row 5; expected one row"
    with pytest.raises(DataError, match=wanted):
        run(replace(config, items=replace(config.items, repeated="refuse")), tmp_path)


def test_bad_rows_of_the_catalogue_are_quarantined_and_all_told_before_the_events_are_read(tmp_path: Path) -> None:
    (tmp_path / "events.csv").write_text(f"who,what,when,paid\na,x,{START},1\n")
    rows = ["x,X,1990", ",Y,1991", "z,Z,1992,more", "[1],L,1993", ",,", *(f"i{n},,{n}" for n in range(95))]
    (tmp_path / "items.csv").write_text("\n".join(["id,name,year", *rows]))
    items = {"item_id": "id", "text": ["name"], "numeric": ["year"]}
    config = mapping(source={"events": "none.csv", "items": "items.csv"}, items=items)
    with pytest.raises(DataError) as refused:
        run(config, tmp_path)
    file = tmp_path / "items.csv"
    assert str(refused.value) == (
        "4 of 100 rows of items are bad (4.00%), more than [quality] max_bad_share = 0.01. "
        f"{file}, row 2, column 'id': expected an id (2 such rows). "
        f"{file}, row 3: expected no more fields than there are columns (1 such rows). "
        f"{file}, row 4, column 'id', found '[1]': expected an id, not a list or an object of JSON (1 such rows). "
        f"All are listed in {tmp_path / 'quarantine.parquet'}"
    )
    (tmp_path / "quarantine.parquet").unlink()
    config = replace(config, source=replace(config.source, events="events.csv"), quality=QualityConfig(0.04))
    card, _ = run(config, tmp_path)
    assert (card.catalogue_items, sum(card.bad_of_tables.values())) == (96, 4)
    assert card.bad_of_tables["items, id: expected an id"] == 2
    bad = pl.read_parquet(tmp_path / "quarantine.parquet")
    assert bad.select("table", "row", "column", "found").rows() == [
        ("items", 2, "id", None),
        ("items", 3, "", None),
        ("items", 4, "id", "[1]"),
        ("items", 5, "id", None),
    ]


def test_a_few_values_of_an_item_that_are_no_numbers_are_missing_and_many_are_bad(tmp_path: Path) -> None:
    (tmp_path / "events.csv").write_text(f"who,what,when,paid\na,i1,{START},1\n")
    config = mapping(
        source={"events": "events.csv", "items": "items.csv"}, items={"item_id": "id", "numeric": ["year"]}
    )
    years = ["N/A", "inf", "", *map(str, range(1990, 2008))]
    (tmp_path / "items.csv").write_text("\n".join(["id,year", *(f"i{n},{year}" for n, year in enumerate(years))]))
    card, _ = run(config, tmp_path)
    assert card.settled == {"items: values of 'year' that are no numbers, taken as missing": 2}
    found = pl.read_parquet(tmp_path / "log" / "items.parquet")["year"]
    assert found.to_list() == [None, None, None, *map(float, range(1990, 2008))]
    (tmp_path / "items.csv").write_text("\n".join(["id,year", 'a,"1,299.00"', *(f"i{n},1" for n in range(80))]))
    with pytest.raises(DataError, match=r"row 1, column 'year', found '1,299.00': expected a number as .* \[numbers\]"):
        run(config, tmp_path)
    (tmp_path / "items.csv").write_text("\n".join(["id,year", "a,N/A", *(f"i{n},1" for n in range(8))]))
    wanted = (
        r"1 of 9 rows of items are bad .*row 1, column 'year', found 'N/A': expected a finite number \(1 such rows\)"
    )
    with pytest.raises(DataError, match=wanted):
        run(config, tmp_path)


def test_an_equal_row_of_a_user_is_one_and_another_is_refused(tmp_path: Path) -> None:
    (tmp_path / "events.csv").write_text(f"who,what,when,paid\na,x,{START},1\n")
    (tmp_path / "users.csv").write_text("who,age\na,3\nb,4\na,3\n")
    config = mapping(source={"events": "events.csv", "users": "users.csv"})
    card, _ = run(config, tmp_path)
    assert pl.read_parquet(tmp_path / "log" / "users.parquet").rows() == [("b", "4"), ("a", "3")]
    assert card.settled == {"users: rows that stand again in full": 1}
    (tmp_path / "users.csv").write_text("who,age\na,3\na,4\n")
    with pytest.raises(
        DataError, match=r"users.csv, row 2: user_id 'a' stands already, .* per id \(repeated ids: 1\)$"
    ):
        run(config, tmp_path)


def test_items_and_users_arrive_in_canonical_types(tmp_path: Path) -> None:
    (tmp_path / "events.csv").write_text(f"who,what,when,paid\na,x,{START},1\nb,y,{START},1\nb,z,{START},1\n")
    (tmp_path / "items.csv").write_text(
        "id,name,brand,genres,year\nx,Tea, Acme ,hot|loose|hot,1990\ny,,,,\nw,Jam,Best,| |,1\n"
    )
    (tmp_path / "users.jsonl").write_text('{"who": "a", "age": 30}\n{"who": "b"}\n')
    config = mapping(
        source={"events": "events.csv", "items": "items.csv", "users": "users.jsonl"},
        items={
            "item_id": "id",
            "text": ["name", "brand"],
            "categorical": ["brand"],
            "multi": {"genres": "|"},
            "numeric": ["year"],
        },
    )
    card, _ = run(config, tmp_path)
    items = pl.read_parquet(tmp_path / "log" / "items.parquet")
    assert items.schema == {
        "item_id": pl.String,
        "text": pl.String,
        "brand": pl.String,
        "genres": pl.List(pl.String),
        "year": pl.Float64,
    }
    assert items.rows() == [
        ("x", "Tea, Acme", "Acme", ["hot", "loose"], 1990.0),
        ("y", "y", None, None, None),
        ("w", "Jam, Best", "Best", None, 1.0),
    ]
    assert (card.items, card.catalogue_items, card.missing_text) == (3, 3, 2)  # y has no text, z no row
    assert pl.read_parquet(tmp_path / "log" / "users.parquet").rows() == [("a", "30"), ("b", None)]


def test_impressions_are_checked_and_stored(tmp_path: Path) -> None:
    (tmp_path / "events.csv").write_text(f"who,what,when,paid\na,x,{START},1\n")
    (tmp_path / "shown.csv").write_text(
        f"page,who,what,when,click\n1,a,x,{START},1\n1,a,y,{START},false\n1,a,z,{START},7\n"
    )
    names = {"request_id": "page", "user_id": "who", "item_id": "what", "timestamp": "when", "label": "click"}
    config = mapping(source={"events": "events.csv", "impressions": "shown.csv"}, impressions=names)
    with pytest.raises(
        DataError,
        match=r"1 of 3 rows of impressions are bad .*shown.csv, row 3, column 'click', found '7': expected a label",
    ):
        run(config, tmp_path)
    card, _ = run(replace(config, quality=replace(config.quality, max_bad_share=0.5)), tmp_path)
    stored = pl.read_parquet(tmp_path / "log" / "impressions.parquet")
    assert stored.rows() == [("1", "a", "x", START * SECOND, 1), ("1", "a", "y", START * SECOND, 0)]
    assert (card.impressions, card.bad_impressions) == (2, 1)


moments = st.datetimes(datetime(1981, 1, 1), datetime(2090, 1, 1))
zones = st.sampled_from(["UTC", "Europe/Berlin", "America/New_York", "Asia/Kolkata"])


@given(moment=moments, zone=zones, written=st.sampled_from(["naive", "T", "Z", "UTC", "offset", "minutes", "date"]))
@settings(max_examples=300, deadline=None)
def test_text_times_are_what_python_says_they_are(moment: datetime, zone: str, written: str) -> None:
    local = moment.replace(tzinfo=ZoneInfo(zone))
    exists = local.astimezone(UTC).astimezone(local.tzinfo).replace(tzinfo=None) == moment
    text, expected = {
        "naive": (str(moment), local),
        "T": (moment.isoformat(), local),
        "Z": (moment.isoformat() + "Z", moment.replace(tzinfo=UTC)),
        "UTC": (f"{moment} UTC", moment.replace(tzinfo=UTC)),
        "offset": (f"{moment.isoformat()}-05:30", moment.replace(tzinfo=UTC) + timedelta(hours=5, minutes=30)),
        "minutes": (f"{moment:%Y-%m-%d %H:%M}", local.replace(second=0, microsecond=0)),
        "date": (f"{moment:%Y-%m-%d}", datetime(moment.year, moment.month, moment.day, tzinfo=ZoneInfo(zone))),
    }[written]
    field = time_reader(TimeConfig("datetime", zone))("at", pl.String(), "t.csv")
    found = pl.select(pl.lit(text).alias("at")).select(field.value).item()
    if written in ("naive", "T", "minutes") and not exists:
        assert found is None  # an hour the clocks skip
        return
    assert found == (expected - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1)


def test_a_stated_format_reads_what_is_not_year_first() -> None:
    for form, text in (("%d/%m/%Y %H:%M", "03/04/2017 10:30"), ("%d/%m/%Y", "03/04/2017"), ("%Y%m%d", "20170403")):
        field = time_reader(TimeConfig("datetime", format=form))("at", pl.String(), "t.csv")
        found = pl.select(pl.lit(text).alias("at")).select(field.value).item()
        assert datetime.fromtimestamp(found / 1e6, UTC).strftime(form) == text


random_pairs = st.lists(st.tuples(st.integers(0, 8), st.integers(0, 8)), min_size=1, max_size=80)


@given(pairs=random_pairs, users=st.integers(1, 4), items=st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_the_core_is_what_repeated_removal_leaves(pairs: list[tuple[int, int]], users: int, items: int) -> None:
    left, before = pairs, None
    while left != before:
        before = left
        by_user, by_item = Counter(user for user, _ in left), Counter(item for _, item in left)
        left = [(user, item) for user, item in left if by_user[user] >= users and by_item[item] >= items]
    frame = pl.DataFrame(pairs, schema={"user_id": pl.Int64, "item_id": pl.Int64}, orient="row").cast(pl.String)
    with TemporaryDirectory() as work:
        core = thinning.core(frame.lazy(), users, items, Path(work))
        kept = core.of(frame.lazy()).collect().rows()
    assert kept == [(str(user), str(item)) for user, item in left]
    assert core.events == len(left) == len(pairs) - core.rare_users - core.rare_items


@given(
    events=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 300)), min_size=1, max_size=60), gap=st.integers(0, 40)
)
@settings(max_examples=40, deadline=None)
def test_sessions_are_cut_where_a_user_was_away(events: list[tuple[int, int]], gap: int) -> None:
    expected = set()
    for user in {user for user, _ in events}:
        session = last = None
        for moment in sorted(at for one, at in events if one == user):
            if last is None or moment - last > gap:
                session = moment
            expected.add((str(user), moment, str(session)))
            last = moment
    frame = pl.DataFrame(events, schema=["user_id", "timestamp"], orient="row").with_columns(
        pl.col("user_id").cast(pl.String), pl.lit("x").alias("item_id")
    )
    with TemporaryDirectory() as work:
        cut = thinning.cut_sessions(frame.lazy(), len(events), gap, Path(work), at_once=7).collect()
    assert cut.height == len(events)
    assert set(cut.select("user_id", "timestamp", "session_id").iter_rows()) == expected


def test_a_user_who_makes_much_of_the_log_is_told_and_can_be_left_out(tmp_path: Path) -> None:
    rows = [f"u{n % 30},i{n % 7},{START + n},1" for n in range(90)] + [f"bot,i{n % 7},{START + n},1" for n in range(35)]
    (tmp_path / "events.csv").write_text("\n".join(["who,what,when,paid", *rows]))
    card, _ = run(mapping(), tmp_path)
    (doubt,) = card.doubts()
    assert doubt.startswith("One user makes 28% of the events (35), as a machine")
    card, events = run(mapping(filters={"max_user_events": 34, "min_user_events": 3}), tmp_path)
    assert (card.filtered, card.events, card.doubts()) == ({"max_user_events = 34": 35}, 90, [])
    assert "bot" not in events["user_id"]
    assert events["timestamp"].is_sorted()  # in the file's order
    assert run(mapping(filters={"max_user_events": 35}), tmp_path)[0].filtered == {}
    with pytest.raises(DataError, match=r"events.csv: no event is left: every user has more than max_user_events = 2"):
        run(mapping(filters={"max_user_events": 2}), tmp_path)


@given(ids=st.lists(st.one_of(st.none(), st.integers(0, 12).map(str)), min_size=1, max_size=40))
@settings(max_examples=40, deadline=None)
def test_only_the_first_row_of_an_event_id_stays(ids: list[str | None]) -> None:
    expected = [n for n, name in enumerate(ids) if name is not None and name in ids[:n]]
    found = thinning.repeated_ids(pl.LazyFrame({"event_id": ids}, schema={"event_id": pl.String}), len(ids), at_once=6)
    assert found.tolist() == expected


@pytest.mark.parametrize("at_once", [7, 100, 999, 5000])
def test_a_log_counted_in_parts_is_the_log_counted_whole(tmp_path: Path, at_once: int) -> None:
    draw = np.random.default_rng(3)
    frame = pl.DataFrame(
        {
            "user_id": draw.integers(0, 20, 999) ** 2,
            "item_id": draw.integers(0, 30, 999),
            "timestamp": draw.integers(-9, 9, 999),
        }
    )
    frame = frame.with_columns(pl.col("user_id", "item_id").cast(pl.String))
    frame.write_parquet(tmp_path / "e.parquet", row_group_size=64)
    (tmp_path / "work").mkdir()
    facts = measure_events(tmp_path / "e.parquet", 999, tmp_path / "work", at_once)
    lengths = frame["user_id"].value_counts()["count"].to_numpy()
    assert facts.repeated_share == 1 - frame.select("user_id", "item_id").n_unique() / 999
    assert facts.history == {f"p{p}": np.percentile(lengths, p, method="lower") for p in (10, 25, 50, 75, 90, 100)}
    assert facts.users == len(lengths)
    assert set(facts.items.to_list()) == set(frame["item_id"].to_list())
    assert len(facts.items) == frame["item_id"].n_unique()
    assert (facts.first_time, facts.last_time) == (frame["timestamp"].min(), frame["timestamp"].max())
    write_users(tmp_path / "e.parquet", facts.first_rows, tmp_path / "users.parquet", tmp_path / "work", at_once)
    users = pl.read_parquet(tmp_path / "users.parquet")
    assert users["user_id"].to_list() == frame["user_id"].unique(maintain_order=True).to_list()


def shop(folder: Path, draw: np.random.Generator) -> Path:
    """Text ids, returns, anonymous rows, sessions of its own."""
    rows = []
    for n in range(600):
        when = f"2021-{1 + n % 9:02}-{1 + n % 27:02} 10:{n % 60:02}"
        who, what = f'"customer ""{n % 23}"""', f'"tea, no. {draw.integers(15)}"'
        rows.append(f"{who},{what},{when},{['buy', 'view'][n % 2]},{-1 if n % 50 == 0 else 2},{n // 2}")
    rows += [f",x,2021-01-01 10:00,buy,1,{n}" for n in range(600, 620)]
    (folder / "shop.csv").write_text("\n".join(["customer,tea,when,what,pieces,receipt", *rows]))
    text = """
    [source]
    events = "shop.csv"
    [columns]
    user_id = "customer"
    item_id = "tea"
    timestamp = "when"
    action = "what"
    session_id = "receipt"
    [time]
    zone = "Europe/London"
    [filters]
    drop_null = ["customer"]
    positive = ["pieces"]
    [requests]
    positive.actions = ["buy"]
    """
    (folder / "shop.toml").write_text(text)
    return folder / "shop.toml"


def clicks(folder: Path, draw: np.random.Generator) -> Path:
    """Unsorted Parquet parts in milliseconds, no text, rows repeated; sessions to be cut."""
    for part in range(3):
        time = draw.integers(START * 1000, (START + 90 * 86400) * 1000, 400)
        frame = pl.DataFrame({"uid": draw.integers(1, 20, 400), "iid": draw.integers(1, 40, 400), "ts": time})
        pl.concat([frame, frame.head(3)]).write_parquet(folder / f"clicks_{part}.parquet")
    (folder / "clicks.toml").write_text(
        '[source]\nevents = "clicks_*.parquet"\n[columns]\nuser_id = "uid"\nitem_id = "iid"\ntimestamp = "ts"\n'
        '[time]\nunit = "ms"\n[sessions]\ngap = "6h"\n[filters]\nmin_user_events = 5\nmin_item_events = 5\n'
    )
    return folder / "clicks.toml"


def playlists(folder: Path, draw: np.random.Generator) -> Path:
    """JSON Lines that know only the order."""
    rows = [{"list": f"p{n % 12}", "song": int(draw.integers(25)), "place": n // 12} for n in range(360)]
    (folder / "plays.jsonl").write_text("\n".join(json.dumps(row) for row in draw.permutation(np.array(rows))))
    (folder / "plays.toml").write_text(
        '[source]\nevents = "plays.jsonl"\n[columns]\nuser_id = "list"\nitem_id = "song"\nposition = "place"\n'
    )
    return folder / "plays.toml"


@pytest.mark.parametrize(
    ("make", "kind", "users"), [(shop, "time", 23), (clicks, "time", 19), (playlists, "last_request", 12)]
)
def test_three_quite_different_logs_are_prepared_by_toml_alone(tmp_path: Path, make, kind: str, users: int) -> None:
    config = load_mapping(make(tmp_path, np.random.default_rng(1)))
    card = ingest_files(config, tmp_path, tmp_path / "log", make.__name__)
    assert card.users == users
    assert card.read == card.events + sum(card.filtered.values())
    assert card.order == ("time" if kind == "time" else "position")
    settings = overlaid(prepare_defaults(tmp_path / "log"), {"workers": 1, "negatives": 5})
    done = prepare(tmp_path / "log", tmp_path / "set", parse(PrepareConfig, settings, ""))
    assert done.manifest["config"]["split"]["kind"] == kind
    assert tuple(done.manifest["config"]["positive"]) == config.requests.positive.actions
    assert done.manifest["counts"]["events"] == card.events
    assert all(count > 0 for count in done.manifest["counts"]["requests"].values())
    assert done.manifest["source"]["digest"] == card.digest
    if make is clicks:
        events = pl.read_parquet(tmp_path / "log" / "events.parquet")
        assert events.group_by("user_id", "session_id").len().height < events.height


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"columns": {"timestamp": "a", "position": "b"}},
            r"my.toml: \[columns\]: expected either timestamp .* found both",
        ),
        (
            {"columns": {"user": "a", "timestamp": "b"}},
            r"my.toml \[columns\]: unknown key 'user'; did you mean 'user_id'",
        ),
        ({"source": {"event": "a"}}, r"unknown key 'event'; did you mean 'events'"),
        ({"requests": {"positive": {"action": ["buy"]}}}, r"unknown key 'action'; did you mean 'actions'"),
        ({"requests": {"positive": {"min_value": 4}}}, r"positive.min_value: the log has no values"),
        (
            {"sessions": {"gap": "30 parsecs"}},
            r"my.toml: \[sessions\] gap: found '30 parsecs'; expected a number and s, m, h or d",
        ),
        ({"time": {"zone": "Mars/Olympus"}}, r"no time zone 'Mars/Olympus'"),
        ({"time": {"unit": "ns"}}, r"time.unit.*'ns'"),
        ({"items": {"numeric": ["text"]}}, r"\[items\]: column 'text' is a name of the system's own"),
        ({"quality": {"max_bad_share": 2}}, r"quality.max_bad_share"),
    ],
)
def test_a_mapping_that_cannot_be_meant_is_refused_by_key(tmp_path: Path, change: dict, message: str) -> None:
    table = {"source": {"events": "e.csv"}, "columns": {"timestamp": "t"}, **change}
    lines = [f"{section}.{key} = {toml(value)}" for section, keys in table.items() for key, value in keys.items()]
    (tmp_path / "my.toml").write_text("\n".join(lines))
    with pytest.raises(ConfigError, match=message):
        load_mapping(tmp_path / "my.toml")


def toml(value: object) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {toml(one)}" for key, one in value.items()) + "}"
    return json.dumps(value)
