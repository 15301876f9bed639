"""A run trained again gives the same weights, or the reason why not."""

import pytest
from typer.testing import CliRunner

from pipelines.reproduce import changes, find_run, reproduce
from pipelines.shipped import find_config
from pipelines.train import Loop, train
from pipelines.train_config import load_config
from pipelines.workspace import Workspace
from recsys.cli import app
from recsys.errors import DataError, GateError
from recsys.files import read_json, write_json


@pytest.fixture(scope="module")
def place(prepared, mlflow_uri, tmp_path_factory):
    place = Workspace(tmp_path_factory.mktemp("workspace"))
    (place.root / "prepared").symlink_to(prepared.directory)
    quick = ["stop.max_steps=3", "stop.requests=20", "batches.rows=16"]
    train(load_config(find_config("mean_pooling"), quick), place.prepared, place.run("mean"), mlflow_uri)
    return place


def test_the_same_comes_out_bit_for_bit(place, mlflow_uri):
    run_id = read_json(place.run("mean") / "run.json")["run_id"]
    done = CliRunner().invoke(app, ["reproduce", run_id, "-w", str(place.root), "--mlflow", mlflow_uri])
    assert done.exit_code == 0, done.output
    assert f"Run {run_id} was reproduced: the same weights, bit for bit." in done.output


def test_each_time_it_is_trained_anew_and_only_what_was_interrupted_goes_on(place, mlflow_uri, tmp_path, monkeypatch):
    taken, honest, out = [], Loop.step, tmp_path / "again"

    def step(self):
        if len(taken) == 8:
            raise KeyboardInterrupt
        taken.append(self.state.step)
        return honest(self)

    def again() -> list[int]:
        taken.clear()
        assert reproduce(place.run("quick"), place, out, mlflow_uri).identical
        return list(taken)

    quick = ["stop.max_steps=3", "stop.requests=20", "batches.rows=16", "stop.checkpoint_every=1"]
    train(load_config(find_config("mean_pooling"), quick), place.prepared, place.run("quick"), mlflow_uri)
    monkeypatch.setattr(Loop, "step", step)
    assert (again(), again()) == ([0, 1, 2], [0, 1, 2])

    def interrupt() -> None:
        taken[:] = [0] * 6
        with pytest.raises(KeyboardInterrupt):
            reproduce(place.run("quick"), place, out, mlflow_uri)

    interrupt()
    assert again() == [2]
    interrupt()
    about = read_json(out / "run.json")
    write_json(out / "run.json", about | {"environment": about["environment"] | {"code": "abc"}})
    assert again() == [0, 1, 2]


def test_what_has_changed_is_said(place, mlflow_uri, tmp_path):
    about = place.run("mean") / "run.json"
    record = read_json(about)
    try:
        write_json(about, record | {"environment": record["environment"] | {"package torch": "1.0", "code": "abc"}})
        result = reproduce(place.run("mean"), place, tmp_path / "again", mlflow_uri)
        assert result.identical
        assert "code was abc and is" in result.words()
        assert "package torch was 1.0 and is" in result.words()
        write_json(about, record | {"data_digest": "0123456789abcdef"})
        with pytest.raises(DataError, match=f"data 0123456789ab, .*{place.prepared.digest[:12]}"):
            reproduce(place.run("mean"), place, tmp_path / "again", mlflow_uri)
    finally:
        write_json(about, record)


def test_another_outcome_exits_with_4_and_says_what_is_known(place, mlflow_uri, monkeypatch):
    import pipelines.reproduce as module

    class Changed:
        identical = False

        def words(self):
            return "not the same"

    monkeypatch.setattr(module, "reproduce", lambda *arguments: Changed())
    done = CliRunner().invoke(app, ["reproduce", "mean", "-w", str(place.root), "--mlflow", mlflow_uri])
    assert isinstance(done.exception, GateError)
    with pytest.raises(DataError, match=r"no_such: no run of .*; there are mean"):
        find_run("no_such", place)


def test_facts_that_only_one_side_has_count_as_changed():
    found = changes({"code": "a", "package x": "1"}, {"code": "a", "hardware y": "2"})
    assert [(one.fact, one.recorded, one.now) for one in found] == [
        ("hardware y", "absent", "2"),
        ("package x", "1", "absent"),
    ]
