"""Tunes every model with the same budget: as many settings, the same seeds, the same validation requests for all.

A sweep is a grid: models x settings x seeds, one training run each. Settings are drawn once from a space that all
models share, so nobody gets a second look or a finer net. A model that shares nothing with the others (trees have no
learning rate) may have a space of its own under [own.<model>]; the number of settings is the same. The best setting of
a model is the one with the best mean over seeds of a validation metric; the test period has no say.

Every run lies in its own directory, named by the digest of its configuration and of the prepared set. A sweep that is
interrupted goes on where it was, and one that is given more models, settings or seeds takes only the runs that are new.
"""

import json
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.checkpoint import TrainingError
from pipelines.evaluate import TrainingSummary
from pipelines.prepared import PreparedSet
from pipelines.shipped import find_config
from pipelines.train import train
from pipelines.train_config import TrainConfig, load_config
from ranking.models import RANKERS
from recsys.config import overlaid, parse, read_toml
from recsys.errors import ConfigError
from recsys.files import read_json, sha256_json, whole_file, write_json
from recsys.progress import Progress, silent, titled
from recsys.randomness import generator

METRICS = ("gauc", "auc", "auc_per_request", "ndcg_at_10")
"""Validation metrics that every model has."""

Setting = dict[str, Any]
"""dotted name -> value, e.g. {"optimiser.learning_rate": 0.003}"""


@dataclass(frozen=True)
class SweepConfig:
    """A sweep as its TOML states it."""

    models: tuple[str, ...]  # training configs: shipped names or paths
    space: dict[str, Any] = field(default_factory=dict)  # nested sections; every value is a list of what to try
    own: dict[str, dict[str, Any]] = field(default_factory=dict)  # model -> a space in place of the shared one
    trials: int | None = None  # settings per model, drawn from its space; all of the shared space if absent
    seed: int = 2023  # of the settings drawn
    seeds: tuple[int, ...] = (2023,)  # every setting is trained with each
    metric: str = "gauc"  # validation metric that chooses
    train: dict[str, Any] = field(default_factory=dict)  # sections laid over every model's own file

    def __post_init__(self) -> None:
        names = [Path(model).stem for model in self.models]
        if not names or len(set(names)) < len(names):
            raise ConfigError(f"sweep: models must be distinct names, at least one; found {list(self.models)}")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ConfigError(f"sweep: seeds must be distinct, at least one; found {list(self.seeds)}")
        if self.metric not in METRICS:
            raise ConfigError(f"sweep: metric must be one of {', '.join(METRICS)}, found {self.metric!r}")
        strangers = sorted(set(self.own) - set(names) - set(RANKERS))
        if strangers:  # a space of a ranker that is left out this time waits for the next
            raise ConfigError(f"sweep: [own.{strangers[0]}] is no model of this sweep; models are {', '.join(names)}")

    def settings(self, model: str) -> list[Setting]:
        """Return the settings to try with a model, the same number for all."""
        shared = axes(self.space, "space")
        number = math.prod(len(values) for values in shared.values()) if self.trials is None else self.trials
        space = axes(self.own[model], f"own.{model}") if model in self.own else shared
        return draw(space, number, self.seed, f"own.{model}" if model in self.own else "space")


@dataclass(frozen=True)
class Trial:
    """One training run of a sweep."""

    model: str
    setting: Setting
    seed: int
    config: TrainConfig
    run: str  # directory name under the sweep's


@dataclass(frozen=True)
class Outcome:
    """What a setting came to."""

    setting: Setting
    values: list[float | None]  # validation metric by seed; None: the loss stopped being a number
    runs: list[str]  # directories of the runs, in the same order
    seconds: float  # of training, over all seeds

    @property
    def mean(self) -> float:
        """Mean over seeds; minus infinity if any run failed, so that such a setting is never the best."""
        kept = [value for value in self.values if value is not None]
        return statistics.fmean(kept) if len(kept) == len(self.values) else -math.inf

    @property
    def deviation(self) -> float | None:
        """Standard deviation over seeds; None for a single one."""
        kept = [value for value in self.values if value is not None]
        return statistics.stdev(kept) if len(kept) == len(self.values) > 1 else None

    def table(self) -> dict[str, Any]:
        """Return everything as values of JSON; a failed setting has no mean."""
        mean = None if self.mean == -math.inf else self.mean
        return asdict(self) | {"mean": mean, "sd": self.deviation}


@dataclass(frozen=True)
class Swept:
    """A finished sweep: by model, the outcomes of its settings in the order they were drawn."""

    config: SweepConfig
    data_digest: str
    outcomes: dict[str, list[Outcome]]

    def best(self, model: str) -> Outcome:
        """Return the best setting of a model; the first of equals."""
        return max(self.outcomes[model], key=lambda outcome: outcome.mean)

    def table(self) -> dict[str, Any]:
        """Return everything as nested values of JSON."""
        return {
            "metric": f"valid/{self.config.metric}",
            "data_digest": self.data_digest,
            "config": json.loads(json.dumps(asdict(self.config))),
            "models": {
                model: {"best": self.best(model).setting, "outcomes": [outcome.table() for outcome in outcomes]}
                for model, outcomes in self.outcomes.items()
            },
        }

    def markdown(self) -> str:
        """Return two tables: the best setting of every model, best first, and all settings."""
        head = f"valid/{self.config.metric}"
        ranked = sorted(self.outcomes, key=lambda model: -self.best(model).mean)
        count, seeds = len(next(iter(self.outcomes.values()))), len(self.config.seeds)
        lines = [
            f"Settings of each model: {count}. Seeds of each setting: {seeds}. The mean of {head} over seeds chooses.",
            "",
            f"| model | best setting | {head} | sd over seeds | seconds of all its runs |",
            "|---|---|---|---|---|",
        ]
        for model in ranked:
            best, seconds = self.best(model), sum(outcome.seconds for outcome in self.outcomes[model])
            lines.append(f"| {model} | {words(best.setting)} | {_numbers(best)} | {seconds:.0f} |")
        lines += ["", f"| model | setting | {head} | sd over seeds | runs |", "|---|---|---|---|---|"]
        for model in ranked:
            for outcome in self.outcomes[model]:
                row = (model, words(outcome.setting), _numbers(outcome), ", ".join(outcome.runs))
                lines.append(f"| {' | '.join(row)} |")
        return "\n".join(lines) + "\n"


def load_sweep(path: Path, assignments: Sequence[str] = ()) -> SweepConfig:
    """Read the TOML of a sweep."""
    return parse(SweepConfig, read_toml(path, assignments), str(path))


def axes(space: Mapping[str, Any], where: str) -> dict[str, list[Any]]:
    """Return a nested space as dotted names; raises `ConfigError` for anything but a list of values at the end."""
    flat: dict[str, list[Any]] = {}
    for key, value in space.items():
        if isinstance(value, Mapping):
            flat |= {f"{key}.{name}": values for name, values in axes(value, f"{where}.{key}").items()}
        elif isinstance(value, list) and value:
            flat[key] = value
        else:
            raise ConfigError(f"sweep: {where}.{key}: expected a list of values to try, found {value!r}")
    return flat


def draw(space: Mapping[str, list[Any]], number: int, seed: int, where: str) -> list[Setting]:
    """Draw `number` different settings from a space, in the order of its grid; an empty space has one, the model's own.

    Raises:
        ConfigError: the space has fewer.
    """
    shape = tuple(len(values) for values in space.values())
    size = math.prod(shape)
    if not 1 <= number <= size:
        raise ConfigError(f"sweep: {number} settings wanted, [{where}] has {size}; give it more values or lower trials")
    chosen = np.sort(generator(seed, 0, "sweep/settings").choice(size, number, replace=False))
    places = np.stack(np.unravel_index(chosen, shape), 1) if shape else np.zeros((1, 0), np.int64)
    return [{key: values[at] for (key, values), at in zip(space.items(), row, strict=True)} for row in places.tolist()]


def trials(config: SweepConfig, data_digest: str) -> list[Trial]:
    """Return all runs of a sweep; every configuration is read and checked here, before anything is trained."""
    return [
        _trial(config, path, setting, seed, data_digest)
        for path in config.models
        for setting in config.settings(Path(path).stem)
        for seed in config.seeds
    ]


def sweep(config: SweepConfig, prepared: PreparedSet, directory: Path, uri: str, progress: Progress = silent) -> Swept:
    """Train what is not trained yet and say which setting of each model is best.

    Args:
        config: the sweep.
        prepared: the prepared set.
        directory: holds the runs, and at the end sweep.json and sweep.md.
        uri: MLflow tracking URI.
        progress: called after every step of every run.

    A run whose loss stops being a number counts as failed, and the sweep goes on.
    """
    planned = trials(config, prepared.digest)
    finished: dict[str, TrainingSummary | None] = {}
    for number, trial in enumerate(planned, start=1):
        title = f"run {number} of {len(planned)}, {trial.model}, seed {trial.seed}"
        finished[trial.run] = _run(trial, prepared, directory / trial.run, uri, titled(progress, title))
    swept = Swept(config, prepared.digest, _outcomes(config, planned, finished))
    write_json(directory / "sweep.json", swept.table())
    with whole_file(directory / "sweep.md") as temporary:
        temporary.write_text(swept.markdown())
    return swept


def words(setting: Setting) -> str:
    """Return a setting as arguments of `--set`; "as shipped" for the empty one."""
    return ", ".join(f"{key}={json.dumps(value)}" for key, value in setting.items()) or "as shipped"


def _trial(config: SweepConfig, path: str, setting: Setting, seed: int, data_digest: str) -> Trial:
    overlay = overlaid(config.train, {"seed": seed})
    for key, value in setting.items():
        overlay = overlaid(overlay, _nested(key, value))
    loaded, model = load_config(find_config(path), overlay=overlay), Path(path).stem
    digest = sha256_json({"config": loaded.table(), "data": data_digest})
    return Trial(model, setting, seed, loaded, f"{model}-{digest[:12]}")


def _nested(key: str, value: Any) -> dict[str, Any]:
    first, _, rest = key.partition(".")
    return {first: _nested(rest, value) if rest else value}


def _run(trial: Trial, prepared: PreparedSet, directory: Path, uri: str, progress: Progress) -> TrainingSummary | None:
    """Return the summary of a run, trained now unless it was before; None if its loss stopped being a number."""
    done, failed = directory / "summary.json", directory / "failed.json"
    if done.exists():
        return TrainingSummary.of(read_json(done))
    if failed.exists():
        return None
    try:
        return train(trial.config, prepared, directory, uri, progress).summary
    except TrainingError as error:
        write_json(failed, {"error": str(error)})
        return None


def _outcomes(
    config: SweepConfig, planned: Sequence[Trial], finished: Mapping[str, TrainingSummary | None]
) -> dict[str, list[Outcome]]:
    """Return the outcomes by model: runs of one setting stand together, one for each seed."""
    outcomes: dict[str, list[Outcome]] = {}
    for group in _groups(planned, len(config.seeds)):
        summaries = [finished[trial.run] for trial in group]
        outcomes.setdefault(group[0].model, []).append(
            Outcome(
                group[0].setting,
                [None if one is None else one.best(config.metric) for one in summaries],
                [trial.run for trial in group],
                sum(one.seconds for one in summaries if one is not None),
            )
        )
    return outcomes


def _groups(planned: Sequence[Trial], size: int) -> Iterator[Sequence[Trial]]:
    for start in range(0, len(planned), size):
        yield planned[start : start + size]


def _numbers(outcome: Outcome) -> str:
    """Return mean and deviation as two cells."""
    if outcome.mean == -math.inf:
        return "failed | –"
    return f"{outcome.mean:.4f} | {'–' if outcome.deviation is None else f'{outcome.deviation:.4f}'}"
