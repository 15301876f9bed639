"""Small logs for tests of prepare: random ones with every oddity a log may have, and larger regular ones."""

from dataclasses import dataclass

import numpy as np
import polars as pl
from hypothesis import strategies as st

from pipelines.datasets import RawLog
from recsys.history import DAY


@dataclass(frozen=True)
class Line:
    user: str
    item: str
    time: int
    session: str | None
    action: str | None


def random_log(seed: int, users: int, sessions: int, distinct: bool) -> list[Line]:
    """Sessions of a few users over ninety days: lines apart by up to twelve days, so that sessions interleave and
    straddle cuts; moments shared by sessions, and names of sessions by users, unless all must be distinct.
    """
    draw = np.random.default_rng(seed)
    lines = []
    for number in range(sessions):
        user = "αbcdefgh"[draw.integers(users)]
        session = [f"s{number}", f"s{number % 3}", None][draw.choice(3, p=[0.5, 0.2, 0.3])]
        start = draw.integers(90 * 2) * DAY // 2 + (number if distinct else 0)
        spread = 2 * DAY if session and draw.random() < 0.5 else 0
        for later in sorted(draw.integers(0, 7, draw.integers(1, 6))):
            action = ["buy", "view", None][draw.choice(3, p=[0.6, 0.3, 0.1])]
            lines.append(Line(user, f"i{draw.integers(10)}", int(start + later * spread), session, action))
    return lines


def logs(distinct: bool = False) -> st.SearchStrategy[list[Line]]:
    return st.builds(random_log, st.integers(0, 2**32), st.integers(1, 8), st.integers(1, 60), st.just(distinct))


def raw(lines: list[Line], name: str = "a log", sessions: bool = True) -> RawLog:
    events = pl.DataFrame(
        {
            "user_id": [line.user for line in lines],
            "item_id": [line.item for line in lines],
            "timestamp": [line.time for line in lines],
            "action": pl.Series([line.action for line in lines], dtype=pl.String),
            "session_id": pl.Series([line.session for line in lines], dtype=pl.String),
        }
    )
    items = pl.DataFrame({"item_id": [f"i{n}" for n in range(3, 12)], "category": ["x", None, "y"] * 3})
    return RawLog(name, (events if sessions else events.drop("session_id")).lazy(), items.lazy())


def synthetic(events: int, seed: int = 0) -> list[Line]:
    draw = np.random.default_rng(seed)
    sessions = draw.integers(0, events // 5, events)
    user, at = sessions % 37, (sessions * 7919) % (200 * 24) * (DAY // 24)
    item, action = draw.integers(0, 60, events), draw.choice(["buy", "view"], events)
    columns = (user, item, at, sessions, action)
    return [Line(f"u{u}", f"i{i}", int(t), f"s{s}", str(a)) for u, i, t, s, a in zip(*columns, strict=True)]
