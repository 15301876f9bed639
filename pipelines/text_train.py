"""Training of text models: one loop for the encoder and the rerankers, resumable, logged as the rankers are.

Every draw is a function of (seed, step, purpose), so a run that is killed and started again draws what it would have
drawn. The best weights by the dev measure are kept; dev and test documents never give training pairs.
"""

import dataclasses
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from pipelines import tracking
from pipelines.checkpoint import Checkpoint, RunState, TrainingError, restore
from pipelines.text_config import TextOptimiser, TextStop
from ranking.text_backbone import device_of
from recsys.errors import DataError
from recsys.files import read_json, sha256_json, write_json
from recsys.progress import Progress, silent
from recsys.randomness import derive

CHECKPOINT = "checkpoint.safetensors"
MODEL = "model"
"""directory of the finished model in that of its run"""
SUMMARY = "summary.json"
"""written last, removed first: a run with one is finished, by what its run.json says"""


class Task(Protocol):
    """What the loop needs of a training task."""

    @property
    def model(self) -> nn.Module:
        """The model that is trained."""
        ...

    @property
    def fresh(self) -> Sequence[nn.Parameter]:
        """Parameters that are not the backbone's."""
        ...

    def loss(self, step: int) -> tuple[Tensor, dict[str, float]]:
        """Return the loss of one step and numbers worth logging."""
        ...

    def validate(self) -> dict[str, float]:
        """Return dev measures; the first one decides which weights are kept."""
        ...


@dataclass(frozen=True)
class TextRun:
    """A finished run."""

    directory: Path
    run_id: str
    state: RunState

    @property
    def model(self) -> Path:
        """Directory of the model, as `ranking.text_models` loads it."""
        return self.directory / MODEL

    def table(self) -> dict[str, Any]:
        """Return what the run took and reached, as JSON values."""
        state = self.state
        return {
            "run_id": self.run_id,
            "steps": state.step,
            "best_step": state.best_step,
            "best_value": state.best_value,
            "seconds": round(state.seconds, 1),
        }


def contrastive_loss(
    queries: Tensor, passages: Tensor, target: Tensor, also: Tensor, temperature: float, each: float = 1.0
) -> Tensor:
    """Return the mean cross-entropy of each query's positive among all passages of the batch, in float32.

    Args:
        queries: [B, d].
        passages: [C, d], the positives and negatives of all queries.
        target: int64 [B], the column of each query's positive.
        also: bool [B, C], columns left out of a row: other passages that are relevant to it, too.
        temperature: tau.
        each: how many passages a negative stands for, where the batch is a sample of those a query is asked among.
    """
    scores = queries.float() @ passages.float().T / temperature  # [B, C]
    if each != 1.0:
        scores = scores + math.log(each) * (1 - nn.functional.one_hot(target, scores.shape[1]))
    return nn.functional.cross_entropy(scores.masked_fill(also, -torch.inf), target)


@contextmanager
def own_draws(device: torch.device, seed: int) -> Iterator[None]:
    """Seed torch's generators, the device's too, and give them back as they were: dropout depends on seed and step."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def train_text(
    build: Callable[[], Task],
    table: Mapping[str, Any],
    inputs: Mapping[str, Any],
    directory: Path,
    uri: str,
    optimiser: TextOptimiser,
    stop: TextStop,
    progress: Progress = silent,
) -> TextRun:
    """Train a task's model, or go on with the run `directory` holds, and save it at its best dev measure.

    Args:
        build: makes the task with the initial weights its seed gives; not called if the run is finished. Where it
            fails, what `directory` holds stays.
        table: the config, for the log.
        inputs: what the data are: their digests and the backbone's; `run.json` has them as `data`.
        directory: of the run. One of another config or other data is begun again.
        uri: MLflow tracking URI.
        optimiser: learning rates and decay.
        stop: length of the run.
        progress: called after every step.
    """
    of_config = {key: value for key, value in table.items() if key != "device"}  # no other run on another device
    digest = sha256_json({"config": of_config, "data": dict(inputs)})
    run_id, path = tracking.known_run(directory, digest), directory / CHECKPOINT
    if run_id is not None and path.exists() and _is_finished(directory):
        saved = Checkpoint.load(path, 1)
        if saved.state.finished:
            return TextRun(directory, run_id, saved.state)
    task = build()
    with _run(directory, digest, table, inputs, uri) as run:
        loop = TextLoop(task, path, digest, optimiser, stop, int(table["seed"]), run)
        state = loop.run_to_end(progress)
        loop.task.model.save(directory / MODEL)  # type: ignore[operator]
        loop.save(finished=True)
        write_json(directory / SUMMARY, TextRun(directory, run.run_id, state).table())
        run.metrics({"train/seconds": state.seconds, "train/steps": state.step}, state.step)
        return TextRun(directory, run.run_id, loop.state)


@contextmanager
def _run(
    directory: Path, digest: str, table: Mapping[str, Any], inputs: Mapping[str, Any], uri: str
) -> Iterator[tracking.Run]:
    run_id = tracking.known_run(directory, digest)
    with tracking.run(uri, directory.name, run_id) as run:
        if run_id is None:
            (directory / SUMMARY).unlink(missing_ok=True)
            (directory / CHECKPOINT).unlink(missing_ok=True)
            if (directory / MODEL).is_dir():
                shutil.rmtree(directory / MODEL)
            plain = json.loads(json.dumps(table))
            known = {"inputs": digest, "run_id": run.run_id, "config": plain, "data": dict(inputs), "kind": "text"}
            write_json(directory / "run.json", known)
            run.params(plain)
            run.tags({"inputs": digest, "git_commit": tracking.git_commit(), "model": str(table["name"])})
        yield run


def _is_finished(directory: Path) -> bool:
    return (directory / SUMMARY).is_file() and (directory / MODEL).is_dir()


class TextLoop:
    """State of one run between steps."""

    def __init__(
        self,
        task: Task,
        path: Path,
        inputs: str,
        optimiser: TextOptimiser,
        stop: TextStop,
        seed: int,
        run: tracking.Run | None = None,
    ) -> None:
        self.seed = seed
        self.device = device_of(task.model)
        self.task, self.path, self.inputs, self.options, self.stop, self.run = task, path, inputs, optimiser, stop, run
        fresh = {id(parameter) for parameter in task.fresh}
        learned = [parameter for parameter in task.model.parameters() if parameter.requires_grad]
        groups = [
            {"params": [p for p in learned if id(p) not in fresh], "lr": optimiser.learning_rate},
            {"params": [p for p in learned if id(p) in fresh], "lr": optimiser.learning_rate_fresh},
        ]
        self.groups = [group for group in groups if group["params"]]
        self.rates = [float(group["lr"]) for group in self.groups]  # type: ignore[arg-type]
        self.optimiser: torch.optim.Optimizer | None = None
        if self.groups:  # fused: a third of the time where W has a row per term of the vocabulary
            self.optimiser = torch.optim.AdamW(self.groups, weight_decay=optimiser.weight_decay, fused=True)
        self.state = RunState()
        self.best = self.learned()
        if path.exists():
            saved = Checkpoint.load(path, 1)
            task.model.load_state_dict(saved.weights, strict=False)
            self.state, self.best = saved.state, saved.best
            if self.optimiser is not None:
                restore([self.optimiser], saved.optimisers)

    def learned(self) -> dict[str, Tensor]:
        """Return a copy of the weights that training changes."""
        named = self.task.model.named_parameters()
        return {name: tensor.detach().clone() for name, tensor in named if tensor.requires_grad}

    def run_to_end(self, progress: Progress = silent) -> RunState:
        """Take the remaining steps; leaves the best weights in the model, which are the first ones if none gained."""
        if not self.state.curve:
            self.validate({})  # of the untrained model: training must beat it to be kept
        steps = self.stop.steps if self.optimiser is not None else 0
        while self.state.step < steps and self.state.without_gain < self.stop.patience:
            logged = self.step()
            done = self.state.step
            if done % self.stop.validate_every == 0 or done == steps:
                self.validate(logged)
            if done % self.stop.checkpoint_every == 0:
                self.save()
            progress(done, steps, f"loss {logged['loss']:.4f}")
        self.task.model.load_state_dict(self.best, strict=False)
        self.task.model.eval()
        return self.state

    def step(self) -> dict[str, float]:
        """Take one step and give what is worth logging."""
        assert self.optimiser is not None
        started, step = time.perf_counter(), self.state.step
        warm = max(self.options.warmup * self.stop.steps, 1)
        factor = min((step + 1) / warm, max(self.stop.steps - step, 1) / max(self.stop.steps - warm, 1), 1.0)
        for group, rate in zip(self.optimiser.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor
        self.task.model.train(self.options.dropout)
        with own_draws(self.device, derive(self.seed, step, "dropout")):
            loss, logged = self.task.loss(step)
        if not torch.isfinite(loss):
            raise TrainingError(f"loss is {float(loss.detach())} at step {step}; try a smaller learning rate")
        self.optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        learned = [parameter for group in self.optimiser.param_groups for parameter in group["params"]]
        norm = nn.utils.clip_grad_norm_(learned, self.options.clip)
        if not torch.isfinite(norm):
            raise TrainingError(f"gradient norm is {float(norm)} at step {step}; try a smaller learning rate")
        self.optimiser.step()
        seconds = self.state.seconds + time.perf_counter() - started
        self.state = dataclasses.replace(self.state, step=step + 1, seconds=seconds)
        return {"loss": float(loss.detach()), "gradient_norm": float(norm), **logged}

    def validate(self, logged: Mapping[str, float]) -> None:
        """Measure on dev; keep the weights if they are the best so far."""
        self.task.model.eval()
        measured = self.task.validate()
        value = next(iter(measured.values()))
        values = {f"valid/{name}": number for name, number in measured.items()}
        values |= {f"train/{name}": number for name, number in logged.items()}
        if self.run is not None:
            self.run.metrics(values, self.state.step)
        self.state = self.state.after(value, values)
        if self.state.gained:
            self.best = self.learned()

    def save(self, finished: bool = False) -> None:
        """Write a checkpoint."""
        self.state = dataclasses.replace(self.state, finished=finished)
        states = [] if self.optimiser is None else [self.optimiser.state_dict()["state"]]
        Checkpoint(self.inputs, self.state, self.learned(), self.best, states).save(self.path)


def finished_run(directory: Path) -> tuple[str, Path]:
    """Return name and model directory of a finished text run; raises `DataError` for anything else."""
    about = read_json(directory / "run.json")
    if about.get("kind") != "text" or not _is_finished(directory):
        raise DataError(f"{directory}: no finished text run; run `recsys train --config lexsembridge` first")
    return str(about["config"]["name"]), directory / MODEL
