"""What an audit says, as frozen records, as `audit.json` and as tables.

    {
      "format": 1, "data_digest": "...", "passed": false,
      "checks": [{"name": "history_before_request", "passed": false, "found": "...", "wanted": "..."}, ...],
      "splits": [{...SplitFacts...}, ...], "samplers": [{...SamplerFacts...}, ...],
      "repeated_share": 0.41, "notes": ["..."]
    }

null stands for "not defined", e.g. an AUC of one class. The same prepared set gives the same bytes every time.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from pipelines.findings import number, percent
from pipelines.just_before import caution
from pipelines.tables import Cell, Table
from recsys.config import first_problem
from recsys.errors import DataError
from recsys.files import read_json, write_json

FORMAT = 1


def counted(number: int, noun: str) -> str:
    """Return e.g. "1 request" or "2,928 requests"."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


@dataclass(frozen=True)
class Check:
    """One thing that must hold: what was found, and what is wanted."""

    name: str
    passed: bool
    found: str
    wanted: str


@dataclass(frozen=True)
class SplitFacts:
    """What the requests of one split are like; nothing here can fail.

    Attributes:
        split: train, valid or test.
        requests: how many.
        users: how many different ones ask.
        positives: items to be found, over all requests.
        positives_in_history: share of the positives that occur earlier in the user's history, over `sampled` requests.
        sampled: requests that share was counted on.
        without_history: requests with no event before them.
        cold_users: users of the split without any training event.
        cold_positives: positives whose item has no training event.
        cold_items: how many different items those are.
        positives_just_before: share of the positives that the user touched within 30 minutes before the request, over
            `sampled` requests; None for a log of positions, and in audits of before.
    """

    split: str
    requests: int
    users: int
    positives: int
    positives_in_history: float | None
    sampled: int
    without_history: int
    cold_users: int
    cold_positives: int
    cold_items: int
    positives_just_before: float | None = None


@dataclass(frozen=True)
class SamplerFacts:
    """How hard the candidates of one split and sampler are: what two models that learn nothing reach on them.

    Attributes:
        split: valid or test.
        sampler: name of the sampler of the negatives.
        requests: requests scored, drawn by seed.
        negatives_per_request: on average.
        negatives_in_history: share of the negatives that occur in the user's history.
        popularity_auc: AUC of the training counts.
        popularity_gauc: the same within users.
        personal_frequency_auc: AUC of the user's own decayed counts.
        personal_frequency_gauc: the same within users.
    """

    split: str
    sampler: str
    requests: int
    negatives_per_request: float
    negatives_in_history: float | None
    popularity_auc: float | None
    popularity_gauc: float | None
    personal_frequency_auc: float | None
    personal_frequency_gauc: float | None


@dataclass(frozen=True)
class Audit:
    """An audit of one prepared set.

    Attributes:
        data_digest: of the prepared set, as its manifest states it.
        checks: what must hold, in the order it was looked at.
        splits: facts by split.
        samplers: facts by split and sampler.
        repeated_share: share of all events that repeat an earlier (user, item).
        notes: what could not be checked and why; filters of the log that saw the test period.
    """

    data_digest: str
    checks: tuple[Check, ...]
    splits: tuple[SplitFacts, ...] = ()
    samplers: tuple[SamplerFacts, ...] = ()
    repeated_share: float | None = None
    notes: tuple[str, ...] = ()

    @property
    def failed(self) -> tuple[Check, ...]:
        """The checks that did not pass."""
        return tuple(check for check in self.checks if not check.passed)

    @property
    def passed(self) -> bool:
        """Whether every check did."""
        return not self.failed

    @property
    def verdict(self) -> str:
        """Passed or not, which checks failed, and whether the moments before the test requests give them away."""
        if self.passed:
            told = f"The audit of this data passed: {counted(len(self.checks), 'check')}, no leak found."
            cautions = [
                caution(facts.split, facts.positives_just_before) for facts in self.splits if facts.split == "test"
            ]
            return " ".join([told, *(f"But {words}." for words in cautions if words)])
        names = ", ".join(f"`{check.name}`" for check in self.failed)
        return f"The audit of this data failed {len(self.failed)} of {len(self.checks)} checks: {names}."

    def table(self) -> dict[str, Any]:
        """Return the audit as plain values, for JSON."""
        return {"format": FORMAT, "passed": self.passed, **asdict(self)}

    def save(self, path: Path) -> None:
        """Write `audit.json`, whole or not at all."""
        write_json(path, self.table())

    @staticmethod
    def load(path: Path) -> "Audit":
        """Read what `save` wrote; raises `DataError` for another format or a damaged file."""
        record = read_json(path)
        if not isinstance(record, dict) or record.pop("format", None) != FORMAT:
            raise DataError(f"{path}: not an audit of format {FORMAT}; run `recsys audit` again")
        record.pop("passed", None)
        try:
            return TypeAdapter(Audit).validate_python(record)
        except ValidationError as error:
            raise DataError(f"{path}: {first_problem(error)}") from None


def last_audit(path: Path) -> Audit | None:
    """Return the audit saved at `path`; None where nobody has audited yet."""
    return Audit.load(path) if path.exists() else None


def tables(audit: Audit) -> list[Table]:
    """Return the checks, then the facts, as tables; what failed first."""
    found = [_checks(audit)]
    if audit.splits:
        found.append(_splits(audit))
    if audit.samplers:
        found.append(_samplers(audit))
    return found


def text(audit: Audit) -> str:
    """Return the audit in aligned columns for a terminal, the verdict last."""
    parts = [f"{table.title}\n{_aligned(table)}" + (f"\n{table.note}" if table.note else "") for table in tables(audit)]
    return "\n\n".join([*parts, audit.verdict]).replace("`", "")


def _checks(audit: Audit) -> Table:
    rows = []
    for check in (*audit.failed, *(check for check in audit.checks if check.passed)):
        told = Cell("passed") if check.passed else Cell("FAILED", best=True)
        rows.append((Cell(check.name), told, Cell(check.found, "" if check.passed else f"wanted: {check.wanted}")))
    return Table("Checks", ("Check", "", "Found"), tuple(rows), " ".join(audit.notes))


def _splits(audit: Audit) -> Table:
    header = (
        "Split",
        "Requests",
        "Users",
        "Positives",
        "in history",
        "30 min before",
        "without history",
        "cold users",
        "cold positives",
        "cold items",
    )
    rows = []
    for facts in audit.splits:
        counts = (facts.without_history, facts.cold_users, facts.cold_positives, facts.cold_items)
        shares = [
            "–" if share is None else percent(share)
            for share in (facts.positives_in_history, facts.positives_just_before)
        ]
        sizes = (facts.requests, facts.users, facts.positives)
        rows.append(
            (
                Cell(facts.split),
                *(Cell(f"{size:,}") for size in sizes),
                *map(Cell, shares),
                *(Cell(f"{n:,}") for n in counts),
            )
        )
    sampled = ", ".join(f"{facts.sampled:,} {facts.split}" for facts in audit.splits)
    note = (
        "Cold: without a training event. In history, and in the 30 minutes before the request: share of the positives, "
    )
    note += f"over {sampled} requests."
    if audit.repeated_share is not None:
        note += f" Of all events {percent(audit.repeated_share)} repeat an earlier choice of the user."
    return Table("Requests", header, tuple(rows), note)


def _samplers(audit: Audit) -> Table:
    header = (
        "Split, sampler",
        "Requests",
        "Negatives each",
        "in history",
        "popularity AUC",
        "GAUC",
        "personal frequency AUC",
        "GAUC",
    )
    rows = []
    for facts in audit.samplers:
        shared = "–" if facts.negatives_in_history is None else percent(facts.negatives_in_history)
        values = (
            facts.popularity_auc,
            facts.popularity_gauc,
            facts.personal_frequency_auc,
            facts.personal_frequency_gauc,
        )
        rows.append(
            (
                Cell(f"{facts.split}, {facts.sampler}"),
                Cell(f"{facts.requests:,}"),
                Cell(f"{facts.negatives_per_request:,.1f}"),
                Cell(shared),
                *(Cell(number(value)) for value in values),
            )
        )
    return Table("What models that learn nothing reach", header, tuple(rows))


def _aligned(table: Table) -> str:
    """Return a table in columns: words to the left, numbers to the right."""
    lines = [table.header, *(tuple(cell.text for cell in row) for row in table.rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(table.header))]
    right = [column > 0 and _numeric(line[column] for line in lines[1:]) for column in range(len(widths))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if to_right else cell.ljust(width)
            for cell, width, to_right in zip(line, widths, right, strict=True)
        ).rstrip()
        for line in lines
    )


def _numeric(cells: Iterable[str]) -> bool:
    return all(cell[:1].isdigit() or cell == "–" or cell.startswith(("under", "over")) for cell in cells)
