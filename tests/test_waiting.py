"""Requests that wait, kept in runs: what comes back is what a plain list of them would hold."""

from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines import waiting
from pipelines.buckets import Sessions
from pipelines.waiting import Users, Waiting, save_waiting
from recsys.errors import DataError

Request = tuple[int, int, int, int, tuple[int, ...]]
"""user key, at, last, events before it, positives"""


def sessions(requests: list[Request], users: Users) -> Sessions:
    """Pack requests, by history row."""
    row = {int(key): place for place, key in enumerate(users.key)}
    found = sorted(requests, key=lambda one: (row[one[0]], one[1]))
    user = np.array([row[one[0]] for one in found], np.int64)
    columns = [np.array([one[place] for one in found], np.int64) for place in (1, 2, 3)]
    size = np.array([len(one[4]) for one in found], np.int64)
    positive = np.array([value for one in found for value in one[4]], np.int32)
    offsets = np.concatenate([[0], np.cumsum(size)])
    return Sessions(user, columns[0], columns[1], columns[2] + users.start[user], offsets, positive)


def requests(some: Sessions, users: Users) -> list[Request]:
    edges = pairwise(some.offsets.tolist())
    columns = zip(users.key[some.user], some.at, some.last, some.end - users.start[some.user], strict=True)
    return [
        (*map(int, row), tuple(some.positive[begin:end].tolist()))
        for row, (begin, end) in zip(columns, edges, strict=True)
    ]  # type: ignore[misc]


def grown_users(draw: np.random.Generator, users: Users, more: int) -> Users:
    """Put new users between the old ones, and new events behind everybody's."""
    key = users.key
    for number in range(more):
        key = np.insert(key, draw.integers(len(key) + 1), len(users.key) + number)
    return Users(key, np.cumsum(draw.integers(0, 9, len(key))))


@given(seed=st.integers(0, 2**32), appends=st.integers(0, 6), most=st.integers(1, 3), at_once=st.integers(1, 9))
@settings(max_examples=60, deadline=None)
def test_runs_hold_what_a_list_would(seed: int, appends: int, most: int, at_once: int) -> None:
    draw = np.random.default_rng(seed)
    clock = 0

    def some(users: Users) -> list[Request]:
        nonlocal clock
        made: list[Request] = []
        for _ in range(draw.integers(0, 8)):
            clock += 1
            positives = tuple(draw.integers(2, 90, draw.integers(0, 4)).tolist())
            key = int(draw.choice(users.key))
            made.append((key, clock, clock + int(draw.integers(5)), int(draw.integers(9)), positives))
        return made

    with (
        TemporaryDirectory() as name,
        patch.object(waiting, "RUNS", most),
        patch.object(waiting, "WRITTEN_AT_ONCE", at_once),
    ):
        users = grown_users(draw, Users(np.empty(0, np.int64), np.empty(0, np.int64)), 4)
        known = some(users)
        packed = sessions(known, users)
        save_waiting([packed], len(packed), len(packed.positive), users, Path(name) / "0")
        for number in range(1, appends + 1):
            users = grown_users(draw, users, int(draw.integers(0, 3)))
            fresh = some(users)
            before = Waiting.open(Path(name) / str(number - 1))
            found = before.grown(sessions(fresh, users), users, Path(name) / str(number))
            heads = found.heads(users)
            index = heads.by_user(np.arange(len(heads)))
            row = {int(key): place for place, key in enumerate(users.key)}
            known = sorted([*known, *fresh], key=lambda one: (row[one[0]], one[1]))
            assert requests(found.take(heads, index, users), users) == known
            shuffled = draw.permutation(len(known))[: draw.integers(0, len(known) + 1)]
            wanted = [known[place] for place in shuffled.tolist()]
            assert requests(found.take(heads, index[shuffled], users), users) == wanted
            stays = draw.random(len(heads)) < 0.6
            found.keep(heads, stays, users)
            known = [one for one, kept in zip(known, stays[index], strict=True) if kept]
            again = before.heads(users)  # the set before is as it was
            assert len(again) == len(heads) - len(fresh)
        assert len(Waiting.open(Path(name) / str(appends)).runs) <= most + 1


def test_a_set_of_an_earlier_version_is_named(tmp_path: Path) -> None:
    (tmp_path / "pending.safetensors").write_bytes(b"")
    with pytest.raises(DataError, match=r"pending: no such folder; the set is of an earlier version: prepare all"):
        Waiting.open(tmp_path)
