"""Who would have served better: two bundles on the same live requests, judged by what the users did afterwards.

For every pair (`serving.pairs`) the items of the user's events within a window after the request are its outcomes, for
both lists alike. Only requests whose window has ended count, and users who were forgotten do not. Differences are
paired, with intervals over resampled users. The list that was shown has an advantage, since people take what they see:
a shadow that is level with the champion may well be better. The champion beside a challenger has the same handicap.
"""

import bisect
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic_core import from_json, to_json

from recsys.bootstrap import Ratio, bootstrap
from recsys.errors import DataError
from recsys.history import POSITIONS
from recsys.log_format import LogReader
from recsys.stores import Tombstone
from serving.pairs import Pair, read_pairs

RESAMPLES = 1000
MEASURES = ("hit_rate", "ndcg")


@dataclass(frozen=True)
class Figure:
    """A mean with its 95 % interval over resampled users."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Comparison:
    """One bundle that answered beside one that did not, over the same requests.

    Attributes:
        answered: role and version of the one whose answers were sent.
        other: role and version of the one that scored beside.
        requests: whose window has ended.
        users: of these requests.
        with_outcome: requests after which the user did anything.
        young: requests left out because their window has not ended.
        overlap: mean share of the longer list that both have.
        measures: by name: of the one that answered, of the other, and other minus answered.
        seconds: median time of each, as measured beside each other in production.
    """

    answered: str
    other: str
    requests: int
    users: int
    with_outcome: int
    young: int
    overlap: float
    measures: dict[str, tuple[Figure, Figure, Figure]]
    seconds: tuple[float, float]

    def table(self) -> dict[str, Any]:
        """Return the comparison as values of JSON: what is not defined is null."""
        table: dict[str, Any] = from_json(to_json(asdict(self), inf_nan_mode="null"))
        return table


def compare_online(
    state: Path, window: int, now: int, actions: Sequence[str] = (), resamples: int = RESAMPLES, seed: int = 0
) -> list[Comparison]:
    """Compare all bundles that stood beside each other in a state directory, the most requests first.

    Args:
        state: directory of the service.
        window: microseconds after a request within which the user's events are its outcomes.
        now: microseconds UTC.
        actions: events of these only; all if empty.
        resamples: of the users.
        seed: of the resampling.

    Raises:
        DataError: there are no pairs: no challenger or shadow has served here.
    """
    pairs = list(read_pairs(state / "pairs"))
    if not pairs:
        raise DataError(
            f"{state / 'pairs'}: no pairs; publish with --alias challenger or --alias shadow while the service runs"
        )
    if now >= POSITIONS and all(pair.at < POSITIONS for pair in pairs):
        raise DataError(f"{state / 'pairs'}: answers over a log of positions, after which no time can be waited")
    events, forgotten = _events(state / "log", actions)
    groups: dict[tuple[str, str], list[Pair]] = defaultdict(list)
    for pair in pairs:
        if pair.user_id not in forgotten:
            answered, other = (f"{one.role} {one.version}" for one in (pair.answered, pair.other))
            groups[answered, other].append(pair)
    found = [_compare(*names, group, events, window, now, resamples, seed) for names, group in groups.items()]
    return sorted(found, key=lambda comparison: -comparison.requests)


def _events(log: Path, actions: Sequence[str]) -> tuple[dict[str, tuple[list[int], list[str]]], set[str]]:
    """Return times (ascending) and items of each user's events, and the users who were forgotten."""
    rows: dict[str, list[tuple[int, str]]] = defaultdict(list)
    forgotten: set[str] = set()
    for record in LogReader(log).replay():
        event = record.event
        if isinstance(event, Tombstone):
            rows.pop(event.user_id, None)
            forgotten.add(event.user_id)
        elif not actions or event.action in actions:
            rows[event.user_id].append((event.time, event.item_id))
    for own in rows.values():
        own.sort()
    return {user: ([time for time, _ in own], [item for _, item in own]) for user, own in rows.items()}, forgotten


def _compare(
    answered: str,
    other: str,
    pairs: Sequence[Pair],
    events: dict[str, tuple[list[int], list[str]]],
    window: int,
    now: int,
    resamples: int,
    seed: int,
) -> Comparison:
    old = [pair for pair in pairs if pair.at + window <= now]
    outcomes = [_outcomes(pair, events, window) for pair in old]
    users = {user: number for number, user in enumerate(dict.fromkeys(pair.user_id for pair in old))}
    user = np.array([users[pair.user_id] for pair in old], np.int64)
    measured = {
        (name, side): Ratio.of_groups(_measure(name, old, side, outcomes), user, len(users))
        for name in MEASURES
        for side in ("answered", "other")
    }
    statistics = {f"{name} {side}": ratio for (name, side), ratio in measured.items()}
    estimates = bootstrap(statistics, len(users), resamples, seed)
    figures = {}
    for name in MEASURES:
        ours, theirs = estimates[f"{name} answered"], estimates[f"{name} other"]
        three = [Figure(each.value, *each.interval()) for each in (ours, theirs, theirs.minus(ours))]
        figures[name] = (three[0], three[1], three[2])
    return Comparison(
        answered=answered,
        other=other,
        requests=len(old),
        users=len(users),
        with_outcome=sum(bool(outcome) for outcome in outcomes),
        young=len(pairs) - len(old),
        overlap=_mean([_overlap(pair) for pair in old]),
        measures=figures,
        seconds=(_median([pair.answered.seconds for pair in old]), _median([pair.other.seconds for pair in old])),
    )


def _outcomes(pair: Pair, events: dict[str, tuple[list[int], list[str]]], window: int) -> set[str]:
    times, items = events.get(pair.user_id, ([], []))
    first = bisect.bisect_right(times, pair.at)
    return set(items[first : bisect.bisect_right(times, pair.at + window)])


def _measure(name: str, pairs: Sequence[Pair], side: str, outcomes: Sequence[set[str]]) -> NDArray[np.float64]:
    """Return a value per request: NaN, which is left out, where the user did nothing."""
    score = {"hit_rate": _hit, "ndcg": _ndcg}[name]
    values = [
        score(getattr(pair, side).items, outcome) if outcome else math.nan
        for pair, outcome in zip(pairs, outcomes, strict=True)
    ]
    return np.array(values, np.float64)


def _hit(items: Sequence[str], outcome: set[str]) -> float:
    return float(any(item in outcome for item in items))


def _ndcg(items: Sequence[str], outcome: set[str]) -> float:
    """Return DCG with gain 1 for an outcome, over the best that a list of this length could have."""
    gained = sum(1 / math.log2(place + 2) for place, item in enumerate(items) if item in outcome)
    best = sum(1 / math.log2(place + 2) for place in range(min(len(outcome), len(items))))
    return gained / best if best else 0.0


def _overlap(pair: Pair) -> float:
    longer = max(len(pair.answered.items), len(pair.other.items))
    return len(set(pair.answered.items) & set(pair.other.items)) / longer if longer else math.nan


def _mean(values: Sequence[float]) -> float:
    defined = [value for value in values if not math.isnan(value)]
    return float(np.mean(defined)) if defined else math.nan


def _median(values: Sequence[float]) -> float:
    return float(np.median(values)) if values else math.nan


def describe(comparisons: Sequence[Comparison]) -> str:
    """Return the comparisons in words and a table, for a terminal."""
    return "\n\n".join(_described(comparison) for comparison in comparisons)


def _described(found: Comparison) -> str:
    ours, theirs = (seconds * 1e3 for seconds in found.seconds)
    lines = [
        f"{found.answered} answered, {found.other} scored beside it",
        f"  {found.requests:,} requests of {found.users:,} users, {found.with_outcome:,} with an event afterwards; "
        f"{found.young:,} too young to judge",
        f"  {found.overlap:.1%} of the lists in common; median {ours:.1f} ms and {theirs:.1f} ms",
    ]
    for name, figures in found.measures.items():
        first, second, difference = (f"{each.value:.4f} [{each.low:.4f}, {each.high:.4f}]" for each in figures)
        lines.append(f"  {name:<9} {first}   other {second}   other - answered {difference}")
    return "\n".join(lines)
