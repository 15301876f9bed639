"""Training a recorded run again, and saying whether the same came out and, if not, what has changed since.

The same data, config, seed, code, packages and hardware give the same weights bit for bit. Where the weights differ the
report lists what is not as it was; where nothing is known to differ it says that too.
"""

import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from pipelines.environment import environment
from pipelines.evaluation import defined
from pipelines.train import Trained, train, trained_run
from pipelines.train_config import config_of
from pipelines.workspace import Workspace
from ranking.devices import pick_device
from recsys.errors import DataError
from recsys.files import read_json, write_json
from recsys.progress import Progress, silent


@dataclass(frozen=True)
class Change:
    """A fact that is not as it was when the run was recorded."""

    fact: str
    recorded: str
    now: str


@dataclass(frozen=True)
class Reproduced:
    """What came of training a run again.

    Attributes:
        run_id: of the recorded run.
        identical: whether the weights are the same bit for bit.
        largest_difference: of any weight, absolute; 0 where identical, None where shapes differ.
        recorded: its best validation value.
        now: that of the new run.
        metric: which value that is.
        changes: what is not as it was.
        unknown: whether the run was recorded without its environment, by an older version.
    """

    run_id: str
    identical: bool
    largest_difference: float | None
    metric: str
    recorded: float | None
    now: float | None
    changes: list[Change]
    unknown: bool

    def words(self) -> str:
        """Say it in a few sentences."""
        if self.identical:
            text = f"Run {self.run_id} was reproduced: the same weights, bit for bit."
        else:
            gap = "" if self.largest_difference is None else f", weights differ by up to {self.largest_difference:.3g}"
            text = (
                f"Run {self.run_id} was not reproduced: {self.metric} was {_value(self.recorded)} and is "
                f"{_value(self.now)}{gap}."
            )
        if self.changes:
            listed = "; ".join(f"{one.fact} was {one.recorded} and is {one.now}" for one in self.changes)
            text += f" What has changed since: {listed}."
        elif self.unknown:
            text += " Its environment was not recorded, so what has changed is not known."
        elif not self.identical:
            text += (
                " Data, code, packages and hardware are as recorded: what remains is work whose order is not fixed, "
                "e.g. on a GPU or with several threads."
            )
        return text


def find_run(name: str, place: Workspace) -> Path:
    """Return the directory of a run by its name or MLflow run id; raises `DataError` naming those there are."""
    if (place.run(name) / "run.json").is_file():
        return place.run(name)
    known = sorted((place.root / "runs").rglob("run.json"))
    for about in known:
        if read_json(about).get("run_id") == name:
            return about.parent
    raise DataError(f"{name}: no run of {place.root}; there are {', '.join(p.parent.name for p in known) or 'none'}")


def reproduce(directory: Path, place: Workspace, out: Path, uri: str, progress: Progress = silent) -> Reproduced:
    """Train a recorded run again into `out`, and compare.

    An earlier reproduction in `out` is removed; one that was interrupted goes on if nothing has changed since.

    Raises:
        DataError: the workspace's prepared set is not the one the run was trained on (both digests named), or the run
            did not finish.
    """
    about, prepared = read_json(directory / "run.json"), place.prepared
    digest = about.get("data_digest")
    if digest is not None and digest != prepared.digest:
        raise DataError(
            f"{directory.name} was trained on data {digest[:12]}, {prepared.directory} is {prepared.digest[:12]}; "
            "prepare the recorded data again"
        )
    before = trained_run(directory, prepared)
    config = config_of(about["config"], str(directory / "run.json"))
    facts: dict[str, str] = about.get("environment", {})
    found = environment(str(pick_device(config.device)))
    if out.exists() and not _interrupted(out, found):
        shutil.rmtree(out)
    after = train(config, prepared, out, uri, progress)
    result = Reproduced(
        about["run_id"],
        *_compared(before, after),
        metric=f"validation {config.stop.metric}",
        recorded=defined(before.summary.best(config.stop.metric)),
        now=defined(after.summary.best(config.stop.metric)),
        changes=changes(facts, found) if facts else [],
        unknown=not facts,
    )
    write_json(out / "reproduced.json", {"words": result.words(), **asdict(result)})
    return result


def changes(recorded: dict[str, str], now: dict[str, str]) -> list[Change]:
    """Return the facts that differ, those that only one side has included."""
    return [
        Change(fact, recorded.get(fact, "absent"), now.get(fact, "absent"))
        for fact in sorted(recorded.keys() | now.keys())
        if recorded.get(fact) != now.get(fact)
    ]


def _interrupted(out: Path, now: dict[str, str]) -> bool:
    """Whether a reproduction stopped before its end, in this very environment."""
    about = out / "run.json"
    if not about.is_file() or (out / "summary.json").exists():
        return False
    return bool(read_json(about).get("environment") == now)


def _compared(before: Trained, after: Trained) -> tuple[bool, float | None]:
    ours, theirs = (one.model.state_dict() for one in (before, after))  # type: ignore[attr-defined]
    if ours.keys() != theirs.keys() or any(ours[key].shape != theirs[key].shape for key in ours):
        return False, None
    if all(torch.equal(ours[key].cpu(), theirs[key].cpu()) for key in ours):
        return True, 0.0
    gaps = [(ours[key].double().cpu() - theirs[key].double().cpu()).abs().max() for key in ours if ours[key].numel()]
    return False, float(max(gaps))


def _value(value: float | None) -> str:
    return "not known" if value is None else f"{value:.6f}"
