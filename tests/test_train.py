"""The training loop: resumable bit for bit, logged, and stopped by a loss that is no number."""

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from pipelines import tracking
from pipelines import train as loop
from pipelines.batches import BatchConfig, TrainingBatches
from pipelines.checkpoint import Checkpoint, TrainingError
from pipelines.datasets import RawLog
from pipelines.ingest import ingest
from pipelines.optimise import OptimiserConfig
from pipelines.prepare import PrepareConfig, prepare
from pipelines.splits import SplitConfig
from pipelines.train import Loop, train, trained_run
from pipelines.train_config import StopConfig, TrainConfig, config_of, load_config, suited
from ranking.models import RANKERS
from ranking.ranker import Loss
from recsys.errors import ConfigError, DataError, RecsysError
from recsys.files import sha256_json, write_json
from recsys.history import DAY

CONFIGS = Path("pipelines/configs")
STEPS = 9


def config(name: str, **stop) -> TrainConfig:
    shipped = load_config(CONFIGS / f"{name}.toml")
    stop = {"max_steps": STEPS, "validate_every": 4, "checkpoint_every": 3, "requests": 30, "epochs": 50.0} | stop
    batches = replace(shipped.batches, rows=16)
    return replace(shipped, device="cpu", batches=batches, stop=replace(shipped.stop, **stop))


class KilledError(Exception):
    """Stands for a kill at the end of a step."""


def kill_at(step: int):
    def report(done: int, total: int, words: str) -> None:
        if done == step:
            raise KilledError

    return report


def weights(trained) -> dict[str, torch.Tensor]:
    return trained.model.state_dict()


@pytest.mark.parametrize("name", ["dare", "mqsa_ted"])
def test_a_killed_run_ends_with_the_same_weights(name, prepared, mlflow_uri, tmp_path):
    whole = train(config(name), prepared, tmp_path / "whole", mlflow_uri)
    assert whole.summary.steps == STEPS
    for kills in ([3], [5], [1, 4, 7]):  # at a checkpoint, between two, and again and again
        directory = tmp_path / "-".join(map(str, kills))
        for kill in kills:
            with pytest.raises(KilledError):
                train(config(name), prepared, directory, mlflow_uri, kill_at(kill))
        resumed = train(config(name), prepared, directory, mlflow_uri)
        assert weights(resumed).keys() == weights(whole).keys()
        for key, tensor in weights(whole).items():
            assert torch.equal(tensor, weights(resumed)[key]), key
        curve = {entry["step"]: entry["valid/gauc"] for entry in resumed.summary.curve}
        assert curve == {entry["step"]: entry["valid/gauc"] for entry in whole.summary.curve}


def test_another_seed_is_another_run_and_the_same_is_the_same(prepared, mlflow_uri, tmp_path):
    runs = {
        (seed, copy): train(replace(config("dare"), seed=seed), prepared, tmp_path / f"{seed}{copy}", mlflow_uri)
        for seed in (1, 2)
        for copy in "ab"
    }
    for key, tensor in weights(runs[1, "a"]).items():
        assert torch.equal(tensor, weights(runs[1, "b"])[key])
    assert not torch.equal(
        weights(runs[1, "a"])["representation.item.weight"], weights(runs[2, "a"])["representation.item.weight"]
    )


def test_a_changed_config_starts_again(prepared, mlflow_uri, tmp_path):
    first = train(config("dare"), prepared, tmp_path, mlflow_uri)
    again = train(config("dare"), prepared, tmp_path, mlflow_uri)
    other = train(config("dare", max_steps=2), prepared, tmp_path, mlflow_uri)
    assert again.run_id == first.run_id
    assert other.run_id != first.run_id
    assert other.summary.steps == 2


def test_the_best_checkpoint_is_kept_and_patience_ends_a_run(prepared, mlflow_uri, tmp_path, monkeypatch):
    values = iter([0.5, 0.9, 0.7, 0.6, 0.8])
    seen = []

    def validate(model, *_):
        seen.append({key: tensor.clone() for key, tensor in model.state_dict().items()})
        return {"auc": next(values), "gauc": 0.0, "ndcg_at_10": 0.0}

    monkeypatch.setattr(loop, "validate", validate)
    stop = {"validate_every": 1, "patience": 2, "samplers": ("uniform",), "metric": "auc"}
    trained = train(config("dare", **stop), prepared, tmp_path, mlflow_uri)
    assert (trained.summary.steps, trained.summary.best_step) == (4, 2)
    for key, tensor in seen[1].items():
        assert torch.equal(tensor, weights(trained)[key])


def test_a_run_stopped_between_its_last_checkpoint_and_its_end_takes_no_step_more(
    prepared, mlflow_uri, tmp_path, monkeypatch
):
    values = iter([0.5, 0.4, 0.3])
    monkeypatch.setattr(loop, "validate", lambda *_: {"auc": next(values), "gauc": 0.0, "ndcg_at_10": 0.0})
    stop = {"validate_every": 1, "patience": 2, "metric": "auc", "samplers": ("uniform",), "checkpoint_every": 1}
    with pytest.raises(KilledError):
        train(config("mean_pooling", **stop), prepared, tmp_path, mlflow_uri, kill_at(3))
    assert train(config("mean_pooling", **stop), prepared, tmp_path, mlflow_uri).summary.steps == 3


@pytest.mark.parametrize("rows", [16, 100_000])
def test_speed_is_of_the_rows_that_batches_have(rows, prepared, mlflow_uri, tmp_path):
    found = replace(config("mean_pooling"), batches=BatchConfig(rows=rows))
    summary = train(found, prepared, tmp_path, mlflow_uri).summary
    batches = TrainingBatches(prepared, found.batches, "requests", None, found.seed)
    taken = sum(len(batches.batch(step)) for step in range(STEPS))
    assert summary.samples_per_second == pytest.approx(taken / summary.seconds)
    assert summary.seconds_per_epoch == pytest.approx(len(batches) * summary.seconds / STEPS)


def test_a_finished_run_is_read_back_without_training(prepared, mlflow_uri, tmp_path):
    trained = train(config("dare"), prepared, tmp_path, mlflow_uri)
    back = trained_run(tmp_path, prepared)
    assert back.config == trained.config
    assert back.summary == trained.summary
    for key, tensor in weights(trained).items():
        assert torch.equal(tensor, weights(back)[key])


def test_a_run_of_a_version_that_built_the_model_otherwise_is_refused_in_words(prepared, tmp_path):
    found = config("dare")
    loop = Loop(found, prepared, tmp_path, "inputs", None)
    loop.state = replace(loop.state, finished=True)
    loop.best["head.norm.weight"] = loop.best["head.norm.weight"][:-2]
    loop.save()
    table = found.table()
    inputs = sha256_json({"config": table, "data": prepared.digest})
    write_json(tmp_path / "run.json", {"config": table, "inputs": inputs, "run_id": "x"})
    with pytest.raises(DataError, match=r"weights are of another version's dare; train it again.*head\.norm\.weight"):
        trained_run(tmp_path, prepared)


def test_an_unfinished_run_and_a_broken_checkpoint_are_told_apart(prepared, mlflow_uri, tmp_path):
    with pytest.raises(KilledError):
        train(config("dare"), prepared, tmp_path, mlflow_uri, kill_at(4))
    with pytest.raises(DataError, match="stopped at step 3"):
        trained_run(tmp_path, prepared)
    (tmp_path / "checkpoint.safetensors").write_bytes(b"\x80\x04pickle")
    with pytest.raises(DataError, match="not a checkpoint"):
        trained_run(tmp_path, prepared)
    (tmp_path / "checkpoint.safetensors").unlink()
    with pytest.raises(DataError, match="stopped before its first checkpoint; run `recsys train` again"):
        trained_run(tmp_path, prepared)


@pytest.mark.parametrize("what", ["loss", "gradient norm"])
def test_what_is_no_number_stops_the_run_and_keeps_the_checkpoint(what, prepared, mlflow_uri, tmp_path, monkeypatch):
    model = RANKERS["dare"][1]
    honest = model.loss
    calls = iter(range(100))

    def loss(self, batch, generator):
        found = honest(self, batch, generator)
        if next(calls) < 4:
            return found
        if what == "gradient norm":
            found.total.register_hook(lambda gradient: gradient * float("nan"))
            return found
        return Loss(found.total * float("nan"), found.parts)

    monkeypatch.setattr(model, "loss", loss)
    with pytest.raises(TrainingError, match=f"{what} is nan at step 4 of seed 2023, batch of 16 rows"):
        train(config("dare"), prepared, tmp_path, mlflow_uri)
    saved = Checkpoint.load(tmp_path / "checkpoint.safetensors", 2)
    assert saved.state.step == 3
    assert all(torch.isfinite(tensor).all() for tensor in saved.weights.values())


def test_mlflow_holds_parameters_metrics_and_tags(prepared, mlflow_uri, tmp_path):
    trained = train(config("dare"), prepared, tmp_path, mlflow_uri)
    run = tracking.tracking_client(mlflow_uri).get_run(trained.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params["model.retrieved"] == "20"
    assert run.data.params["seed"] == "2023"
    assert run.data.tags["data_digest"] == prepared.digest
    assert run.data.tags["git_commit"]
    assert {"valid/gauc", "valid/uniform/auc", "train/total", "train/samples_per_second"} <= run.data.metrics.keys()


def test_a_senseless_tracking_uri_is_a_config_error(prepared, tmp_path):
    with pytest.raises(ConfigError, match="MLflow at nonsense://here"):
        train(config("popularity"), prepared, tmp_path, "nonsense://here")


class TestBatches:
    """Batches are a function of (seed, step), and hold what the configuration says."""

    @pytest.fixture(params=["requests", "sequences"])
    def batches(self, request, prepared) -> TrainingBatches:
        return TrainingBatches(prepared, BatchConfig(rows=16, max_positives=5), request.param, 50, 7)

    def test_a_step_is_reproduced_alone(self, batches, prepared):
        steps = [0, len(batches) - 1, len(batches), 2 * len(batches) + 1]
        inorder = [batches.batch(step) for step in steps]
        for step, batch in reversed(list(zip(steps, inorder, strict=True))):
            fresh = replace(batches).batch(step)
            assert torch.equal(fresh.history.item, batch.history.item)
            assert torch.equal(fresh.candidates.item, batch.candidates.item)

    def test_an_epoch_visits_every_row_at_most_once(self, batches):
        seen = []
        for step in range(len(batches)):
            index = batches._epoch(0)[step]
            seen += index.tolist()
        assert len(seen) == len(set(seen)) == batches.rows_per_epoch

    def test_histories_end_before_the_request_and_labels_fit(self, batches, prepared):
        for step in range(5):
            batch = batches.batch(step)
            newest = batch.history.time[batch.history.offsets[1:] - 1]
            assert (newest < batch.request.at).all()
            assert int(batch.history.lengths.max()) <= 50
            real = batch.candidates.mask
            assert (batch.label[~real] == 0).all()
            positives = batch.label.sum(1)
            assert ((positives >= 1) & (positives <= 5)).all()
            if batches.trains_on == "requests":
                assert torch.equal((real.sum(1) - positives).long(), (2 * positives).long())
            else:
                assert torch.equal(real.sum(1), positives.long())

    def test_own_negatives_come_on_top_and_are_corrected_for(self, prepared):
        plain = TrainingBatches(prepared, BatchConfig(rows=64), "requests", None, 7)
        with_own = TrainingBatches(prepared, BatchConfig(rows=64, own_negatives=3), "requests", None, 7)
        for step in range(3):
            before, after = plain.batch(step), with_own.batch(step)
            width = before.candidates.item.shape[1]
            assert torch.equal(after.candidates.item[:, :width], before.candidates.item)
            assert (after.label[:, width:] == 0).all()
            offsets = before.history.offsets.tolist()
            for row, (start, end) in enumerate(itertools.pairwise(offsets)):
                mine = set(before.history.item[start:end].tolist())
                added = after.candidates.item[row, width:].tolist()
                assert set(added) <= mine | {0}
                assert sum(item > 0 for item in added) in (0, 3 * int(before.label[row].sum()))
                owned = torch.tensor([item in mine for item in before.candidates.item[row].tolist()])
                gap = after.log_q[row, :width] - before.log_q[row]
                assert (gap[owned] > 0).all()
                assert gap[~owned] == pytest.approx(0, abs=1e-6)

    def test_negatives_are_no_positives_of_their_request(self, prepared):
        batches = TrainingBatches(prepared, BatchConfig(rows=64), "requests", 20, 7)
        for step in range(3):
            requests = batches.requests.take(batches._epoch(0)[step])
            batch = batches.batch(step)
            for row in range(len(batch)):
                basket = requests.positive[requests.offsets[row] : requests.offsets[row + 1]]
                items = batch.candidates.item[row].numpy()
                label = batch.label[row].numpy()
                assert np.isin(items[label == 1], basket).all()
                assert not np.isin(items[(label == 0) & (items > 0)], basket).any()


def test_contradictions_are_refused_with_both_values():
    with pytest.raises(ConfigError, match=r"weight_decay = 0\.1 .*sparse_adam"):
        OptimiserConfig(weight_decay=0.1)
    with pytest.raises(ConfigError, match="samplers must be some of"):
        BatchConfig(samplers=("unifrom",))
    with pytest.raises(ConfigError, match="at least 1"):
        BatchConfig(rows=0)
    with pytest.raises(ConfigError, match="max_requests must be at least 1, found 0"):
        BatchConfig(max_requests=0)


@pytest.mark.parametrize(
    ("assignment", "words"),
    [
        ("stop.validate_every=0", r"\[stop\] validate_every must be at least 1, found 0"),
        ("stop.least_steps=0", r"\[stop\] least_steps must be at least 1, found 0"),
        ("stop.checkpoint_every=0", r"\[stop\] checkpoint_every must be at least 1, found 0"),
        ("stop.patience=0", r"\[stop\] patience must be at least 1, found 0"),
        ("stop.max_steps=-1", r"\[stop\] max_steps must be at least 1, found -1"),
        ("stop.requests=0", r"\[stop\] requests must be at least 1, found 0"),
        ("stop.epochs=inf", r"\[stop\] epochs must be a number above 0, found inf"),
        ("optimiser.learning_rate=inf", r"\[optimiser\] learning_rate must be a number above 0, found inf"),
        ("stop.samplers=[]", r"\[stop\] samplers must name at least one"),
        ("model=din", r"dare\.toml: model is a section.*found 'din'"),
    ],
)
def test_what_cannot_be_meant_is_refused_before_anything_runs(assignment, words):
    with pytest.raises(ConfigError, match=words):
        load_config(CONFIGS / "dare.toml", [assignment])


def test_a_metric_nobody_measures_is_refused(prepared, mlflow_uri, tmp_path):
    with pytest.raises(ConfigError, match=r"metric must be one of .*gauc.*, found 'beauty'"):
        train(config("popularity", metric="beauty"), prepared, tmp_path, mlflow_uri)


def test_a_model_goes_without_a_category_the_catalogue_does_not_have(log, mlflow_uri, tmp_path):
    events = pl.read_parquet(log / "events.parquet")
    ingest(RawLog("bare", events.lazy(), None), tmp_path / "log")
    bare = prepare(tmp_path / "log", tmp_path / "bare", PrepareConfig(workers=1, negatives=5))
    for name in ("din", "mean_pooling", "lightgbm"):
        found = suited(config(name), bare)
        assert found.model.category is None
        assert replace(found, model=config(name).model) == config(name)
    trained = train(config("din"), bare, tmp_path / "run", mlflow_uri)
    assert trained.config.model.category is None
    assert trained_run(tmp_path / "run", bare).config == trained.config
    for asked in (load_config(CONFIGS / "din.toml", ["model.category=shelf"]), config("sim_hard")):
        assert suited(asked, bare).model.category == asked.model.category
        with pytest.raises(ConfigError, match="no categorical item column"):
            train(asked, bare, tmp_path / "refused", mlflow_uri)


def test_a_set_whose_training_requests_have_no_past_is_refused_in_words(tmp_path):
    """A small shop: three purchases each, the last tests, the one before validates, and before the first is nothing."""
    rows = [(user, item, DAY * (15_000 + day)) for user in "ab" for day, item in enumerate(["tea", "jam", "bread"])]
    events = pl.DataFrame(rows, ["user_id", "item_id", "timestamp"], orient="row")
    ingest(RawLog("shop", events.lazy(), None), tmp_path / "log")
    split = SplitConfig(kind="last_request")
    shop = prepare(tmp_path / "log", tmp_path / "shop", PrepareConfig(split=split, workers=1, negatives=1))
    with pytest.raises(DataError, match=r"shop: none of its 2 training requests has an event before it"):
        TrainingBatches(shop, BatchConfig(), "requests", 50, 7).batch(0)


def test_a_log_of_one_item_is_refused_in_words(tmp_path):
    """Nothing to tell apart: no metric is defined, and a summary of NaN could not be written."""
    rows = [(user, "tea", DAY * (15_000 + day)) for user in "ab" for day in range(6)]
    events = pl.DataFrame(rows, ["user_id", "item_id", "timestamp"], orient="row")
    ingest(RawLog("tea", events.lazy(), None), tmp_path / "log")
    split = SplitConfig(kind="last_request")
    tea = prepare(tmp_path / "log", tmp_path / "tea", PrepareConfig(split=split, workers=1, negatives=1))
    with pytest.raises(DataError, match=r"tea: gauc is not defined on its validation requests"):
        Loop(config("popularity"), tea, tmp_path, "inputs", None).run_to_end()


def test_a_set_without_validation_requests_is_refused_in_words(log, mlflow_uri, tmp_path):
    """A log with a gap: one event long after the others takes both periods with it."""
    events = pl.read_parquet(log / "events.parquet")
    late = events.tail(1).with_columns(pl.col("timestamp") + 400 * DAY)
    ingest(RawLog("gap", pl.concat([events, late]).lazy(), None), tmp_path / "log")
    gap = prepare(tmp_path / "log", tmp_path / "gap", PrepareConfig(workers=1, negatives=5))
    with pytest.raises(DataError, match=r"gap: no validation request.*split.valid_days.*last_request"):
        train(config("popularity"), gap, tmp_path / "run", mlflow_uri)


@pytest.mark.parametrize(
    ("settings", "epoch", "steps", "between"),
    [
        ({}, 7, 300, 30),  # an epoch of seven steps: the least, validated ten times
        ({}, 149, 300, 30),
        ({}, 150, 300, 150),  # two epochs are as many
        ({}, 1_000, 2_000, 150),
        ({"validate_every": 20}, 7, 300, 20),
        ({"least_steps": 5, "epochs": 0.1}, 10, 5, 1),
        ({"least_steps": 1}, 7, 14, 150),
        ({"max_steps": 10}, 7, 10, 150),  # a fixed budget is one
        ({"max_steps": 500}, 7, 14, 150),
    ],
)
def test_a_small_log_is_trained_on_for_more_than_its_epochs(settings, epoch, steps, between):
    stop = StopConfig(**settings)
    assert (stop.steps(epoch), stop.between(epoch)) == (steps, between)


def test_a_run_from_before_there_were_least_steps_is_read_as_it_was():
    table = load_config(CONFIGS / "din.toml").table()
    assert config_of(table, "run.json").stop.steps(7) == 300
    del table["stop"]["least_steps"]
    assert config_of(table, "run.json").stop.steps(7) == 14


def test_a_run_on_a_small_log_takes_the_least_steps_and_trees_do_not(prepared, mlflow_uri, tmp_path, monkeypatch):
    small = {"max_steps": None, "epochs": 1.0, "patience": 1, "validate_every": 150, "least_steps": 500}
    trained = train(config("din", **small), prepared, tmp_path / "din", mlflow_uri)
    assert trained.summary.steps == 500
    assert [entry["step"] for entry in trained.summary.curve] == list(range(50, 501, 50))
    seen = []
    monkeypatch.setattr(loop.boost, "grow_from", lambda model, batches, steps, *rest: seen.append((batches, steps)))
    with pytest.raises(RecsysError, match="no trees yet"):
        train(config("lightgbm", **small), prepared, tmp_path / "trees", mlflow_uri)
    ((batches, steps),) = seen
    assert steps == len(batches) < 500
