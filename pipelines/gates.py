"""Gates: what a ranker has to reach before it may be published, as a TOML states it.

    [gates.quality]                     # any name
    metric = "gauc"                     # of metrics.json, also segment/<name>/gauc
    sampler = "uniform"                 # or all_items
    at_least = 0.75

    [gates.worth_training]
    beats = "personal_frequency"        # the interval of the paired difference lies above zero

    [gates.no_worse_for_the_tail]
    metric = "segment/popularity_tail/gauc"
    beats = "dare"
    margin = -0.01                      # ... above this: so much worse would be borne

    [gates.fast]
    metric = "ms_per_request"           # of scoring, in batches
    at_most = 5.0

    [gates.sound]
    metric = "audit"                    # the audit of the data passed

They are judged on the last evaluation, which must be of the same data and of this very training run.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.audit_record import Audit
from pipelines.evaluation import Evaluation
from pipelines.findings import number, signed
from recsys.config import parse, read_toml
from recsys.errors import ConfigError, GateError

AUDIT = "audit"
COST = "ms_per_request"


@dataclass(frozen=True)
class Gate:
    """One thing a ranker has to reach.

    Attributes:
        metric: a name of `metrics.json` without its split, `ms_per_request`, or `audit`.
        sampler: candidates it was measured on; absent takes the evaluation's first.
        at_least: smallest value let through.
        at_most: largest value let through.
        beats: another model of the evaluation; the whole interval of the difference must lie above `margin`.
        margin: of `beats`, 0 if absent.
    """

    metric: str = "gauc"
    sampler: str | None = None
    at_least: float | None = None
    at_most: float | None = None
    beats: str | None = None
    margin: float = 0.0

    def __post_init__(self) -> None:
        if self.metric != AUDIT and self.at_least is None and self.at_most is None and self.beats is None:
            raise ConfigError(f"gate on {self.metric!r} asks for nothing; set at_least, at_most or beats")


@dataclass(frozen=True)
class Passage:
    """How a gate was found: `told` says what was found and what is wanted."""

    name: str
    passed: bool
    told: str


@dataclass(frozen=True)
class _GatesFile:
    gates: dict[str, Any]


def read_gates(path: Path, assignments: Sequence[str] = ()) -> dict[str, Gate]:
    """Read [gates.<name>] tables; raises `ConfigError` for an invalid key or value."""
    table = parse(_GatesFile, read_toml(path, assignments), str(path)).gates
    if not all(isinstance(one, Mapping) for one in table.values()):
        raise ConfigError(f"{path} [gates]: expected tables [gates.<name>], found plain values")
    return {name: parse(Gate, one, f"{path} [gates.{name}]") for name, one in table.items()}


def judge(
    gates: Mapping[str, Gate], ranker: str, run_id: str, evaluation: Evaluation, audit: Audit | None
) -> list[Passage]:
    """Say of every gate whether a ranker, trained by the run `run_id`, gets through.

    Raises:
        ConfigError: the evaluation does not hold the ranker, or a gate names a model it does not hold.
        GateError: the evaluation judged another run of that name.
    """
    if ranker not in evaluation.models:
        raise ConfigError(
            f"gates: the last evaluation has no model {ranker!r} (it has {', '.join(evaluation.models)}); "
            f"run `recsys evaluate {ranker}` first"
        )
    if ranker not in evaluation.run_ids:
        raise GateError(f"the last evaluation does not say which run `{ranker}` was; evaluate it again")
    if evaluation.run_ids[ranker] != run_id:
        raise GateError(f"run `{ranker}` was trained again since this evaluation; evaluate it again")
    return [_through(name, gate, ranker, evaluation, audit) for name, gate in gates.items()]


def refuse_failed(passages: Sequence[Passage]) -> None:
    """Raise `GateError` that names every gate not passed, and why."""
    failed = [one for one in passages if not one.passed]
    if failed:
        told = "; ".join(f"{one.name}: {one.told}" for one in failed)
        raise GateError(f"{len(failed)} of {len(passages)} gates not passed, nothing is published. {told}")


def _through(name: str, gate: Gate, ranker: str, evaluation: Evaluation, audit: Audit | None) -> Passage:
    if gate.metric == AUDIT:
        if audit is None or audit.data_digest != evaluation.data_digest:
            return Passage(name, False, "this data was not audited; run `recsys audit`")
        return Passage(name, audit.passed, audit.verdict)
    sampler = gate.sampler or evaluation.config.samplers[0]
    if gate.metric == COST:
        value: float | None = evaluation.cost[ranker].ms_per_request
    else:
        value = evaluation.metric(ranker, sampler, gate.metric)
    words = gate.metric if gate.metric == COST else f"{gate.metric} on {sampler}"
    if value is None:
        return Passage(name, False, f"{words} is not defined for {ranker}, or not a metric of the evaluation")
    wanted = []
    if gate.at_least is not None and value < gate.at_least:
        wanted.append(f"at least {gate.at_least:g}")
    if gate.at_most is not None and value > gate.at_most:
        wanted.append(f"at most {gate.at_most:g}")
    told = f"{words} is {number(value)}" + (f", wanted {' and '.join(wanted)}" if wanted else "")
    if gate.beats is None:
        return Passage(name, not wanted, told)
    ahead, against = _beats(gate, gate.beats, sampler, ranker, evaluation)
    return Passage(name, ahead and not wanted, f"{told}; {against}")


def _beats(gate: Gate, other: str, sampler: str, ranker: str, evaluation: Evaluation) -> tuple[bool, str]:
    if other not in evaluation.models:
        raise ConfigError(
            f"gates: beats = {other!r} is no model of the last evaluation ({', '.join(evaluation.models)})"
        )
    found = evaluation.compare(sampler, gate.metric, ranker, other)
    if found is None or found.ci_low is None or found.ci_high is None:
        return False, f"no interval of its difference from {other} in {gate.metric}"
    told = f"its difference from {other} is {signed(found.difference)}, from {signed(found.ci_low)} on"
    return found.ci_low > gate.margin, f"{told}, wanted all above {gate.margin:g}"
