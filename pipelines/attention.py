"""How far models are from the attention they approximate, and what they look at for a few requests.

A model that searches a history or hashes it reads less than attention over all of it would. How much less is told by
history length, on candidates of the first sampler: how much attention lies elsewhere, and how far what is read is
turned (`ranking.attention.Attention`).

    R requests   C candidates of each   T events
"""

from collections.abc import Mapping, Sequence
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray

from pipelines.attention_record import AttentionFound, Distance, Example, Looked, View
from pipelines.cold_start import item_names
from pipelines.prepared import CandidateSets, PreparedSet
from pipelines.scoring import Sample, assemble_requests, evaluation_mode
from ranking.attention import Attentive
from ranking.batch import FIRST_ITEM, Batch
from ranking.ranker import AnyRanker
from recsys.bootstrap import Ratio, Resampling, Statistic, bootstrap
from recsys.history import DAY
from recsys.metrics import Floats, Ints

CANDIDATES = 8
"""Candidates of a request that are looked at, spread evenly over its list."""
BATCH = 16
EXAMPLES = 3
EVENTS = 3
"""Items told of each example, those with most attention."""
LEAST_EVENTS = 5
"""Events before a request that is shown as an example."""


def measure_attention(
    models: Mapping[str, AnyRanker],
    prepared: PreparedSet,
    sample: Sample,
    sets: CandidateSets,
    scores: Mapping[str, NDArray[np.float32]],
    segments: Sequence[tuple[str, int, int | None]],
    resampling: Resampling,
) -> AttentionFound | None:
    """Measure the attention of the models that look at single events; None if there are none of them.

    Args:
        models: by name.
        prepared: the set the requests come from.
        sample: R requests.
        sets: their candidates, positives first.
        scores: by model, float32 [N] of those candidates.
        segments: history lengths: name, least length, and the length it ends before.
        resampling: of the users, for intervals.
    """
    attentive = {name: model for name, model in models.items() if hasattr(model, "attention_of")}
    if not attentive or not len(sample):
        return None
    distances: list[Distance] = []
    for name, model in attentive.items():
        both = _distances(model, prepared, sample, sets)
        if both is not None:
            distances += _by_length(name, sample, *both, segments, resampling)
    return AttentionFound(len(sample), distances, _examples(attentive, prepared, sample, sets, scores))


def _distances(
    model: AnyRanker, prepared: PreparedSet, sample: Sample, sets: CandidateSets
) -> tuple[Floats, Floats] | None:
    """Return both distances of every request, float64 [R], means over its candidates; None for an exact model."""
    sizes = np.diff(sets.offsets)
    place = sets.offsets[:-1, None] + np.arange(CANDIDATES) * sizes[:, None] // CANDIDATES  # [R, C]
    item = np.append(sets.item, 0)[place] * (sizes > 0)[:, None]
    found: list[tuple[Floats, Floats]] = []
    with evaluation_mode(model) as device:
        for chosen in np.array_split(np.argsort(sample.length, kind="stable"), -(-len(sample) // BATCH)):
            batch = assemble_requests(model, prepared, sample.take(chosen), item[chosen].astype(np.int32)).to(device)
            attention = cast(Attentive, model).attention_of(batch.history, batch.candidates)
            if attention.weight is attention.exact:
                return None
            real = batch.candidates.mask
            elsewhere, turned = (
                each.double().masked_fill(~real, torch.nan).nanmean(1).cpu().numpy()
                for each in (attention.elsewhere, attention.turned)
            )
            found.append((elsewhere, turned))
    order = np.argsort(np.argsort(sample.length, kind="stable"), kind="stable")
    return np.concatenate([one for one, _ in found])[order], np.concatenate([one for _, one in found])[order]


def _by_length(
    name: str,
    sample: Sample,
    elsewhere: Floats,
    turned: Floats,
    segments: Sequence[tuple[str, int, int | None]],
    resampling: Resampling,
) -> list[Distance]:
    users, user = np.unique(sample.requests.user, return_inverse=True)
    found = []
    for segment, low, high in segments:
        kept = (sample.length >= low) & (sample.length < (high or np.inf)) & ~np.isnan(elsewhere)
        if not kept.any():
            continue
        statistics: dict[str, Statistic] = {
            "elsewhere": Ratio.of_groups(elsewhere[kept], user[kept], len(users)),
            "turned": Ratio.of_groups(turned[kept], user[kept], len(users)),
        }
        told = bootstrap(statistics, len(users), resampling.resamples, resampling.seed)
        values = (told[key].told(resampling.level) for key in ("elsewhere", "turned"))
        found.append(Distance(name, segment, int(kept.sum()), *values))
    return found


def _examples(
    models: Mapping[str, AnyRanker],
    prepared: PreparedSet,
    sample: Sample,
    sets: CandidateSets,
    scores: Mapping[str, NDArray[np.float32]],
) -> list[Example]:
    first = sets.item[np.minimum(sets.offsets[:-1], len(sets.item) - 1)]  # what was taken, if anything
    taken = (sets.label[np.minimum(sets.offsets[:-1], len(sets.label) - 1)] > 0) & (np.diff(sets.offsets) > 1)
    fit = np.flatnonzero(taken & (first >= FIRST_ITEM) & (sample.length >= LEAST_EVENTS))
    chosen = fit[np.unique(np.linspace(0, len(fit) - 1, EXAMPLES).astype(np.int64))] if len(fit) else fit
    names = item_names(prepared) if len(chosen) else []
    timed = prepared.manifest.get("cuts") is not None
    found = []
    for place in chosen.tolist():
        mine = slice(int(sets.offsets[place]), int(sets.offsets[place + 1]))
        one, item = sample.take(np.array([place])), first[place : place + 1][None]
        views = []
        for name, model in models.items():
            with evaluation_mode(model) as device:
                batch = assemble_requests(model, prepared, one, item).to(device)
                looked = _looked(cast(Attentive, model), batch, names, timed)
            own = scores[name][mine]
            views.append(View(name, 1 + int((own > own[0]).sum()), looked))
        found.append(Example(names[int(item[0, 0])], int(sample.length[place]), len(own), views))
    return found


def _looked(model: Attentive, batch: Batch, names: Sequence[str], timed: bool) -> list[Looked]:
    """Return the items with most attention of a single candidate of a single request; an item's events are summed."""
    weight = model.attention_of(batch.history, batch.candidates).weight[0, 0].abs().double().cpu().numpy()  # [T]
    padded = batch.history.padded(len(weight))
    item: Ints = padded.item[0].cpu().numpy().astype(np.int64)
    day = (int(batch.request.at[0]) - padded.time[0].cpu().numpy()) / DAY
    total = weight.sum()
    if total == 0:
        return []
    share = np.bincount(item, weight / total)
    best = np.argsort(-share, kind="stable")[:EVENTS]
    found = []
    for row in best[share[best] > 0].tolist():
        newest = int(np.flatnonzero((item == row) & (weight > 0))[-1])
        events = int(((item == row) & (weight > 0)).sum())
        name = names[row] if row >= FIRST_ITEM else "an item unknown in training"
        days = float(day[newest]) if timed else None
        found.append(Looked(name, float(share[row]), events, len(weight) - newest, days))
    return found
