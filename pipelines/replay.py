"""What another bundle would have answered: the request log scored again over the histories as they were.

The bundle that answered gives what it gave, to the bit: any difference is then a defect. Answers whose history can't be
rebuilt (made over another snapshot or log, or of users who are forgotten) are skipped and counted. Those made with
other filters, rules or quotas, or when other items were unavailable, are replayed by those of now, and counted.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError
from scipy.stats import spearmanr

from ranking.as_served import as_served, forgotten_users
from ranking.availability import AVAILABILITY, AvailabilityFile
from ranking.bundle import Bundle
from ranking.recommender import Recommender
from ranking.recommender_config import DEFAULTS, RecommenderConfig
from ranking.snapshot import SnapshotReader
from recsys.errors import DataError
from recsys.history import Events
from recsys.log_format import LogReader
from recsys.messages import RecommendedItem, RecommendRequest
from recsys.progress import Progress, silent
from recsys.request_log import LoggedItem, LoggedRequest, files, history_digest, read_file
from recsys.stores import Encoder

SHOWN = 10


@dataclass(frozen=True)
class Difference:
    """One answer beside what the bundle gives.

    Attributes:
        request_id: of the answer.
        overlap: share of the items of both that are in the other, 1 for the same items.
        rank_correlation: Spearman's, of the items in both; None for fewer than two.
        score_delta: largest absolute difference of the scores of an item in both; None if there is none.
        identical: whether items, order and scores are the same.
    """

    request_id: str
    overlap: float
    rank_correlation: float | None
    score_delta: float | None
    identical: bool


@dataclass(frozen=True)
class Replay:
    """All answers beside what a bundle gives; means are over the answers replayed.

    Attributes:
        bundle: version of the bundle.
        answers: in the log.
        replayed: scored again.
        skipped: whose history can't be rebuilt, or whose user is forgotten.
        other_history: replayed with a history that differs from the one served, as the bundle knows other items.
        other_settings: made with other quotas, filters or rules, or when other items were unavailable.
        identical: the same items, order and scores.
        overlap: mean.
        rank_correlation: mean of those that have one.
        score_delta: largest; scores of different models are in different units.
        by_model: answers replayed by the version that made them.
        most_different: those of least overlap, then of least rank correlation.
    """

    bundle: str
    answers: int
    replayed: int
    skipped: int
    other_history: int
    other_settings: int
    identical: int
    overlap: float | None
    rank_correlation: float | None
    score_delta: float | None
    by_model: dict[str, int]
    most_different: tuple[Difference, ...]

    def table(self) -> dict[str, Any]:
        """Return it as plain values."""
        return asdict(self)

    def text(self) -> str:
        """Return it in words."""
        lines = [
            f"bundle {self.bundle}: {self.replayed} of {self.answers} logged answers replayed, {self.skipped} skipped",
            f"made by {', '.join(f'{name} ({count})' for name, count in self.by_model.items()) or 'nobody'}",
            f"identical          {self.identical} of {self.replayed}",
            f"overlap            {_shown(self.overlap)} (mean)",
            f"rank correlation   {_shown(self.rank_correlation)} (mean, items in both)",
            f"score delta        {_shown(self.score_delta)} (largest, items in both)",
        ]
        others = (("other history", self.other_history), ("other settings", self.other_settings))
        return "\n".join(lines + [f"{name:<18} {count}" for name, count in others if count])


class _One:
    """The history of one request, whoever asks."""

    def __init__(self) -> None:
        self.events: Events | None = None

    def read(self, user_id: str) -> Events | None:  # noqa: ARG002
        """Return the history that was put here."""
        return self.events


def replay(
    state: Path,
    bundle: Bundle,
    snapshot: SnapshotReader,
    config: RecommenderConfig = DEFAULTS,
    limit: int | None = None,
    progress: Progress = silent,
) -> Replay:
    """Score the newest `limit` logged answers (all if None) with a bundle, and compare.

    Args:
        state: the service's state directory, with its event log, its request log and its table of unavailable items.
        bundle: any bundle whose item keys go with the snapshot's.
        snapshot: the one that was served.
        config: that of the service.
        limit: how many at most.
        progress: told after every answer.

    Raises:
        DataError: there is no log, a log is damaged, or a logged request can't be asked any more.
    """
    log = LogReader(state / "log")
    forgotten = forgotten_users(log)
    answers = [request for path in files(state / "requests") for request, _ in read_file(path)]
    if not answers:
        raise DataError(f"{state / 'requests'}: no logged answers; serve with [request_log] share above 0")
    answers = sorted(answers, key=lambda request: request.at)[-limit if limit else 0 :]
    can = [
        one
        for one in answers
        if (one.snapshot, one.log) == (snapshot.id, log.id) and one.position >= forgotten.get(one.user_id, 0)
    ]
    history = _One()
    recommender = Recommender(bundle, history, config, AvailabilityFile(state / AVAILABILITY))
    settings, keys = recommender.settings_digest(), len(bundle.key_to_row)
    found: list[Difference] = []
    others: Counter[str] = Counter()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the service: more threads add the numbers up in another order
    try:
        for request, events in as_served(can, snapshot, log, Encoder(bundle.key_of, bundle.action_of)):
            history.events = events
            others["history"] += history_digest(events or Events.empty(), request.at, keys) != request.history
            others["settings"] += request.settings not in ("", settings)
            answer = recommender.recommend(_asked(request, state), request.at)
            found.append(difference(request.request_id, request.items, answer.items))
            progress(len(found), len(can))
    finally:
        torch.set_num_threads(threads)
    return _summed(bundle.version, answers, can, found, others)


def difference(request_id: str, logged: Sequence[LoggedItem], given: Sequence[RecommendedItem]) -> Difference:
    """Compare an answer with another one to the same request."""
    before = {item.item_id: (place, item.score) for place, item in enumerate(logged)}
    after = {item.item_id: (place, item.score) for place, item in enumerate(given)}
    both = [item for item in before if item in after]
    places = np.array([(before[item][0], after[item][0]) for item in both], np.float64).reshape(-1, 2)
    deltas = [abs(before[item][1] - after[item][1]) for item in both]
    return Difference(
        request_id,
        overlap=len(both) / max(len(before), len(after)) if before or after else 1.0,
        rank_correlation=float(spearmanr(places).statistic) if len(both) > 1 else None,
        score_delta=max(deltas, default=None),
        identical=list(before.items()) == list(after.items()),
    )


def _asked(request: LoggedRequest, state: Path) -> RecommendRequest:
    try:
        return RecommendRequest(user_id=request.user_id, at=request.at, **request.request)
    except (ValidationError, TypeError) as error:
        raise DataError(
            f"{state / 'requests'}: answer {request.request_id}: its request can't be asked of this version ({error})"
        ) from None


def _summed(
    version: str,
    answers: Sequence[LoggedRequest],
    replayed: Sequence[LoggedRequest],
    found: Sequence[Difference],
    others: Counter[str],
) -> Replay:
    models = [request.model for request in replayed]
    correlations = [one.rank_correlation for one in found if one.rank_correlation is not None]
    deltas = [one.score_delta for one in found if one.score_delta is not None]
    worst = sorted(found, key=lambda one: (one.overlap, 1.0 if one.rank_correlation is None else one.rank_correlation))
    return Replay(
        bundle=version,
        answers=len(answers),
        replayed=len(found),
        skipped=len(answers) - len(found),
        other_history=others["history"],
        other_settings=others["settings"],
        identical=sum(one.identical for one in found),
        overlap=float(np.mean([one.overlap for one in found])) if found else None,
        rank_correlation=float(np.mean(correlations)) if correlations else None,
        score_delta=max(deltas, default=None),
        by_model={model: models.count(model) for model in dict.fromkeys(models)},
        most_different=tuple(one for one in worst if not one.identical)[:SHOWN],
    )


def _shown(value: float | None) -> str:
    return "not defined" if value is None else f"{value:.4g}"
