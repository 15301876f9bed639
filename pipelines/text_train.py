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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from pipelines import tracking
from pipelines.checkpoint import Checkpoint, Progress, restore
from ranking.text_backbone import device_of
from recsys.errors import ConfigError, DataError, RecsysError
from recsys.files import read_json, sha256_json, write_json
from recsys.randomness import derive

CHECKPOINT = "checkpoint.safetensors"
MODEL = "model"
"""directory of the finished model in that of its run"""
SUMMARY = "summary.json"
"""written last, removed first: a run with one is finished, by what its run.json says"""

SHORTEST_WINDOW = 8

Report = Callable[[int, int, str], None]


@dataclass(frozen=True)
class TextStop:
    """How long to train, how often to look."""

    steps: int = 1000
    validate_every: int = 200
    patience: int = 5
    """validations without a gain before the run stops"""
    checkpoint_every: int = 100

    def __post_init__(self) -> None:
        for name in ("steps", "validate_every", "patience", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"[stop] {name} must be at least 1, found {getattr(self, name)}")


@dataclass(frozen=True)
class TextOptimiser:
    """AdamW with warm-up and linear decay."""

    learning_rate: float = 2e-5
    """of the backbone"""
    learning_rate_fresh: float = 1e-3
    """of what training starts from nothing: fusion, decoder, heads"""
    weight_decay: float = 0.01
    warmup: float = 0.1
    """share of the steps"""
    clip: float = 1.0
    dropout: bool = True
    """the backbone's own; without it a step takes half the time on a processor, whose fused attention drops nothing"""

    def __post_init__(self) -> None:
        for name in ("learning_rate", "learning_rate_fresh", "clip"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"[optimiser] {name} must be above 0, found {getattr(self, name)}")
        if self.weight_decay < 0 or not 0 <= self.warmup <= 1:
            raise ConfigError(
                f"[optimiser] weight_decay = {self.weight_decay}, warmup = {self.warmup}: expected a decay of 0 or "
                "more and a share of the steps"
            )


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
    progress: Progress

    @property
    def model(self) -> Path:
        """Directory of the model, as `ranking.text_models` loads it."""
        return self.directory / MODEL

    def table(self) -> dict[str, Any]:
        """Return what the run took and reached, as JSON values."""
        progress = self.progress
        return {
            "run_id": self.run_id,
            "steps": progress.step,
            "best_step": progress.best_step,
            "best_value": progress.best_value,
            "seconds": round(progress.seconds, 1),
        }


class TextTrainingError(RecsysError):
    """The loss stopped being a number."""


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
    report: Report | None = None,
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
        report: called after every step.
    """
    of_config = {key: value for key, value in table.items() if key != "device"}  # no other run on another device
    digest = sha256_json({"config": of_config, "data": dict(inputs)})
    run_id, path = _known_run(directory, digest), directory / CHECKPOINT
    if run_id is not None and path.exists() and _is_finished(directory):
        saved = Checkpoint.load(path, 1)
        if saved.progress.finished:
            return TextRun(directory, run_id, saved.progress)
    task = build()
    with _run(directory, digest, table, inputs, uri) as run:
        loop = TextLoop(task, path, digest, optimiser, stop, int(table["seed"]), run)
        progress = loop.run_to_end(report)
        loop.task.model.save(directory / MODEL)  # type: ignore[operator]
        loop.save(finished=True)
        write_json(directory / SUMMARY, TextRun(directory, run.run_id, progress).table())
        run.metrics({"train/seconds": progress.seconds, "train/steps": progress.step}, progress.step)
        return TextRun(directory, run.run_id, loop.progress)


@contextmanager
def _run(
    directory: Path, digest: str, table: Mapping[str, Any], inputs: Mapping[str, Any], uri: str
) -> Iterator[tracking.Run]:
    run_id = _known_run(directory, digest)
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


def _known_run(directory: Path, digest: str) -> str | None:
    """Return the id of the run that `directory` holds, if it is one of these inputs."""
    about = directory / "run.json"
    known = read_json(about) if about.exists() else {}
    return str(known["run_id"]) if known.get("inputs") == digest else None


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
        self.progress = Progress()
        self.best = self.learned()
        if path.exists():
            saved = Checkpoint.load(path, 1)
            task.model.load_state_dict(saved.weights, strict=False)
            self.progress, self.best = saved.progress, saved.best
            if self.optimiser is not None:
                restore([self.optimiser], saved.optimisers)

    def learned(self) -> dict[str, Tensor]:
        """Return a copy of the weights that training changes."""
        named = self.task.model.named_parameters()
        return {name: tensor.detach().clone() for name, tensor in named if tensor.requires_grad}

    def run_to_end(self, report: Report | None = None) -> Progress:
        """Take the remaining steps; leaves the best weights in the model, which are the first ones if none gained."""
        if not self.progress.curve:
            self.validate({})  # of the untrained model: training must beat it to be kept
        steps = self.stop.steps if self.optimiser is not None else 0
        while self.progress.step < steps and self.progress.without_gain < self.stop.patience:
            logged = self.step()
            done = self.progress.step
            if done % self.stop.validate_every == 0 or done == steps:
                self.validate(logged)
            if done % self.stop.checkpoint_every == 0:
                self.save()
            if report is not None:
                report(done, steps, f"loss {logged['loss']:.4f}")
        self.task.model.load_state_dict(self.best, strict=False)
        self.task.model.eval()
        return self.progress

    def step(self) -> dict[str, float]:
        """Take one step and give what is worth logging."""
        assert self.optimiser is not None
        started, step = time.perf_counter(), self.progress.step
        warm = max(self.options.warmup * self.stop.steps, 1)
        factor = min((step + 1) / warm, max(self.stop.steps - step, 1) / max(self.stop.steps - warm, 1), 1.0)
        for group, rate in zip(self.optimiser.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor
        self.task.model.train(self.options.dropout)
        with own_draws(self.device, derive(self.seed, step, "dropout")):
            loss, logged = self.task.loss(step)
        if not torch.isfinite(loss):
            raise TextTrainingError(f"loss is {float(loss.detach())} at step {step}; try a smaller learning rate")
        self.optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        learned = [parameter for group in self.optimiser.param_groups for parameter in group["params"]]
        norm = nn.utils.clip_grad_norm_(learned, self.options.clip)
        self.optimiser.step()
        seconds = self.progress.seconds + time.perf_counter() - started
        self.progress = dataclasses.replace(self.progress, step=step + 1, seconds=seconds)
        return {"loss": float(loss.detach()), "gradient_norm": float(norm), **logged}

    def validate(self, logged: Mapping[str, float]) -> None:
        """Measure on dev; keep the weights if they are the best so far."""
        self.task.model.eval()
        measured = self.task.validate()
        value = next(iter(measured.values()))
        values = {f"valid/{name}": number for name, number in measured.items()}
        values |= {f"train/{name}": number for name, number in logged.items()}
        if self.run is not None:
            self.run.metrics(values, self.progress.step)
        gained = value > self.progress.best_value
        if gained:
            self.best = self.learned()
        self.progress = dataclasses.replace(
            self.progress,
            best_step=self.progress.step if gained else self.progress.best_step,
            best_value=max(value, self.progress.best_value),
            without_gain=0 if gained else self.progress.without_gain + 1,
            curve=[*self.progress.curve, {"step": self.progress.step, **values}],
        )

    def save(self, finished: bool = False) -> None:
        """Write a checkpoint."""
        self.progress = dataclasses.replace(self.progress, finished=finished)
        states = [] if self.optimiser is None else [self.optimiser.state_dict()["state"]]
        Checkpoint(self.inputs, self.progress, self.learned(), self.best, states).save(self.path)


@dataclass(frozen=True)
class CorpusConfig:
    """What a text model trains on."""

    path: str = "catalogue"
    """a folder in BEIR's layout, or "catalogue" for the item texts of the workspace's log"""
    natural: str = ""
    """split of the judged queries to train on, e.g. "train"; empty for none"""
    keyword: bool = True
    """train on keyword queries cut from the training documents"""
    part_of_passage: tuple[int, ...] = (16, 32)
    """and on spans of these lengths"""
    unit: Literal["token", "word", "char"] = "token"
    dev_queries: int = 200
    """most dev queries of a kind"""
    terms: int = 5
    """of a keyword query"""
    also: tuple[str, ...] = ()
    """folders of more corpora to learn from, with `batches = "passages"`; dev spans and keywords are those of `path`"""

    @property
    def cut(self) -> bool:
        """Whether queries are cut from documents: those of dev and test are then held out of training."""
        return self.keyword or bool(self.part_of_passage)


@dataclass(frozen=True)
class TextTrainConfig:
    """A text training run as its TOML states it."""

    name: str
    model: Any
    seed: int = 0
    device: str = "auto"
    """auto: cuda where there is one; which it is makes no other run"""
    rows: int = 64
    """queries or lists of a step"""
    group: int = 2
    """passages of a query: its positive and hard negatives (BM25 ranks 2 to 50), or the length of a list"""
    depth: int = 100
    """places of the first stage that a reranker's negatives are drawn from"""
    train: Literal["fusion", "full"] = "fusion"
    """fusion freezes the backbone: passages, and pairs of a reranker, are encoded once, and an index stays valid"""
    batches: Literal["queries", "passages"] = "queries"
    """of LexSemBridge: queries with a positive and hard negatives each, as in the paper, or `rows` neighbouring
    passages with `cuts` queries each (`pipelines.neighbour_task`)"""
    cuts: int = 3
    """queries cut from a passage of a step, with `batches = "passages"`, as the next three"""
    layers: int = 0
    """top layers of the backbone that learn; 0 for all of it"""
    train_tokens: int = 128
    """of a training passage's window, special tokens included"""
    bfloat16: bool = False
    """run the backbone in bfloat16 while training: faster where the processor multiplies it, far slower elsewhere"""
    temperature: float = 0.02
    orthogonal: float = 1.0
    """weight of MVP's orthogonal term"""
    teacher: Literal["qrels", "silver", "mixed"] = "mixed"
    """order inside a training list: grades, the first stage, or the first stage inside a grade"""
    positives: int = 2
    """most relevant passages of a training list"""
    rank_tau: float = 0.8
    """temperature of a training list's scores and of its targets (0.8: the authors' code)"""
    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    optimiser: TextOptimiser = field(default_factory=TextOptimiser)
    stop: TextStop = field(default_factory=TextStop)

    def __post_init__(self) -> None:
        if self.group < 2 or self.rows < 1 or self.depth < 2:
            raise ConfigError(
                f"rows is {self.rows}, group {self.group}, depth {self.depth}; expected at least 1, 2 and 2"
            )
        if self.batches == "passages" and self.name != "lexsembridge":
            raise ConfigError(f"batches = 'passages' is for lexsembridge, found {self.name}")
        if self.corpus.also and self.batches != "passages":
            raise ConfigError("[corpus] also would do nothing with batches = 'queries'; leave it out")
        if self.cuts < 1 or self.layers < 0 or self.train_tokens < SHORTEST_WINDOW:
            raise ConfigError(
                f"cuts is {self.cuts}, layers {self.layers}, train_tokens {self.train_tokens}; "
                f"expected at least 1, 0 and {SHORTEST_WINDOW}"
            )
        if self.positives < 1 or self.rank_tau <= 0:
            raise ConfigError(
                f"positives is {self.positives}, rank_tau {self.rank_tau}; expected at least 1 and above 0"
            )

    def table(self) -> dict[str, Any]:
        """Return the config as nested values of JSON."""
        table: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        return table


def finished_run(directory: Path) -> tuple[str, Path]:
    """Return name and model directory of a finished text run; raises `DataError` for anything else."""
    about = read_json(directory / "run.json")
    if about.get("kind") != "text" or not _is_finished(directory):
        raise DataError(f"{directory}: no finished text run; run `recsys train --config lexsembridge` first")
    return str(about["config"]["name"]), directory / MODEL
