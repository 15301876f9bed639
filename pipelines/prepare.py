"""From canonical files to a prepared set: stable ids, packed histories, requests, splits, transitions, candidates.

    keys          ids -> keys in order of first sight; users -> history rows in order of hash
    partition     events streamed into one file per user bucket
    histories     each bucket alone -> packed arrays, requests, training counts, transition pairs (a process pool)
    transitions   pairs of all buckets merged, a block of source rows at a time (the same pool)
    candidates    fixed candidates of validation and test requests, by sampler
    digest        SHA-256 of everything written

The result depends on the log and the configuration only: not on the order of the log's rows, nor on the number of
buckets or workers.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from multiprocessing import get_context
from os import cpu_count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import numpy as np
import polars as pl
from numpy.typing import NDArray
from pydantic import Field

from pipelines import assembly, buckets, catalogue, splits
from pipelines.prepared import FORMAT, PreparedSet, Requests
from pipelines.samplers import SAMPLERS
from pipelines.splits import SplitConfig
from pipelines.transitions import MAX_ROWS
from ranking.items import ItemTable, identity_rows
from recsys.columns import SESSION_ID, TIMESTAMP
from recsys.errors import ConfigError, DataError
from recsys.files import read_json, sha256_tree, whole_directory, write_json
from recsys.history import Histories

Progress = Callable[[str, int, int], None]
"""(step, done, total)"""
MAX_BUCKETS = 4096
EVENTS_PER_BUCKET = 250_000
"""Small, because the allocator reuses small arrays but maps large ones anew, and fresh pages are what costs."""
SMALL_LOG = 3_000_000
"""Events below which starting worker processes costs more than it saves."""


@dataclass(frozen=True)
class PrepareConfig:
    """How a log becomes requests.

    Attributes:
        split: which requests train, validate and test.
        positive: names of the actions that are positives; empty means all. Histories keep every action.
        columns: categorical columns of the item table; None codes every text column the catalogue has.
        samplers: fixed candidates are drawn once by each of these (`pipelines.samplers.SAMPLERS`).
        negatives: sampled negatives per validation or test request.
        max_eval_requests: keep only so many validation and so many test requests, chosen by hash: always the same, and
            those of a smaller number are among those of a larger one. None keeps all.
        transitions_top_n: heaviest transitions kept per item; 0 keeps all. 200 of the grocery set's keep 73 % of the
            weight in 39 MB; all are 99 MB.
        seed: of the choice of evaluation requests and of the candidates.
        buckets: user buckets; None makes one per 250,000 events. Changes memory and time, never the result.
        workers: processes; None takes one per core, one alone for a small log. Never changes the result.
    """

    split: SplitConfig = field(default_factory=SplitConfig)
    positive: tuple[str, ...] = ()
    columns: tuple[str, ...] | None = None
    samplers: tuple[str, ...] = ("uniform", "popularity")
    negatives: Annotated[int, Field(ge=1)] = 100
    max_eval_requests: Annotated[int, Field(ge=1)] | None = None
    transitions_top_n: Annotated[int, Field(ge=0)] = 200
    seed: int = 0
    buckets: Annotated[int, Field(ge=1, le=MAX_BUCKETS)] | None = None
    workers: Annotated[int, Field(ge=1)] | None = None


def prepare(
    source: Path,
    out: Path,
    config: PrepareConfig | None = None,
    progress: Progress | None = None,
    previous: Path | None = None,
) -> PreparedSet:
    """Prepare what `ingest` wrote; `out` appears whole or not at all, replacing what was there.

    Args:
        source: a directory `ingest` wrote.
        out: the prepared set's directory.
        config: see `PrepareConfig`.
        progress: told (step, done, total) as work goes on.
        previous: an earlier prepared set whose item, user and action numbers are kept.

    Raises:
        ConfigError: an unknown sampler.
        DataError: a missing file or column, an action nobody did, or a split without training requests.

    Cost: see `tests/benchmarks/prepare_throughput.py`.
    """
    config = config or PrepareConfig()
    report = progress or (lambda *_: None)
    for name in config.samplers:
        if name not in SAMPLERS:
            raise ConfigError(f"unknown sampler {name!r}; there are {', '.join(SAMPLERS)}")
    log = _open(source)
    earlier = None if previous is None else PreparedSet(previous)
    with whole_directory(out) as target, TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.work.") as work:
        manifest = _prepare(log, target, Path(work), config, report, earlier)
        report("digest", 0, 1)
        write_json(target / "manifest.json", {**manifest, "digest": sha256_tree(target)})
        report("digest", 1, 1)
    return PreparedSet(out)


@dataclass(frozen=True)
class _Log:
    """What `ingest` wrote."""

    directory: Path
    events: pl.LazyFrame
    columns: list[str]
    count: int
    first: int
    newest: int
    source: dict[str, str]


def _open(source: Path) -> _Log:
    for name in ("events", "items", "users"):
        if not (source / f"{name}.parquet").exists():
            raise DataError(f"{source / name}.parquet: no such file; run `recsys ingest` first")
    summary = read_json(source / "ingest.json")
    events = pl.scan_parquet(source / "events.parquet")
    columns = events.collect_schema().names()
    origin = {"name": str(summary["source"]), "digest": str(summary["digest"])}
    return _Log(source, events, columns, summary["events"], summary["first_time"], summary["last_time"], origin)


def _prepare(
    log: _Log, out: Path, work: Path, config: PrepareConfig, report: Progress, previous: PreparedSet | None
) -> dict[str, Any]:
    """Write everything but the manifest; give the manifest without its digest."""
    report("keys", 0, 1)
    number = config.buckets or min(-(-log.count // EVENTS_PER_BUCKET), MAX_BUCKETS)
    items = catalogue.catalogue(log.events, log.directory / "items.parquet", previous)
    people = catalogue.users(log.events, log.directory / "users.parquet", previous, number)
    actions = catalogue.action_names(log.events, previous)
    columns = catalogue.categorical_columns(items, config.columns)
    rows = items.height + buckets.FIRST_ROW
    plan = _plan(log, config, actions, rows)
    report("keys", 1, 1)

    report("partition", 0, log.count)
    (work / "parts").mkdir()
    buckets.partition(log.events, people, items, actions, work / "parts")
    report("partition", log.count, log.count)

    with _pool(config.workers or (1 if log.count < SMALL_LOG else cpu_count() or 1)) as pool:
        done = _run_buckets(pool, work, people, number, plan, report)
        _check_training(log, config, done)
        merged = assembly.merge_transitions(
            pool, done, rows, config.transitions_top_n, lambda i, n: report("transitions", i, n)
        )
        # The pool merges transitions while this process joins the rest.
        histories, requests = assembly.join_histories(done, out), assembly.join_requests(done)
        transitions = assembly.join_transitions(merged)
    hashes = people[catalogue.USER_HASH].to_numpy()
    requests = assembly.choose_evaluated(requests, hashes, config.max_eval_requests, config.seed)
    values = catalogue.vocabulary(items, columns)
    table = catalogue.item_table(items, values, assembly.training_counts(done, rows), transitions)
    _write_tables(out, items, people, values, table)
    _write_requests(out, requests, table, histories, hashes, config, report)
    lengths = np.diff(histories.offsets)
    return {
        "format": FORMAT,
        "config": _lasting(config),
        "source": log.source,
        "actions": actions,
        "categorical": columns,
        "samplers": list(config.samplers),
        "time": {"first": log.first, "last": log.newest},
        "cuts": {"valid": plan.cuts.valid, "test": plan.cuts.test} if config.split.kind == "time" else None,
        "history_length": {f"p{p}": int(np.percentile(lengths, p, method="lower")) for p in (10, 25, 50, 75, 90, 100)},
        "counts": {
            **assembly.counts(done, requests),
            "items": items.height,
            "trained_items": int(table.trained.sum()),
            "users": people.height,
            "transitions": len(transitions.target),
        },
    }


def _plan(log: _Log, config: PrepareConfig, actions: Sequence[str], rows: int) -> buckets.BucketPlan:
    """Give what all buckets share; `first_user` and `users` are filled in for each."""
    for name in config.positive:
        if name not in actions:
            raise DataError(
                f"positive action {name!r} does not occur; the log has {', '.join(actions) or 'no actions'}"
            )
    if rows > MAX_ROWS:
        raise DataError(f"{rows - buckets.FIRST_ROW:,} items; transitions can be counted over at most {MAX_ROWS:,}")
    return buckets.BucketPlan(
        first_user=0,
        users=0,
        cuts=splits.cuts(config.split, log.newest),
        positive=tuple(actions.index(name) + 1 for name in config.positive),
        has_sessions=SESSION_ID in log.columns,
    )


def _run_buckets(
    pool: Executor | None,
    work: Path,
    people: pl.DataFrame,
    number: int,
    plan: buckets.BucketPlan,
    report: Progress,
) -> list[tuple[Path, buckets.BucketSummary]]:
    """Prepare every bucket; give its folder and summary, in the order of buckets."""
    users = np.bincount(people[buckets.BUCKET].to_numpy(), minlength=number)
    first = np.cumsum(users) - users
    jobs: list[tuple[list[Path], Path, buckets.BucketPlan]] = []
    for bucket in range(number):
        folder = work / f"bucket{bucket}"
        folder.mkdir()
        parts = sorted((work / "parts" / f"{buckets.BUCKET}={bucket}").glob("*.parquet"))
        jobs.append((parts, folder, replace(plan, first_user=int(first[bucket]), users=int(users[bucket]))))
    results = (pool.map if pool else map)(buckets.prepare_bucket, *zip(*jobs, strict=True))
    done = []
    for (_, folder, _), summary in zip(jobs, results, strict=True):
        done.append((folder, summary))
        report("histories", len(done), number)
    return done


@contextmanager
def _pool(workers: int) -> Iterator[Executor | None]:
    """Give a pool of fresh processes, or None for one worker: the caller then does the work itself."""
    if workers == 1:
        yield None
        return
    # Polars starts threads, so a fork could hang: processes are spawned.
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        yield pool


def _write_tables(
    out: Path, items: pl.DataFrame, people: pl.DataFrame, values: dict[str, list[str]], table: ItemTable
) -> None:
    """Write catalogue, users, vocabulary, item table and the rows of the keys."""
    trained = pl.Series(catalogue.TRAIN_COUNT, table.count.numpy()[buckets.FIRST_ROW :])
    items.with_columns(trained).write_parquet(out / "catalogue.parquet")
    people.drop(buckets.USER_ROW, buckets.BUCKET, catalogue.USER_HASH).write_parquet(out / "users.parquet")
    write_json(out / "vocabulary.json", values)
    table.save(out / "items.safetensors")
    np.save(out / "key_to_row.npy", identity_rows(items.height))


def _write_requests(
    out: Path,
    requests: Mapping[str, Requests],
    table: ItemTable,
    histories: Histories,
    hashes: NDArray[np.uint64],
    config: PrepareConfig,
    report: Progress,
) -> None:
    """Write the requests of each split, and the fixed candidates of validation and test by sampler."""
    (out / "requests").mkdir()
    for split, found in requests.items():
        found.save(out / "requests" / f"{split}.safetensors")
    (out / "candidates").mkdir()
    look_up = assembly.history_rows(histories, identity_rows(len(table) - buckets.FIRST_ROW))
    jobs = [(split, name) for split in ("valid", "test") for name in config.samplers]
    for done, (split, name) in enumerate(jobs):
        keys = assembly.request_keys(requests[split], hashes)
        sampler = SAMPLERS[name](table)
        sets = assembly.fixed_candidates(requests[split], keys, sampler, config.negatives, config.seed, look_up)
        sets.save(out / "candidates" / f"{split}_{name}.safetensors")
        report("candidates", done + 1, len(jobs))


def _lasting(config: PrepareConfig) -> dict[str, Any]:
    """Give the settings that shape the result; how the work was shared out does not."""
    settings = asdict(config)
    return {name: value for name, value in settings.items() if name not in ("buckets", "workers")}


def _check_training(log: _Log, config: PrepareConfig, done: assembly.Buckets) -> None:
    """Refuse a split that leaves nothing to train on."""
    if any(summary.requests["train"] for _, summary in done):
        return
    where = f"{log.directory / 'events.parquet'}: no training request"
    if config.split.kind == "last_request":
        raise DataError(f"{where}; under last_request a user needs at least three requests")
    days = (log.newest - log.first) / splits.DAY
    raise DataError(
        f"{where}; {TIMESTAMP} spans {days:.4g} days, validation and test take {config.split.valid_days:g} + "
        f"{config.split.test_days:g} of them; shorten them, or use the split last_request"
    )
