"""The offline batch job: the answers of the service for many users, written as Parquet by the very same recommender."""

import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import polars as pl

from ranking.bundle import Bundle
from ranking.recommender import Recommender, RecommenderConfig
from recsys.columns import ITEM_ID, USER_ID
from recsys.errors import DataError
from recsys.files import whole_file
from recsys.messages import RankRequest, RecommendRequest
from recsys.stores import HistoryReader

CHUNK = 2_000
"""Requests answered between two writes; bounds memory."""

T = TypeVar("T")

Progress = Callable[[int, int], None]
"""Called with (done, total)."""

RECOMMENDATIONS = pl.Schema(
    [
        (USER_ID, pl.String()),
        (ITEM_ID, pl.String()),
        ("rank", pl.Int32()),  # from 1
        ("score", pl.Float32()),
        ("sources", pl.List(pl.String())),
        ("user_known", pl.Boolean()),
    ]
)

SCORES = pl.Schema(
    [
        ("request", pl.Int64()),  # place of the request in the input
        (USER_ID, pl.String()),  # null for an inline history
        (ITEM_ID, pl.String()),
        ("score", pl.Float32()),  # null where the bundle does not know the item
    ]
)


def read_user_ids(path: Path) -> list[str]:
    """Read the column `user_id` of a Parquet or CSV file as strings, in its order.

    Raises:
        DataError: the file is missing, is not of its kind, or has no such column.
    """
    try:
        table = pl.read_csv(path, infer_schema=False) if path.suffix == ".csv" else pl.read_parquet(path)
    except (FileNotFoundError, pl.exceptions.PolarsError) as error:
        raise DataError(f"{path}: cannot be read as {path.suffix or 'Parquet'} ({error})") from None
    if USER_ID not in table.columns:
        raise DataError(f"{path}: no column {USER_ID!r}; found {', '.join(table.columns) or 'none'}")
    return table[USER_ID].cast(pl.String).drop_nulls().to_list()


def recommend_users(
    bundle: Bundle,
    histories: HistoryReader,
    user_ids: Sequence[str],
    k: int,
    at: int,
    out: Path,
    exclude_seen: bool = False,
    config: RecommenderConfig | None = None,
    progress: Progress | None = None,
) -> int:
    """Write the k best items of each user at one moment, and give the number of rows.

    Args:
        bundle: models, items and index.
        histories: the snapshot, or the live store.
        user_ids: a user without history gets the popularity answer, marked `user_known` = false.
        k: items per user.
        at: moment of all requests, microseconds UTC; only events strictly before it are used.
        out: Parquet with the columns of `RECOMMENDATIONS`, users in the order given; whole or absent.
        exclude_seen: leave out items of the user's history.
        config: quotas and limits, as the service has them.
        progress: called after every `CHUNK` users.

    Raises:
        ValidationError: k out of the range that the service takes.

    Cost: one request of the service per user; memory is bounded by `CHUNK` users.
    """
    recommender = Recommender(bundle, histories, config or RecommenderConfig())

    def answers(chunk: Sequence[str], _: int) -> Iterator[tuple[object, ...]]:
        for user_id in chunk:
            request = RecommendRequest(user_id=user_id, k=k, at=at, exclude_seen=exclude_seen)
            answer = recommender.recommend(request, at)
            for rank, item in enumerate(answer.items, start=1):
                yield user_id, item.item_id, rank, item.score, item.sources, answer.user_known

    return _write_chunks(user_ids, answers, RECOMMENDATIONS, out, progress)


def rank_requests(
    bundle: Bundle,
    histories: HistoryReader,
    requests: Sequence[RankRequest],
    now: int,
    out: Path,
    config: RecommenderConfig | None = None,
    progress: Progress | None = None,
) -> int:
    """Write the scores of many rank requests, items in the order of each request; gives the number of rows.

    Args:
        bundle: models, items and index.
        histories: the snapshot, or the live store.
        requests: what the service would be asked.
        now: moment of the requests that name none, microseconds UTC.
        out: Parquet with the columns of `SCORES`; whole or absent.
        config: limits, as the service has them.
        progress: called after every `CHUNK` requests.
    """
    recommender = Recommender(bundle, histories, config or RecommenderConfig())

    def answers(chunk: Sequence[RankRequest], start: int) -> Iterator[tuple[object, ...]]:
        for number, request in enumerate(chunk, start):
            answer = recommender.rank(request, now)
            for item_id, score in zip(request.item_ids, answer.scores, strict=True):
                yield number, request.user_id, item_id, score

    return _write_chunks(requests, answers, SCORES, out, progress)


def _write_chunks(
    requests: Sequence[T],
    answers: Callable[[Sequence[T], int], Iterable[tuple[object, ...]]],
    schema: pl.Schema,
    out: Path,
    progress: Progress | None,
) -> int:
    """Answer chunk by chunk into part files, then join them in order under the final name."""
    rows = 0
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as name:
        parts = []
        for start in range(0, max(len(requests), 1), CHUNK):
            chunk = requests[start : start + CHUNK]
            part = pl.DataFrame(list(answers(chunk, start)), schema=schema, orient="row")
            parts.append(Path(name) / f"{start:012d}.parquet")
            part.write_parquet(parts[-1])
            rows += len(part)
            if progress is not None:
                progress(start + len(chunk), len(requests))
        with whole_file(out) as temporary:
            pl.scan_parquet(parts).sink_parquet(temporary)
    return rows
