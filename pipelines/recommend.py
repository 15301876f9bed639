"""The offline batch job: the answers of the service for many users, written as Parquet by the very same recommender.

Users are answered sixteen at a time and chunk by chunk. With several workers the chunks go to Ray actors, each of which
has loaded the bundle once; they are written in the order of the users, so the table is the same whoever did the work.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import polars as pl
import torch

from pipelines.ray_session import ray_session
from ranking.as_served import Remembered
from ranking.bundle import Bundle
from ranking.manifest import read_manifest
from ranking.recommender import Recommender, RecommenderConfig
from ranking.snapshot import SnapshotReader
from recsys.columns import ITEM_ID, USER_ID
from recsys.errors import ConfigError, DataError, RecsysError
from recsys.files import whole_file, work_directory
from recsys.messages import RecommendRequest
from recsys.progress import Progress, silent
from recsys.stores import HistoryReader

CHUNK = 250
"""Users answered between two writes: bounds memory, and is what one worker takes at a time."""

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


def read_user_ids(path: Path) -> list[str]:
    """Read the column `user_id` of a Parquet or CSV file as strings, each once, in the order of their first rows.

    Raises:
        DataError: the file is missing, is not of its kind, or has no such column.
    """
    try:
        table = pl.read_csv(path, infer_schema=False) if path.suffix == ".csv" else pl.read_parquet(path)
    except (FileNotFoundError, pl.exceptions.PolarsError) as error:
        raise DataError(f"{path}: cannot be read as {path.suffix or 'Parquet'} ({error})") from None
    if USER_ID not in table.columns:
        raise DataError(f"{path}: no column {USER_ID!r}; found {', '.join(table.columns) or 'none'}")
    return table[USER_ID].cast(pl.String).drop_nulls().unique(maintain_order=True).to_list()


@dataclass(frozen=True)
class BatchRequest:
    """What is asked for every user of a batch.

    `k` items each, at the moment `at` (microseconds UTC; only events strictly before it are used); `config` holds
    quotas and limits, as the service has them. Of `hidden` users nothing is known: they asked the service to be
    forgotten since the snapshot was published.
    """

    k: int
    at: int
    config: RecommenderConfig = field(default_factory=RecommenderConfig)
    hidden: frozenset[str] = frozenset()


def recommend_users(
    bundle: Bundle,
    histories: HistoryReader,
    user_ids: Sequence[str],
    asked: BatchRequest,
    out: Path,
    progress: Progress = silent,
) -> int:
    """Write the k best items of each user at one moment, and give the number of rows.

    Args:
        bundle: models, items and index.
        histories: the snapshot, or the live store.
        user_ids: a user without history gets the popularity answer, marked `user_known` = false.
        asked: what is asked for each of them.
        out: Parquet with the columns of `RECOMMENDATIONS`, users in the order given; whole or absent.
        progress: called after every `CHUNK` users.

    Raises:
        ValidationError: k out of the range that the service takes.

    Cost: about half of a request of the service per user, since users are encoded, searched for and scored sixteen at a
    time (`tests/benchmarks/batch_recommend.py`); half of what is left are the ranker's scores. Memory is bounded by
    `CHUNK` users. A score may differ from the service's in its last float32 digit.
    """
    recommender = Recommender(bundle, Remembered(histories, asked.hidden), asked.config)
    tables = (_recommendations(recommender, asked, chunk) for chunk in _chunks(user_ids))
    with _one_thread():
        return _write_tables(tables, len(user_ids), out, progress)


def recommend_on_workers(
    bundle: Path,
    snapshot: Path,
    user_ids: Sequence[str],
    asked: BatchRequest,
    out: Path,
    workers: int,
    progress: Progress = silent,
) -> int:
    """Write what `recommend_users` writes, the work shared out among Ray workers; gives the number of rows.

    Args:
        bundle: directory of the bundle; on several machines, where each of them finds it.
        snapshot: directory of the user snapshot, likewise.
        user_ids: as for `recommend_users`.
        asked: what is asked for each of them.
        out: as for `recommend_users`.
        workers: processes, one core each, in the Ray of RAY_ADDRESS or one that is started and stopped here.
        progress: called after every `CHUNK` users.

    Raises:
        ConfigError: fewer than one worker.
        BundleError: there is no bundle.
        RecsysError: a worker failed; nothing is written.

    Cost: some ten seconds to start Ray and load the bundle in every worker.
    """
    if workers < 1:
        raise ConfigError(f"workers is {workers}; expected at least 1")
    if not user_ids:
        return _write_tables(iter([pl.DataFrame(schema=RECOMMENDATIONS)]), 0, out, progress)
    read_manifest(bundle)  # in plain words here, rather than from a worker
    import ray
    from ray.exceptions import RayError
    from ray.util.actor_pool import ActorPool

    with ray_session(workers):
        actor = ray.remote(num_cpus=1)(_Worker)
        # Where there are fewer chunks than workers, the rest would only load the bundle.
        count = min(workers, -(-len(user_ids) // CHUNK))
        pool = ActorPool([actor.remote(bundle.resolve(), snapshot.resolve(), asked) for _ in range(count)])
        tables = pool.map(lambda worker, chunk: worker.answer.remote(chunk), list(_chunks(user_ids)))
        try:
            return _write_tables(tables, len(user_ids), out, progress)
        except RayError as error:
            raise RecsysError(f"{out}: a worker failed: {str(error).strip().splitlines()[-1].strip()}") from error


class _Worker:
    """What runs in each Ray worker: the bundle, loaded once, behind one recommender."""

    def __init__(self, bundle: Path, snapshot: Path, asked: BatchRequest) -> None:
        self._asked = asked
        self._recommender = Recommender(
            Bundle.load(bundle), Remembered(SnapshotReader(snapshot), asked.hidden), asked.config
        )

    def answer(self, user_ids: Sequence[str]) -> pl.DataFrame:
        """Return the rows of one chunk."""
        with _one_thread():
            return _recommendations(self._recommender, self._asked, user_ids)


def _recommendations(recommender: Recommender, asked: BatchRequest, user_ids: Sequence[str]) -> pl.DataFrame:
    requests = [RecommendRequest(user_id=user_id, k=asked.k, at=asked.at) for user_id in user_ids]
    item_ids, rows = recommender.bundle.item_ids, []
    for user_id, (known, found) in zip(user_ids, recommender.trace_many(requests, asked.at), strict=True):
        places = found.chosen.places[: asked.k]
        scores = recommender.told(found.scores[places], known)
        chosen = zip(places.tolist(), found.pool.rows[places].tolist(), scores.tolist(), strict=True)
        rows += [
            (user_id, item_ids[row], rank, score, found.sources_of(place), known)
            for rank, (place, row, score) in enumerate(chosen, start=1)
        ]
    return pl.DataFrame(rows, schema=RECOMMENDATIONS, orient="row")


def _chunks(user_ids: Sequence[str]) -> Iterator[Sequence[str]]:
    """Yield runs of `CHUNK` users; one empty run if there are none."""
    for start in range(0, max(len(user_ids), 1), CHUNK):
        yield user_ids[start : start + CHUNK]


def _write_tables(tables: Iterable[pl.DataFrame], total: int, out: Path, progress: Progress) -> int:
    """Write chunk by chunk into part files, then join them in order under the final name."""
    rows = 0
    with work_directory(out) as work:
        parts = []
        for number, table in enumerate(tables):
            parts.append(work / f"{number:09d}.parquet")
            table.write_parquet(parts[-1])
            rows += len(table)
            progress(min((number + 1) * CHUNK, total), total)
        with whole_file(out) as temporary:
            pl.scan_parquet(parts).sink_parquet(temporary)
    return rows


@contextmanager
def _one_thread() -> Iterator[None]:
    """Score with one thread: a request is too small to share, and more threads would add the numbers up otherwise."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
