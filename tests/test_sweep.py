"""Sweeps: the same budget for every model, nothing trained twice, and the best mean wins."""

import json
import math
import tomllib
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines import sweep as module
from pipelines.checkpoint import TrainingError
from pipelines.sweep import Outcome, SweepConfig, draw, load_sweep, sweep, trials
from recsys.config import parse
from recsys.errors import ConfigError

SHIPPED = Path("pipelines/configs/sweep.toml")
QUICK = """
models = ["popularity", "mean_pooling", "din"]
trials = 2
seeds = [1, 2]

[space]
optimiser.learning_rate = [1e-3, 3e-3, 1e-2]

[train]
batches.rows = 16
stop.max_steps = 2
stop.requests = 20
"""


def config(**changes: Any) -> SweepConfig:
    return replace(parse(SweepConfig, tomllib.loads(QUICK), "quick.toml"), **changes)


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the runs that were really trained, in order."""
    names: list[str] = []
    honest = module.train

    def train(config, prepared, directory, uri, report):
        found = honest(config, prepared, directory, uri, report)
        names.append(directory.name)
        return found

    monkeypatch.setattr(module, "train", train)
    return names


@given(st.lists(st.integers(1, 4), max_size=4), st.integers(1, 300), st.integers(0, 10**6))
def test_settings_are_distinct_points_of_the_grid_and_a_small_grid_is_refused(sizes, number, seed):
    space = {f"a.{axis}": [f"v{value}" for value in range(size)] for axis, size in enumerate(sizes)}
    size = math.prod(sizes)
    if number > size:
        with pytest.raises(ConfigError, match=rf"{number} settings wanted, \[space\] has {size}"):
            draw(space, number, seed, "space")
        return
    settings = draw(space, number, seed, "space")
    assert settings == draw(space, number, seed, "space")
    assert len({json.dumps(setting) for setting in settings}) == number
    assert all(list(setting) == list(space) for setting in settings)
    assert all(setting[axis] in values for setting in settings for axis, values in space.items())


def test_every_model_gets_the_same_settings_and_seeds_and_its_own_file_below_them():
    planned = trials(config(), "digest")
    by_model = {model: [(t.setting, t.seed) for t in planned if t.model == model] for model in config().models}
    assert by_model["popularity"] == by_model["mean_pooling"] == by_model["din"]
    assert len(by_model["din"]) == 2 * 2
    for trial in planned:
        assert trial.config.seed == trial.seed
        assert trial.config.optimiser.learning_rate == trial.setting["optimiser.learning_rate"]
        assert (trial.config.batches.rows, trial.config.stop.max_steps) == (16, 2)
    assert next(trial for trial in planned if trial.model == "din").config.model.pos_mode == "group"  # of din.toml
    assert len({trial.run for trial in planned}) == len(planned)
    assert not {trial.run for trial in planned} & {trial.run for trial in trials(config(), "another digest")}


def test_the_shipped_sweep_spends_the_same_on_every_model():
    shipped = load_sweep(SHIPPED)
    spent = Counter(trial.model for trial in trials(shipped, "digest"))
    assert spent == dict.fromkeys(shipped.models, shipped.trials * len(shipped.seeds))


def test_an_interrupted_sweep_goes_on_and_repeats_nothing(prepared, mlflow_uri, tmp_path, trained):
    class KilledError(Exception):
        pass

    def kill(done: int, total: int, words: str) -> None:
        if words.startswith("run 7 of 12, mean_pooling, seed 1"):
            raise KilledError

    with pytest.raises(KilledError):
        sweep(config(), prepared, tmp_path, mlflow_uri, kill)
    assert len(trained) == 6
    swept = sweep(config(), prepared, tmp_path, mlflow_uri)
    assert len(trained) == len(set(trained)) == 12

    assert sweep(config(), prepared, tmp_path, mlflow_uri) == swept
    more = sweep(config(seeds=(1, 2, 3)), prepared, tmp_path, mlflow_uri)
    assert len(trained) == 12 + 3 * 2  # the new seed of every setting, nothing else
    for model, outcomes in swept.outcomes.items():
        assert [o.values for o in outcomes] == [o.values[:2] for o in more.outcomes[model]]


def test_results_are_written_as_json_and_as_a_table(prepared, mlflow_uri, tmp_path):
    swept = sweep(config(models=("popularity", "mean_pooling"), seeds=(1,)), prepared, tmp_path, mlflow_uri)
    found = json.loads((tmp_path / "sweep.json").read_text())
    assert found["metric"] == "valid/gauc"
    assert found["data_digest"] == prepared.digest
    pooling = found["models"]["mean_pooling"]
    assert len(pooling["outcomes"]) == 2
    best = max(pooling["outcomes"], key=lambda outcome: outcome["mean"])
    assert pooling["best"] == best["setting"] == swept.best("mean_pooling").setting
    for outcome in pooling["outcomes"]:
        curve = json.loads((tmp_path / outcome["runs"][0] / "summary.json").read_text())["curve"]
        assert outcome["mean"] == max(entry["valid/gauc"] for entry in curve)
    text = (tmp_path / "sweep.md").read_text()
    assert f"optimiser.learning_rate={best['setting']['optimiser.learning_rate']}" in text
    assert f"{best['mean']:.4f}" in text


def test_a_run_that_fails_is_recorded_once_and_its_setting_never_wins(
    prepared, mlflow_uri, tmp_path, trained, monkeypatch
):
    honest, failures = module.train, []

    def train(config, prepared, directory, uri, report):
        if config.name == "mean_pooling" and config.seed == 2 and config.optimiser.learning_rate == largest:
            failures.append(directory.name)
            raise TrainingError("loss is nan at step 1")
        return honest(config, prepared, directory, uri, report)

    monkeypatch.setattr(module, "train", train)
    largest = max(trial.config.optimiser.learning_rate for trial in trials(config(), prepared.digest))
    for _ in range(2):
        swept = sweep(config(models=("mean_pooling",)), prepared, tmp_path, mlflow_uri)
    assert len(failures) == 1
    bad = next(o for o in swept.outcomes["mean_pooling"] if o.setting["optimiser.learning_rate"] == largest)
    assert bad.values[0] is not None
    assert bad.values[1] is None
    assert bad.table()["mean"] is None
    assert swept.best("mean_pooling") is not bad
    assert "failed" in swept.markdown()


def test_the_best_setting_has_the_largest_mean_and_the_first_of_equals_wins():
    outcomes = [Outcome({"a": i}, values, [], 0.0) for i, values in enumerate([[0.5, 0.9], [0.7, 0.7], [0.8, 0.5]])]
    assert module.Swept(config(), "", {"m": outcomes}).best("m").setting == {"a": 0}
    assert outcomes[0].mean == pytest.approx(0.7)
    assert outcomes[0].deviation == pytest.approx(math.sqrt(2 * 0.2**2))
    assert Outcome({}, [0.5], [], 0.0).deviation is None


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ('models = ["din"]\ntrails = 2', "unknown key 'trails'; did you mean 'trials'"),
        ('models = ["din", "din"]', "distinct names"),
        ('models = ["din"]\nmetric = "beauty"', "metric must be one of gauc, .* found 'beauty'"),
        ('models = ["din"]\nseeds = []', "seeds must be distinct"),
        ('models = ["din"]\n[own.dear]\nmodel.window = [1]', r"\[own.dear\] is no model of this sweep"),
        ('models = ["din"]\n[space]\noptimiser.learning_rate = 0.1', "space.optimiser.learning_rate: .* found 0.1"),
        ('models = ["din"]\n[space]\noptimiser.learning_rat = [0.1]', "did you mean 'learning_rate'"),
        ('models = ["popularity"]\n[space]\nmodel.window = [1]', "unknown key 'window'; there is nothing to set"),
        ('models = ["nope"]', "no config 'nope' and no file of that name"),
    ],
)
def test_a_sweep_that_cannot_be_meant_is_refused_before_anything_is_trained(text, names, tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=names):
        trials(load_sweep(path), "digest")


def test_a_ranker_left_out_of_the_models_may_have_its_space_all_the_same():
    own = {"lightgbm": {"model": {"leaves": [15, 31]}}}
    assert len(SweepConfig(models=("din", "dare"), own=own, trials=1).settings("din")) == 1
    with pytest.raises(ConfigError, match=r"\[own.lihgtgbm\] is no model of this sweep"):
        SweepConfig(models=("din",), own={"lihgtgbm": {}})
