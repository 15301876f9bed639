"""Gates let through what the evaluation says, and name what they stop; publish exits with 4."""

from dataclasses import replace

import pytest
from test_report import evaluation

from pipelines.audit_record import Audit, Check
from pipelines.gates import Gate, judge, read_gates, refuse_failed
from recsys.errors import ConfigError, GateError

AUDIT = Audit("d", (Check("cuts", True, "two", "two"),))


def through(gate: Gate, audit: Audit | None = AUDIT, ranker: str = "dare") -> bool:
    return judge({"it": gate}, ranker, evaluation(), audit)[0].passed


@pytest.mark.parametrize(
    ("gate", "passed"),
    [
        (Gate(at_least=0.9), True),
        (Gate(at_least=0.91), False),
        (Gate(metric="ms_per_request", at_most=1e9), True),
        (Gate(metric="ms_per_request", at_most=0.0), False),
        (Gate(beats="personal_frequency"), True),  # 0.1 ahead, the interval from 0.09 on
        (Gate(beats="personal_frequency", margin=0.095), False),
        (Gate(metric="no_such_metric", at_least=0), False),
        (Gate(metric="audit"), True),
    ],
)
def test_what_is_let_through(gate, passed):
    assert through(gate) == passed


def test_the_audit_must_be_of_this_data_and_have_passed():
    gate = Gate(metric="audit")
    assert not through(gate, None)
    assert not through(gate, replace(AUDIT, data_digest="another"))
    assert not through(gate, replace(AUDIT, checks=(Check("cuts", False, "one", "two"),)))


def test_every_failed_gate_is_named():
    slow = Gate(metric="ms_per_request", at_most=0)
    gates = {"high": Gate(at_least=0.99), "fine": Gate(at_least=0.1), "quick": slow}
    with pytest.raises(GateError, match=r"2 of 3 gates not passed, nothing is published\. high: gauc on uniform"):
        refuse_failed(judge(gates, "dare", evaluation(), None))
    assert GateError.exit_code == 4
    with pytest.raises(ConfigError, match="no model 'sdim'"):
        judge(gates, "sdim", evaluation(), None)
    with pytest.raises(ConfigError, match="beats = 'sdim' is no model"):
        judge({"it": Gate(beats="sdim")}, "dare", evaluation(), None)


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
