"""Checks on the requests themselves: what lies before them, which split they are in, and their fixed candidates.

Everything here is read from the prepared set alone. Requests are compared by 64-bit names (`moment_names`,
`basket_names`), so that a split of millions costs a sort of bare words; two different requests share a name with a
probability of 2^-64.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from pipelines.audit_record import Check, counted
from pipelines.mixing import mix
from pipelines.prepared import CandidateSets, PreparedSet, Requests, Split
from ranking.batch import FIRST_ITEM
from recsys.errors import DataError
from recsys.history import moment

SPLITS: tuple[Split, ...] = ("train", "valid", "test")
EVENTS_AT_ONCE = 4_000_000
REQUESTS_AT_ONCE = 50_000
SAME_BASKET = 5
"""Items from which on a basket that comes again, the same to the last item, is no coincidence."""
SAME_BASKET_SHARE = 0.01
"""Most evaluated baskets of that size that may come again. A user may repeat one, though none of the 9,269 of the
grocery set is; a log read twice repeats them all."""

Names = NDArray[np.uint64]
AllRequests = Mapping[Split, Requests]


def well_formed(prepared: PreparedSet, split: Split) -> Requests:
    """Return the requests of a split; raises `DataError` where its arrays do not fit each other or the set."""
    found = prepared.requests(split)
    path = prepared.directory / "requests" / f"{split}.safetensors"
    sizes = {len(found.user), len(found.at), len(found.end), len(found.offsets) - 1}
    if len(sizes) != 1 or len(found.offsets) == 0:
        raise DataError(f"{path}: user, at, end and offsets are of different lengths; prepare the set again")
    if found.offsets[0] != 0 or found.offsets[-1] != len(found.positive) or (np.diff(found.offsets) < 0).any():
        raise DataError(f"{path}: offsets do not divide the {len(found.positive)} positives; prepare the set again")
    users, rows = len(prepared.histories), len(prepared.items)
    if len(bad := np.flatnonzero((found.user < 0) | (found.user >= users))):
        raise DataError(f"{path}: request {bad[0]} has user row {found.user[bad[0]]}; this set has rows 0..{users - 1}")
    start, stop = (np.asarray(prepared.histories.offsets)[found.user + step] for step in (0, 1))
    if len(bad := np.flatnonzero((found.end < start) | (found.end > stop))):
        raise DataError(
            f"{path}: request {bad[0]} has a history that ends at {found.end[bad[0]]}; "
            f"its user's events are {start[bad[0]]}..{stop[bad[0]]}"
        )
    if len(bad := np.flatnonzero((found.positive < FIRST_ITEM) | (found.positive >= rows))):
        raise DataError(f"{path}: positive {found.positive[bad[0]]} is no item row; expected {FIRST_ITEM}..{rows - 1}")
    return found


def aligned_samplers(prepared: PreparedSet, requests: AllRequests, samplers: Sequence[str]) -> list[str]:
    """Return the samplers with one candidate list per request; raises `DataError` where arrays do not fit."""
    aligned = []
    for sampler in samplers:
        sizes = []
        for split in SPLITS[1:]:
            sets = prepared.candidates(split, sampler)
            stop = int(sets.offsets[-1]) if len(sets.offsets) else -1
            if not stop == len(sets.item) == len(sets.label) or sets.offsets[0] or (np.diff(sets.offsets) < 0).any():
                raise DataError(
                    f"{prepared.directory / 'candidates'}/{split}_{sampler}.safetensors: offsets do not divide "
                    f"{len(sets.item)} items and {len(sets.label)} labels; prepare the set again"
                )
            if len(wrong := sets.item[(sets.item < FIRST_ITEM) | (sets.item >= len(prepared.items))]):
                raise DataError(
                    f"{prepared.directory / 'candidates'}/{split}_{sampler}.safetensors: {wrong[0]} is no item row; "
                    f"expected {FIRST_ITEM}..{len(prepared.items) - 1}"
                )
            sizes.append(len(sets) == len(requests[split]))
        if all(sizes):
            aligned.append(sampler)
    return aligned


def user_slices(offsets: NDArray[np.int64], events: int) -> Iterator[tuple[int, int]]:
    """Yield runs of users first..last (exclusive) that hold at most `events` events, at least one user each."""
    begin, users = 0, len(offsets) - 1
    while begin < users:
        end = max(int(np.searchsorted(offsets, offsets[begin] + events, side="right")) - 1, begin + 1)
        yield begin, end
        begin = end


def moment_names(user: NDArray[np.int64], at: NDArray[np.int64]) -> Names:
    """Return one 64-bit name per (user, moment)."""
    return mix(user.astype(np.uint64) ^ mix(at.view(np.uint64)))


def item_names(rows: NDArray[np.int32]) -> Names:
    """Return one 40-bit name per item row, so small that sums over any basket stay exact."""
    return mix(rows.astype(np.uint64)) >> np.uint64(24)


def basket_names(requests: Requests) -> Names:
    """Return one name per set of positives: the sum of its items' names."""
    running = np.concatenate([np.zeros(1, np.uint64), np.cumsum(item_names(requests.positive))])
    names: Names = running[requests.offsets[1:]] - running[requests.offsets[:-1]]
    return names


def history_checks(prepared: PreparedSet, requests: AllRequests) -> list[Check]:
    """Look at what lies before each request: in order, all of it earlier, and nothing left out."""
    offsets, time = np.asarray(prepared.histories.offsets), prepared.histories.events.time
    late: list[str] = []
    short: list[str] = []
    n_late = n_short = total = 0
    for split, some in requests.items():
        total += len(some)
        start, stop = offsets[some.user], offsets[some.user + 1]
        newest = np.asarray(time[np.maximum(some.end - 1, 0)]) if len(time) else np.zeros(len(some), np.int64)
        following = np.asarray(time[np.minimum(some.end, len(time) - 1)]) if len(time) else newest
        reaches = np.flatnonzero((some.end > start) & (newest >= some.at))
        stops = np.flatnonzero((some.end < stop) & (following < some.at))
        n_late, n_short = n_late + len(reaches), n_short + len(stops)
        late += [_request(prepared, split, some, int(index)) for index in reaches[:1]]
        short += [_request(prepared, split, some, int(index)) for index in stops[:1]]
    disorder = _out_of_order(prepared)
    return [
        Check(
            "history_in_order",
            not disorder,
            f"before an older one of their user: {counted(disorder, 'event')}" if disorder else f"{len(time):,} events",
            "each user's events oldest first",
        ),
        Check(
            "history_before_request",
            not n_late,
            f"events at or after their moment are seen by {n_late:,} of {total:,} requests, e.g. {late[0]}"
            if late
            else f"{total:,} requests see only what lies strictly before them",
            "every event of a history strictly before its request",
        ),
        Check(
            "history_whole",
            not n_short,
            f"events before their moment are missed by {n_short:,} of {total:,} requests, e.g. {short[0]}"
            if short
            else f"{total:,} requests see all that lies before them",
            "a history that ends where the request's moment begins",
        ),
    ]


def _out_of_order(prepared: PreparedSet) -> int:
    offsets, time = np.asarray(prepared.histories.offsets), prepared.histories.events.time
    count = 0
    for begin, end in user_slices(offsets, EVENTS_AT_ONCE):
        part = np.asarray(time[offsets[begin] : offsets[end]])
        falls = np.flatnonzero(part[1:] < part[:-1]) + 1 + offsets[begin]
        starts = offsets[np.minimum(np.searchsorted(offsets, falls), len(offsets) - 1)]
        count += int((starts != falls).sum())
    return count


def split_checks(prepared: PreparedSet, requests: AllRequests, last_request: bool) -> list[Check]:
    """Look for what two splits share: a request, a moment of a user, or a large basket that comes again.

    Under `last_request` a user's two newest sessions may carry one stamp (a log of days): they are then validation and
    test, and neither sees the other, so only moments shared with training count.
    """
    baskets = {split: basket_names(some) for split, some in requests.items()}
    moments = {split: moment_names(some.user, some.at) for split, some in requests.items()}
    whole = {split: mix(moments[split] ^ mix(baskets[split])) for split in requests}
    same: list[str] = []
    close: list[str] = []
    for one, other in combinations(requests, 2):
        same += _shared(prepared, requests, (one, other), whole)
        if "train" in (one, other) or not last_request:
            close += _shared(prepared, requests, (one, other), moments)
    sizes = ", ".join(f"{len(some):,} {split}" for split, some in requests.items())
    return [
        Check("shared_requests", not same, "; ".join(same) or f"none among {sizes}", "no request in two splits"),
        Check(
            "shared_moments",
            not close,
            "; ".join(close) or f"none among {sizes}",
            "no two splits with a request of one user at one moment",
        ),
        _repeated_baskets(requests, baskets),
    ]


def _shared(
    prepared: PreparedSet, requests: AllRequests, pair: tuple[Split, Split], names: Mapping[Split, Names]
) -> list[str]:
    one, other = pair
    found = np.flatnonzero(np.isin(names[other], names[one]))
    if not len(found):
        return []
    example = _request(prepared, other, requests[other], int(found[0]))
    return [f"also in {one}: {len(found):,} of {len(names[other]):,} {other} requests, e.g. {example}"]


def _repeated_baskets(requests: AllRequests, baskets: Mapping[Split, Names]) -> Check:
    large = {split: np.diff(some.offsets) >= SAME_BASKET for split, some in requests.items()}
    owned = {split: mix(some.user.astype(np.uint64) ^ mix(baskets[split])) for split, some in requests.items()}
    words, worst = [], 0.0
    for split in ("valid", "test"):
        asked = owned[split][large[split]]
        again = int(np.isin(asked, owned["train"][large["train"]]).sum())
        words.append(f"{again:,} of {len(asked):,} {split}")
        worst = max(worst, again / len(asked) if len(asked) else 0.0)
    return Check(
        "repeated_baskets",
        worst <= SAME_BASKET_SHARE,
        f"{' and '.join(words)} baskets of {SAME_BASKET} and more items are, item by item, a training basket of the "
        "same user",
        f"at most {100 * SAME_BASKET_SHARE:g} % of either",
    )


def candidate_check(prepared: PreparedSet, requests: AllRequests, samplers: Sequence[str]) -> Check:
    """Look at the fixed candidates: one list per request, its positives first, no negative among them."""
    wrong: list[str] = []
    lists = 0
    for split in SPLITS[1:]:
        for sampler in samplers:
            sets = prepared.candidates(split, sampler)
            lists += len(sets)
            if complaint := _candidates(requests[split], sets):
                wrong.append(f"{split}, {sampler}: {complaint}")
    return Check(
        "candidate_lists",
        not wrong,
        "; ".join(wrong) or f"{lists:,} lists",
        "one list per request in their order, its positives first, no negative among its positives",
    )


def _candidates(requests: Requests, sets: CandidateSets) -> str:
    """Say what is wrong with the candidates of a split; nothing if they are as they should be."""
    if len(sets) != len(requests):
        return f"{len(sets):,} lists for {len(requests):,} requests"
    misplaced = accused = 0
    for begin in range(0, len(requests), REQUESTS_AT_ONCE):
        end = min(begin + REQUESTS_AT_ONCE, len(requests))
        some = requests.take(np.arange(begin, end))
        low, high = sets.offsets[begin], sets.offsets[end]
        bad, known = _misplaced(some, sets.offsets[begin : end + 1] - low, sets.item[low:high], sets.label[low:high])
        misplaced, accused = misplaced + bad, accused + known
    complaints = []
    if misplaced:
        complaints.append(f"not beginning with their request's positives: {misplaced:,} of {len(requests):,} lists")
    if accused:
        complaints.append(f"positives of their own request: {counted(accused, 'negative')}")
    return ", ".join(complaints)


def _misplaced(
    requests: Requests, offsets: NDArray[np.int64], item: NDArray[np.int32], label: NDArray[np.uint8]
) -> tuple[int, int]:
    """Count the lists that do not begin with their positives, and the negatives that are positives."""
    size, positives = np.diff(offsets), np.diff(requests.offsets)
    owner = np.repeat(np.arange(len(requests)), size)
    place = np.arange(len(item)) - offsets[owner]
    first = place < positives[owner]
    padded = np.append(requests.positive, np.int32(0))
    expected = padded[np.minimum(requests.offsets[owner] + place, len(requests.positive))]
    wrong = (first != (label == 1)) | (first & (item != expected))
    bad = np.bincount(owner[wrong], minlength=len(requests)) > 0
    bad |= size < positives
    known = np.repeat(np.arange(len(requests)), positives) << 32 | requests.positive
    asked = (owner << 32 | item)[label == 0]
    return int(bad.sum()), int(np.isin(asked, known).sum())


def _request(prepared: PreparedSet, split: Split, requests: Requests, index: int) -> str:
    """Name a request as a person can find it."""
    user = prepared.users["user_id"][int(requests.user[index])]
    return f"{split} request {index} (user {user!r} at {moment(int(requests.at[index]))})"
