"""The studies' grid: every cell is a sound configuration, a killed grid goes on where it was, tables say what lacks."""

import itertools
import math
from collections import Counter
from dataclasses import dataclass, replace

import numpy as np
import polars as pl
import pytest
import torch
import torch.nn.functional as F
from benchmarks.studies import dare_search, measure, plan, run, sdim_distance, tables
from sklearn.metrics import mutual_info_score

from pipelines import datasets
from pipelines.datasets import RawLog
from pipelines.scoring import draw_requests
from ranking.dare import Dare, DareConfig
from recsys.errors import DataError

DAY = 86_400_000_000
QUICK = ("batches.rows=16", "stop.max_steps=6", "stop.validate_every=3", "stop.checkpoint_every=2", "stop.requests=20")
READ = {"max_requests": 40, "full_ranking_requests": 10, "cold_requests": 0, "resamples": 20}


def test_every_cell_is_a_sound_configuration_with_a_name_of_its_own():
    grid = list(plan.cells())
    assert max(Counter((cell.study, cell.name) for cell in grid).values()) == 1
    for cell in grid:
        config = measure.config_of(cell)
        assert config.seed == cell.seed
        assert cell.model in plan.STUDIES[cell.study].rows
        assert cell.dataset in plan.DATASETS
    for name, study in plan.STUDIES.items():
        assert {claim.model for claim in study.claims} | {claim.other for claim in study.claims} <= set(study.rows), (
            name
        )
        planned = {cell.model for cell in grid if cell.study == name}
        assert planned == set(study.rows)


def test_models_of_a_candidates_table_differ_in_the_model_alone():
    """The same budget, negatives and evaluated requests for every row that trains on requests.

    `dare_own_counts` is exempt: negatives from the user's own past are a part of it, and the table says so;
    `dare_own_counts_alike` is that model on everybody's negatives.
    """
    configs = {
        cell.model: measure.config_of(cell) for cell in plan.cells() if cell.study == "ctr" and cell.seed == 2023
    }
    trained = [config for row, config in configs.items() if row not in ("mqsa_ted", "dare_own_counts")]
    assert len({(config.batches, replace(config.stop, metric="")) for config in trained}) == 1


def test_more_groups_bring_sdim_nearer_to_the_attention_it_estimates():
    draws = torch.Generator().manual_seed(1)
    q, s = (torch.randn(6, rows, 12, generator=draws, dtype=torch.float64) + 0.5 for rows in (5, 40))
    mask = torch.rand(6, 40, generator=draws) < 0.8
    s = s * mask.unsqueeze(-1)
    far, near = (sdim_distance.distance(q, s, mask, 2, groups, seed=3) for groups in (2, 512))
    assert near["ratio"] > 0.995
    assert near["error"] < far["error"] / 8  # as G^-1/2, so 16 times nearer but for luck
    mean, total = sdim_distance.exact(q, s, mask, 2)
    weights = [(1 - math.acos(float(F.cosine_similarity(q[0, 0], one, dim=0))) / math.pi) ** 2 for one in s[0, mask[0]]]
    by_hand = (torch.tensor(weights, dtype=torch.float64)[:, None] * s[0, mask[0]]).sum(0)
    torch.testing.assert_close(total[0, 0], by_hand)
    torch.testing.assert_close(mean[0, 0], by_hand / sum(weights))


@dataclass(frozen=True)
class Told:
    """A result of which only two figures are known."""

    sampled: float
    full: float

    def metric(self, name):
        return {"uniform/ndcg_at_10": self.sampled, tables.FULL: self.full}[name]


def test_agreement_is_that_of_the_models_orders():
    study = replace(plan.STUDIES["ctr"], rows=("a", "b", "c", "d"))
    same = {row: [Told(value, 2 * value)] for row, value in zip("abc", (0.1, 0.3, 0.2), strict=True)}
    assert tables.agreement(study, same, "uniform").endswith("against all items: 1.00.")
    one_pair_turned = same | {"c": [Told(0.2, 0.7)]}  # 2 of 3 pairs agree
    assert tables.agreement(study, one_pair_turned, "uniform").endswith("against all items: 0.33.")
    assert tables.MISSING in tables.agreement(study, {"a": same["a"]}, "uniform")


def test_the_quality_of_a_search_is_that_worked_out_by_hand(monkeypatch):
    gains, mask = torch.tensor([[[3.0, 2, 1, 0, 0]]], dtype=torch.float64), torch.ones(1, 5, dtype=torch.bool)
    scores = torch.tensor([[[4.0, 5, 2, 3, 1]]], dtype=torch.float64)  # found: 2nd, 1st, 4th, 3rd, 5th
    second, third = 1 / math.log2(3), 1 / math.log2(4)
    ideal = {1: 3, 2: 3 + 2 * second, 3: 3 + 2 * second + third}
    for cut, own, fixed in ((1, 0.666667, 0.420004), (2, 0.913402, 0.817494), (3, 0.817494, 0.817494)):
        monkeypatch.setattr(dare_search, "CUT", cut)
        found = float(dare_search.ndcg(scores, gains, mask))
        assert found == pytest.approx(own, abs=1e-6)
        assert found * ideal[cut] / ideal[3] == pytest.approx(
            fixed, abs=1e-6
        )  # DARE's authors divide by the last ideal


def test_the_oracle_of_search_counts_mutual_information_and_its_own_order_is_perfect(prepared):
    draws = np.random.default_rng(2)
    sign, label = draws.integers(0, 2, 90), draws.integers(0, 2, 90)
    counts = ((sign * label).sum(), label.sum(), sign.sum(), 90)
    found = dare_search.mutual_information(*(torch.tensor([float(n)], dtype=torch.float64) for n in counts))
    assert float(found) == pytest.approx(mutual_info_score(sign, label), abs=1e-12)

    torch.manual_seed(1)
    model = Dare(DareConfig(pos_mode="group"), prepared.items).eval()
    sample = draw_requests(prepared, "valid", 60, 1)
    sets = prepared.candidates("valid", "uniform").take(sample.index)
    with torch.inference_mode():
        categories = int(prepared.items.column("category").max()) + 1
        oracle = dare_search.count_oracle(model, prepared, sample, sets, categories, least=2)

        def perfect(model, state, batch):
            sign = dare_search.signs(state, dare_search.category_of(model, batch.history.padded(200).item))
            return oracle.gains(dare_search.category_of(model, batch.candidates.item), sign)

        orders = {"perfect": (model, perfect), "search": (model, dare_search.by_search)}
        orders["chance"] = (model, dare_search.any_order)
        quality = dare_search.quality(orders, oracle, prepared, sample, sets)
    means = {name: one.numerator.sum() / one.denominator.sum() for name, one in quality.items()}
    assert means["perfect"] == pytest.approx(1.0)
    assert means["chance"] < 0.8
    assert means["search"] < 0.9  # untrained


def small_log(users):
    """Forty users of one event a day for ninety days."""
    draws = np.random.default_rng(5)
    user = np.repeat(np.arange(40), 90).astype(str)
    item = draws.integers(0, 30, len(user)).astype(str)
    at = np.tile(np.arange(90), 40) * DAY + 1_600_000_000_000_000
    events = pl.DataFrame({"user_id": user, "item_id": item, "timestamp": at})
    items = pl.DataFrame({"item_id": [*map(str, range(30))], "category": [f"c{one % 4}" for one in range(30)]})
    return RawLog("small", events.lazy(), items.lazy())


@pytest.fixture
def grid(monkeypatch):
    """Three cells of one table and one under leave_one_out."""
    monkeypatch.setitem(datasets.DATASETS, "small", small_log)
    known = {"timed": plan.Dataset("small"), "ordered": plan.Dataset("small", newest=12, prepare=plan.LEAVE_ONE_OUT)}
    for name, dataset in known.items():
        monkeypatch.setitem(plan.DATASETS, name, dataset)
    watched = ("stop.protocol=leave_one_out", "stop.metric=ndcg_at_20")
    short = ("model.window=10", "model.width=8", "model.softmax=full", "model.negatives=8")
    cells = (
        plan.Cell("ctr", "timed", "popularity", "popularity", 0, ("stop.requests=20",), evaluate=READ),
        plan.Cell("ctr", "timed", "mean_pooling", "mean_pooling", 1, QUICK, evaluate=READ),
        plan.Cell("ctr", "timed", "mean_pooling", "mean_pooling", 2, QUICK, evaluate=READ),
        plan.Cell("paper", "ordered", "MQSA-TED", "mqsa_ted_paper", 1, (*QUICK, *watched, *short), "leave_one_out"),
    )
    monkeypatch.setattr(tables, "cells", lambda: iter(cells))
    claims = tuple(plan.Claim(row, "popularity", "uniform/gauc", "us") for row in ("mean_pooling", "din"))
    study = replace(
        plan.STUDIES["ctr"],
        dataset="timed",
        rows=("popularity", "mean_pooling", "din"),
        claims=claims,
        segments=("history_50_199",),
    )
    paper = replace(plan.STUDIES["paper"], dataset="ordered", rows=("MQSA-TED",), claims=())
    monkeypatch.setattr(tables, "STUDIES", {"ctr": study, "paper": paper})
    return cells


@pytest.mark.slow
def test_a_grid_killed_in_the_middle_of_a_run_ends_as_one_that_was_not(grid, tmp_path, monkeypatch):
    assert run.run(grid, tmp_path / "whole", tmp_path / "one") == []
    with monkeypatch.context() as patch:  # the clock passes the deadline in the middle of the second cell's steps
        ticks = itertools.count()
        patch.setattr(run.time, "monotonic", lambda: float(next(ticks)))
        run.run(grid, tmp_path / "killed", tmp_path / "two", deadline=6.0)
    assert [run.done(cell, tmp_path / "two") for cell in grid] == [True, False, False, False]
    assert run.run(grid, tmp_path / "killed", tmp_path / "two") == []
    measured = []
    monkeypatch.setattr(run, "measure", lambda cell, *_: measured.append(cell))
    run.run(grid, tmp_path / "killed", tmp_path / "two")
    assert measured == []
    one, two = tables.results_of(tmp_path / "one"), tables.results_of(tmp_path / "two")
    assert sum(map(len, one.values())) == len(grid)
    for key, seeds in one.items():
        for whole, resumed in zip(seeds, two[key], strict=True):
            assert whole.record["metrics"] == resumed.record["metrics"]
            assert whole.record["training"]["best_step"] == resumed.record["training"]["best_step"]
    check_vectors(one)
    check_tables(tables.render(one))


def check_vectors(found):
    """What was kept by user gives the very figures that were measured."""
    for one in itertools.chain.from_iterable(found.values()):
        names = ("ndcg_at_5",) if one.cell.study == "paper" else ("uniform/gauc", "popularity/ndcg_at_10", tables.FULL)
        for name in names:
            ratio = one.ratio(name)
            assert ratio.numerator.sum() / ratio.denominator.sum() == pytest.approx(one.metric(name), rel=1e-5)
    same = found["ctr", "timed", "popularity"]
    assert tables.difference(same, same, "uniform/gauc") == (0.0, 0.0, 0.0)
    other = found["paper", "ordered", "MQSA-TED"]
    with pytest.raises(DataError, match="different data"):
        tables.difference(same, other, "uniform/gauc")


def check_tables(text):
    assert "Cells run: 3 of 3." in text
    row = next(line for line in text.splitlines() if line.startswith("| `mean_pooling` | 2 |"))
    assert row.count("±") == 4
    assert f"| `din` | 0 | {tables.MISSING} |" in text
    assert f"| `din` – `popularity` | uniform/gauc | {tables.MISSING} |" in text
    assert "**ordered**" in text
    parts = [line for line in text[text.index("GAUC by segment") :].splitlines() if line.startswith("| `")]
    assert parts[1].count("±") == 1
    assert parts[2] == f"| `din` | {tables.MISSING} |"
