"""Facts about a prepared set that no check can fail on, but every number measured on it depends on."""

from collections.abc import Iterator, Sequence

import numpy as np

from pipelines.audit_period import Counts, Period, training_counts
from pipelines.audit_record import SamplerFacts, SplitFacts
from pipelines.audit_requests import EVENTS_AT_ONCE, SPLITS, AllRequests, user_slices
from pipelines.evaluate import validate
from pipelines.evaluation import defined
from pipelines.just_before import share_just_before
from pipelines.parts import Part
from pipelines.prepared import CandidateSets, PreparedSet, Requests, Split
from pipelines.scoring import draw_requests, in_history
from ranking.personal_frequency import PersonalFrequency, PersonalFrequencyConfig
from ranking.popularity import Popularity, PopularityConfig
from recsys.files import read_json

SAMPLED = 20_000
"""Requests whose positives are looked up in their histories."""
SCORED = 2_000
"""Requests scored by the two models that learn nothing."""
SEED = 2023
FLOORS = {"min_user_events": "users", "min_item_events": "items"}
"""Filters of `ingest` that count events, and what they cut."""


def split_facts(prepared: PreparedSet, requests: AllRequests, period: Period, counts: Counts) -> Iterator[SplitFacts]:
    """Yield the facts of each split. Cost: one sort of the events of at most `SAMPLED` users."""
    offsets, time = np.asarray(prepared.histories.offsets), prepared.histories.events.time
    for split in SPLITS:
        some = requests[split]
        users = np.unique(some.user)
        has_events = users[offsets[users] < offsets[users + 1]]
        trained = int((np.asarray(time[offsets[has_events]]) < period.ends[has_events]).sum())
        cold = some.positive[counts[some.positive] == 0]
        share, sampled = _in_history(prepared, split)
        yield SplitFacts(
            split=split,
            requests=len(some),
            users=len(users),
            positives=len(some.positive),
            positives_in_history=share,
            sampled=sampled,
            without_history=int((some.end == offsets[some.user]).sum()),
            cold_users=len(users) - trained,
            cold_positives=len(cold),
            cold_items=len(np.unique(cold)),
            positives_just_before=share_just_before(prepared, split, SAMPLED, SEED),
        )


def _in_history(prepared: PreparedSet, split: Split) -> tuple[float | None, int]:
    """Return the share of positives that occur in their request's history, and on how many requests."""
    sample = draw_requests(prepared, split, SAMPLED, SEED)
    some: Requests = sample.requests
    positives = CandidateSets(some.offsets, some.positive, np.ones(len(some.positive), np.uint8))
    found = in_history(prepared, sample, positives)
    return (float(found.mean()) if len(found) else None), len(sample)


def threshold_notes(prepared: PreparedSet, parts: Sequence[Part], period: Period, counts: Counts) -> tuple[str, ...]:
    """Say where the log was cut by counts over all its time, the test period included, and what that keeps.

    Filters such as `min_item_events` come before any split, as in most published protocols, so they are told rather
    than failed; users and items that fewer training events would have cut are what they let through.
    """
    cards = [read_json(part.directory / "ingest.json") for part in parts]
    cuts = [str(words).partition(" = ") for card in cards for words in card.get("filtered", {})]
    floors = {name: int(least) for name, _, least in cuts if name in FLOORS and least.isdigit() and int(least) > 1}
    notes = []
    for name, least in floors.items():
        ever, training = (
            (training_counts(prepared), counts) if name == "min_item_events" else _events_of_users(prepared, period)
        )
        few = int(((ever > 0) & (training < least)).sum())
        notes.append(
            f"The log was cut by {name} = {least}, counted over all its time, the test period included: {few:,} of its "
            f"{int((ever > 0).sum()):,} {FLOORS[name]} have fewer events in training."
        )
    return tuple(notes)


def _events_of_users(prepared: PreparedSet, period: Period) -> tuple[Counts, Counts]:
    """Count each user's events, all of them and those of the training period."""
    offsets, time = np.asarray(prepared.histories.offsets), prepared.histories.events.time
    training = np.zeros(len(offsets) - 1, np.int64)
    for begin, end in user_slices(offsets, EVENTS_AT_ONCE):
        low, lengths = int(offsets[begin]), np.diff(offsets[begin : end + 1])
        seen = np.asarray(time[low : int(offsets[end])]) < np.repeat(period.ends[begin:end], lengths)
        training[begin:end] = np.diff(np.concatenate([[0], np.cumsum(seen)])[offsets[begin : end + 1] - low])
    return np.diff(offsets), training


def sampler_facts(prepared: PreparedSet, samplers: Sequence[str]) -> Iterator[SamplerFacts]:
    """Yield the facts of each split and sampler of fixed candidates."""
    for split in SPLITS[1:]:
        sample = draw_requests(prepared, split, SCORED, SEED)
        for sampler in samplers if len(sample) else ():
            sets = prepared.candidates(split, sampler).take(sample.index)
            negative = sets.label == 0
            inside = in_history(prepared, sample, sets)[negative]
            popular, frequent = (
                validate(model, prepared, split, sampler, SCORED, SEED)
                for model in (
                    Popularity(PopularityConfig(), prepared.items),
                    PersonalFrequency(PersonalFrequencyConfig(), prepared.items),
                )
            )
            yield SamplerFacts(
                split=split,
                sampler=sampler,
                requests=len(sample),
                negatives_per_request=float(negative.sum() / len(sample)),
                negatives_in_history=float(inside.mean()) if len(inside) else None,
                popularity_auc=defined(popular["auc"]),
                popularity_gauc=defined(popular["gauc"]),
                personal_frequency_auc=defined(frequent["auc"]),
                personal_frequency_gauc=defined(frequent["gauc"]),
            )
