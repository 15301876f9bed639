"""From canonical files to a prepared set: stable ids, packed histories, requests, splits, transitions, candidates.

    keys          ids -> keys in order of first sight; users -> history rows in order of hash
    partition     events divided into one file per user bucket
    histories     each bucket alone -> packed arrays, requests, training counts, transition pairs (a process pool)
    transitions   pairs of all buckets merged, a block of source rows at a time (another pool)
    candidates    fixed candidates of validation and test requests, by sampler
    digest        SHA-256 of everything written but the means of growth

The result depends on the log and the configuration only: not on the order of the log's rows, nor on the number of
buckets or workers, nor on whether a log in parts (`pipelines.parts`) was prepared at once or part by part
(`pipelines.append`). Memory is bounded by the buckets in work, the users, the items and, where there are any, the
impressions: not by the events.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing import get_context
from os import cpu_count
from pathlib import Path

import numpy as np
import polars as pl

from pipelines import assembly, buckets, splits
from pipelines.catalogue import USER_HASH
from pipelines.edges import EdgeRuns, merge_pairs
from pipelines.forgotten import record_in
from pipelines.parts import Part, open_part
from pipelines.prepared import GROWTH, IMPRESSIONS, PreparedSet, contents, digest_of, file_digests
from pipelines.samplers import SAMPLERS
from pipelines.settings import MAX_BUCKETS, PrepareConfig
from pipelines.shown import shown_in
from pipelines.spans import Spans, read_spans
from pipelines.transitions import PAIRS
from pipelines.waiting import Users, save_waiting
from pipelines.write import Log, Names, name_all, rule_of, write_set
from recsys.columns import TIMESTAMP, USER_ID, USER_KEY
from recsys.errors import ConfigError, DataError
from recsys.files import whole_directory, work_directory, write_json
from recsys.history import DAY, Histories
from recsys.memory import give_back_freed_memory
from recsys.progress import Progress, silent, titled

__all__ = ["PrepareConfig", "prepare"]

EVENTS_PER_BUCKET = 250_000
"""Small, because the allocator reuses small arrays but maps large ones anew, and fresh pages are what costs."""
PARTITIONED_AT_ONCE = 1_000_000
"""Events: the memory of one streaming pass grows with its length."""
SMALL_LOG = 3_000_000
"""Events below which starting worker processes costs more than it saves."""


def prepare(
    source: Path | Sequence[Path],
    out: Path,
    config: PrepareConfig | None = None,
    progress: Progress = silent,
    previous: Path | None = None,
) -> PreparedSet:
    """Prepare what `ingest` wrote; `out` appears whole or not at all, replacing what was there.

    Args:
        source: a directory `ingest` wrote, or several, the parts of one log from the oldest on (`pipelines.parts`).
        out: the prepared set's directory.
        config: see `PrepareConfig`.
        progress: told as work goes on.
        previous: an earlier prepared set whose item, user and action numbers are kept.

    Raises:
        ConfigError: an unknown sampler.
        DataError: a missing file or column, an action nobody did, a part with events older than those of the parts
            before it, or a split without training requests.

    Cost: 20 million events take 0.90 GiB over all processes, 200 million 0.95, 1.47 million 0.55
    (`tests/benchmarks/prepare_throughput.py`); what grows is the table of users, 40 bytes each, and that of items.
    """
    config = config or PrepareConfig()
    for name in config.samplers:
        if name not in SAMPLERS:
            raise ConfigError(f"unknown sampler {name!r}; there are {', '.join(SAMPLERS)}")
    parts = [open_part(path) for path in ([source] if isinstance(source, Path) else source)]
    earlier = None if previous is None else PreparedSet(previous)
    with whole_directory(out) as target, work_directory(out) as work:
        record_in(target, [part.hidden for part in parts])
        names, log = _read(parts, target, work, config, progress, earlier)
        finish(target, names, log, config, progress)
    return PreparedSet(out)


def finish(out: Path, names: Names, log: Log, config: PrepareConfig, progress: Progress) -> None:
    """Write what is left of a set, and its digest."""
    if config.appendable:
        np.save(out / GROWTH / "hashes.npy", names.people[USER_HASH].to_numpy())
        if log.shown is not None:
            log.shown.write_parquet(out / GROWTH / f"{IMPRESSIONS}.parquet")
    with ThreadPoolExecutor(1) as pool:
        early = pool.submit(file_digests, contents(out))  # histories and training requests, the largest files
        manifest = write_set(out, names, log, config, progress)
        progress(0, 1, "digest")
        write_json(out / "manifest.json", {**manifest, "digest": digest_of(out, early.result())})
    progress(1, 1, "digest")


def _read(
    parts: Sequence[Part],
    out: Path,
    work: Path,
    config: PrepareConfig,
    progress: Progress,
    previous: PreparedSet | None,
) -> tuple[Names, Log]:
    """Write histories and training requests; give what is left to write."""
    total = sum(part.record.events for part in parts)
    newest = max(part.record.last for part in parts)
    number = config.buckets or min(-(-total // EVENTS_PER_BUCKET), MAX_BUCKETS)
    names = name_all(parts, _spans(parts, work, progress), config, previous, number)
    give_back_freed_memory()
    _partition(parts, work, names, number, config, progress)
    give_back_freed_memory()
    workers = config.workers or (1 if total < SMALL_LOG else cpu_count() or 1)
    plan = buckets.BucketPlan(0, 0, splits.cuts(config.split, newest))
    with _pool(workers) as pool:
        done = _run_buckets(pool, work, names.people, number, plan, progress)
    if not any(summary.requests["train"] for _, summary in done):
        raise _no_training(parts, config)
    give_back_freed_memory()
    with _pool(workers) as pool:  # other processes: those above would keep what sorting the buckets took
        histories, transitions = _join(pool, done, out, work, names, config, progress)
    records = tuple(part.record for part in parts)
    evaluated = {split: assembly.Pieces(split, done) for split in ("valid", "test")}
    return names, Log(records, histories, evaluated, assembly.tally(done, names.rows), transitions, shown_in(parts))


def _join(
    pool: Executor | None,
    done: assembly.Buckets,
    out: Path,
    work: Path,
    names: Names,
    config: PrepareConfig,
    progress: Progress,
) -> tuple[Histories, EdgeRuns]:
    """Write what the buckets hold: the pool merges transitions while this process joins the rest."""
    keep, edges = None, work / "edges"
    edges.mkdir()
    if config.appendable:
        keep = out / GROWTH / "pairs"
        keep.mkdir(parents=True)
    files = [folder / PAIRS for folder, _ in done]
    with ThreadPoolExecutor(1) as beside:
        merging = beside.submit(
            merge_pairs,
            pool,
            files,
            names.rows,
            config.transitions_top_n,
            keep,
            edges,
            titled(progress, "transitions"),
        )
        histories = assembly.join_histories(done, out)
        (out / "requests").mkdir()
        train = assembly.Pieces("train", done)
        assembly.write_requests(out / "requests" / "train.safetensors", len(train), train.positives, train)
        if config.appendable:
            users = Users(names.people[USER_KEY].to_numpy().astype(np.int64), histories.offsets[:-1])
            count, positives = assembly.count_waiting(done)
            save_waiting(assembly.waiting(done), count, positives, users, out / GROWTH)
        return histories, merging.result()


def _spans(parts: Sequence[Part], work: Path, progress: Progress) -> list[Spans]:
    """Go through every part once: what naming its users and items needs."""
    total, before, spans = sum(part.record.events for part in parts), 0, []
    progress(0, total, "keys")
    for index, part in enumerate(parts):
        folder = work / "spans" / str(index)
        folder.mkdir(parents=True)
        spans.append(read_spans(part, folder))
        before += part.record.events
        progress(before, total, "keys")
    return spans


def _present(part: Part, people: pl.DataFrame) -> pl.DataFrame:
    """Return the rows of the users with events in a part: a join with all users would hold a hash table of all."""
    seen = part.events.select(pl.col(USER_ID).unique()).collect(engine="streaming")
    return people.lazy().join(seen.lazy(), on=USER_ID, how="semi").collect(engine="streaming")


def _partition(
    parts: Sequence[Part], work: Path, names: Names, number: int, config: PrepareConfig, progress: Progress
) -> None:
    """Divide every part, slice by slice, among the files of the buckets in `work`/events."""
    folder = work / "events"
    folder.mkdir()
    total, done = sum(part.record.events for part in parts), 0
    people = names.people.select(USER_ID, buckets.USER_ROW, buckets.BUCKET)
    progress(0, total, "partition")
    for index, part in enumerate(parts):
        for start in range(0, part.record.events, PARTITIONED_AT_ONCE):
            some = replace(part, events=part.events.slice(start, PARTITIONED_AT_ONCE))
            events = buckets.numbered(some, index, _present(some, people), names.items, names.actions, rule_of(config))
            buckets.partition(events.collect(engine="streaming"), number, folder)
            done += min(PARTITIONED_AT_ONCE, part.record.events - start)
            progress(done, total, "partition")


def _run_buckets(
    pool: Executor | None,
    work: Path,
    people: pl.DataFrame,
    number: int,
    plan: buckets.BucketPlan,
    progress: Progress,
) -> list[tuple[Path, buckets.BucketSummary]]:
    """Prepare every bucket; give its folder and summary, in the order of buckets."""
    users = np.bincount(people[buckets.BUCKET].to_numpy(), minlength=number)
    first = np.cumsum(users) - users
    jobs: list[tuple[Path, Path, buckets.BucketPlan]] = []
    for bucket in range(number):
        folder = work / f"bucket{bucket}"
        folder.mkdir()
        events = buckets.bucket_file(work / "events", bucket)
        jobs.append((events, folder, buckets.BucketPlan(int(first[bucket]), int(users[bucket]), plan.cuts)))
    results = (pool.map if pool else map)(buckets.prepare_bucket, *zip(*jobs, strict=True))
    done = []
    for (events, folder, _), summary in zip(jobs, results, strict=True):
        events.unlink(missing_ok=True)
        done.append((folder, summary))
        progress(len(done), number, "histories")
    return done


@contextmanager
def _pool(workers: int) -> Iterator[Executor | None]:
    """Yield a pool of fresh processes, or None for one worker: the caller then does the work itself."""
    if workers == 1:
        yield None
        return
    # Polars starts threads, so a fork could hang: processes are spawned.
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        yield pool


def _no_training(parts: Sequence[Part], config: PrepareConfig) -> DataError:
    """Say why a split leaves nothing to train on."""
    where = f"{parts[0].directory / 'events.parquet'}: no training request"
    if config.split.kind == "last_request":
        return DataError(f"{where}; under last_request a user needs at least three requests")
    days = (max(part.record.last for part in parts) - min(part.record.first for part in parts)) / DAY
    return DataError(
        f"{where}; {TIMESTAMP} spans {days:.4g} days, validation and test take {config.split.valid_days:g} + "
        f"{config.split.test_days:g} of them; shorten them by split.valid_days and split.test_days, or use "
        "split.kind=last_request"
    )
