"""What a team says about its own files: the TOML that `recsys init` writes and `recsys ingest --config` reads.

Every name on the right is a name in the files; everything after ingest sees canonical names (`recsys.columns`) only.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal
from zoneinfo import ZoneInfo

from pydantic import Field

from recsys.columns import ITEM_ID, ITEM_KEY, TEXT, TIMESTAMP, USER_ID
from recsys.config import parse, read_toml
from recsys.errors import ConfigError

Repeated = Literal["last", "refuse"]
"""what becomes of an id with several rows of different values: the last row is kept, or the table is refused"""
Unit = Literal["s", "ms", "us", "datetime"]
MICROSECONDS = {"s": 1_000_000, "ms": 1_000, "us": 1}
"""of one unit of time"""
RESERVED = frozenset({ITEM_ID, TEXT, ITEM_KEY, "train_count"})
"""names a catalogue column cannot have: the system's own"""
_GAP = re.compile(r"(\d+(?:\.\d+)?)\s*(s|m|h|d)")
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


@dataclass(frozen=True)
class SourceConfig:
    """Where the files are: paths or globs, from the TOML's own folder.

    CSV, Parquet or JSON Lines by their suffix, texts also packed (`.csv.gz`).
    """

    events: str
    items: str | None = None
    users: str | None = None
    impressions: str | None = None


@dataclass(frozen=True)
class ColumnsConfig:
    """The events' columns, or columns made of several or of the entries of a list (`pipelines.derived`).

    `timestamp` says when; `position` says only in which order, where no time is known.
    """

    user_id: str = USER_ID
    item_id: str = ITEM_ID
    timestamp: str | None = None
    position: str | None = None
    action: str | None = None
    value: str | None = None
    session_id: str | None = None
    event_id: str | None = None

    def __post_init__(self) -> None:
        if (self.timestamp is None) == (self.position is None):
            raise ConfigError(
                "[columns]: expected either timestamp (when) or position (only the order), found "
                + ("neither" if self.timestamp is None else "both")
            )


@dataclass(frozen=True)
class ItemsConfig:
    """The items' columns; those not named here are left out.

    Attributes:
        item_id: as the events name an item.
        text: joined with ", ", in this order, into the item's text.
        name: what an item is shown by; a line of its own at the beginning of the text. The whole text if absent.
        categorical: one value each.
        multi: column -> separator of its values; a Parquet list needs none ("").
        numeric: numbers.
        repeated: of rows of one id with different values the last is kept, or the catalogue is refused.
    """

    item_id: str = ITEM_ID
    text: tuple[str, ...] = ()
    name: str | None = None
    categorical: tuple[str, ...] = ()
    multi: dict[str, str] = field(default_factory=dict)
    numeric: tuple[str, ...] = ()
    repeated: Repeated = "last"

    def __post_init__(self) -> None:
        if self.name is not None and not self.name.strip():
            raise ConfigError("[items] name: found ''; expected a column, or leave it out")
        names = [*self.categorical, *self.multi, *self.numeric]
        for name in names:
            if name in RESERVED or names.count(name) > 1:
                why = "is a name of the system's own" if name in RESERVED else "stands more than once"
                raise ConfigError(f"[items]: column {name!r} {why}; expected a name of its own for every attribute")


@dataclass(frozen=True)
class ImpressionsConfig:
    """The impressions' columns; `timestamp` is in the unit and zone of [time]."""

    request_id: str = "request_id"
    user_id: str = USER_ID
    item_id: str = ITEM_ID
    timestamp: str = TIMESTAMP
    label: str = "label"


@dataclass(frozen=True)
class TimeConfig:
    """How times are written.

    Attributes:
        unit: s, ms or us since 1970 (UTC), or datetime: a column of datetimes, or text such as 2017-01-31 18:05:00.
        zone: of datetimes that carry none.
        format: of the text, e.g. "%d/%m/%Y %H:%M", where it is not year first.
        future: times to come are meant, as where dates were shifted; else a row of one is bad.
    """

    unit: Unit = "datetime"
    zone: str = "UTC"
    format: str | None = None
    future: bool = False

    def __post_init__(self) -> None:
        try:
            ZoneInfo(self.zone)
        except (ValueError, OSError, KeyError):
            raise ConfigError(f"[time] zone: no time zone {self.zone!r}; expected e.g. UTC or Europe/Berlin") from None


@dataclass(frozen=True)
class NumbersConfig:
    """How numbers are written in text.

    Attributes:
        decimal: the mark before the decimals.
        thousands: between thousands; "" for nothing.
        currency: what may stand before or behind a number, such as $ or EUR. One alone: amounts of two are no numbers
            of one column.
    """

    decimal: Literal[".", ","] = "."
    thousands: Literal["", ".", ",", " ", "'"] = ""
    currency: str = ""

    def __post_init__(self) -> None:
        if re.search(r"[\d\s+-]|^[.,']$", self.currency):
            raise ConfigError(
                f"[numbers] currency: found {self.currency!r}; expected a sign or code alone, e.g. $ or EUR"
            )
        if self.decimal == self.thousands:
            raise ConfigError(f"[numbers]: decimal and thousands are both {self.decimal!r}; expected two marks")

    @property
    def example(self) -> str:
        """A number written so."""
        return f"{self.currency}1{self.thousands}234{self.decimal}5"


@dataclass(frozen=True)
class SessionsConfig:
    """`gap`: a user's events further apart than this, e.g. 30m, 12h or 1d, belong to two sessions."""

    gap: str | None = None

    def __post_init__(self) -> None:
        if self.gap is not None and not _GAP.fullmatch(self.gap.strip()):
            raise ConfigError(f"[sessions] gap: found {self.gap!r}; expected a number and s, m, h or d, e.g. 30m")

    @property
    def microseconds(self) -> int | None:
        """The gap; None cuts nothing."""
        found = _GAP.fullmatch(self.gap.strip()) if self.gap else None
        return round(float(found[1]) * _SECONDS[found[2]] * 1_000_000) if found else None


@dataclass(frozen=True)
class FiltersConfig:
    """Rows that are meant to be left out; they are counted apart from bad ones.

    Attributes:
        drop_null: columns of the file; a row with nothing in one of them is left out.
        positive: columns of the file that must be above 0, e.g. the quantity where returns are negative.
        min_user_events: users with fewer events are left out, and ...
        min_item_events: items with fewer events are, again and again until both hold.
        max_user_events: users with more events, as machines and accounts that many share have, are left out with all of
            them, before the two above count; None leaves nobody out.
    """

    drop_null: tuple[str, ...] = ()
    positive: tuple[str, ...] = ()
    min_user_events: Annotated[int, Field(ge=1)] = 1
    min_item_events: Annotated[int, Field(ge=1)] = 1
    max_user_events: Annotated[int, Field(ge=1)] | None = None


@dataclass(frozen=True)
class PositiveRule:
    """Which events are positives: those of these actions (all if empty) with at least this value (any if None)."""

    actions: tuple[str, ...] = ()
    min_value: float | None = None


@dataclass(frozen=True)
class RequestsConfig:
    """How events become requests; carried to `recsys prepare` with the log."""

    positive: PositiveRule = field(default_factory=PositiveRule)


@dataclass(frozen=True)
class QualityConfig:
    """`max_bad_share`: of the rows read, how many may be bad before the job stops."""

    max_bad_share: Annotated[float, Field(ge=0, le=1)] = 0.01


@dataclass(frozen=True)
class IngestConfig:
    """The whole file, section by section."""

    source: SourceConfig
    columns: ColumnsConfig
    items: ItemsConfig = field(default_factory=ItemsConfig)
    impressions: ImpressionsConfig = field(default_factory=ImpressionsConfig)
    time: TimeConfig = field(default_factory=TimeConfig)
    numbers: NumbersConfig = field(default_factory=NumbersConfig)
    sessions: SessionsConfig = field(default_factory=SessionsConfig)
    filters: FiltersConfig = field(default_factory=FiltersConfig)
    requests: RequestsConfig = field(default_factory=RequestsConfig)
    quality: QualityConfig = field(default_factory=QualityConfig)

    def __post_init__(self) -> None:
        if self.sessions.gap and self.columns.timestamp is None:
            raise ConfigError("[sessions] gap: positions are not apart in time; expected [columns] timestamp")
        if self.sessions.gap and self.columns.session_id:
            raise ConfigError("[sessions] gap: the log has sessions, [columns] session_id; expected one of the two")
        rule = self.requests.positive
        if rule.actions and self.columns.action is None:
            raise ConfigError("[requests] positive.actions: the log has no actions; expected [columns] action")
        if rule.min_value is not None and self.columns.value is None:
            raise ConfigError("[requests] positive.min_value: the log has no values; expected [columns] value")


def load_mapping(path: Path, assignments: Sequence[str] = ()) -> IngestConfig:
    """Read a mapping; `assignments` are laid over it (`section.key=value`).

    Raises:
        ConfigError: not TOML, an unknown key, an invalid value; the message names file, section and key.
    """
    table = read_toml(path, assignments)
    try:
        return parse(IngestConfig, table, str(path))
    except ConfigError as error:
        message = str(error)
        raise (error if message.startswith(str(path)) else ConfigError(f"{path}: {message}")) from None
