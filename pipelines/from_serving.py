"""The loop back: what a service was told and what it answered become the next part of the log.

    events.parquet        posted events of users who are not forgotten, later than the user's events so far; in
                          sessions where the log's own [sessions] cut them, or where it has sessions by name, which a
                          posted event has not: cut then where a user was away for `USUAL_GAP`
    impressions.parquet   answers that were logged, an item a row, labelled by what the user did afterwards
    serving.json          up to where the service's logs are in it, and which events they hold are not

An event that came too late for its place in the parts before stays out (`left_out`): it serves on in the live
histories, and trains nothing. So does one dated later than `as_of`, until then.

An item shown is a positive if the user has a positive event of it within the attribution window after the answer; each
event counts for the last answer before it that showed the item. It is a negative once the window has passed without
one. An answer whose window has not passed is not mature: it and all after it in its file wait for the next time, and
what they showed is attributed to them already.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

import polars as pl

from pipelines.datasets import RawLog
from pipelines.forgotten import add_to_list, mark_parts
from pipelines.impressions import Shown, labelled
from pipelines.ingest import ingest
from pipelines.mapping import PositiveRule, SessionsConfig
from pipelines.parts import keep_part, open_part
from pipelines.prepared import PreparedSet
from pipelines.thinning import session_names
from pipelines.workspace import Workspace
from ranking.as_served import as_served, can_rebuild, forgotten_users
from ranking.bundle import Bundle
from ranking.snapshot import SnapshotReader
from recsys.columns import ACTION, EVENT_ID, ITEM_ID, SESSION_ID, TIMESTAMP, USER_ID, VALUE
from recsys.config import parse
from recsys.errors import ConfigError, DataError
from recsys.files import read_json, work_directory, write_json
from recsys.history import POSITIONS, Events
from recsys.log_format import LogReader
from recsys.request_log import LoggedRequest, files, history_digest, read_file
from recsys.stores import Encoder, Event, LogMark, Tombstone

NAME = "serving.json"
OTHER, OTHER_SHARE = 3, 0.01
"""Most answers, and most of those rebuilt, whose history may be another than the one that was served."""
SERVICE = "service"
USUAL_GAP = "30m"
"""as `init` proposes"""


@dataclass(frozen=True)
class Attribution:
    """`window`: microseconds after an answer in which an event counts for it; `as_of`: the moment it is judged at."""

    window: int
    as_of: int

    def __post_init__(self) -> None:
        if self.window <= 0:
            raise ConfigError(f"an attribution window of {self.window} microseconds; expected more than 0")


@dataclass(frozen=True)
class Taken:
    """Up to where a service's logs are in a part.

    Attributes:
        log: id of the event log.
        position: of it, up to which all events are in this part or one before, but for `left_out`.
        left_out: positions of events that are in no part.
        requests: file of the request log -> byte up to which its answers are in this part or one before.
    """

    log: str
    position: int = 0
    left_out: tuple[int, ...] = ()
    requests: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class FromServing:
    """What was taken in.

    Attributes:
        events: posted events in the part.
        left_out: posted events in no part, as they came too late or lie in the future.
        forgotten: users on the tombstone list because of this log.
        answers: logged answers that became impressions.
        positives: impressions with an event in the window.
        negatives: impressions without.
        waiting: answers whose window has not passed, or that there is no part for; they wait for the next time.
        verified: answers whose history was rebuilt, and is the one that was served.
        other_history: answers whose history was rebuilt, and is another one; not used.
        unverified: answers made over a snapshot or bundle that is no longer at hand, as all that waited when the next
            was published; used, as labels need no history. Those over another event log are not.
        part: directory of the part, None if there was no event to make one of.
    """

    events: int
    left_out: int
    forgotten: int
    answers: int
    positives: int
    negatives: int
    waiting: int
    verified: int
    other_history: int
    unverified: int
    part: str | None


@dataclass(frozen=True)
class _Posted:
    """The event log, read: events to take in, positions to leave out, tombstones and the end."""

    events: list[Event]
    left_out: list[int]
    forgotten: dict[str, int]
    end: int


def ingest_from_serving(state: Path, place: Workspace, attribution: Attribution) -> FromServing:
    """Take in what a service has logged since the last time, as one later part of the workspace's log.

    Args:
        state: the service's state directory.
        place: the workspace whose bundle and snapshot are, or were last, served.
        attribution: when an item shown is a positive.

    Raises:
        DataError: there is no log, a log is damaged, or more than a few histories that were served differ from the
            rebuilt ones; nothing is taken in then.

    Cost: the logs are read from where they were left the last time; where answers have matured since, the event log is
    gone through once more from its beginning, for an event may come late.
    """
    log = LogReader(state / "log")
    taken = last_taken(place.parts, log.id)
    posted = _read_events(log, taken, _newest(place.parts), attribution.as_of)
    forgotten = forgotten_users(log)
    found = list(_read_requests(state / "requests", taken, log, forgotten))
    checked = _verify([request for request, _, _ in found], place, log)
    shown, beside, cursors, waiting = _mature(found, taken, attribution, checked)
    rule, sessions = _rules(place)
    # Answers that wait, or may not be used, take their events from those before them; only the others are written.
    labels = labelled([*shown, *beside], _attributable(log, [*shown, *beside], forgotten), rule, attribution.window)
    labels = labels.filter(pl.col("request_id").is_in([one.request_id for one in shown]))
    earlier = len(place.parts)
    add_to_list(place.root, sorted(posted.forgotten), earlier)
    mark_parts(place.root, place.parts)
    part = None
    if posted.events:
        now = Taken(log.id, posted.end, tuple(posted.left_out), cursors)
        part = _write(place, posted.events, labels, now, rule, sessions)
    else:  # no part that could say up to where the answers are taken in: they wait
        waiting, shown, labels = waiting + len(shown), [], labels.clear()
    positives = int(labels["label"].sum())
    return FromServing(
        events=len(posted.events),
        left_out=len(posted.left_out),
        forgotten=len(posted.forgotten),
        answers=len(shown),
        positives=positives,
        negatives=labels.height - positives,
        waiting=waiting,
        verified=len(checked.same),
        other_history=len(checked.other),
        unverified=len(found) - len(checked.same) - len(checked.other),
        part=None if part is None else str(part),
    )


def last_taken(parts: Sequence[Path], log: str) -> Taken:
    """Return up to where a service's logs are in the parts of a log."""
    for part in reversed(parts):
        found = _taken(part)
        if found is not None and found.log == log:
            return found
    return Taken(log)


def contained(prepared: PreparedSet, parts: Sequence[Path]) -> list[LogMark]:
    """Say what a prepared set contains of event logs: what the parts it was made of do."""
    known = {record["digest"] for record in prepared.manifest.get("parts", ())}
    marks: dict[str, LogMark] = {}
    for part in parts:
        found = _taken(part)
        if found is not None and open_part(part).record.digest in known:
            marks[found.log] = LogMark(found.log, found.position, found.left_out)
    return list(marks.values())


def _taken(part: Path) -> Taken | None:
    if not (part / NAME).exists():
        return None
    table = read_json(part / NAME)
    return parse(Taken, table, str(part / NAME))


def _newest(parts: Sequence[Path]) -> dict[str, int]:
    """Return each user's newest moment in all parts."""
    newest: dict[str, int] = {}
    for path in parts:
        if not path.exists():
            continue
        frame = open_part(path).events.group_by(USER_ID).agg(pl.col(TIMESTAMP).max()).collect(engine="streaming")
        for user, moment in frame.select(USER_ID, TIMESTAMP).iter_rows():
            newest[user] = max(moment, newest.get(user, moment))
    return newest


def _read_events(log: LogReader, taken: Taken, newest: dict[str, int], as_of: int) -> _Posted:
    """Read what is new of the event log, and what was left out before and may fit now."""
    again = [(start, next(iter(log.replay(start)))) for start in taken.left_out]
    entries, end = [(start, record.event) for start, record in again], taken.position
    forgotten: dict[str, int] = {}
    for record in log.replay(taken.position):
        if isinstance(record.event, Tombstone):
            forgotten[record.event.user_id] = record.end
        else:
            entries.append((end, record.event))
        end = record.end
    events: list[Event] = []
    left_out: list[int] = []
    for start, event in entries:
        assert isinstance(event, Event), "tombstones are kept apart"
        if start < forgotten.get(event.user_id, -1):
            continue
        known = None if event.user_id in forgotten else newest.get(event.user_id)
        fits = event.time <= as_of and (known is None or event.time > known)
        if fits:
            events.append(event)
        else:
            left_out.append(start)
    return _Posted(events, left_out, forgotten, end)


def _read_requests(
    directory: Path, taken: Taken, log: LogReader, forgotten: Mapping[str, int]
) -> Iterator[tuple[LoggedRequest, str, int]]:
    """Yield the new answers of users who are not forgotten, with file and the byte after each."""
    for path in files(directory):
        for request, end in read_file(path, taken.requests.get(path.name, 0)):
            if request.log == log.id and request.position < forgotten.get(request.user_id, -1):
                continue
            yield request, path.name, end


class _Checked(NamedTuple):
    """Ids of answers whose history was rebuilt: the same as was served, or another."""

    same: set[str]
    other: set[str]
    log: str

    def usable(self, request: LoggedRequest) -> bool:
        """Whether an answer may be learned from: its user's events are in this log, and nothing speaks against it.

        Over a log of positions nothing may: what followed an answer has no time after it.
        """
        known = request.log == self.log and request.position >= 0 and request.request_id not in self.other
        return known and request.at >= POSITIONS


def _verify(requests: Sequence[LoggedRequest], place: Workspace, log: LogReader) -> _Checked:
    """Rebuild the histories of answers.

    Raises:
        DataError: more of them than `OTHER` and `OTHER_SHARE` allow were not as served. Fewer may be: while a bundle is
            swapped, one replica may know an item that another one's events do not name yet.
    """
    checked = _Checked(set(), set(), log.id)
    if not requests:
        return checked
    snapshot, bundle = SnapshotReader(place.snapshot), Bundle.load(place.bundle, golden=False)
    can = [request for request in requests if can_rebuild(request, snapshot, log, bundle.version)]
    encoder = Encoder(bundle.key_of, bundle.action_of)
    for request, events in as_served(can, snapshot, log, encoder):
        rebuilt = history_digest(events or Events.empty(), request.at, len(bundle.key_to_row))
        (checked.same if rebuilt == request.history else checked.other).add(request.request_id)
        if rebuilt != request.history and len(checked.other) > max(OTHER, OTHER_SHARE * len(can)):
            raise DataError(
                f"{place.snapshot} and {log.directory}: {len(checked.other)} or more of {len(can)} answers were "
                f"made from another history than the one rebuilt; answer {request.request_id} from one with digest "
                f"{request.history}, and the one rebuilt up to position {request.position} has {rebuilt}: what "
                "the service served is not what it was told; stop it, remove its `histories`, and look at its log"
            )
    return checked


def _mature(
    found: Sequence[tuple[LoggedRequest, str, int]], taken: Taken, attribution: Attribution, checked: _Checked
) -> tuple[list[Shown], list[Shown], dict[str, int], int]:
    """Return the answers to learn from, those beside them, up to where files are used, and how many of those wait."""
    shown: list[Shown] = []
    beside: list[Shown] = []
    waiting = 0
    cursors, held = dict(taken.requests), set[str]()
    for request, file, end in found:
        items = tuple((item.item_id, item.propensity) for item in request.items)
        one = Shown(request.request_id, request.user_id, request.at, items)
        if file in held or request.at + attribution.window > attribution.as_of:
            held.add(file)
            beside.append(one)
            waiting += 1
            continue
        cursors[file] = end
        (shown if checked.usable(request) else beside).append(one)
    return shown, beside, cursors, waiting


def _attributable(log: LogReader, shown: Sequence[Shown], forgotten: Mapping[str, int]) -> Iterator[Event]:
    """Yield the events of the users who were shown something, those before a tombstone aside.

    All of the log is read, as late events may stand anywhere.
    """
    users = {one.user_id for one in shown}
    if users:
        for record in log.replay():
            user = record.event.user_id
            if isinstance(record.event, Event) and user in users and record.end > forgotten.get(user, 0):
                yield record.event


def _rules(place: Workspace) -> tuple[PositiveRule, SessionsConfig]:
    """Return which events are positives and how sessions are cut, as the log's own card says.

    Sessions that came with the log have names, which a posted event can't tell: it is cut by the usual gap.
    """
    if not (place.log / "ingest.json").exists():
        return PositiveRule(), SessionsConfig()
    card = read_json(place.log / "ingest.json")
    sessions = parse(SessionsConfig, card.get("sessions", {}), "ingest.json [sessions]")
    if not sessions.gap and SESSION_ID in open_part(place.log).events.collect_schema():
        sessions = SessionsConfig(USUAL_GAP)
    return parse(PositiveRule, card.get("positive", {}), "ingest.json [positive]"), sessions


def _write(
    place: Workspace,
    events: list[Event],
    labels: pl.DataFrame,
    now: Taken,
    rule: PositiveRule,
    sessions: SessionsConfig,
) -> Path:
    """Write a part and keep it behind those there are."""
    with work_directory(place.root / "from-serving") as work:
        directory = work / "part"
        ingest(_raw(place, events, labels, rule, sessions), directory)
        write_json(directory / NAME, asdict(now))
        return keep_part(directory, place.later_parts)


def _raw(
    place: Workspace, events: list[Event], labels: pl.DataFrame, rule: PositiveRule, sessions: SessionsConfig
) -> RawLog:
    columns = {
        USER_ID: [event.user_id for event in events],
        ITEM_ID: [event.item_id for event in events],
        TIMESTAMP: [event.time for event in events],
        ACTION: [event.action or None for event in events],
        VALUE: [event.value for event in events],
        EVENT_ID: [event.event_id for event in events],
    }
    types = {ACTION: pl.String, VALUE: pl.Float64}
    frame = pl.DataFrame(columns, schema_overrides=types).sort(TIMESTAMP, maintain_order=True)
    if gap := sessions.microseconds:
        frame = frame.sort(USER_ID, TIMESTAMP, ITEM_ID).with_columns(session_names(gap).alias(SESSION_ID))
    known = [pl.scan_parquet(part / "items.parquet").select(ITEM_ID) for part in place.parts if part.exists()]
    new = frame.lazy().select(pl.col(ITEM_ID).unique())
    # Rows of known items would lay their bare ids over what the catalogue says of them.
    items = new.join(pl.concat(known), on=ITEM_ID, how="anti").sort(ITEM_ID) if known else new.sort(ITEM_ID)
    return RawLog(
        name=SERVICE,
        events=frame.lazy(),
        items=items,
        impressions=labels.lazy() if labels.height else None,
        positive=rule,
        sessions=sessions,
    )


def forget_again(place: Workspace) -> None:
    """Mark the parts by the workspace's tombstone list: a part that was ingested anew forgets whom the old one did."""
    mark_parts(place.root, place.parts)
