"""The training loop of rankers: it knows `loss(batch, generator)` and nothing else of a model.

Every draw is a function of (seed, step, purpose), and a checkpoint holds weights, optimiser states and where the run
stands. So a run that is killed and started again ends with the same weights, bit for bit, as one that was not (on a
CPU, with the same versions and number of threads). Trees, which take no steps, grow by `pipelines.boost`.
"""

import copy
import dataclasses
import math
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from pipelines import boost, leave_one_out, tracking
from pipelines.batches import TrainingBatches
from pipelines.checkpoint import Checkpoint, RunState, TrainingError, restore
from pipelines.environment import environment
from pipelines.evaluate import TrainingSummary, validate
from pipelines.optimise import build_optimisers, update
from pipelines.prepared import PreparedSet
from pipelines.team import Alone, Team
from pipelines.train_config import TrainConfig, config_of, suited
from ranking.batch import Batch
from ranking.devices import pick_device
from ranking.gradient_boosting import GradientBoosting
from ranking.models import RANKERS
from ranking.ranker import AnyRanker
from recsys.errors import ConfigError, DataError
from recsys.files import read_json, sha256_json, write_json
from recsys.progress import Progress, silent
from recsys.randomness import derive

CHECKPOINT = "checkpoint.safetensors"
"""of a run, in its directory"""


@dataclass(frozen=True)
class Trained:
    """A finished run: the model at its best checkpoint, in evaluation mode."""

    model: AnyRanker
    config: TrainConfig
    summary: TrainingSummary
    run_id: str


def trained_run(directory: Path, prepared: PreparedSet) -> Trained:
    """Return a finished run back from its directory, without touching MLflow.

    Raises:
        DataError: there is no finished run, or it was trained on another prepared set.
    """
    about = read_json(directory / "run.json")
    config = config_of(about["config"], str(directory / "run.json"))
    # Of the config as recorded: a later version may have added settings, which changes nothing of a finished run.
    inputs = sha256_json({"config": about["config"], "data": prepared.digest})
    if about["inputs"] != inputs:
        raise DataError(f"{directory}: trained on another prepared set than {prepared.directory}; train it again")
    if not (directory / CHECKPOINT).exists():
        raise DataError(f"{directory}: stopped before its first checkpoint; run `recsys train` again to finish it")
    model = build(config, prepared)
    saved = Checkpoint.load(directory / CHECKPOINT, len(build_optimisers(_module(model), config.optimiser)))
    if not saved.state.finished:
        raise DataError(f"{directory}: stopped at step {saved.state.step}; run `recsys train` again to finish it")
    try:
        _module(model).load_state_dict(saved.best)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise DataError(
            f"{directory}: its weights are of another version's {config.name}; train it again ({reason})"
        ) from None
    _module(model).eval()
    summary = TrainingSummary.of(read_json(directory / "summary.json"))
    return Trained(model, config, summary, about["run_id"])


def build(config: TrainConfig, prepared: PreparedSet) -> AnyRanker:
    """Build the model of a config on its device, with the initial weights its seed gives.

    A model on the processor shares the set's item table, one elsewhere has its own.
    """
    device = pick_device(config.device)
    items = prepared.items if device.type == "cpu" else copy.deepcopy(prepared.items)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(config.seed, 0, "weights"))
        model: AnyRanker = RANKERS[config.name][1](config.model, items)  # type: ignore[call-arg]
    _module(model).to(device)
    return model


def train(
    config: TrainConfig, prepared: PreparedSet, directory: Path, uri: str, progress: Progress = silent
) -> Trained:
    """Train a model, or go on with the run `directory` holds, and give it at its best checkpoint.

    Args:
        config: the run.
        prepared: the prepared set; its digest is part of the run's identity.
        directory: of the run: checkpoint.safetensors and run.json. A directory of another config or data set is begun
            again.
        uri: MLflow tracking URI.
        progress: called after every step.

    Raises:
        TrainingError: the loss or its gradient is not finite; the last good checkpoint is kept.
    """
    config = suited(config, prepared)
    with begin(config, prepared, directory, uri) as (run, inputs):
        loop = Loop(config, prepared, directory, inputs, run)
        loop.run_to_end(progress)
        return Trained(loop.model, config, finish(directory, loop, run), run.run_id)


@contextmanager
def begin(config: TrainConfig, prepared: PreparedSet, directory: Path, uri: str) -> Iterator[tuple[tracking.Run, str]]:
    """Open the MLflow run of a directory, a new one unless it holds this very run; gives it and the inputs' digest."""
    if not prepared.manifest["counts"]["requests"]["valid"]:
        raise DataError(
            f"{prepared.directory}: no validation request, so no checkpoint can be chosen; prepare the log with other "
            "split.valid_days and split.test_days (counted back from the newest event), or split.kind=last_request"
        )
    inputs = sha256_json({"config": config.table(), "data": prepared.digest})
    run_id = tracking.known_run(directory, inputs)
    with tracking.run(uri, directory.name, run_id) as run:
        if run_id is None:
            (directory / CHECKPOINT).unlink(missing_ok=True)
            known = {"inputs": inputs, "run_id": run.run_id, "config": config.table(), "data_digest": prepared.digest}
            write_json(directory / "run.json", known | {"environment": environment(str(pick_device(config.device)))})
            run.params(config.table())
            run.tags({"data_digest": prepared.digest, "git_commit": tracking.git_commit(), "model": config.name})
        yield run, inputs


def finish(directory: Path, loop: "Loop", run: tracking.Run) -> TrainingSummary:
    """Write and log what the run took."""
    summary = _summary(loop)
    write_json(directory / "summary.json", summary.table())
    run.metrics({"train/seconds": summary.seconds, "train/samples_per_second": summary.samples_per_second}, 0)
    return summary


class Loop:
    """State of one run between steps.

    Args:
        config: the run.
        prepared: what it trains on.
        directory: where its checkpoint is, or will be.
        inputs: digest of the two.
        run: where metrics go; None in all members of a team but the first.
        team: who takes the steps together; this process alone if absent.
    """

    def __init__(
        self,
        config: TrainConfig,
        prepared: PreparedSet,
        directory: Path,
        inputs: str,
        run: tracking.Run | None,
        team: Team | None = None,
    ) -> None:
        self.config, self.prepared, self.inputs, self.run = config, prepared, inputs, run
        self.team: Team = team or Alone()
        self.path = directory / CHECKPOINT
        self.device = pick_device(config.device)
        self.model = build(config, prepared)
        self.module = _module(self.model)
        self.optimisers = build_optimisers(self.module, config.optimiser)
        self.state = RunState()
        self.best = _copy(self.module)
        trains_on = self.model.trains_on
        self.batches = (
            None
            if trains_on == "nothing"
            else TrainingBatches(prepared, config.batches, trains_on, self.model.window, config.seed)
        )
        if self.path.exists():
            saved = Checkpoint.load(self.path, len(self.optimisers))
            self.module.load_state_dict(saved.weights)
            restore(self.optimisers, saved.optimisers)
            self.state, self.best = saved.state, saved.best

    @property
    def steps(self) -> int:
        """Steps the run may take."""
        return 0 if self.batches is None else self.config.stop.steps(len(self.batches))

    @property
    def between(self) -> int:
        """Steps from one validation to the next."""
        return 0 if self.batches is None else self.config.stop.between(len(self.batches))

    def run_to_end(self, progress: Progress = silent) -> RunState:
        """Take the remaining steps; leaves the best weights in the model."""
        stop = self.config.stop
        losses: dict[str, Tensor] = {}
        prolonged = self.batches is not None and stop.prolonged(len(self.batches))
        if isinstance(self.model, GradientBoosting) and not self.state.finished:
            self.grow(self.model, progress)
        while (
            not self.state.finished
            and self.state.step < self.steps
            and (self.state.without_gain < stop.patience or prolonged)
        ):
            losses = self.step()
            done = self.state.step
            if done % self.between == 0 or done == self.steps:
                self.validate(losses)
            if done % stop.checkpoint_every == 0:
                self.save()
            progress(done, self.steps, f"{self.config.name} loss {float(losses['total']):.4f}")
        if not self.state.finished:
            if not self.state.curve:
                self.validate(losses)
            self.state = dataclasses.replace(self.state, finished=True)
            self.save()
        self.module.load_state_dict(self.best)
        self.module.eval()
        return self.state

    def grow(self, model: GradientBoosting, progress: Progress) -> None:
        """Grow the trees of a model that takes no steps."""
        started, config = time.perf_counter(), self.config
        batches = TrainingBatches(self.prepared, config.batches, "requests", model.window, config.seed)
        boost.grow_from(model, batches, config.stop.passes(len(batches)), config.seed, progress)
        self.state = dataclasses.replace(self.state, seconds=time.perf_counter() - started)

    def step(self) -> dict[str, Tensor]:
        """Take one step and give the parts of its loss."""
        assert self.batches is not None
        started = time.perf_counter()
        step = self.state.step
        batch = self.batches.batch(step, self.team.rank, self.team.size).to(self.device)
        self.module.train()
        draws = torch.Generator(self.device).manual_seed(derive(self.config.seed, step, "loss"))
        loss = self.model.loss(batch, draws)
        self._refuse_infinite("loss", loss.total, batch)
        loss.total.backward()  # type: ignore[no-untyped-call]
        self.team.average(self.module, batch.weight.sum() if loss.counted is None else loss.counted)
        norm = update(self.optimisers, self.config.optimiser)
        self._refuse_infinite("gradient norm", norm, batch)
        seconds = self.state.seconds + time.perf_counter() - started
        self.state = dataclasses.replace(self.state, step=step + 1, seconds=seconds)
        return {"total": loss.total.detach(), "gradient_norm": norm, **loss.parts}

    def _refuse_infinite(self, what: str, value: Tensor, batch: Batch) -> None:
        if not torch.isfinite(value):
            raise TrainingError(
                f"{self.config.name}: {what} is {float(value.detach())} at step {self.state.step} of seed "
                f"{self.config.seed}, batch of {len(batch)} rows, first at {int(batch.request.at[0])}; the last good "
                "checkpoint is kept, try a smaller learning_rate"
            )

    def validate(self, losses: dict[str, Tensor]) -> None:
        """Measure on the validation requests; keep the weights if they are the best so far."""
        stop = self.config.stop
        self.module.eval()
        found: list[dict[str, float]] = self.team.agree(self._measure() if self.team.rank == 0 else None)
        if stop.metric not in found[0]:
            raise ConfigError(f"[stop] metric must be one of {', '.join(found[0])}, found {stop.metric!r}")
        means = {key: sum(v[key] for v in found) / len(found) for key in found[0]}
        values = {f"valid/{key}": mean for key, mean in means.items()}
        if stop.protocol == "candidates":
            values |= {f"valid/{name}/{key}": v[key] for name, v in zip(stop.samplers, found, strict=True) for key in v}
        value = means[stop.metric]
        if math.isnan(value):
            raise DataError(
                f"{self.prepared.directory}: {stop.metric} is not defined on its validation requests, so no checkpoint "
                "can be chosen; expected requests with items that were taken and items that were not (has the log more "
                "than one item?)"
            )
        values |= {f"train/{key}": float(part) for key, part in losses.items()}
        if self.run is not None:
            self.run.metrics(values, self.state.step)
        self.state = self.state.after(value, values)
        if self.state.gained:
            self.best = _copy(self.module)

    def _measure(self) -> list[dict[str, float]]:
        """Return the validation metrics: one set per sampler, or the one of the protocol."""
        stop = self.config.stop
        if stop.protocol == "leave_one_out":
            return [leave_one_out.validate(self.model, self.prepared, stop.requests)]
        return [validate(self.model, self.prepared, "valid", name, stop.requests) for name in stop.samplers]

    def save(self) -> None:
        """Write a checkpoint; of a team, the first member does."""
        if self.team.rank:
            return
        states = [optimiser.state_dict()["state"] for optimiser in self.optimisers]
        Checkpoint(self.inputs, self.state, _copy(self.module), self.best, states).save(self.path)


def _module(model: AnyRanker) -> nn.Module:
    assert isinstance(model, nn.Module)
    return model


def _copy(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def _summary(loop: Loop) -> TrainingSummary:
    config, state, batches, seconds = loop.config, loop.state, loop.batches, loop.state.seconds
    steps, rows = (0, 0) if batches is None else (len(batches), batches.rows_per_epoch)
    per_second = state.step / steps * rows / seconds if steps and seconds else 0.0
    return TrainingSummary(
        model=config.name,
        seconds=seconds,
        steps=state.step,
        best_step=state.best_step,
        samples_per_second=per_second,
        seconds_per_epoch=rows / per_second if per_second else 0.0,
        parameters=sum(p.numel() for p in loop.module.parameters()),
        peak_memory_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        device=str(loop.device),
        config=config.table(),
        curve=state.curve,
    )
