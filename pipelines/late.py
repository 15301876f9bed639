"""A later part without its late events: those not after their user's newest event in the parts before."""

from collections.abc import Sequence
from pathlib import Path

import polars as pl

from pipelines.cards import Tally
from pipelines.datasets import RawLog
from pipelines.ingest import ingest
from pipelines.mapping import PositiveRule, SessionsConfig
from pipelines.parts import open_part
from pipelines.prepared import PreparedSet
from recsys.columns import TIMESTAMP, USER_ID
from recsys.config import parse
from recsys.errors import DataError
from recsys.files import read_json

LATE = "late: not after the user's newest event in the parts before"
_NEWEST = "_newest"


def leave_out_late(source: Path, prepared: PreparedSet, parts: Sequence[Path], out: Path) -> int:
    """Write a part to `out` without its late events, which no part may have, and give how many those are.

    Args:
        source: a directory `ingest` wrote.
        prepared: the set the part is to be added to.
        parts: the parts of the log; one that is not in the set yet, as after an interruption, makes no event late.
        out: a directory that appears whole or not at all.

    Raises:
        DataError: every event is late, as where the part was added before.

    Cost: one pass over the users of all parts, and the part is ingested again.
    """
    part, card = open_part(source), read_json(source / "ingest.json")
    known = {record["digest"] for record in prepared.manifest.get("parts", ())}
    there = [one for path in parts if path.exists() and (one := open_part(path)).record.digest in known]
    before = [one.events.select(USER_ID, TIMESTAMP) for one in there]
    newest = pl.concat(before).group_by(USER_ID).agg(pl.col(TIMESTAMP).max().alias(_NEWEST)).collect(engine="streaming")
    joined = part.events.join(newest.lazy(), on=USER_ID, how="left", maintain_order="left")
    events = joined.filter(pl.col(_NEWEST).is_null() | (pl.col(TIMESTAMP) > pl.col(_NEWEST))).drop(_NEWEST)
    kept = int(events.select(pl.len()).collect(engine="streaming").item())
    late = part.record.events - kept
    if not kept:
        raise DataError(
            f"{part.file}: all {late:,} events are late, not after their user's newest in the parts before; was this "
            "part added already? `recsys prepare` without --add prepares what there is"
        )
    shown = source / "impressions.parquet"
    raw = RawLog(
        name=part.record.name,
        events=events,
        items=pl.scan_parquet(part.items),
        users=part.users().lazy(),
        impressions=pl.scan_parquet(shown) if shown.exists() else None,
        order=card["order"],
        positive=parse(PositiveRule, card.get("positive", {}), f"{source / 'ingest.json'} [positive]"),
        sessions=parse(SessionsConfig, card.get("sessions", {}), f"{source / 'ingest.json'} [sessions]"),
        tally=Tally(part.record.events, {LATE: late} if late else {}),
    )
    ingest(raw, out)
    return late
