"""Posted events that the log brings too, as where a shop's nightly log holds what its service was told.

A snapshot of such a log contains them. Its mark (`recsys.stores.LogMark`) must say so, or the live histories count each
a second time. A posted event is the log's own if user, item, time and, where the log has actions, action are the same,
or event id, user and item. How often it stands on either side does not matter.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import polars as pl

from pipelines.parts import Part, open_part
from pipelines.prepared import PreparedSet
from recsys.columns import ACTION, EVENT_ID, ITEM_ID, TIMESTAMP, USER_ID
from recsys.log_format import LogReader
from recsys.stores import Event, LogMark, Tombstone

MOST_LEFT_OUT = 10_000
"""Positions a mark names of events before it that the log lacks: each is looked up when histories are built."""
_START = "_start"


class Repeats(NamedTuple):
    """Marks that pass over posted events the log brings too.

    `contained` of them are passed over; `twice` are not and count twice in the live histories.
    """

    marks: list[LogMark]
    contained: int = 0
    twice: int = 0

    def told(self) -> list[str]:
        """Return what a person should know of it, in sentences."""
        lines = []
        if self.contained:
            lines.append(f"{self.contained:,} posted events are in the log too; histories count them once.")
        if self.twice:
            lines.append(
                f"{self.twice:,} posted events are in the log too and count twice in live histories: they stand behind "
                "a forgotten user's tombstone, or behind many posted events that the log lacks. Choose one way back: "
                "either `recsys ingest --from-serving`, or a log that holds what was posted and a new state directory."
            )
        return lines


def pass_over_repeats(prepared: PreparedSet, parts: Sequence[Path], marks: Sequence[LogMark], state: Path) -> Repeats:
    """Return the marks of a snapshot with that of a service's log moved past the events that the set's log brings too.

    What the log lacks of the events before stays in the live histories, as `left_out`. No mark passes a tombstone of a
    user whom the set knows, since only the tombstone hides what the snapshot holds of that user.

    Args:
        prepared: the set that is published.
        parts: of its log.
        marks: what they contain by their own account (`pipelines.from_serving.contained`).
        state: the service's state directory; nothing is changed where it has no event log.

    Cost: one pass over the event log from the mark on, and one over each part; memory of the events posted since.
    """
    if not (state / "log" / "id").exists():
        return Repeats(list(marks))
    log = LogReader(state / "log")
    mark = next((one for one in marks if one.log == log.id), LogMark(log.id))
    late = {start: next(iter(log.replay(start))).event for start in mark.left_out}
    entries, end = [], mark.position
    for record in log.replay(mark.position):
        entries.append((end, record))
        end = record.end
    posted = [*late.items(), *((start, record.event) for start, record in entries)]
    repeated = _repeated([(start, event) for start, event in posted if isinstance(event, Event)], prepared, parts)
    if not repeated:
        return Repeats(list(marks))
    known = set(prepared.users[USER_ID].cast(pl.String).to_list())
    left = {start: event.user_id for start, event in late.items() if start not in repeated}
    position, passed, behind = mark.position, len(late) - len(left), dict[int, str]()
    for start, (event, after) in entries:
        if isinstance(event, Tombstone):
            if event.user_id in known:
                break
            left, behind = ({s: user for s, user in some.items() if user != event.user_id} for some in (left, behind))
        elif start in repeated:
            left, behind, position, passed = left | behind, {}, after, passed + 1
        else:
            behind[start] = event.user_id
        if len(left) + len(behind) > MOST_LEFT_OUT:
            break
    moved = LogMark(log.id, position, tuple(sorted(left)))
    return Repeats([*(one for one in marks if one.log != log.id), moved], passed, len(repeated) - passed)


def _repeated(posted: Sequence[tuple[int, Event]], prepared: PreparedSet, parts: Sequence[Path]) -> set[int]:
    """Return the positions of the posted events that the parts of a prepared set hold."""
    columns = {
        _START: [start for start, _ in posted],
        USER_ID: [event.user_id for _, event in posted],
        ITEM_ID: [event.item_id for _, event in posted],
        TIMESTAMP: [event.time for _, event in posted],
        ACTION: [event.action for _, event in posted],
        EVENT_ID: [event.event_id for _, event in posted],
    }
    frame = pl.DataFrame(columns, dict.fromkeys(columns, pl.String) | {_START: pl.Int64, TIMESTAMP: pl.Int64})
    digests = {record["digest"] for record in prepared.manifest.get("parts", ())}
    found: set[int] = set()
    for path in parts if posted else ():
        part = open_part(path) if path.exists() else None
        if part is not None and part.record.digest in digests:
            action = [ACTION] if ACTION in part.columns else []
            found |= _held(frame, part, [USER_ID, ITEM_ID, TIMESTAMP, *action])
            if EVENT_ID in part.columns:
                found |= _held(frame, part, [EVENT_ID, USER_ID, ITEM_ID])
    return found


def _held(frame: pl.DataFrame, part: Part, keys: Sequence[str]) -> set[int]:
    """Return the positions of the rows that a part has an event for with the same values in `keys`."""
    events = part.events.select(pl.col(name).fill_null("") if name == ACTION else pl.col(name) for name in keys)
    # The log is the larger side: only what of it was posted is held in memory.
    same = events.join(frame.lazy().select(keys).unique(), on=keys, how="semi").unique().collect(engine="streaming")
    return set(frame.join(same, on=keys, how="semi")[_START].to_list())
