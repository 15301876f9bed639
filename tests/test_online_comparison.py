"""Two bundles on the same live requests: worked by hand, and from requests over HTTP to the command's answer."""

import json
import math

import pytest
from serving_world import eventually, make_service, patient_app, publish_world
from starlette.testclient import TestClient

from recsys.errors import DataError
from recsys.stores import Event
from serving import pairs
from serving.event_log import SegmentLog
from serving.lineup import BundlePlace, Plan
from serving.online_comparison import compare_online, describe
from serving.pairs import Listed, Pair, PairLog, read_pairs
from serving.settings import load_plan

HOUR = 3_600_000_000


def pair(user: str, at: int, answered: str, other: str) -> Pair:
    return Pair(at, user, Listed("champion", "a", list(answered), 0.002), Listed("shadow", "b", list(other), 0.004))


def test_by_hand(tmp_path):
    log_of_pairs = PairLog(tmp_path / "pairs")
    for each in (
        pair("u", 100, "xyz", "zyx"),
        pair("v", 100, "xyz", "abc"),
        pair("w", 100, "xyz", "xyz"),  # does nothing
        pair("gone", 100, "xyz", "zyx"),
        pair("u", 900, "xyz", "zyx"),  # its window has not ended
    ):
        log_of_pairs.append(each)
    log_of_pairs.close()
    with (tmp_path / "pairs" / "0.jsonl").open("w") as file:
        file.write('{"at": 100, "user_id": "cut sh')
    with (tmp_path / "pairs" / "1.jsonl").open("wb") as file:
        file.write('{"at": 100, "user_id": "é'.encode()[:-1])
    log = SegmentLog(tmp_path / "log", "os")
    log.append([Event("1", "u", "z", 150), Event("2", "u", "z", 100), Event("3", "u", "x", 201)])
    log.append([Event("4", "v", "a", 200), Event("5", "v", "q", 120), Event("6", "gone", "x", 120)])
    log.forget("gone")
    log.close()
    [early] = compare_online(tmp_path, window=100, now=150, resamples=50)  # no window has ended
    assert json.loads(json.dumps(early.table(), allow_nan=False))["overlap"] is None
    [found] = compare_online(tmp_path, window=100, now=999, resamples=50)
    assert (found.answered, found.other) == ("champion a", "shadow b")
    assert (found.requests, found.users, found.with_outcome, found.young) == (3, 3, 2, 1)
    assert found.overlap == pytest.approx((1 + 0 + 1) / 3)
    assert [figure.value for figure in found.measures["hit_rate"]] == [1 / 2, 1, 1 / 2]
    # u: z is third or first of one outcome; v: a is not there or first of two outcomes
    ours, theirs = (1 / math.log2(4) + 0) / 2, (1 + 1 / (1 + 1 / math.log2(3))) / 2
    assert [figure.value for figure in found.measures["ndcg"]] == pytest.approx([ours, theirs, theirs - ours])
    assert found.seconds == (0.002, 0.004)
    assert "3 requests of 3 users, 2 with an event afterwards; 1 too young" in describe([found])


def test_a_pair_comes_back_whatever_characters_its_ids_have(tmp_path):
    pairs, odd = PairLog(tmp_path), pair("u\u2028\x85\n", 100, "xyz", "zyx")
    pairs.append(odd)
    pairs.close()
    assert list(read_pairs(tmp_path)) == [odd]


def test_actions_choose_the_outcomes(tmp_path):
    pairs = PairLog(tmp_path / "pairs")
    pairs.append(pair("u", 100, "xyz", "zyx"))
    log = SegmentLog(tmp_path / "log", "os")
    log.append([Event("1", "u", "z", 150, "view"), Event("2", "u", "x", 160, "buy")])
    [all_actions] = compare_online(tmp_path, 100, 999, resamples=5)
    [bought] = compare_online(tmp_path, 100, 999, ["buy"], resamples=5)
    assert all_actions.measures["ndcg"][2].value == pytest.approx(0)
    assert bought.measures["ndcg"][2].value == pytest.approx(1 / math.log2(4) - 1)


def test_without_pairs_it_says_what_to_do(tmp_path):
    with pytest.raises(DataError, match="--alias challenger"):
        compare_online(tmp_path, HOUR, 0)


def test_from_requests_to_the_commands_answer(tmp_path):
    from typer.testing import CliRunner

    from recsys.cli import app

    place = publish_world(tmp_path / "world")
    service = make_service(place, tmp_path / "state")
    load_plan(service, Plan(BundlePlace(place.bundle, ""), shadow=BundlePlace(place.smaller, "")))
    with TestClient(patient_app(service)) as client:
        for number in range(10):
            client.post("/v1/recommend", json={"user_id": f"user-{number}", "k": 5}).raise_for_status()
            client.post("/v1/events", json={"events": [{"user_id": f"user-{number}", "item_id": "item-1"}]})
            assert eventually(lambda before=number: _lines(tmp_path) > before)
    service.close()
    done = CliRunner().invoke(
        app, ["compare-online", "--state", str(tmp_path / "state"), "--window-hours", "0", "--json"]
    )
    assert done.exit_code == 0, done.output
    [found] = json.loads(done.output)
    assert found["requests"] == 10
    assert found["answered"] == f"champion {service.version}"


def _lines(directory) -> int:
    return sum(path.read_text().count("\n") for path in (directory / "state").glob("pairs/*.jsonl"))


def test_pairs_are_kept_by_their_bytes_and_in_a_file_that_exists(tmp_path, monkeypatch):
    monkeypatch.setattr(pairs, "MOST_BYTES", pairs.FILE_BYTES + 4_000)
    for number in range(60):  # as many processes, each with a few pairs
        log = PairLog(tmp_path)
        log.append(pair(f"u{number}", number, "a", "b"))
        log.close()
    kept = [one.at for one in read_pairs(tmp_path)]
    assert kept == list(range(60 - len(kept), 60))
    assert 10 < len(kept) < 40
    log = PairLog(tmp_path)
    log.append(pair("u", 100, "a", "b"))
    for path in tmp_path.glob("*.jsonl"):
        path.unlink()
    log.append(pair("u", 101, "a", "b"))
    log.close()
    assert [one.at for one in read_pairs(tmp_path)] == [101]


def test_answers_over_positions_have_no_hours_after_them(tmp_path):
    pairs = PairLog(tmp_path / "pairs")
    pairs.append(pair("u", 1_000, "xyz", "zyx"))
    pairs.close()
    with pytest.raises(DataError, match="over a log of positions"):
        compare_online(tmp_path, window=24 * HOUR, now=1_700_000_000_000_000)
