"""What the service tells of itself: Prometheus metrics in seconds and bytes. No user or item is ever a label."""

import os
from collections.abc import Iterable, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
MULTIPROCESS = "PROMETHEUS_MULTIPROC_DIR"
"""Where replicas of one machine share their counts; read by prometheus_client when a process first imports it."""

SECONDS = (0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
STAGE_SECONDS = (0.00005, 0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5)
CANDIDATES = (1, 10, 50, 100, 200, 500, 1_000, 2_000, 5_000, 10_000)


class Telemetry:
    """The metrics of one service, in a registry of their own.

    With `PROMETHEUS_MULTIPROC_DIR` set, a scrape gives the sum over all replicas of the machine, whichever answers it.
    """

    def __init__(self) -> None:
        registry = CollectorRegistry()
        self._registry = registry
        self._add_requests(registry)
        self._add_answers(registry)
        self._add_events(registry)
        self._add_bundles(registry)

    def _add_requests(self, registry: CollectorRegistry) -> None:
        """What every request has."""
        self._seconds = Histogram(
            "recsys_http_request_seconds",
            "Time from the request's arrival in the process to its last byte.",
            ("route", "method", "status"),
            buckets=SECONDS,
            registry=registry,
        )
        self._bytes = Counter("recsys_http_response_bytes", "Bytes of response bodies.", ("route",), registry=registry)
        self._stage = Histogram(
            "recsys_stage_seconds",
            "Time in a stage of a request.",
            ("stage",),
            buckets=STAGE_SECONDS,
            registry=registry,
        )

    def _add_answers(self, registry: CollectorRegistry) -> None:
        """What recommendations and ranks are made of, and want."""
        self._candidates = Histogram(
            "recsys_rank_candidates", "Items in a rank request.", buckets=CANDIDATES, registry=registry
        )
        self._pool = Histogram(
            "recsys_recommend_candidates",
            "Items scored for a recommendation.",
            buckets=CANDIDATES,
            registry=registry,
        )
        self._asked = Counter("recsys_items_asked", "Items that recommendations were to hold.", registry=registry)
        self._given = Counter("recsys_items_given", "Items that recommendations held.", registry=registry)
        self._degraded = Counter(
            "recsys_degraded", "Answers given with a stage skipped.", ("stage",), registry=registry
        )
        self._unknown_users = Counter(
            "recsys_unknown_users", "Answers by popularity, for want of any history.", registry=registry
        )
        self._unknown_items = Counter(
            "recsys_unknown_items", "Items in rank requests that the bundle does not know.", registry=registry
        )

    def _add_events(self, registry: CollectorRegistry) -> None:
        """What was posted, and what became of it."""
        self._effect = Histogram(
            "recsys_event_effect_seconds",
            "Time from a post's arrival until its events are used by every request.",
            buckets=SECONDS,
            registry=registry,
        )
        self._events = Counter("recsys_events", "Posted events by verdict.", ("verdict",), registry=registry)
        self._forgotten = Counter("recsys_users_forgotten", "Users forgotten on request.", registry=registry)
        self._logged = Counter(
            "recsys_request_log_answers", "Answers drawn for the request log.", ("outcome",), registry=registry
        )
        self._torn_tails = Gauge(
            "recsys_event_log_torn_tails",
            "Writers of the event log that died while they wrote, since the log began.",
            multiprocess_mode="max",
            registry=registry,
        )
        self._torn_bytes = Gauge(
            "recsys_event_log_torn_bytes",
            "Bytes they left, told to nobody as durable, that were cut off.",
            multiprocess_mode="max",
            registry=registry,
        )

    def _add_bundles(self, registry: CollectorRegistry) -> None:
        """What is served, and how true to its publication."""
        self._parity = Gauge(
            "recsys_golden_parity_error",
            "Largest relative difference of a golden request's scores from the published ones, at the last check.",
            multiprocess_mode="mostrecent",
            registry=registry,
        )
        self._checks = Counter(
            "recsys_golden_checks", "Golden requests replayed beside the answers.", registry=registry
        )
        self._created = Gauge(
            "recsys_bundle_created_seconds",
            "When the champion, and so its index, was made; seconds since 1970.",
            multiprocess_mode="mostrecent",
            registry=registry,
        )
        self._recall = Gauge(
            "recsys_index_recall",
            "Share of the exact best items that the newest sampled searches found; before any, that of publish.",
            multiprocess_mode="mostrecent",
            registry=registry,
        )
        self._recalls = Counter(
            "recsys_index_recall_searches",
            "Searches of the index that were compared with exact ones.",
            registry=registry,
        )
        self._drift = Gauge(
            "recsys_score_drift",
            "Population stability index of the newest scores against those at publish; above 0.25 they lie otherwise.",
            multiprocess_mode="mostrecent",
            registry=registry,
        )
        self._refused = Counter("recsys_bundles_refused", "Bundles that did not load.", registry=registry)
        self._shadow = Counter(
            "recsys_shadow_requests",
            "Answers another bundle was to score beside, by outcome.",
            ("outcome",),
            registry=registry,
        )
        self._swaps = Counter("recsys_bundle_swaps", "Bundles put in place, the first one too.", registry=registry)

    def request(self, route: str, method: str, status: int, seconds: float, sent: int) -> None:
        """Count one HTTP request; `route` is the template (`/v1/users/{user_id}/history`), never the path."""
        self._seconds.labels(route, method, str(status)).observe(seconds)
        self._bytes.labels(route).inc(sent)

    def stages(self, timings: Mapping[str, float]) -> None:
        """Count the seconds of each stage."""
        for stage, seconds in timings.items():
            self._stage.labels(stage).observe(seconds)

    def answer(self, user_known: bool, degraded: Iterable[str]) -> None:
        """Count what kind of answer was given."""
        if not user_known:
            self._unknown_users.inc()
        for stage in degraded:
            self._degraded.labels(stage).inc()

    def degraded(self, stage: str) -> None:
        """Count a stage that was skipped."""
        self._degraded.labels(stage).inc()

    def logged(self, taken: bool) -> None:
        """Count an answer that was drawn for the request log, and whether there was room."""
        self._logged.labels("taken" if taken else "dropped").inc()

    def recovered(self, tails: int, cut: int) -> None:
        """Say how many torn tails of the event log were cut off so far, and their bytes."""
        self._torn_tails.set(tails)
        self._torn_bytes.set(cut)

    def recommended(self, asked: int, given: int, candidates: int) -> None:
        """Count the items that a recommendation was to hold, holds, and was chosen from."""
        self._asked.inc(asked)
        self._given.inc(given)
        self._pool.observe(candidates)

    def effect(self, seconds: float) -> None:
        """Count the time from a post's arrival until its events are used."""
        self._effect.observe(seconds)

    def parity(self, error: float) -> None:
        """Record how far a golden request's scores are from the published ones."""
        self._parity.set(error)
        self._checks.inc()

    def created(self, seconds: float) -> None:
        """Record when the champion was made, seconds since 1970."""
        self._created.set(seconds)

    def recall_at_publish(self, share: float) -> None:
        """Record what share of the exact best the champion's index found when it was built; NaN if nobody measured."""
        self._recall.set(share)

    def recall(self, share: float) -> None:
        """Record what share of the exact best the newest sampled searches found, of which one is new."""
        self._recall.set(share)
        self._recalls.inc()

    def drift(self, index: float) -> None:
        """Record how far scores have drifted from where they lay at publish."""
        self._drift.set(index)

    def candidates(self, asked: int, unknown: int) -> None:
        """Count the items of a rank request, and those unknown."""
        self._candidates.observe(asked)
        self._unknown_items.inc(unknown)

    def verdict(self, verdict: str) -> None:
        """Count one posted event."""
        self._events.labels(verdict).inc()

    def forget(self) -> None:
        """Count a user forgotten."""
        self._forgotten.inc()

    def swap(self) -> None:
        """Count a bundle put in place."""
        self._swaps.inc()

    def refused(self) -> None:
        """Count a bundle that did not load."""
        self._refused.inc()

    def shadow(self, outcome: str) -> None:
        """Count an answer that a rival bundle scored beside (`taken`) or had no time for (`dropped`)."""
        self._shadow.labels(outcome).inc()

    def scrape(self) -> bytes:
        """Return all metrics in the Prometheus text format."""
        if MULTIPROCESS in os.environ:
            registry = CollectorRegistry()
            MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
            return generate_latest(registry)
        return generate_latest(self._registry)
