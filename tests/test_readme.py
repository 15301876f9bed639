"""Every command of the README: its steps run in their order in a fresh directory, long ones with smaller settings.

What stands in `sh` and `bash` blocks is run; what stands in `console` blocks, which would take hours, is read.
"""

import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
from serving_world import free_port
from typer.main import get_command

from pipelines.shipped import find_config
from pipelines.text_models import load_text_config
from pipelines.train_config import load_config
from recsys.cli import app
from recsys.cli.text import is_text_config

pytestmark = [pytest.mark.slow, pytest.mark.serve]

ROOT = Path(__file__).parent.parent
RECSYS = Path(sys.executable).with_name("recsys")
TRAIN = ["--set", "stop.max_steps=4", "--set", "stop.requests=30", "--set", "batches.rows=32"]
SMOKE = {
    "ingest": ["--users", "40"],
    "train": TRAIN,
    "evaluate": ["--set", "max_requests=40", "--set", "full_ranking_requests=5", "--set", "resamples=50"],
}
QUICKSTART = [
    "--exit", "--users", "40", "--set", "train.stop.max_steps=4", "--set", "train.batches.rows=32",
    "--set", "evaluate.max_requests=30", "--set", "evaluate.full_ranking_requests=4",
]  # fmt: skip


def commands() -> list[str]:
    """Return the commands of all shell blocks, comments cut off, in order."""
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [line.split("  #")[0].strip() for line in lines if line.strip() and not line.startswith("#")]


def shown() -> list[str]:
    """Return the commands of all console blocks, which are too long or too many to run, comments cut off."""
    text = "".join((ROOT / name).read_text() for name in ("README.md", "tests/benchmarks/RESULTS.md"))
    lines = "".join(re.findall(r"```console\n(.*?)```", text, re.DOTALL)).splitlines()
    return [line.split("  #")[0].strip() for line in lines]


def run(arguments: list[str], directory: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "2"}
    done = subprocess.run(
        arguments, cwd=directory, env=environment, capture_output=True, text=True, timeout=540, check=False
    )
    assert done.returncode == 0, f"{shlex.join(arguments)}\n{done.stdout}\n{done.stderr}"
    return done


@pytest.mark.parametrize("line", shown())
def test_what_is_shown_is_a_command_with_options_and_keys_that_exist(line: str):
    words, verbs = shlex.split(line), get_command(app)
    assert words[0] == "recsys"
    context = verbs.make_context("recsys", [words[1], "--help"], resilient_parsing=True)
    name, verb, rest = verbs.resolve_command(context, words[1:])
    given = verb.make_context(name, rest, parent=context).params
    if given.get("config"):
        path = find_config(given["config"])
        if name == "train":
            (load_text_config if is_text_config(path) else load_config)(path, given["assignments"] or ())


def test_make_commands_name_targets_that_exist():
    made = [line for line in commands() if line.startswith("make ")]
    assert {"make quickstart", "make test"} <= {" ".join(line.split()[:2]) for line in made}
    for line in made:
        run([*shlex.split(line), "--dry-run"], ROOT)


def test_the_steps_run_as_written(tmp_path: Path):
    port, seen = free_port(), []
    server = None
    try:
        for line in commands():
            line = line.replace("8000", str(port))
            words = shlex.split(line)
            if words[:2] == ["recsys", "quickstart"]:
                run([str(RECSYS), *words[1:], *QUICKSTART, "--port", str(free_port())], tmp_path)
            elif words[:2] == ["recsys", "serve"]:
                server = subprocess.Popen([RECSYS, *words[1:]], cwd=tmp_path, stderr=subprocess.PIPE, text=True)
                await_ready(server, port)
            elif words[0] == "recsys":
                run([str(RECSYS), *words[1:], *SMOKE.get(words[1], [])], tmp_path)
            elif words[0] == "curl":
                answer = json.loads(run(words, tmp_path).stdout)
                assert "status" not in answer, answer  # a problem document has one
            else:
                continue
            seen.append(words[1] if words[0] == "recsys" else words[0])
    finally:
        if server is not None:
            server.send_signal(signal.SIGINT)
            server.wait(180)
    wanted = {"ingest", "prepare", "train", "evaluate", "publish", "recommend", "serve", "curl"}
    assert wanted <= set(seen), seen
    assert (tmp_path / "workspace" / "evaluation" / "report.html").exists()
    assert (tmp_path / "recommendations.parquet").exists()


def await_ready(server: subprocess.Popen[str], port: int) -> None:
    for _ in range(720):
        assert server.poll() is None, server.stderr.read() if server.stderr else ""
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"http://127.0.0.1:{port}/readyz", timeout=2).status_code == 200:
                return
        time.sleep(0.5)
    raise AssertionError("the endpoint did not become ready within six minutes")


def test_the_tutorial_runs_as_written(tmp_path: Path):
    script = "".join(re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL))
    environment = os.environ | {"PATH": f"{RECSYS.parent}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-e"],
        input=script,
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    manifest = json.loads((tmp_path / "shop" / "prepared" / "manifest.json").read_text())
    assert manifest["counts"]["items"] == 3
    assert manifest["counts"]["users"] == 2
    card = json.loads((tmp_path / "shop" / "log" / "ingest.json").read_text())
    assert (card["read"], card["filtered"], card["bad"]) == (10, {"positive pieces": 1}, {})
    assert (tmp_path / "shop" / "runs" / "dare" / "summary.json").exists()


def test_the_quickstart_goes_on_and_repeats_only_what_changed(tmp_path: Path):
    """Kill the job in the middle, start it again, run it a third time with one changed setting."""
    arguments = [str(RECSYS), "quickstart", *QUICKSTART, "--port", str(free_port())]
    first = subprocess.Popen(arguments, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    assert first.stderr is not None
    for line in first.stderr:
        if "Training dare." in line:
            first.kill()
            break
    first.wait(60)
    first.stderr.close()
    said = run(arguments, tmp_path).stderr
    assert "Training din. Already done." in said
    assert "Training dare." in said
    assert "Training dare. Already done." not in said
    assert "recommended in" in said
    assert "The next answer" in said
    report = (tmp_path / "workspace" / "evaluation" / "report.html").read_text()
    assert "http://" not in re.sub(r"http://www\.w3\.org/\S*", "", report)

    changed = [*arguments, "--set", "evaluate.resamples=100"]
    said = run(changed, tmp_path).stderr
    assert said.count("Already done.") == 3 + 7 + 1  # ingest, prepare, audit, seven models, publish
    assert re.search(r"Scoring \d+ requests of the test period with every model\.\n", said)
