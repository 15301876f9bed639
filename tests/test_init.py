"""`recsys init` on logs as they are found: what it guesses, and that its file works as written."""

import datetime as dt
import json
import re
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest
from typer.testing import CliRunner, Result

from pipelines.guess import guess_columns, guess_time
from pipelines.ingest import ingest_files
from pipelines.mapping import NumbersConfig, load_mapping
from pipelines.mapping_draft import write_mapping
from pipelines.sources import open_table
from recsys.cli import app
from recsys.errors import ConfigError, DataError

ROOT = Path(__file__).parent.parent

RETAIL = """InvoiceNo,StockCode,Description,Quantity,InvoiceDate,UnitPrice,CustomerID,Country
536365,85123A,"WHITE, HANGING HEART",6,12/1/2010 8:26,2.55,17850,United Kingdom
536365,71053,LANTERN,6,12/1/2010 8:26,3.39,17850,United Kingdom
536366,22633,HAND WARMER,-6,12/13/2010 8:28,1.85,13047,France
536367,84406B,,8,12/2/2010 8:34,2.75,,France
"""
VIEWS = """timestamp,visitorid,event,itemid,transactionid
1433221332117,257597,view,355908,
1433224214164,992329,view,248676,
1433221999827,111016,transaction,318965,4000
"""
SHOP = """event_time,event_type,product_id,category_code,brand,price,user_id,user_session
2019-10-01 00:00:00 UTC,view,44600062,,shiseido,35.79,541312140,72d76fde
2019-10-01 00:00:01 UTC,cart,3900821,appliances.water,aqua,33.20,554748717,9333dfbd
"""
ATOMIC = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n196\t242\t3\t881250949\n186\t302\t3\t891717742\n"
REVIEWS = [
    {"reviewerID": "A1", "asin": "B00", "overall": 5.0, "unixReviewTime": 1252800000, "reviewText": "fine"},
    {"reviewerID": "A2", "asin": "B01", "overall": 2.0, "unixReviewTime": 1252800001, "reviewText": "not, fine"},
]
PLAYLISTS = "customer;sku;pos\nx;1;0\nx;2;1\n"


NESTED = [
    {"user": {"id": "Ünï 1", "country": "DE"}, "product": {"sku": "a/b", "tags": ["x", "y"]}, "ts": 1700000000},
    {"user": {"id": "Ünï 2"}, "product": {"sku": "it's", "tags": []}, "ts": 1700000060},
]
SESSIONS = "session_id,item_id,timestamp\ns1,a,1700000000\ns1,b,1700000060\ns2,a,1700000120\n"


def file(folder: Path, name: str, content: str) -> Path:
    (folder / name).write_text(content)
    return folder / name


NAMES = ("user_id", "item_id", "timestamp", "position", "action", "value", "session_id")


@pytest.mark.parametrize(
    ("text", "form"),
    [
        ("03/01/2024 02:05 PM", "%m/%d/%Y %I:%M %p"),
        ("12/31/10 8:26", "%m/%d/%y %H:%M"),
        ("01-Mar-2024 10:00", "%d-%b-%Y %H:%M"),
        ("01-Mar-2024", "%d-%b-%Y"),
    ],
)
def test_formats_of_exports_are_known(text, form):
    found = guess_time(pl.DataFrame({"at": [text, text]}), "at")
    assert (found.unit, found.format) == ("datetime", form)


def test_a_glob_is_guessed_by_its_first_file_and_written_as_it_is(tmp_path):
    for number in range(2):
        file(tmp_path, f"part{number}.csv", f"user_id,item_id,timestamp\nu,{number},170000000{number}\n")
    text = write_mapping(tmp_path / "part*.csv", None, tmp_path)
    assert 'events = "part*.csv"' in text
    (tmp_path / "my.toml").write_text(text)
    assert ingest_files(load_mapping(tmp_path / "my.toml"), tmp_path, tmp_path / "log", "parts").events == 2


@pytest.mark.parametrize("clock", ["10:05", "9:05:30", "01:05 PM"])
@pytest.mark.parametrize("days", [("2024-03-01", "2024-03-02"), ("01/03/2024", "13/03/2024")])
def test_a_date_and_its_time_of_day_are_read_as_one(tmp_path, clock, days):
    rows = "".join(f"u{day},i,{day},{clock}\n" for day in days)
    path = file(tmp_path, "log.csv", "user,item,date,time\n" + rows)
    text = write_mapping(path, None, tmp_path)
    assert 'timestamp = "date + time"' in text
    (tmp_path / "my.toml").write_text(text)
    assert not ingest_files(load_mapping(tmp_path / "my.toml"), tmp_path, tmp_path / "log", "x").bad
    read = pl.read_parquet(tmp_path / "log/events.parquet")["timestamp"].cast(pl.Datetime("us"))
    seconds = 30 if clock == "9:05:30" else 0
    hour = {"10:05": 10, "9:05:30": 9, "01:05 PM": 13}[clock]
    assert [moment.time() for moment in read] == [dt.time(hour, 5, seconds)] * 2
    assert read[0].date() == dt.date(2024, 3, 1)
    whole = file(tmp_path, "whole.csv", f"user,item,timestamp,pause\nu,i,2024-03-01 10:05:00,{clock}\n")
    assert 'timestamp = "timestamp"' in write_mapping(whole, None, tmp_path)


@pytest.mark.parametrize(
    ("columns", "row", "timestamp"),
    [
        ("date,time", "20240131,10:05:00", "date + time"),
        ("date,time", "2024/01/31,10:05", "date + time"),
        ("date,time", "2024-01-31 00:00:00,10:05", "date + time"),
        ("date,time", "31.01.2024,0:05:15.5", "date"),  # no format reads both: told
        ("date,duration", "2024-01-31,10:05", "date"),  # minutes of something
        ("date,delivery_time", "2024-01-31T00:00:00Z,10:05", "date"),
    ],
)
def test_a_clock_is_joined_only_where_both_can_be_read(tmp_path, columns, row, timestamp):
    path = file(tmp_path, "log.csv", f"user,item,{columns}\n" + "".join(f"u{n},i{n % 2},{row}\n" for n in range(9)))
    text = write_mapping(path, None, tmp_path)
    assert f'timestamp = "{timestamp}"' in text
    assert (timestamp == "date") == ("are not read" in text)
    (tmp_path / "my.toml").write_text(text)
    card = ingest_files(load_mapping(tmp_path / "my.toml"), tmp_path, tmp_path / "log", "x")
    assert (card.events, card.bad) == (9, {})


def test_a_date_without_its_clock_in_most_rows_is_read_alone(tmp_path):
    rows = "".join(f"u{n},i,2024-01-31,{'10:05' if n % 3 == 0 else ''}\n" for n in range(9))
    text = write_mapping(file(tmp_path, "log.csv", "user,item,date,time\n" + rows), None, tmp_path)
    assert 'timestamp = "date"' in text


def test_lists_that_are_no_orders_are_let_be(tmp_path):
    names = "".join(f'u{n % 3},c{n % 4},"Milk {n}, 1l",{1_700_000_000 + n}\n' for n in range(40))
    text = write_mapping(file(tmp_path, "named.csv", "user,code,products,ts\n" + names), None, tmp_path)
    assert "products[" not in text
    rows = [
        {
            "user": f"u{n % 3}",
            "ts": 1_700_000_000 + n,
            "device": [{"id": f"d{n}"}],
            "promotions": [{"id": 7}],
            "lines": [{"sku": f"s{n % 4}", "id": n}],
        }
        for n in range(9)
    ]
    text = write_mapping(file(tmp_path, "o.jsonl", "".join(json.dumps(row) + "\n" for row in rows)), None, tmp_path)
    assert 'item_id = "lines[].sku"' in text
    assert '# value = ""' in text
    rows = [{"user": f"u{n % 3}", "ts": 1_700_000_000 + n, "items": [{"id": n % 4, "qty": 2}]} for n in range(9)]
    text = write_mapping(file(tmp_path, "i.jsonl", "".join(json.dumps(row) + "\n" for row in rows)), None, tmp_path)
    assert 'item_id = "items[].id"' in text
    assert '# value = ""' in text
    rows = [{"user": f"u{n % 3}", "ts": 1_700_000_000 + n, "no": f"p{n % 4}", "items": [{"id": n}]} for n in range(9)]
    items = file(tmp_path, "items.csv", "no,title\n" + "".join(f"p{n},Tea {n}\n" for n in range(4)))
    events = file(tmp_path, "c.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    assert 'item_id = "no"  # its values are the catalogue' in write_mapping(events, items, tmp_path)


ORDERS = [
    {
        "order_id": "o1",
        "customer": "u1",
        "ts": 1700000000,
        "lines": [{"sku": 7, "price": 2.5}, {"sku": "b", "price": 1}],
    },
    {"order_id": "o2", "customer": "u2", "ts": 1700000060, "lines": [{"sku": "b", "price": 3}]},
]


@pytest.mark.parametrize(
    ("name", "content", "item_id", "value"),
    [
        ("orders.jsonl", "".join(json.dumps(row) + "\n" for row in ORDERS), "lines[].sku", [2.5, 1.0, 3.0]),
        (
            "orders.ndjson",
            "".join(
                json.dumps({**row, "lines": None, "items": [line["sku"] for line in row["lines"]]}) + "\n"
                for row in ORDERS
            ),
            "items[]",
            None,
        ),
        (
            "orders.csv",
            "order_id,customer,ts,products\no1,u1,1700000000,7; b\no2,u2,1700000060,b\n",
            "products[;]",
            None,
        ),
    ],
)
def test_an_order_with_a_list_of_articles_is_an_event_each(tmp_path, name, content, item_id, value):
    text = write_mapping(file(tmp_path, name, content), None, tmp_path)
    assert f'item_id = "{item_id}"' in text
    (tmp_path / "my.toml").write_text(text)
    card = ingest_files(load_mapping(tmp_path / "my.toml"), tmp_path, tmp_path / "log", "x")
    events = pl.read_parquet(tmp_path / "log/events.parquet")
    assert (card.bad, card.read) == ({}, 3)
    assert events["item_id"].to_list() == ["7", "b", "b"]
    assert events["session_id"].to_list() == ["o1", "o1", "o2"]
    assert (events["value"].to_list() if "value" in events.columns else None) == value


def test_neither_a_price_nor_a_list_is_taken_for_an_id(tmp_path):
    rows = "".join(f"A{n // 2};K{n % 3};B{n % 4};05.03.2024 10:0{n};{n};1.{n}00,50\n" for n in range(9))
    shop = file(tmp_path, "shop.csv", "Bestellnr;Kunde;Artikel;Datum;Menge;Preis\n" + rows)
    orders = [
        {"ts": 1_700_000_000 + n, "person": f"u{n % 3}", "items": [f"a{n}"], "sku": f"s{n % 2}"} for n in range(9)
    ]
    nested = file(tmp_path, "orders.jsonl", "".join(json.dumps(row) + "\n" for row in orders))
    for path, never in ((shop, "Preis"), (nested, "items")):
        table = open_table(path)
        guesses = guess_columns(table, table.rows(list(table.columns)).collect())
        assert never not in {guesses[name].column for name in ("user_id", "item_id") if name in guesses}


@pytest.mark.parametrize(
    ("name", "content", "columns", "time"),
    [
        (
            "retail.csv",
            RETAIL,
            ("CustomerID", "StockCode", "InvoiceDate", None, None, "Quantity", "InvoiceNo"),
            ("datetime", "%m/%d/%Y %H:%M"),
        ),
        ("views.csv", VIEWS, ("visitorid", "itemid", "timestamp", None, "event", None, "transactionid"), ("ms", None)),
        (
            "shop.csv",
            SHOP,
            ("user_id", "product_id", "event_time", None, "event_type", "price", "user_session"),
            ("datetime", None),
        ),
        (
            "ml.inter.tsv",
            ATOMIC,
            ("user_id:token", "item_id:token", "timestamp:float", None, None, "rating:float", None),
            ("s", None),
        ),
        (
            "reviews.jsonl",
            "".join(json.dumps(row) + "\n" for row in REVIEWS),
            ("reviewerID", "asin", "unixReviewTime", None, None, "overall", None),
            ("s", None),
        ),
        ("lists.csv", PLAYLISTS, ("customer", "sku", None, "pos", None, None, None), None),
    ],
)
def test_well_known_logs_are_guessed_and_the_file_works_as_written(
    tmp_path: Path, name, content, columns, time
) -> None:
    expected = {canonical: column for canonical, column in zip(NAMES, columns, strict=True) if column}
    path = file(tmp_path, name, content)
    table = open_table(path)
    sample = table.rows(list(table.columns)).collect()
    guesses = guess_columns(table, sample)
    assert {canonical: guess.column for canonical, guess in guesses.items()} == expected
    if time:
        found = guess_time(sample, expected["timestamp"])
        assert found is not None
        assert (found.unit, found.format) == time
    (tmp_path / "my.toml").write_text(write_mapping(path, None, tmp_path))
    card = ingest_files(load_mapping(tmp_path / "my.toml"), tmp_path, tmp_path / "log", name)
    assert not card.bad
    assert card.read == len(content.splitlines()) - (0 if name.endswith("jsonl") else 1)
    if name == "retail.csv":  # a row without customer, and a return
        assert card.filtered == {"drop_null CustomerID": 1, "positive Quantity": 1}


def test_columns_without_a_telling_name_are_guessed_by_content(tmp_path: Path) -> None:
    frame = pl.DataFrame(
        {
            "a": [f"{n % 7}-x" for n in range(100)],
            "b": [n % 31 for n in range(100)],
            "c": [1_500_000_000_000 + n for n in range(100)],
            "d": [n / 7 for n in range(100)],
        }
    )
    frame.write_parquet(tmp_path / "t.parquet")
    guesses = guess_columns(open_table(tmp_path / "t.parquet"), frame)
    assert {name: guess.column for name, guess in guesses.items()} == {"timestamp": "c", "user_id": "a", "item_id": "b"}
    assert all("CHECK" in guesses[name].why for name in ("user_id", "item_id"))
    text = write_mapping(tmp_path / "t.parquet", None, tmp_path)
    assert 'unit = "ms"' in text
    frame.select("d").write_parquet(tmp_path / "t.parquet")
    text = write_mapping(tmp_path / "t.parquet", None, tmp_path)
    assert text.count('= "?"') == 3
    (tmp_path / "my.toml").write_text(text)
    with pytest.raises(DataError, match=r"no column '\?' \(\[columns\] user_id\); found d"):
        ingest_files(load_mapping(tmp_path / "my.toml"), tmp_path, tmp_path / "log", "x")


def test_a_catalogue_is_sorted_into_text_categories_values_and_numbers(tmp_path: Path) -> None:
    genres, languages = ["drama|war", "war", "comedy|drama"], ["en", "fr"]
    rows = [f'{n},"Film no. {n} ({1990 + n % 9})",{genres[n % 3]},{languages[n % 2]},{n * 1.5}' for n in range(60)]
    items = file(tmp_path, "films.csv", "\n".join(["movieId,title,genres,language,length", *rows]))
    text = write_mapping(file(tmp_path, "ml.tsv", ATOMIC), items, tmp_path)
    (tmp_path / "my.toml").write_text(text)
    config = load_mapping(tmp_path / "my.toml").items
    assert (config.item_id, config.text, config.categorical) == ("movieId", ("title",), ("language",))
    assert (config.multi, config.numeric) == ({"genres": "|"}, ("length",))


def test_how_numbers_are_written_is_guessed(tmp_path: Path) -> None:
    rows = [f"u{n % 5};{n % 7};2024-01-{n % 28 + 1:02};{n},{n % 10}0;{n % 3 - 1},0" for n in range(40)]
    events = file(tmp_path, "buys.csv", "\n".join(["user;item;date;price;quantity", *rows]))
    items = file(tmp_path, "items.csv", "\n".join(["item;weight", *(f"{n};{n}.000,25" for n in range(1, 30))]))
    (tmp_path / "my.toml").write_text(write_mapping(events, items, tmp_path))
    config = load_mapping(tmp_path / "my.toml")
    assert (config.numbers, config.items.numeric) == (NumbersConfig(",", "."), ("weight",))
    assert config.filters.positive == ("quantity",)
    card = ingest_files(config, tmp_path, tmp_path / "log", "x")
    assert (card.bad, card.filtered) == ({}, {"positive quantity": 27})
    assert pl.read_parquet(tmp_path / "log/items.parquet")["weight"].max() == 29_000.25


@pytest.mark.parametrize(
    ("form", "currency"), [("${0}.50", "$"), ("{0},50 €", "€"), ("EUR {0}.50", "EUR"), ("$-{0}.50", "$")]
)
def test_a_currency_is_guessed_and_amounts_in_another_one_are_no_numbers(tmp_path: Path, form, currency) -> None:
    events = file(tmp_path, "buys.csv", "\n".join(["user;item;date", *(f"u{n % 5};{n};2024-01-01" for n in range(40))]))
    rows = [f"{n};Tea {n};{'Green. ' * 9};{form.format(n + 10)}" for n in range(40)]
    items = file(tmp_path, "items.csv", "\n".join(["item;title;description;price", *rows]))
    (tmp_path / "my.toml").write_text(write_mapping(events, items, tmp_path))
    config = load_mapping(tmp_path / "my.toml")
    assert (config.numbers.currency, config.items.numeric) == (currency, ("price",))
    assert (config.items.text, config.items.name) == (("title", "description"), "title")
    ingest_files(config, tmp_path, tmp_path / "log", "x")
    found = pl.read_parquet(tmp_path / "log/items.parquet").sort("price")
    sign = -1 if "-" in form else 1
    assert sorted(found["price"] * sign) == [n + 10.5 for n in range(40)]
    assert set(found["text"].str.split("\n").list.len()) == {2}
    assert "Tea 1\n" + " ".join(["Green."] * 9) in found["text"].to_list()
    items.write_text(items.read_text() + "\n99;Tea 99;Green;£9.50\n")
    with pytest.raises(DataError, match=r"row 41, column 'price', found '£9.50': expected a number as .* currency"):
        ingest_files(config, tmp_path, tmp_path / "log", "x")


@pytest.mark.parametrize(
    ("price", "size", "written", "numeric"),
    [("0.5{0}", "3,{0}", NumbersConfig(), ("price",)), ("0,5{0}", "3,{0}", NumbersConfig(","), ("price", "size"))],
)
def test_one_way_of_writing_numbers_is_guessed_for_all_columns(tmp_path: Path, price, size, written, numeric) -> None:
    events = file(tmp_path, "buys.csv", "\n".join(["user;item;date", *(f"u{n % 5};{n};2024-01-01" for n in range(40))]))
    rows = [f"{n};{price.format(n + 10)};{size.format(n + 10)}" for n in range(40)]
    items = file(tmp_path, "items.csv", "\n".join(["item;price;size", *rows]))
    (tmp_path / "my.toml").write_text(write_mapping(events, items, tmp_path))
    config = load_mapping(tmp_path / "my.toml")
    assert (config.numbers, config.items.numeric) == (written, numeric)
    assert not ingest_files(config, tmp_path, tmp_path / "log", "x").bad


def test_the_command_line_from_a_file_to_a_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    file(tmp_path, "views.csv", VIEWS + VIEWS.split("\n", 1)[1].replace("14332", "14"))

    def recsys(*arguments: str) -> Result:
        return CliRunner().invoke(app, arguments)

    done = recsys("init", "--events", "views.csv", "--out", "my.toml")
    assert (done.exit_code, done.exception) == (0, None)
    assert done.stdout.strip() == (tmp_path / "my.toml").read_text().strip()
    assert "recsys ingest --config my.toml" in done.stderr
    again = recsys("init", "--events", "views.csv", "--out", "my.toml")
    assert isinstance(again.exception, ConfigError)
    assert "my.toml: already there" in str(again.exception)
    arguments = ("ingest", "--config", "my.toml", "--workspace", "w", "--json")
    refused = subprocess.run(
        [sys.executable, "-m", "recsys.cli", *arguments], capture_output=True, text=True, check=False
    )
    assert refused.returncode == 3
    assert refused.stdout == ""
    assert "recsys: 3 of 6 rows of events are bad" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert pl.read_parquet("w/quarantine.parquet")["row"].to_list() == [4, 5, 6]
    done = recsys(*arguments, "--set", "quality.max_bad_share=0.5")
    card = json.loads(done.stdout)
    assert (card["read"], card["events"], sum(card["bad"].values())) == (6, 3, 3)
    assert card == json.loads(Path("w/log/ingest.json").read_text())
    assert "w/quarantine.parquet" in done.stderr
    words = recsys(*arguments[:-1], "--set", "quality.max_bad_share=0.5").stdout
    assert re.search(r"events kept +3\n", words)
    for wrong in (("--config", "my.toml", "--users", "3"), ("--set", "a.b=1"), ("--config", "no.toml")):
        assert isinstance(recsys("ingest", "-w", "w", *wrong).exception, ConfigError)


def test_what_stands_in_an_object_inside_an_object_is_a_column(tmp_path):
    events = file(tmp_path, "nested.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in NESTED))
    table = open_table(events)
    assert list(table.columns) == ["user.id", "user.country", "product.sku", "product.tags", "ts"]
    config = tmp_path / "log.toml"
    config.write_text(write_mapping(events, None, tmp_path))
    assert 'user_id = "user.id"' in config.read_text()
    assert 'item_id = "product.sku"' in config.read_text()
    ingest_files(load_mapping(config), tmp_path, tmp_path / "log", "nested")
    found = pl.read_parquet(tmp_path / "log" / "events.parquet")
    assert found["user_id"].to_list() == ["Ünï 1", "Ünï 2"]
    assert found["item_id"].to_list() == ["a/b", "it's"]
    assert table.rows(["user.country", "product.tags"]).collect()["user.country"].to_list() == ["DE", None]


def test_a_log_of_sessions_alone_has_each_for_a_user(tmp_path):
    text = write_mapping(file(tmp_path, "sessions.csv", SESSIONS), None, tmp_path)
    assert 'user_id = "session_id"  # nothing names users' in text
    assert '# session_id = ""' in text


VISITS = "user_id,item_id,timestamp,event\n" + "".join(
    f"u{n % 5},i{n % 7},{1_700_000_000 + 86_400 * (n // 15) + 3_600 * (n % 5) + 20 * k},{step}\n"
    for n in range(45)
    for k, step in enumerate(("view", "cart", "purchase"))
)


@pytest.mark.parametrize(
    ("log", "cut"),
    [
        (VISITS, True),
        (VISITS.replace("cart", "purchase").replace("view", "purchase"), False),  # one action: no steps of a visit
        (VISITS.replace("timestamp", "position"), False),  # positions are not apart in time
    ],
)
def test_sessions_are_cut_where_actions_may_be_steps_of_a_visit(tmp_path: Path, log: str, cut: bool) -> None:
    text = write_mapping(file(tmp_path, "visits.csv", log), None, tmp_path)
    assert ('\ngap = "30m"  # ' in text) == cut
    assert ('\n# gap = "30m"  # ' in text) == (not cut)
    (tmp_path / "my.toml").write_text(text)
    ingest_files(load_mapping(tmp_path / "my.toml"), tmp_path, tmp_path / "log", "visits")
    events = pl.read_parquet(tmp_path / "log" / "events.parquet")
    assert ("session_id" in events.columns) == cut


def test_a_catalogue_of_odd_values_keeps_its_columns_and_says_what_is_not_used(tmp_path: Path) -> None:
    rows = [f"{n},Thing {n},Home > {'Kitchen' if n % 2 else 'Bath'},{n * 1.5},note {n}" for n in range(60)]
    rows[7] = "7,Thing 7,Home > Bath,N/A,note 7"
    items = file(tmp_path, "items.csv", "\n".join(["item,title,category,price,remark", *rows]))
    text = write_mapping(file(tmp_path, "log.tsv", ATOMIC), items, tmp_path)
    assert 'numeric = ["price"]  # no numbers, taken as missing: 1 of price in the first 60 rows\n' in text
    assert "\n# not used: remark\n" in text
    (tmp_path / "my.toml").write_text(text)
    config = load_mapping(tmp_path / "my.toml")
    assert config.items.multi == {"category": " > "}
    card = ingest_files(config, tmp_path, tmp_path / "log", "x")
    assert card.settled == {"items: values of 'price' that are no numbers, taken as missing": 1}
    found = pl.read_parquet(tmp_path / "log" / "items.parquet").filter(pl.col("item_id").is_in(["7", "8"]))
    assert found.select("category", "price").rows() == [(["Home", "Bath"], None), (["Home", "Bath"], 12.0)]


@pytest.mark.parametrize(
    ("steps", "taken"),
    [
        (("view", "addtocart", "transaction"), ("transaction",)),
        (("pv", "fav", "buy"), ("buy",)),
        (("page_view", "Order Placed", "sold"), ("Order Placed", "sold")),
        (("play", "skip", "like"), ()),  # nobody can say
        (("buy", "purchase", "sale"), ()),  # all of them
    ],
)
def test_of_several_actions_those_that_the_others_lead_to_are_positives(
    tmp_path: Path, steps: tuple[str, ...], taken: tuple[str, ...]
) -> None:
    log = VISITS
    for name, step in zip(("view", "cart", "purchase"), steps, strict=True):
        log = log.replace(f",{name}\n", f",{step}\n")
    (tmp_path / "my.toml").write_text(write_mapping(file(tmp_path, "visits.csv", log), None, tmp_path))
    assert sorted(load_mapping(tmp_path / "my.toml").requests.positive.actions) == sorted(taken)
