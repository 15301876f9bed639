"""Gates let through what the evaluation says, and name what they stop; publish exits with 4."""

from dataclasses import replace

import pytest
from evaluations import evaluation
from typer.testing import CliRunner

from pipelines.audit_record import Audit, Check
from pipelines.gates import Gate, judge, read_gates, refuse_failed
from recsys.cli import app
from recsys.errors import ConfigError, GateError

AUDIT = Audit("d", (Check("cuts", True, "two", "two"),))


def through(gate: Gate, audit: Audit | None = AUDIT, ranker: str = "dare") -> bool:
    return judge({"it": gate}, ranker, f"run-{ranker}", evaluation(), audit)[0].passed


@pytest.mark.parametrize(
    ("gate", "passed"),
    [
        (Gate(at_least=0.9), True),
        (Gate(at_least=0.91), False),
        (Gate(metric="ms_per_request", at_most=1e9), True),
        (Gate(metric="ms_per_request", at_most=0.0), False),
        (Gate(beats="personal_frequency"), True),  # 0.1 ahead, the interval from 0.09 on
        (Gate(beats="personal_frequency", margin=0.095), False),
        (Gate(at_least=0.99, beats="personal_frequency"), False),  # ahead, but not high enough
        (Gate(at_most=0.9), True),
        (Gate(at_most=0.89), False),
        (Gate(metric="no_such_metric", at_least=0), False),
        (Gate(metric="audit"), True),
    ],
)
def test_what_is_let_through(gate, passed):
    assert through(gate) == passed


@pytest.mark.parametrize(("margin", "passed"), [(-0.2, True), (-0.105, False), (0.0, False)])
def test_no_worse_than_so_much(margin, passed):
    """Personal frequency is 0.1 behind, by 0.11 at the far end of the interval."""
    assert through(Gate(beats="dare", margin=margin), ranker="personal_frequency") == passed


def test_a_gate_asks_of_the_sampler_it_names():
    high, low = evaluation(), evaluation(gauc={"dare": 0.6, "personal_frequency": 0.5})
    metrics = {"dare": {**high.metrics["dare"], "popularity": low.metrics["dare"]["popularity"]}}
    mixed = replace(high, metrics={**high.metrics, **metrics})
    for sampler, passed in (("uniform", True), ("popularity", False), ("", True)):
        gate = Gate(at_least=0.8, **({"sampler": sampler} if sampler else {}))
        assert judge({"it": gate}, "dare", "run-dare", mixed, AUDIT)[0].passed == passed, sampler


def test_what_has_no_interval_beats_nothing():
    (found,) = judge({"it": Gate(beats="personal_frequency")}, "dare", "run-dare", evaluation(width=0), AUDIT)
    assert not found.passed
    assert "no interval" in found.told


def test_the_audit_must_be_of_this_data_and_have_passed():
    gate = Gate(metric="audit")
    assert not through(gate, None)
    assert not through(gate, replace(AUDIT, data_digest="another"))
    assert not through(gate, replace(AUDIT, checks=(Check("cuts", False, "one", "two"),)))


def test_every_failed_gate_is_named():
    slow = Gate(metric="ms_per_request", at_most=0)
    gates = {"high": Gate(at_least=0.99), "fine": Gate(at_least=0.1), "quick": slow}
    with pytest.raises(GateError, match=r"2 of 3 gates not passed, nothing is published\. high: gauc on uniform"):
        refuse_failed(judge(gates, "dare", "run-dare", evaluation(), None))
    assert GateError.exit_code == 4
    with pytest.raises(ConfigError, match="no model 'sdim'"):
        judge(gates, "sdim", "run-sdim", evaluation(), None)
    with pytest.raises(ConfigError, match="beats = 'sdim' is no model"):
        judge({"it": Gate(beats="sdim")}, "dare", "run-dare", evaluation(), None)


def test_a_run_trained_again_since_its_evaluation_passes_no_gate():
    gates = {"fine": Gate(at_least=0.1)}
    with pytest.raises(GateError, match="run `dare` was trained again since this evaluation; evaluate it again"):
        judge(gates, "dare", "run-of-today", evaluation(), AUDIT)
    with pytest.raises(GateError, match="does not say which run `dare` was; evaluate it again"):
        judge(gates, "dare", "run-dare", replace(evaluation(), run_ids={}), AUDIT)


def test_publish_judges_the_run_that_was_evaluated(prepared, mlflow_uri, tmp_path):
    (tmp_path / "prepared").symlink_to(prepared.directory)
    (tmp_path / "gates.toml").write_text("[gates.no_one]\nat_least = 2")

    def recsys(*words: str) -> str:
        done = CliRunner().invoke(app, [*words, "--workspace", str(tmp_path), "--mlflow", mlflow_uri])
        return str(done.exception) if done.exit_code else ""

    train = ("train", "--config", "popularity", "--set", "stop.requests=20")
    evaluate = ("evaluate", "popularity", "--set", "max_requests=20", "--set", "resamples=0")
    publish = ("publish", "--ranker", "popularity", "--gates", str(tmp_path / "gates.toml"))
    assert (recsys(*train), recsys(*evaluate)) == ("", "")
    assert "1 of 1 gates not passed" in recsys(*publish)
    assert recsys(*train, "--set", "seed=1") == ""
    assert "run `popularity` was trained again since this evaluation" in recsys(*publish)


def test_gates_are_read_strictly(tmp_path):
    path = tmp_path / "gates.toml"
    for text, words in (
        ("[gates.a]\nat_leest = 1", "did you mean 'at_least'"),
        ("[gates.a]\nmetric = 'gauc'", "asks for nothing"),
        ("[gates]\nat_least = 1", "expected tables"),
        ("[gate.a]\nat_least = 1", "did you mean 'gates'"),
    ):
        path.write_text(text)
        with pytest.raises(ConfigError, match=words):
            read_gates(path)
