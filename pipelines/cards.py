"""The data card: what was read, what was left out and why, and what the log that remains is like."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from pipelines.mapping import PositiveRule, SessionsConfig
from recsys.files import read_json

Order = Literal["time", "position"]
BUSY_SHARE, BUSY_TIMES = 0.05, 10
"""A user with more than this share of the events, and so many times those of the middle user, is hardly one person."""

MOST_ACTIONS = 12
"""Actions that are named, the most frequent first."""


@dataclass(frozen=True)
class Tally:
    """Rows of a source: read, left out by each filter, bad in each way. What is left went into the log.

    `bad_impressions` counts apart, as do the item and user tables: `settled` are rows of them that were left out, and
    values taken as missing, by what they were; `bad_of_tables` rows that could not be meant, by what was expected.
    """

    read: int
    filtered: Mapping[str, int] = field(default_factory=dict)
    bad: Mapping[str, int] = field(default_factory=dict)
    bad_impressions: int = 0
    settled: Mapping[str, int] = field(default_factory=dict)
    bad_of_tables: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class DataCard:
    """What was taken in.

    Attributes:
        source: what messages call it.
        events: rows kept; read = kept + filtered + bad.
        read: rows read.
        filtered: rows left out on purpose, by filter.
        bad: rows that could not be meant, by what was expected; they are in the quarantine file.
        users: with events.
        items: with events.
        catalogue_items: of the item table.
        in_catalogue: items with events that the item table has; all of them where there is none.
        not_in_catalogue: ids of a few that it does not have.
        missing_text: items with events that have no text of their own.
        impressions: rows kept of them; 0 where the log has none.
        bad_impressions: rows of them that could not be meant.
        settled: rows of the item and user tables left out, and values taken as missing, by what they were.
        bad_of_tables: rows of these tables that could not be meant, by what was expected.
        order: whether `timestamp` is a time or only a position.
        first_time: of the events, microseconds UTC (or the first position).
        last_time: of the events.
        history: events per user, quantiles p10 to p100.
        repeated_share: of the events, those of a pair of user and item that came before.
        columns: of the events.
        positive: which events are positives, as far as the source says.
        sessions: how sessions were cut; as the log has them, or each moment its own, where there is no gap.
        digest: SHA-256 over the files.
        actions: events by action, most first, "" for those without; empty where the log has no column of them.
    """

    source: str
    events: int
    read: int
    filtered: dict[str, int]
    bad: dict[str, int]
    users: int
    items: int
    catalogue_items: int
    in_catalogue: int
    not_in_catalogue: tuple[str, ...]
    missing_text: int
    impressions: int
    bad_impressions: int
    settled: dict[str, int]
    bad_of_tables: dict[str, int]
    order: Order
    first_time: int
    last_time: int
    history: dict[str, int]
    repeated_share: float
    columns: tuple[str, ...]
    positive: PositiveRule
    sessions: SessionsConfig
    digest: str
    actions: dict[str, int] = field(default_factory=dict)

    def describe(self) -> list[tuple[str, str]]:
        """Return the card as (label, words), for a person."""
        rows = [
            ("source", self.source),
            ("events read", f"{self.read:,}"),
            *(("  filtered", f"{n:,} by {why}") for why, n in self.filtered.items()),
            *(("  bad", f"{n:,}: {why}") for why, n in self.bad.items()),
            ("events kept", f"{self.events:,}"),
            ("users", f"{self.users:,}"),
            ("items", f"{self.items:,} with events, {self.catalogue_items:,} in the catalogue"),
            ("  in both", f"{self.in_catalogue:,}"),
            *(("  settled", f"{n:,} {why}") for why, n in self.settled.items()),
            *(("  bad", f"{n:,}: {why}") for why, n in self.bad_of_tables.items()),
            ("items without text", f"{self.missing_text:,}"),
            *([("actions", self._actions())] if self.actions else []),
            ("events per user", ", ".join(f"{name} {n:,}" for name, n in self.history.items())),
            ("repeats", f"{self.repeated_share:.1%} of the events"),
            ("from, to", f"{self._moment(self.first_time)}, {self._moment(self.last_time)}"),
            ("columns", ", ".join(self.columns)),
            ("digest", self.digest[:16]),
        ]
        if self.impressions or self.bad_impressions:
            rows.append(("impressions", f"{self.impressions:,}, and {self.bad_impressions:,} bad"))
        return rows

    def doubts(self) -> list[str]:
        """Return what is well formed and yet hardly meant, in sentences."""
        told = []
        most = self.history["p100"]
        if most > BUSY_SHARE * self.events and most > BUSY_TIMES * self.history["p50"]:
            told.append(
                f"One user makes {most / self.events:.0%} of the events ({most:,}), as a machine or a shared account "
                "does; [filters] max_user_events leaves out users with more."
            )
        if 2 * self.in_catalogue < self.items:
            told.append(self._not_in_catalogue())
        return told + self._odd_actions()

    def _actions(self) -> str:
        told = [f"{name or 'none'} {n:,}" for name, n in self.actions.items()]
        more = [f"and {len(told) - MOST_ACTIONS:,} more"] if len(told) > MOST_ACTIONS else []
        return ", ".join(told[:MOST_ACTIONS] + more)

    def _odd_actions(self) -> list[str]:
        """Return what of the actions is written otherwise than elsewhere."""
        told, alike = [], defaultdict[str, list[str]](list)
        for name in filter(None, self.actions):
            alike[name.strip().casefold()].append(name)
        for names in (names for names in alike.values() if len(names) > 1):
            written = " and ".join(f"{name!r} ({self.actions[name]:,})" for name in names)
            told.append(
                f"The actions {written} are several here; name all that count in [requests] positive.actions, or "
                "write them alike in the log."
            )
        if unknown := [name for name in self.positive.actions if self.actions and name not in self.actions]:
            there = ", ".join(map(repr, list(filter(None, self.actions))[:MOST_ACTIONS])) or "none"
            told.append(
                f"[requests] positive.actions names {', '.join(map(repr, unknown))}, which no event has; "
                f"there are {there}."
            )
        return told

    def _not_in_catalogue(self) -> str:
        return (
            f"Only {self.in_catalogue:,} of {self.items:,} items with events are in the catalogue; its ids may be "
            f"written in another way, since it does not have {', '.join(map(repr, self.not_in_catalogue))}."
        )

    def _moment(self, value: int) -> str:
        if self.order == "position":
            return f"position {value:,}"
        return datetime.fromtimestamp(value / 1e6, UTC).strftime("%Y-%m-%d %H:%M:%S")


def prepare_defaults(directory: Path) -> dict[str, Any]:
    """Return the settings of `prepare` that a log brings along, as TOML would hold them; the caller lays its own over.

    They are the rule for positives, and, for a log that knows only an order, the split by each user's last requests.
    """
    card = read_json(directory / "ingest.json")
    settings: dict[str, Any] = {"split": {"kind": "last_request"}} if card.get("order") == "position" else {}
    rule = card.get("positive") or {}
    if rule.get("actions"):
        settings["positive"] = rule["actions"]
    if rule.get("min_value") is not None:
        settings["min_value"] = rule["min_value"]
    return settings
