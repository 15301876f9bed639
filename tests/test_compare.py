"""Comparisons: verdicts of known worlds, twins, methods, and what cannot be paired is refused by name and number."""

import json
from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

from pipelines.compare import CompareConfig, CompareFile, compare, decide, predict
from pipelines.compare_page import build_page, render_markdown, write_page
from pipelines.compare_runs import Subject, subjects
from pipelines.evaluate import evaluate
from pipelines.evaluation import EvaluateConfig
from pipelines.predictions import Predictions, same_questions
from pipelines.prepared import PreparedSet
from pipelines.publish import publish
from pipelines.scoring import draw_requests
from pipelines.segments import SegmentsConfig
from pipelines.shipped import find_config
from pipelines.train import train
from pipelines.train_config import load_config
from pipelines.verdicts import Question, Rule, all_twins, of_files, of_methods, of_twins
from pipelines.workspace import Workspace
from ranking.models import RANKERS
from recsys.bootstrap import Ratio, bootstrap
from recsys.cli import app
from recsys.config import parse
from recsys.errors import ConfigError, DataError

CONFIG = CompareConfig(resamples=200, max_requests=60)
FILE = CompareFile(CONFIG, SegmentsConfig(item_columns=()))
ASK = Question("gauc", "", 60)
RULE = Rule()


def estimates(values, seed=0, resamples=200):
    """One estimate per row of values [models, users], on the same resamples."""
    users = values.shape[1]
    return list(
        bootstrap({str(i): Ratio(v, np.ones(users)) for i, v in enumerate(values)}, users, resamples, seed).values()
    )


# -- verdicts ---------------------------------------------------------------------------------------------------------


def test_verdicts_of_known_differences():
    rng = np.random.default_rng(0)
    base = rng.normal(size=60)
    noise = rng.normal(size=60) * 0.1
    a, above, near = estimates(np.stack([base, base + 0.2 + noise, base + noise - noise.mean() + 0.005]))
    assert of_files(ASK, ("x", above), ("a", a), RULE).word == "better"
    worse = of_files(ASK, ("a", a), ("x", above), RULE)
    assert (worse.word, worse.users_needed) == ("worse", None)
    unsure = of_files(ASK, ("x", near), ("a", a), RULE)
    assert unsure.word == "cannot tell"
    # n (z_.975 + z_.8)^2 (sd / d)^2, the sd of a user's difference being that of the noise
    expected = (1.96 + 0.8416) ** 2 * noise.var() / 0.005**2
    assert unsure.users_needed == pytest.approx(expected, rel=0.35)


def test_one_user_and_nothing_to_measure_are_said_so():
    one, other = estimates(np.array([[0.6], [0.7]]))
    verdict = of_files(replace(ASK, users=1), ("a", one), ("b", other), RULE)
    assert verdict.word == "cannot tell"
    none = estimates(np.full((2, 3), np.nan))
    assert of_files(ASK, ("a", none[0]), ("b", none[1]), RULE).word == "not defined"


def world(rng, runs, users=60, luck=0.05, noise=0.3):
    """Models of equal truth: a user's own level, the luck of each training run, noise of each (run, user)."""
    level = rng.normal(size=users)
    return level + luck * rng.normal(size=(runs, 1)) + noise * rng.normal(size=(runs, users))


def test_twins_come_out_cannot_tell():
    rng = np.random.default_rng(1)
    told = [
        verdict.word == "cannot tell"
        for trial in range(40)
        for verdict in all_twins(
            ASK, dict(zip("abcde", estimates(world(rng, 5, luck=0.2), trial, 60), strict=True)), RULE
        )
    ]
    assert np.mean(told) >= 0.95
    rng = np.random.default_rng(2)
    for trial in range(20):  # two runs alone cannot tell luck from anything else
        pair = dict(zip("ab", estimates(world(rng, 2, luck=0.5, noise=0.01), trial, 60), strict=True))
        assert of_twins(ASK, ("a", "b"), pair, RULE).word == "cannot tell"


def test_a_method_needs_seeds_and_errs_as_seldom_as_it_says():
    rng = np.random.default_rng(3)
    false = better = 0
    for trial in range(120):
        runs = world(rng, 10, luck=0.2)
        found = estimates(runs, trial, 100)
        false += of_methods(ASK, ("a", found[:5]), ("b", found[5:]), RULE).word != "cannot tell"
        runs[:5] += 0.6  # three times the luck of a seed
        found = estimates(runs, trial, 100)
        better += of_methods(ASK, ("a", found[:5]), ("b", found[5:]), RULE).word == "better"
    assert false <= 12  # 5 % of 120 is 6, standard deviation 2.4
    assert better >= 90
    few = of_methods(ASK, ("a", found[:4]), ("b", found[5:]), RULE)
    assert few.word == "cannot tell"
    assert "4 and 5 seeds; a verdict on methods needs at least 5" in few.why


# -- the same questions -----------------------------------------------------------------------------------------------


def answers(name="a", digest="d" * 20, **changes) -> Predictions:
    given = Predictions(
        name,
        digest,
        np.arange(3),
        np.array([0, 0, 1]),
        np.array([0, 2, 4, 6]),
        np.arange(6, dtype=np.int32) + 2,
        np.array([1, 0, 1, 0, 1, 0], np.uint8),
        np.arange(6, dtype=np.float32),
    )
    return replace(given, **changes)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (answers("b", "e" * 20), "a is of data dddddddddddd, b of data eeeeeeeeeeee"),
        (
            answers("b", index=np.array([0, 1, 9])),
            "a: predictions are missing for 1 of 4 requests, first for request 9",
        ),
        (
            answers("b", item=np.array([2, 3, 4, 9, 6, 8], np.int32)),
            "a and b scored different candidates in 2 of 3 requests, first in request 1",
        ),
        (
            answers("b", score=np.array([0, 1, 2, np.nan, np.nan, 5], np.float32)),
            r"b: 2 scores are NaN, the first at row 3 \(request 1, item row 5\)",
        ),
        (answers("b", score=np.zeros(5, np.float32)), "5 scores for 6 candidates"),
    ],
)
def test_what_cannot_be_paired_is_refused(other, message):
    with pytest.raises(DataError, match=message):
        same_questions([answers(), other])


# -- on a prepared set ------------------------------------------------------------------------------------------------


def fresh(prepared: PreparedSet, name: str):
    return RANKERS[name][1](RANKERS[name][0](), prepared.items)


def test_a_copy_is_never_told_from_itself_and_noise_is_worse(prepared):
    chosen = draw_requests(prepared, "test", CONFIG.max_requests, CONFIG.seed)
    good = predict("good", fresh(prepared, "personal_frequency"), prepared, chosen, "uniform", "test")
    noise = np.random.default_rng(0).standard_normal(len(good.score)).astype(np.float32)
    file = replace(FILE, compare=replace(CONFIG, segments=("target_in_history", "item_age_unseen")))
    found = decide([good, replace(good, name="copy"), replace(good, name="noise", score=noise)], {}, prepared, file)
    words = {(v.model, v.other): v.word for v in found.primary}
    assert words == {
        ("good", "copy"): "cannot tell", ("good", "noise"): "better", ("copy", "noise"): "better",
    }  # fmt: skip
    assert {v.segment for v in found.segments} <= {"target_in_history", "item_age_unseen"}
    assert "target_outside_history" in {v.segment for v in found.exploratory}
    page = build_page(found)
    text = render_markdown(page)
    value = f"{found.values['good']['gauc']:.4f}"
    assert page.summary[0] == (
        f"`good` has the highest GAUC, {value}; it is better than `noise`, and cannot be told from `copy`."
    )
    assert len(page.summary) <= 5
    two = replace(found, primary=[verdict for verdict in found.primary if "good" not in (verdict.model, verdict.other)])
    one, other = (build_page(replace(two, primary=[verdict])) for verdict in (two.primary[0], two.primary[0].turned))
    assert one.summary[0] == other.summary[0]  # whichever way round it was asked
    assert one.summary[0].startswith("`copy` is better than `noise`: GAUC +")
    for segment in found.not_defined:
        assert f"`{segment}`" in text
    with pytest.raises(ConfigError, match=r"no segment 'gold_users'; there are .*target_in_history"):
        decide([good, good], {}, prepared, replace(FILE, compare=replace(CONFIG, segments=("gold_users",))))


def test_kept_scores_equal_scoring_anew_and_wrong_ones_are_refused(prepared, tmp_path):
    model = fresh(prepared, "personal_frequency")
    settings = EvaluateConfig(
        resamples=0, full_ranking_requests=1, max_requests=40, cold_requests=0, samplers=("uniform",)
    )
    evaluate({"kept": model}, prepared, settings).save(tmp_path / "evaluation")
    scores = tmp_path / "evaluation" / "predictions" / "kept.safetensors"
    both = [
        Subject("kept", prepared.digest, scores=scores),
        Subject("anew", prepared.digest, model=lambda: model),
    ]
    found = compare(both, prepared, FILE)
    assert found.requests == 40
    assert found.primary[0].difference == 0
    tensors = load_file(scores)
    tensors["uniform"][7] = np.nan
    save_file(tensors, scores)
    with pytest.raises(DataError, match="kept: 1 scores are NaN, the first at row 7"):
        compare(both, prepared, FILE)
    with pytest.raises(DataError, match=f"data {prepared.digest[:12]}, other of data 0123456789ab"):
        compare([both[1], Subject("other", "0123456789abcdef", model=lambda: model)], prepared, FILE)


def test_the_verb_takes_names_run_ids_and_bundles(prepared, mlflow_uri, tmp_path):
    place = Workspace(tmp_path / "workspace")
    place.root.mkdir()
    (place.root / "prepared").symlink_to(prepared.directory)
    runs = [
        train(load_config(find_config("popularity"), [f"seed={seed}"]), place.prepared, place.run(name), mlflow_uri)
        for seed, name in enumerate(("first", "second"))
    ]
    publish(prepared, runs[0], None, place.bundle, place.snapshot, {}, ())
    names = ["first", runs[1].run_id, str(place.bundle)]
    settings = ["--set", "compare.max_requests=40", "--set", "compare.resamples=100"]
    words = ["compare", *names, "-w", str(place.root), "--mlflow", mlflow_uri, "--json"]
    done = CliRunner().invoke(app, [*words, *settings])
    assert done.exit_code == 0, done.output
    record = json.loads((place.comparison / "compare.json").read_text())
    assert record["methods"] == {"first": names[:2], names[2]: names[2:]}
    assert [v["word"] for v in record["twins"]] == ["cannot tell"]
    assert [v["kind"] for v in record["primary"]] == ["methods"]
    assert (place.comparison / "compare.html").exists()
    for wanted, message in (
        (["first", "third"], r"third: no run of this workspace \(there are first, second\)"),
        (["first", "first"], "expected two or more different runs"),
    ):
        with pytest.raises((DataError, ConfigError), match=message), subjects(wanted, place, mlflow_uri):
            pass


def test_the_page_is_the_same_every_time(prepared, tmp_path):
    model = fresh(prepared, "popularity")
    pair = [Subject(name, prepared.digest, model=lambda: model) for name in ("a", "b")]
    found = compare(pair, prepared, FILE)
    for folder in ("one", "two"):
        write_page(found, tmp_path / folder)
    for name in ("compare.html", "compare.md"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_settings_that_cannot_be_meant():
    for table, words in (
        ({"compare": {"segments": list("abcdef")}}, "at most 5 can decide"),
        ({"compare": {"segments": ["a", "a"]}}, "each once"),
        ({"compare": {"metric": "clicks"}}, "compare.metric"),
        ({"compare": {"least_seeds": 1}}, "at least 2"),
        ({"compere": {}}, "did you mean 'compare'"),
    ):
        with pytest.raises(ConfigError, match=words):
            parse(CompareFile, table, "compare.toml")
