"""The audit: does anything in a prepared set know what it should not? Checks that can fail, and facts that cannot.

    files_unchanged         the files are those whose digest the manifest states
    log_events              histories hold the log's events, no more and no less
    log_requests            requests are sessions of the log; training ones end before the cut
    cuts                    the cuts are those of the configuration
    splits_in_period        each split's requests lie in its period
    shared_requests         no request is in two splits
    shared_moments          no user has requests of two splits at one moment
    repeated_baskets        large baskets of the evaluated period are not those of training once more
    history_in_order        events are oldest first
    history_before_request  a request sees strictly earlier events only
    history_whole           and all of them, as the service would
    training_counts         counts are those of the training period, item by item
    trained_flags           an item is trained where it has a training event, and only there
    transitions             transitions, and the threshold of the heaviest kept, are those of the training requests
    candidate_lists         fixed candidates: positives first, no negative a positive, one list per request
    sampler_weights         drawn again with the training period's counts, the negatives are the same
    negatives_trained       no negative is an item without training events
    item_features           no column of the items alone reads the label
    user_features           no column of the users alone reads the label

Whatever depends on the training period is worked out anew and compared to the last bit. `log_*` need the log the set
was made from. `pipelines/audit_{requests,period,log,features,facts}.py` hold the work.

Cost: 1.47 million grocery events take 4 CPU seconds and 0.7 GiB, 10 million synthetic ones in 1.1 million requests
1.6 GiB: events are read in runs of users, requests are held whole.
"""

from collections.abc import Sequence
from pathlib import Path

from pipelines.audit_facts import sampler_facts, split_facts, threshold_notes
from pipelines.audit_features import feature_checks
from pipelines.audit_log import log_checks, of_this_set, period_of_log, read_log
from pipelines.audit_period import (
    Period,
    count_checks,
    cuts_check,
    period_check,
    period_of_requests,
    sampler_checks,
    stored_cuts,
    training_counts,
    transition_check,
)
from pipelines.audit_record import Audit, Check, counted
from pipelines.audit_requests import (
    SPLITS,
    AllRequests,
    aligned_samplers,
    candidate_check,
    history_checks,
    split_checks,
    well_formed,
)
from pipelines.parts import Part, open_part
from pipelines.prepared import PreparedSet, contents, digest_of
from pipelines.settings import PrepareConfig
from recsys.config import parse
from recsys.errors import DataError, GateError
from recsys.progress import Progress, silent

__all__ = ["Audit", "Check", "audit", "refuse_failed"]

STEPS = 8


def audit(prepared: PreparedSet, log: Sequence[Path] = (), progress: Progress = silent) -> Audit:
    """Audit a prepared set; a leak never raises, its check fails.

    Args:
        prepared: the set.
        log: directories of the parts of the log it was made from, the oldest first; without them, or with others,
            `log_*` are left out and a note says so.
        progress: told as work goes on.

    Raises:
        DataError: files that are missing or do not fit each other, so that nothing can be said; or a set by
            `last_request` that keeps only a choice of its requests, without its log.
    """
    config = parse(PrepareConfig, prepared.manifest["config"], f"{prepared.directory / 'manifest.json'} [config]")
    progress(0, STEPS, "files")
    _refuse_unlike_sizes(prepared)
    checks = [_files_check(prepared)]
    requests: AllRequests = {split: well_formed(prepared, split) for split in SPLITS}
    samplers = aligned_samplers(prepared, requests, config.samplers)
    progress(1, STEPS, "log")
    parts = [open_part(path) for path in log]
    known = of_this_set(prepared, parts)
    period, found = _period(prepared, requests, config, parts if known else [])
    checks += found
    progress(2, STEPS, "requests")
    checks += [cuts_check(prepared, config, period.cuts), period_check(requests, period)]
    checks += split_checks(prepared, requests, period.last_request)
    checks += history_checks(prepared, requests)
    progress(3, STEPS, "counts")
    counts = training_counts(prepared, period.ends)
    checks += count_checks(prepared, counts)
    progress(4, STEPS, "transitions")
    checks.append(transition_check(prepared, requests["train"], config.transitions_top_n))
    progress(5, STEPS, "candidates")
    checks.append(candidate_check(prepared, requests, config.samplers))
    checks += sampler_checks(prepared, requests, config, counts)
    progress(6, STEPS, "features")
    checks += feature_checks(prepared, samplers)
    progress(7, STEPS, "facts")
    notes = threshold_notes(prepared, parts, period, counts) if known else (_without_log(log),)
    result = Audit(
        data_digest=prepared.digest,
        checks=tuple(checks),
        splits=tuple(split_facts(prepared, requests, period, counts)),
        samplers=tuple(sampler_facts(prepared, samplers)),
        repeated_share=prepared.manifest["counts"].get("repeated_share"),
        notes=notes,
    )
    progress(STEPS, STEPS, "done")
    return result


def refuse_failed(found: Audit) -> None:
    """Raise `GateError` naming every check that failed, if any did."""
    if found.failed:
        lines = [f"  {check.name}: {check.found}; wanted: {check.wanted}" for check in found.failed]
        raise GateError(f"{len(found.failed)} of {len(found.checks)} checks failed\n" + "\n".join(lines))


def _period(
    prepared: PreparedSet, requests: AllRequests, config: PrepareConfig, parts: Sequence[Part]
) -> tuple[Period, list[Check]]:
    """Return the training period, by the log where there is one, and the checks against the log."""
    cuts = stored_cuts(prepared, config)
    if not parts:
        return period_of_requests(prepared, cuts, requests), []
    read = read_log(prepared, parts, config)
    period = period_of_log(prepared, cuts, read.sessions)
    return period, log_checks(prepared, requests, read, period)


def _without_log(log: Sequence[Path]) -> str:
    found = f"{', '.join(map(str, log))}: not what this set was made from" if log else "no log was given"
    return f"Histories and requests were not compared with a log ({found})."


def _refuse_unlike_sizes(prepared: PreparedSet) -> None:
    """Refuse tables that do not fit each other: nothing worked out from them would mean anything."""
    rows, keys = len(prepared.items), len(prepared.key_to_row)
    if prepared.catalogue.height != keys or (keys and int(prepared.key_to_row.max()) >= rows):
        raise DataError(
            f"{prepared.directory}: {prepared.catalogue.height} items in catalogue.parquet, {keys} keys in "
            f"key_to_row.npy, {rows} rows in items.safetensors; prepare the set again"
        )
    if prepared.users.height != len(prepared.histories):
        raise DataError(
            f"{prepared.directory}: {prepared.users.height} users in users.parquet, {len(prepared.histories)} in "
            "histories; prepare the set again"
        )


def _files_check(prepared: PreparedSet) -> Check:
    """Compare the digest of the files with the one in the manifest, which was written last."""
    found = digest_of(prepared.directory)
    words = f"{counted(len(contents(prepared.directory)), 'file')}, digest {found[:12]}"
    return Check("files_unchanged", found == prepared.digest, words, f"digest {prepared.digest[:12]}")
