"""The files under `serving/deploy/`, as far as they can be checked without installing anything."""

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "serving/deploy"


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
def test_systemd_understands_the_unit(tmp_path):
    text = (DEPLOY / "recsys.service").read_text()
    command = re.search(r"^ExecStart=(\S+/recsys) serve ", text, re.MULTILINE)
    assert command, "the unit starts `recsys serve`"
    unit = tmp_path / "recsys.service"
    unit.write_text(text.replace(command.group(1), sys.executable))  # systemd asks whether it is there
    done = subprocess.run(["systemd-analyze", "verify", str(unit)], capture_output=True, text=True, check=False)
    complaints = [line for line in done.stderr.splitlines() if unit.name in line]
    assert (done.returncode, complaints) == (0, []), done.stderr


def test_the_image_holds_what_the_package_is_built_of():
    lines = (DEPLOY / "Containerfile").read_text().splitlines()
    copied = {word for line in lines if line.startswith("COPY ") for word in line.split()[1:-1]}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = {name.split(".")[0].rstrip("*") for name in project["tool"]["setuptools"]["packages"]["find"]["include"]}
    assert packages | {"pyproject.toml", "constraints.txt", project["project"]["readme"]} <= copied
    assert all((ROOT / name).exists() for name in copied)
    [image] = [line for line in lines if line.startswith("FROM ")]
    assert image.endswith("python:3.11-slim")
    assert project["project"]["requires-python"].startswith(">=3.11")
    assert [line for line in lines if line.startswith("USER ")] == ["USER recsys"]
