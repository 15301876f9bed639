"""Three quite different logs come through by what `recsys init` wrote and one edit, and mean what they meant."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import polars as pl
import pytest
from typer.testing import CliRunner

from pipelines.prepared import PreparedSet
from recsys.cli import app

EVENTS = 6000


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    """The benchmark that makes the logs, also at a size nobody would measure."""
    place = Path(__file__).parent / "benchmarks" / "ingest_logs.py"
    spec = importlib.util.spec_from_file_location("ingest_logs", place)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["ingest_logs"] = module
    spec.loader.exec_module(module)
    module.CHUNK = 2000  # several files, several chunks
    return module


def through(bench: ModuleType, name: str, folder: Path) -> tuple[dict, PreparedSet]:
    """Take a log through the verbs; gives its data card and the prepared set."""
    log = bench.LOGS[name]
    card = {}
    for verb, arguments in bench.verbs(log, log.write(EVENTS, folder), folder).items():
        done = CliRunner().invoke(app, arguments, catch_exceptions=False)
        assert done.exit_code == 0, done.output
        if verb == "init":
            bench.edit_mapping(log, folder / "my.toml")
        elif verb == "ingest":
            card = json.loads(done.stdout)
    return card, PreparedSet(folder / "workspace" / "prepared")


def truth(bench: ModuleType) -> pl.DataFrame:
    return pl.concat(bench.draws(EVENTS, 0))


def histories(done: PreparedSet) -> dict[str, list[tuple[str, int]]]:
    """Return (item, time) of every user's events, by outside ids."""
    ids, found = done.catalogue["item_id"].to_list(), {}
    for row, user in enumerate(done.users["user_id"]):
        events = done.histories.of(row)
        found[user] = [(ids[key], int(time)) for key, time in zip(events.item, events.time, strict=True)]
    return found


def test_text_ids_stay_as_they_are_and_returns_are_filtered_not_bad(bench: ModuleType, tmp_path: Path) -> None:
    card, done = through(bench, "returns", tmp_path)
    pieces = pl.read_csv(tmp_path / "sales.csv")["pieces"]
    assert card["filtered"] == {"positive pieces": int((pieces < 0).sum())}
    assert 0.02 < (pieces < 0).mean() < 0.04
    assert (card["bad"], card["read"]) == ({}, EVENTS)
    assert done.manifest["categorical"] == ["shelf"]
    assert done.manifest["multi"] == ["tags"]
    lines = truth(bench).filter(pl.Series(pieces > 0))
    wanted: dict[str, list[tuple[str, int]]] = {}
    for user, item, second in lines.select("user", "item", "second").iter_rows():
        wanted.setdefault(f'Card "{user}" é', []).append((f"SKU {item}/x", second * 1_000_000))
    found = histories(done)
    assert {user: sorted(events, key=lambda e: e[::-1]) for user, events in found.items()} == {
        user: sorted(events, key=lambda e: e[::-1]) for user, events in wanted.items()
    }


def test_rows_in_no_order_give_the_set_that_rows_in_order_give(bench: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "sorted").mkdir()
    card, done = through(bench, "unsorted", tmp_path)
    assert (card["read"], card["events"], card["missing_text"]) == (EVENTS, EVENTS, card["items"])
    times = pl.concat(pl.read_parquet(path) for path in sorted((tmp_path / "clicks").iterdir()))["ts"]
    assert not times.is_sorted()
    ordered = pl.concat([pl.read_parquet(path) for path in (tmp_path / "clicks").iterdir()]).sort("ts", "visitor_id")
    for path in (tmp_path / "clicks").iterdir():
        path.unlink()
    ordered.write_parquet(tmp_path / "clicks" / "part0000.parquet")
    shuffled = done.digest
    for arguments in list(bench.verbs(bench.LOGS["unsorted"], tmp_path, tmp_path).values())[1:]:
        assert CliRunner().invoke(app, arguments, catch_exceptions=False).exit_code == 0
    assert PreparedSet(done.directory).digest == shuffled


def test_positions_alone_order_a_history(bench: ModuleType, tmp_path: Path) -> None:
    card, done = through(bench, "order", tmp_path)
    assert (card["order"], card["bad"], card["filtered"]) == ("position", {}, {})
    assert done.manifest["config"]["split"]["kind"] == "last_request"
    found = histories(done)
    for (user,), lines in truth(bench).group_by("user", maintain_order=True):
        items = [str(item) for item in lines["item"]]
        assert found[str(user)] == [(item, place) for place, item in enumerate(items)]
    ends = {done.users["user_id"][int(user)]: int(at) for user, at in zip(*_last(done), strict=True)}
    assert ends == {user: len(events) - 1 for user, events in found.items()}


def _last(done: PreparedSet) -> tuple[np.ndarray, np.ndarray]:
    requests = done.requests("test")
    return requests.user, requests.at
