"""The batch job: the same rows from one process and from several, and the first event of a new user counts at once."""

import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import typer
from typer.testing import CliRunner

import pipelines.recommend as batch_job
from pipelines.recommend import BatchRequest, recommend_on_workers, recommend_users
from ranking.bundle import Bundle
from ranking.calibration import Calibration
from ranking.recommender import Recommender
from ranking.recommender_config import Cap, RecommenderConfig
from ranking.snapshot import SnapshotReader
from recsys.cli import app
from recsys.cli.answers import _asked_at
from recsys.errors import BundleError, ConfigError, RecsysError
from recsys.history import Events
from recsys.messages import InlineEvent, RecommendRequest
from serving.event_log import SegmentLog

DAY = 86_400_000_000


@pytest.fixture(scope="module")
def bundle(published) -> Bundle:
    return Bundle.load(published.bundle)


@pytest.fixture(scope="module")
def snapshot(published) -> SnapshotReader:
    return SnapshotReader(published.snapshot)


@pytest.fixture(scope="module")
def later(snapshot) -> int:
    """A day after everything."""
    return max(int(snapshot.read(user).time[-1]) for user in snapshot.users(60)) + DAY


class Newcomer:
    """Everybody has the same events."""

    def __init__(self, events: Events | None) -> None:
        self.events = events

    def read(self, user_id: str) -> Events | None:
        return self.events


def test_the_first_event_of_a_new_user_changes_the_next_answer(bundle, later):
    asked = RecommendRequest(user_id="new", k=10, at=later)
    nothing = Recommender(bundle, Newcomer(None)).recommend(asked, 0)
    assert not nothing.user_known
    assert {tuple(item.sources) for item in nothing.items} == {("popularity",)}
    answers = set()
    for row in (2, 500, 5_000):
        item = bundle.item_ids[row]
        event = InlineEvent(item_id=item, timestamp=later - 1)
        known = Recommender(bundle, Newcomer(None)).recommend(RecommendRequest(history=[event], k=10, at=later), 0)
        assert known.user_known
        assert known.history_events == 1
        assert any(set(found.sources) - {"popularity"} for found in known.items)
        assert [found.item_id for found in known.items] != [found.item_id for found in nothing.items]
        answers.add(tuple(found.item_id for found in known.items))
    assert len(answers) == 3  # what it was matters, not only that there was one


@pytest.mark.slow
def test_two_workers_write_what_one_process_writes(published, bundle, snapshot, later, tmp_path, monkeypatch):
    """Byte for byte, users in their order, unknown ones among them, whatever the chunks."""
    users = [*reversed(snapshot.users(60)), "a user nobody knows", *snapshot.users(3)]
    monkeypatch.setattr(batch_job, "CHUNK", 7)
    one, two, seen = tmp_path / "one.parquet", tmp_path / "two.parquet", []
    asked = BatchRequest(12, later, hidden=frozenset(users[:2]))
    rows = recommend_users(bundle, snapshot, users, asked, one)
    again = recommend_on_workers(
        published.bundle, published.snapshot, users, asked, two, 2, lambda done, total: seen.append((done, total))
    )
    assert rows == again == 12 * len(users)
    assert seen == [(min(7 * n, 64), 64) for n in range(1, 11)]
    assert two.read_bytes() == one.read_bytes()
    assert pl.read_parquet(two)["user_id"].unique(maintain_order=True).to_list()[:3] == users[:3]
    none = tmp_path / "none.parquet"
    with pytest.raises(RecsysError, match=r"a worker failed: .*snapshot.json: no such file"):
        recommend_on_workers(published.bundle, tmp_path, users, asked, none, 2)
    assert not none.exists()


def test_nobody_and_no_worker(published, tmp_path):
    asked = BatchRequest(5, 0)
    out = tmp_path / "none.parquet"
    assert recommend_on_workers(published.bundle, published.snapshot, [], asked, out, 2) == 0
    assert pl.read_parquet(out).schema == batch_job.RECOMMENDATIONS
    with pytest.raises(BundleError, match=r"no manifest.json"):
        recommend_on_workers(tmp_path, published.snapshot, ["1"], asked, out, 2)
    with pytest.raises(ConfigError, match="workers is 0"):
        recommend_on_workers(published.bundle, published.snapshot, ["1"], asked, out, 0)


def test_the_verb_answers_the_users_of_a_file(published, snapshot, later, tmp_path):
    workspace = tmp_path / "workspace"
    workspace.mkdir()
    (workspace / "bundle").symlink_to(published.bundle)
    (workspace / "snapshot").symlink_to(published.snapshot)
    users = snapshot.users(4)
    pl.DataFrame({"user_id": users}).write_csv(tmp_path / "users.csv")
    out = tmp_path / "recs.parquet"
    arguments = ["recommend", "-w", str(workspace), "--users", str(tmp_path / "users.csv"), "--out", str(out)]
    done = CliRunner().invoke(app, [*arguments, "--k", "3", "--at", str(later)])
    assert done.exit_code == 0, done.output
    assert f"12 rows for 4 users, bundle {Bundle.load(published.bundle).version}" in done.output
    assert pl.read_parquet(out)["user_id"].to_list() == [user for user in users for _ in range(3)]
    SegmentLog(workspace / "state" / "log").forget(users[0])
    again = CliRunner().invoke(app, [*arguments, "--k", "3", "--at", str(later)])
    assert "12 rows for 4 users, 1 of them without a history, served by popularity, bundle" in again.output
    refused = CliRunner().invoke(app, [*arguments, "--workers", "0"])
    assert refused.exit_code == 2


def test_the_moment_of_a_batch_is_asked_for_in_words_a_person_writes(capsys):
    newest, second = 1_700_000_000_000_000, 1_000_000
    assert _asked_at("end", newest) == newest + 1
    assert _asked_at("1700000000000000", None) == newest
    for text in ("2023-11-14T22:13:20", "2023-11-14T23:13:20+01:00", "2023-11-14 22:13:20"):
        assert _asked_at(text, None) == newest
    assert _asked_at("2023-11-14", None) == newest - (22 * 3600 + 13 * 60 + 20) * second
    assert _asked_at(None, 999) == 1000  # positions
    assert capsys.readouterr().err == ""
    assert abs(_asked_at(None, newest) - time.time_ns() // 1000) < 60 * second
    assert "days old" in capsys.readouterr().err
    for text in ("soon", "20240605", "1700000000", "--5", "²"):
        with pytest.raises(typer.BadParameter, match="expected a date or time"):
            _asked_at(text, newest)


@pytest.mark.parametrize("name", ["users.csv", "users.parquet"])
def test_a_file_without_users_is_refused(tmp_path: Path, name):
    from pipelines.recommend import read_user_ids
    from recsys.errors import DataError

    with pytest.raises(DataError, match=name):
        read_user_ids(tmp_path / name)
    table = pl.DataFrame({"customer": ["1"]})
    (table.write_csv if name.endswith("csv") else table.write_parquet)(tmp_path / name)
    with pytest.raises(DataError, match=r"no column 'user_id'; found customer"):
        read_user_ids(tmp_path / name)


@pytest.mark.parametrize(
    ("asking", "cap"), [({}, 12), ({"exclude_seen": True}, 12), ({"k": 40}, 3)], ids=["plain", "unseen", "more rounds"]
)
def test_many_users_at_once_are_answered_as_one_by_one(bundle, snapshot, later, asking, cap):
    """The same items in the same order from the same sources; scores but for the last float32 digit."""
    recommender = Recommender(bundle, snapshot, RecommenderConfig(rules=(Cap("department", cap),)))
    users = ["a user nobody knows", *snapshot.users(40), "nor this one"]
    asked = {"k": 12, "at": later, **asking}
    requests = [RecommendRequest(user_id=user, **asked) for user in users]
    known, found = zip(*recommender.trace_many(requests, 0), strict=True)
    assert known == (False, *[True] * 40, False)
    rounds = set()
    for request, many in zip(requests, found, strict=True):
        one = recommender.trace(request, 0)
        assert many.pool.rows.tolist() == one.pool.rows.tolist()
        assert many.pool.rank.tolist() == one.pool.rank.tolist()
        assert many.chosen.places.tolist() == one.chosen.places.tolist()
        np.testing.assert_allclose(many.scores, one.scores, rtol=2e-7)
        rounds.add(many.rounds)
    assert (max(rounds) > 1) == (cap == 3)


def test_the_job_tells_what_the_service_tells_calibrated_scores_too(bundle, snapshot, later, tmp_path):
    calibrated = replace(bundle, calibration=Calibration(method="platt", slope=0.5, intercept=-1, answers=1, shown=1))
    users = ["a user nobody knows", *snapshot.users(5)]
    recommend_users(calibrated, snapshot, users, BatchRequest(7, later), tmp_path / "recs.parquet")
    rows = pl.read_parquet(tmp_path / "recs.parquet").partition_by("user_id", maintain_order=True)
    service = Recommender(calibrated, snapshot)
    for user, told in zip(users, rows, strict=True):
        answer = service.recommend(RecommendRequest(user_id=user, k=7, at=later), 0)
        assert told["user_known"].unique().to_list() == [answer.user_known] == [answer.calibrated]
        assert told["rank"].to_list() == list(range(1, 8))
        assert told["item_id"].to_list() == [item.item_id for item in answer.items]
        assert told["sources"].to_list() == [item.sources for item in answer.items]
        np.testing.assert_allclose(told["score"], [item.score for item in answer.items], rtol=2e-7)
