"""Strict TOML: what is wrong is named, and nothing wrong gets through."""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recsys.config import overlaid, parse, read_toml
from recsys.errors import ConfigError


@dataclass(frozen=True)
class Inner:
    rate: float = 0.5
    kind: Literal["a", "b"] = "a"


@dataclass(frozen=True)
class Outer:
    width: int
    names: tuple[str, ...] = ()
    inner: Inner = field(default_factory=Inner)
    more: tuple[Inner, ...] = ()
    most: int | None = None
    shown: bool = False


def test_values_arrive_typed():
    config = parse(Outer, {"width": 3, "names": ["x"], "inner": {"rate": 1}, "more": [{"kind": "b"}]}, "t.toml")
    assert config == Outer(3, ("x",), Inner(1.0), (Inner(kind="b"),))


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({"width": 3, "widht": 4}, ["t.toml", "'widht'", "'width'"]),
        ({"width": 3, "inner": {"rte": 1}}, ["t.toml [inner]", "'rte'", "'rate'"]),
        ({}, ["width", "required"]),
        ({"width": "many"}, ["width", "a whole number", "'many'"]),
        ({"width": "3"}, ["width", "a whole number", "'3'"]),
        ({"width": True}, ["width", "a whole number", "True"]),
        ({"width": 3, "inner": {"rate": "1"}}, ["t.toml [inner]", "rate", "a number", "'1'"]),
        ({"width": 3, "shown": "yes"}, ["shown", "true or false", "'yes'"]),
        ({"width": 3, "most": "1"}, ["most", "a whole number", "'1'"]),
        ({"width": 3, "more": [{"rate": 1}, {"rte": 1}]}, ["t.toml [more]", "'rte'", "'rate'"]),
        ({"width": 3, "more": [{"rate": True}]}, ["t.toml [more]", "rate", "a number", "True"]),
        ({"width": 3, "inner": {"kind": "c"}}, ["inner.kind", "'a' or 'b'", "'c'"]),
        ({"width": 3, "inner": {"rate": float("nan")}}, ["t.toml [inner]", "rate", "a number", "nan"]),
        ({"width": 3, "names": ["x", float("nan")]}, ["t.toml", "names", "nan"]),
    ],
)
def test_what_is_wrong_is_named(table, words):
    with pytest.raises(ConfigError) as error:
        parse(Outer, table, "t.toml")
    for word in words:
        assert word in str(error.value)


@given(st.text(min_size=1).filter(lambda key: key not in {f.name for f in fields(Outer)}))
def test_no_unknown_key_gets_through(key):
    with pytest.raises(ConfigError, match="unknown key"):
        parse(Outer, {"width": 1, key: 1}, "t.toml")


def test_assignments_win_and_make_sections(tmp_path: Path):
    path = tmp_path / "c.toml"
    path.write_text("width = 1\n[inner]\nrate = 0.1\n")
    table = read_toml(path, ["width=7", "inner.kind=b", 'names=["p", "q"]', "new.key=2.5"])
    assert table == {"width": 7, "inner": {"rate": 0.1, "kind": "b"}, "names": ["p", "q"], "new": {"key": 2.5}}


@pytest.mark.parametrize("assignment", ["width", "=3", "width.deeper=1"])
def test_a_senseless_assignment_is_refused(tmp_path: Path, assignment: str):
    path = tmp_path / "c.toml"
    path.write_text("width = 1\n")
    with pytest.raises(ConfigError, match="--set"):
        read_toml(path, [assignment])


@pytest.mark.parametrize("content", ["width = ", "\xff\xfe"])
def test_a_file_that_is_not_toml_is_named(tmp_path: Path, content: str):
    path = tmp_path / "broken.toml"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(ConfigError, match=r"broken\.toml: not valid TOML"):
        read_toml(path)
    with pytest.raises(ConfigError, match=r"absent\.toml: no such file"):
        read_toml(tmp_path / "absent.toml")


def test_sections_are_laid_over_each_other():
    below = {"a": {"x": 1, "y": {"z": 1}}, "b": 1}
    assert overlaid(below, {"a": {"y": {"w": 2}}, "b": 3}) == {"a": {"x": 1, "y": {"z": 1, "w": 2}}, "b": 3}
    assert below == {"a": {"x": 1, "y": {"z": 1}}, "b": 1}
