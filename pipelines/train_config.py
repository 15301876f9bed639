"""What a training run is, as its TOML states it: a model with its options, batches, optimiser, when to stop."""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args, get_type_hints

from pipelines.batches import BatchConfig
from pipelines.leave_one_out import Protocol
from pipelines.optimise import OptimiserConfig
from pipelines.prepared import PreparedSet
from ranking.embeddings import FieldWidths
from ranking.models import RANKERS
from recsys.config import assign, overlaid, parse, read_toml
from recsys.errors import ConfigError

UNTOLD = {"action_width": 0, "actions": False}
"""What leaves actions out of a model, beside the widths of its fields."""


@dataclass(frozen=True)
class StopConfig:
    """When to validate, when to stop, what to keep.

    The epochs of a small log are a handful of steps. Where they are fewer than `least_steps`, a run takes that many,
    whatever the patience, and validates ten times on the way or more often.
    """

    epochs: float = 2.0
    least_steps: int = 300  # however few the epochs have; without effect beside max_steps
    max_steps: int | None = None  # a fixed budget, whatever the number of epochs
    validate_every: int = 150  # steps
    patience: int = 5  # validations without a gain before the run stops
    protocol: Protocol = "candidates"  # leave_one_out: HR and NDCG of all validation targets among all items
    metric: str = "gauc"  # the best checkpoint is the one with the largest value of this
    samplers: tuple[str, ...] = ("uniform", "popularity")  # validation candidates; the mean over them decides
    requests: int = 1000  # validation requests, the same ones every time
    checkpoint_every: int = 100  # steps

    def __post_init__(self) -> None:
        names = ("least_steps", "validate_every", "patience", "requests", "checkpoint_every")
        counts = {name: getattr(self, name) for name in names}
        counts |= {} if self.max_steps is None else {"max_steps": self.max_steps}
        for name, value in counts.items():
            if value < 1:
                raise ConfigError(f"[stop] {name} must be at least 1, found {value}")
        if not 0 < self.epochs < math.inf:
            raise ConfigError(f"[stop] epochs must be a number above 0, found {self.epochs}")
        if not self.samplers:
            raise ConfigError("[stop] samplers must name at least one, found none")

    def passes(self, epoch: int) -> int:
        """Return the steps that the epochs are, of so many steps each, `max_steps` at most."""
        steps = max(round(self.epochs * epoch), 1)
        return steps if self.max_steps is None else min(steps, self.max_steps)

    def steps(self, epoch: int) -> int:
        """Return the steps a run may take, of epochs of so many steps."""
        return self.passes(epoch) if self.max_steps is not None else max(self.passes(epoch), self.least_steps)

    def prolonged(self, epoch: int) -> bool:
        """Whether a run takes more steps than its epochs are; patience does not end it before."""
        return self.steps(epoch) > self.passes(epoch)

    def between(self, epoch: int) -> int:
        """Return the steps from one validation to the next."""
        tenth = max(self.steps(epoch) // 10, 1)
        return min(self.validate_every, tenth) if self.prolonged(epoch) else self.validate_every


@dataclass(frozen=True)
class TrainConfig:
    """A training run as its TOML states it."""

    name: str
    model: Any  # the model's own config dataclass
    seed: int = 2023
    device: str = "auto"  # auto: cuda where there is one
    batches: BatchConfig = field(default_factory=BatchConfig)
    optimiser: OptimiserConfig = field(default_factory=OptimiserConfig)
    stop: StopConfig = field(default_factory=StopConfig)

    def table(self) -> dict[str, Any]:
        """Return the config as nested values of JSON, for the log and for digests."""
        table: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        return table


def load_config(path: Path, assignments: Sequence[str] = (), overlay: Mapping[str, Any] | None = None) -> TrainConfig:
    """Read a training TOML: [model] with a name and its options, [batches], [optimiser], [stop], seed, device.

    `overlay` holds sections laid over those of the file; assignments, as `--set` gives them, win over both.
    """
    table = overlaid(read_toml(path), overlay or {})
    for assignment in assignments:
        assign(table, assignment)
    model = table.pop("model", {})
    if not isinstance(model, Mapping):
        raise ConfigError(f"{path}: model is a section, [model] with a name and options; found {model!r}")
    model = dict(model)
    name = model.pop("name", None)
    if name not in RANKERS:
        raise ConfigError(f"{path} [model]: name must be one of {', '.join(RANKERS)}, found {name!r}")
    config = parse(RANKERS[name][0], model, f"{path} [model]")
    return parse(TrainConfig, {"name": name, "model": config, **table}, str(path))


def config_of(table: Mapping[str, Any], where: str) -> TrainConfig:
    """Return the config back that `TrainConfig.table` gave."""
    name = table.get("name")
    if name not in RANKERS:
        raise ConfigError(f"{where}: name must be one of {', '.join(RANKERS)}, found {name!r}")
    stop = {"least_steps": 1} | table.get("stop", {})  # runs before there was one took their epochs alone
    model = parse(RANKERS[name][0], table["model"], where)
    return parse(TrainConfig, {**table, "model": model, "stop": stop}, where)


def suited(config: TrainConfig, prepared: PreparedSet) -> TrainConfig:
    """Return the config for a prepared set: without a category where the default's column is not in its catalogue.

    A column that was asked for by another name, and one that the model cannot do without, stays and is refused later.
    Where the log has one action at most, nothing of a model is there to tell actions apart.
    """
    if len(prepared.manifest["actions"]) < 2:
        config = dataclasses.replace(config, model=_without_actions(config.model))
    optional = type(None) in get_args(get_type_hints(type(config.model)).get("category"))
    if not optional or config.model.category != type(config.model).category:
        return config
    if config.model.category in (*prepared.items.columns, *prepared.items.multi_columns):
        return config
    return dataclasses.replace(config, model=dataclasses.replace(config.model, category=None))


def _without_actions(model: Any) -> Any:
    """Return a model's config with nothing that reads actions."""
    values = {field.name: getattr(model, field.name) for field in dataclasses.fields(model)}
    widths = {
        name: dataclasses.replace(value, action=0) for name, value in values.items() if isinstance(value, FieldWidths)
    }
    return dataclasses.replace(model, **widths, **{name: off for name, off in UNTOLD.items() if name in values})
