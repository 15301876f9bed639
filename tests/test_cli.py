"""The command line: quick to answer, strict, and honest in its exit codes."""

import dataclasses
import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from pipelines.evaluation import EvaluateConfig
from pipelines.settings import PrepareConfig
from pipelines.text_config import TEXT_MODELS
from ranking.models import RANKERS
from recsys.cli import app, told
from recsys.config import parse
from recsys.errors import BundleError, ConfigError, DataError, GateError, RecsysError

CONFIGS = Path("pipelines/configs")
CASES = {"twin": "dare", "sasrec": "mqsa_ted"}
"""Published models that are a case of another: config -> model."""


def recsys(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "recsys.cli", *arguments], capture_output=True, text=True, timeout=120, check=False
    )


def test_exit_codes_are_those_of_the_error_tree():
    codes = {kind.__name__: kind.exit_code for kind in (RecsysError, ConfigError, DataError, BundleError, GateError)}
    assert codes == {"RecsysError": 1, "ConfigError": 2, "DataError": 3, "BundleError": 3, "GateError": 4}


def test_help_imports_nothing_heavy():
    code = (
        "import sys; import recsys.cli;"
        "heavy = {'torch', 'polars', 'mlflow', 'ray', 'faiss', 'numpy', 'matplotlib'} & set(sys.modules);"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("words", "given", "named"),
    [
        ("q.toml [evaluate]: unknown key 'max_request'", ["evaluate.max_requests=5", "evaluate.max_request=3"], 1),
        ("p.toml: split.kind: Input should be 'time'", ["split.kind=bytime", "split.test=3"], 0),
        ("p.toml: unknown key 'splitt'", ["splitt.kind=time"], 0),
        ("d.toml [model]: k must be at least 1, found 0", ["evaluate.k=5", "model.k=0"], 1),
        ("d.toml [model]: bits=9, groups=0: expected bits from 0 to 8", ["model.bits=1", "model.bits=9"], 1),
        ("0 dev queries; name a natural split", ["model.name=mvp"], None),
        ("no config 'dinn' and no file of that name", ["x.file=3"], None),
        ("[corpus] also would do nothing; leave it out", ["corpus.unit=word"], None),
    ],
)
@pytest.mark.parametrize("joined", [True, False])
def test_an_error_names_the_assignment_it_is_of(words, given, named, joined):
    arguments = [part for one in given for part in ([f"--set={one}"] if joined else ["--set", one])]
    found = told(ConfigError(words), ["recsys", "train", *arguments, "--json"])
    assert found == (words if named is None else f"{words} (by --set {given[named]})")
    assert told(DataError(words), arguments) == words


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["fly"], 2, ["fly"]),
        (["prepare", "-w", "{tmp}"], 3, ["recsys ingest --workspace"]),
        (["train", "--config", "dinn", "-w", "{tmp}"], 2, ["no config 'dinn'", "the likest there are: din, "]),
        (["train", "--config", "dare", "-w", "{tmp}"], 3, ["recsys prepare --workspace"]),
        (["train", "--config", "dare", "--name", "requests", "-w", "{tmp}"], 2, ["a run called 'requests'"]),
        (["serve", "-w", "{tmp}"], 3, ["recsys publish --workspace"]),
        (["evaluate", "minilm", "--corpus", "{tmp}", "-w", "{tmp}"], 3, ["runs/minilm: not there yet", "recsys train"]),
        (
            ["quickstart", "-w", "{tmp}", "--set", "evaluate.max_request=3"],
            2,
            ["'max_request'", "'max_requests'", "(by --set evaluate.max_request=3)"],
        ),
        (["quickstart", "-w", "{tmp}", "--config", "{tmp}/no.toml"], 2, ["no.toml: no such file"]),
        (["publish", "-w", "{tmp}", "--gates", "gates"], 2, ["--gates would do nothing without --ranker"]),
        (["publish", "-w", "{tmp}", "--fusion", "rrf"], 2, ["--fusion, name a --text-encoder"]),
        (
            ["train", "-w", "{tmp}", "--config", "mvp", "--workers", "2"],
            2,
            ["--workers would do nothing for a text"],
        ),
        (["ingest", "-w", "{tmp}", "--users", "0"], 2, ["--users"]),
        (["ingest", "-w", "{tmp}", "--dataset", "nope"], 2, ["completejourney", "'nope'"]),
    ],
)
def test_bad_usage_has_its_code_and_says_what_to_do(tmp_path: Path, arguments, code, words):
    done = recsys(*(argument.replace("{tmp}", str(tmp_path)) for argument in arguments))
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize("there", [["mqsa_ted"], []])
def test_a_retriever_without_vectors_is_refused_before_anything_is_loaded(tmp_path: Path, there):
    for run in ("dare", "lexsembridge", *there):
        (tmp_path / "runs" / run).mkdir(parents=True)
        (tmp_path / "runs" / run / "run.json").write_text(json.dumps({"config": {"name": run}}))
    done = recsys("publish", "--ranker", "dare", "--retriever", "dare", "-w", str(tmp_path))
    assert (done.returncode, done.stdout) == (2, "")
    assert "Traceback" not in done.stderr
    for words in ("dare gives no vectors", f"there are: {', '.join(there) or 'none'}"):
        assert words in " ".join(done.stderr.split())


@pytest.mark.parametrize(
    ("name", "options", "examples"),
    [
        ("prepare", PrepareConfig, {"min_value", "columns", "multi", "numeric", "max_eval_requests"}),
        ("evaluate", EvaluateConfig, {"champion"}),
    ],
)
def test_a_file_of_defaults_names_every_key_with_its_default(name, options, examples):
    text = (CONFIGS / f"{name}.toml").read_text()
    table = tomllib.loads("\n".join(line.removeprefix("#") for line in text.splitlines() if not line.startswith("# ")))
    found = parse(options, {key: value for key, value in table.items() if key not in examples}, name)
    assert found == options()
    own = {"buckets", "workers"}  # of prepare: they change memory and time, never the result
    assert set(table) == {field.name for field in dataclasses.fields(options)} - own
    assert tomllib.loads(text) == {}


def test_every_model_has_a_shipped_config_that_loads():
    from pipelines.train_config import load_config

    names = set()
    for path in CONFIGS.glob("*.toml"):
        table = tomllib.loads(path.read_text())
        if "model" in table and table["model"]["name"] not in TEXT_MODELS:  # see tests/test_text_pipeline.py
            config = load_config(path)
            # dare.toml, its variants as dare_own_counts.toml, and models that are a case of another
            assert CASES.get(path.stem) == config.name or path.stem.startswith(config.name)
            names.add(config.name)
    assert names == set(RANKERS)


@pytest.mark.parametrize("name", ["quickstart", "full"])
def test_the_main_jobs_name_models_that_load(name):
    from pipelines.quickstart import load_quickstart

    job = load_quickstart(name)
    assert {job.training(model).name for model in job.models} <= set(RANKERS)
    assert job.retriever in job.models


def test_a_terminated_verb_cleans_up(tmp_path: Path):
    verb = """
import tempfile, time
import recsys.cli

def work():
    with tempfile.TemporaryDirectory(dir=".") as half_written:
        print("begun", flush=True)
        time.sleep(600)

recsys.cli.app = work
recsys.cli.main()
"""
    with subprocess.Popen([sys.executable, "-c", verb], cwd=tmp_path, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
        assert len(list(tmp_path.iterdir())) == 1
        process.terminate()
        assert process.wait(120) == 128 + 15
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("kind", "given", "words"),
    [
        ("text", ["--set", "max_requests=9"], "--set would do nothing for text models"),
        ("text", ["--config", "mine"], "--config would do nothing for text models"),
        ("ranker", ["--split", "valid"], "--split would do nothing for rankers"),
        ("ranker", ["--corpus", "c", "--split", "dev"], "--corpus and --split would do nothing"),
    ],
)
def test_evaluation_refuses_what_means_nothing_for_its_models(tmp_path, kind, given, words):
    (tmp_path / "runs/a").mkdir(parents=True)
    (tmp_path / "runs/a/run.json").write_text(json.dumps({"kind": kind}))
    with pytest.raises(ConfigError, match=words):
        app(["evaluate", "a", "-w", str(tmp_path), *given], standalone_mode=False)
