"""Gradient boosting (LightGBM) on eleven counts: what a practitioner builds before any sequence model.

Ke et al., "LightGBM: A Highly Efficient Gradient Boosting Decision Tree", NIPS 2017.

    own_count, own_short, own_long     the user's events of the candidate: all, and decayed with two half-lives
    own_age_days                       since the newest of them; missing if there is none
    category_share, category_age_days  the same of the candidate's category: its share of decayed events, and its age
    popularity, popularity_recent      log(1 + training events), of the whole period and of its last `recent_days`
    followed                           P(candidate | items of the newest basket), from the training transitions
    events, user_age_days              length of the history, and time since its newest event
    last_action                        what the user last did with the candidate, 0 if nothing; only with `actions`

All of them come from sorted histories by binary search, O((T + C) log T) a request. `pipelines.boost` grows the trees
on the very requests and sampled negatives the other rankers see; the logit is the sum of the trees. Popularity
and transitions hold the training requests themselves; what a request has put there is taken out before
the trees see it, or they would learn to recognise it.

Six counts may only raise the score (`RISING`). Without that the trees cut the rare items into steps that do not hold a
month later: grocery purchases, 300 validation requests with 100 negatives, 120 trees from 6,000 requests, GAUC .890 ->
.911 on uniform and .718 -> .776 on popular negatives, NDCG@10 .705 -> .779 and .511 -> .494.

The trees are LightGBM's own text format, held as bytes in the weights file: nothing that can run code is stored.
Growing and scoring need the package `lightgbm`, which is no dependency of the service; it is asked for by name.
"""

import math
import threading
import weakref
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ranking.batch import Batch, Candidates, History, Request
from ranking.embeddings import take
from ranking.followers import Held, followed, newest_basket, out_weights
from ranking.items import ItemTable
from ranking.own_counts import (
    OwnEvents,
    decayed_counts,
    decayed_total,
    last_action,
    own_events,
    own_span,
)
from ranking.ranker import NEGATIVE, Loss, TrainsOn
from recsys.errors import ConfigError, RecsysError
from recsys.history import DAY

FEATURES = (
    "own_count",
    "own_short",
    "own_long",
    "own_age_days",
    "category_share",
    "category_age_days",
    "popularity",
    "popularity_recent",
    "followed",
    "events",
    "user_age_days",
)
LAST_ACTION = "last_action"
"""A category, beside the counts."""

RISING = ("own_count", "own_short", "own_long", "category_share", "popularity", "followed")
"""Features of which more never lowers the score."""


@dataclass(frozen=True)
class GradientBoostingConfig:
    """Attributes of the model.

    Attributes:
        trees: number of trees.
        leaves: most leaves of a tree.
        learning_rate: weight of each tree.
        least_rows: fewest training rows in a leaf.
        short_days: half-life of `own_short`.
        long_days: half-life of `own_long` and of the category's share.
        recent_days: last days of the training period that `popularity_recent` counts.
        category: item column used as category; None leaves its two features out.
        actions: tell apart what the user did last with a candidate; for logs of several actions.
    """

    trees: int = 200
    leaves: int = 31
    learning_rate: float = 0.05
    least_rows: int = 100
    short_days: float = 7.0
    long_days: float = 60.0
    recent_days: float = 28.0
    category: str | None = "category"
    actions: bool = False

    @property
    def features(self) -> tuple[str, ...]:
        """Names of the features, in order."""
        return (*FEATURES, LAST_ACTION) if self.actions else FEATURES

    def __post_init__(self) -> None:
        if self.trees < 1 or self.leaves < 2 or self.least_rows < 1 or self.learning_rate <= 0:
            raise ConfigError(
                f"trees={self.trees}, leaves={self.leaves}, least_rows={self.least_rows}, "
                f"learning_rate={self.learning_rate}: expected at least 1, 2 and 1, and a rate above 0"
            )
        if not 0 < self.short_days < self.long_days or self.recent_days <= 0:
            raise ConfigError(
                f"short_days={self.short_days}, long_days={self.long_days}, recent_days={self.recent_days}: "
                "expected 0 < short_days < long_days and recent_days above 0"
            )


class CountsState(NamedTuple):
    """A history ordered for counting, by item and by category."""

    item: Tensor  # int32 [B, T], `OwnEvents` of the items
    time: Tensor  # int64 [B, T]
    action: Tensor  # uint8 [B, T]
    category: Tensor  # int32 [B, T], `OwnEvents` of the categories; no columns without one
    category_time: Tensor  # int64 [B, T]
    category_action: Tensor  # uint8 [B, T]
    basket: Tensor  # int32 [B, M], the items of the newest moment
    events: Tensor  # int64 [B], length of the history
    newest: Tensor  # int64 [B], time of its newest event, 0 if it is empty

    @property
    def own(self) -> OwnEvents:
        """The events by item."""
        return OwnEvents(self.item, self.time, self.action)

    @property
    def own_category(self) -> OwnEvents:
        """The events by category."""
        return OwnEvents(self.category, self.category_time, self.category_action)


@dataclass(frozen=True)
class Training:
    """What the counts hold of the training requests whose features are asked for."""

    held: Held
    recent: Tensor  # bool [B], whether `popularity_recent` holds the request


class GradientBoosting(nn.Module):
    """Scores a candidate by trees over counts; `recent` and `trees` are set by `pipelines.boost`."""

    trains_on: ClassVar[TrainsOn] = "nothing"
    recent: Tensor
    trees: Tensor
    total: Tensor

    def __init__(self, config: GradientBoostingConfig, items: ItemTable) -> None:
        super().__init__()
        self.config = config
        self.items = items
        if config.category is not None:
            items.column(config.category)  # refused here if there is none
        self.register_buffer("recent", torch.zeros(len(items), dtype=torch.int64))  # recent training events by row
        self.register_buffer("trees", torch.empty(0, dtype=torch.uint8))  # UTF-8 bytes of LightGBM's text
        self.register_buffer("total", out_weights(items.transitions), persistent=False)

    @property
    def window(self) -> int | None:
        """All events are counted."""
        return None

    def encode(self, history: History) -> CountsState:
        """Return the history ordered by item and by category; cost O(T log T)."""
        own = own_events(history)
        category = OwnEvents(*(part[:, :0] for part in own))
        if self.config.category is not None:
            codes = take(self.items.column(self.config.category), history.item)
            category = own_events(replace(history, item=codes))
        return CountsState(*own, *category, newest_basket(history), history.lengths, history.padded(1).time[:, 0])

    def score(self, state: CountsState, request: Request, candidates: Candidates) -> Tensor:
        """Return the sums of the trees, float32 [B, C]; raises `RecsysError` before they are grown."""
        mask = candidates.mask
        features = self.features(state, request, candidates)[mask]  # [R, F]
        logits = torch.full(mask.shape, NEGATIVE, device=mask.device)
        if len(features):
            raw = self._sums(np.ascontiguousarray(features.cpu().numpy()))
            logits[mask] = torch.from_numpy(raw).to(mask.device, torch.float32)
        return logits

    def loss(self, batch: Batch, generator: torch.Generator) -> Loss:
        """Raise: trees are grown, not stepped."""
        raise RecsysError("lightgbm is not trained by gradient steps; `recsys train --config lightgbm` grows its trees")

    def features(
        self, state: CountsState, request: Request, candidates: Candidates, training: Training | None = None
    ) -> Tensor:
        """Return the features of all candidates in the order of the config's, float32 [B, C, F], NaN where missing.

        Computed in float64 and rounded at the end, so that a last digit does not move a candidate past a threshold.
        With `training` the requests are left out of the counts that they are part of.
        """
        item, at, config = candidates.item, request.at, self.config
        own = state.own
        count, _, newest = own_span(own, item)
        everybody, recent = take(self.items.count, item), take(self.recent, item)
        if training is not None:
            label = training.held.label.long()
            everybody = (everybody - label).clamp_min(0)
            recent = (recent - label * training.recent[:, None]).clamp_min(0)
        share, category_age = self._category(state, at, item)
        by_user = torch.zeros_like(share)  # [B, C]
        columns = [
            count.double(),
            decayed_counts(own, at, item, config.short_days),
            decayed_counts(own, at, item, config.long_days),
            _age_days(at, newest, count > 0),
            share,
            category_age,
            everybody.double().log1p(),
            recent.double().log1p(),
            followed(self.items.transitions, self.total, state.basket, item, training.held if training else None),
            by_user + state.events[:, None],
            by_user + _age_days(at, state.newest[:, None], state.events[:, None] > 0),
        ]
        if config.actions:
            columns.append(last_action(own, item).double())
        return torch.stack(columns, -1).float()

    def _category(self, state: CountsState, at: Tensor, item: Tensor) -> tuple[Tensor, Tensor]:
        """Return the category's share of the decayed events (0 of none) and its age in days, float64 [B, C]."""
        if self.config.category is None:
            nothing = torch.full(item.shape, math.nan, dtype=torch.float64, device=item.device)
            return nothing, nothing
        own, code = state.own_category, take(self.items.column(self.config.category), item)
        count, _, newest = own_span(own, code)
        total = decayed_total(own, at, self.config.long_days)[:, None]
        share = decayed_counts(own, at, code, self.config.long_days) / total.clamp_min(torch.finfo(total.dtype).tiny)
        return share, _age_days(at, newest, count > 0)

    def _sums(self, features: NDArray[np.float32]) -> NDArray[np.float64]:
        """Return the sum of the trees' values for each row of features [R, F]."""
        threads = torch.get_num_threads()
        sums: NDArray[np.float64] = booster(self).predict(features, raw_score=True, num_threads=threads)
        return sums

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Take trees of any length: their bytes are as many as LightGBM wrote."""
        if f"{prefix}trees" in state_dict:
            self.trees = torch.empty_like(state_dict[f"{prefix}trees"], device=self.trees.device)
        super()._load_from_state_dict(state_dict, prefix, *rest)


def _age_days(at: Tensor, time: Tensor, known: Tensor) -> Tensor:
    """Return days from `time` to `at` int64 [B], float64 in the shape of `time` [B, ...]; NaN where not known."""
    age = (at[:, None] - time).clamp_min(0).double() / DAY
    return age.masked_fill(~known, math.nan)


_boosters: "weakref.WeakKeyDictionary[GradientBoosting, tuple[Tensor, int, Any]]" = weakref.WeakKeyDictionary()
_boosters_lock = threading.Lock()


def booster(model: GradientBoosting) -> Any:
    """Return the trees of a model as a `lightgbm.Booster`, parsed again only when its bytes changed.

    Raises:
        RecsysError: there are no trees yet.
        ConfigError: the package `lightgbm` is not installed.
    """
    if not len(model.trees):
        raise RecsysError("lightgbm: no trees yet; grow them with `recsys train --config lightgbm`")
    with _boosters_lock:
        known = _boosters.get(model)
        if known is None or known[0] is not model.trees or known[1] != model.trees._version:
            text = model.trees.cpu().numpy().tobytes().decode()
            known = (model.trees, model.trees._version, lightgbm().Booster(model_str=text))
            _boosters[model] = known
    return known[2]


def lightgbm() -> Any:
    """Return the module `lightgbm`; raises `ConfigError` saying how to install it."""
    try:
        import lightgbm as module
    except ImportError as error:
        raise ConfigError(
            f"the model lightgbm needs the package `lightgbm` ({error}); install it with `pip install lightgbm`, or "
            "choose another ranker"
        ) from None
    return module
