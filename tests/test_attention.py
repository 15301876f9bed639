"""Attention by event: it is what the model reads, and the distance to the exact one is nothing where that is known."""

import numpy as np
import pytest
import torch
from logs import synthetic
from shown_world import CONFIG, ingested

import worlds
from pipelines.evaluate import evaluate
from pipelines.evaluation import EvaluateConfig, Evaluation
from pipelines.prepare import prepare
from pipelines.report import build_page, render_html, render_markdown
from pipelines.scoring import assemble_requests, choose, draw_requests
from ranking.attention import Attention
from ranking.bucket_sums import collision
from ranking.models import RANKERS

WORLD = worlds.make_world(users=40)
BATCH = worlds.take(WORLD.requests("test", size=40)[0], range(24))
K = 4
GRID = 3e-4
"""What rounding a table's events to 2^-16 adds up to here."""


def model_of(name: str, **settings):
    return worlds.named_model(name, WORLD, settings).model


@torch.no_grad()
def read_by_score(name: str, model, batch):
    """Return what `score` pools for every candidate, taken from the path that serves."""
    found = []
    holder, attribute = {"sdim": (model, "_features")}.get(name, (model, "_pool"))
    original = getattr(holder, attribute)

    def spy(*args):
        result = original(*args)
        found.append(args[1] if name == "sdim" else result)
        return result

    setattr(holder, attribute, spy)
    model.score(model.encode(batch.history), batch.request, batch.candidates)
    return torch.cat(found, 1).double()


SETTINGS = {
    "dare": {"retrieved": K},
    "din": {},
    "eta": {"retrieved": K},
    "sim_hard": {"retrieved": K},
    "sdim": {"groups": 8},
}


@pytest.mark.parametrize("name", SETTINGS)
@torch.no_grad()
def test_the_weights_are_what_the_score_reads(name):
    model = model_of(name, **SETTINGS[name])
    found = model.attention_of(BATCH.history, BATCH.candidates)
    assert torch.allclose(
        found.weight.double() @ found.event.double(),
        read_by_score(name, model, BATCH),
        atol=GRID if name == "sdim" else 1e-6,
    )
    padding = ~BATCH.history.padded(200).mask[:, None].expand_as(found.weight)
    assert not found.weight[padding].any()
    assert not found.exact[padding].any()
    if name in ("dare", "eta", "sim_hard"):
        assert int((found.weight > 0).sum(-1).max()) <= K


@pytest.mark.parametrize("norm", ["l2", "none"])
@pytest.mark.parametrize("long_includes_short", [True, False])
@torch.no_grad()
def test_sdim_weights_hold_for_every_read_out(norm, long_includes_short):
    model = model_of("sdim", groups=8, norm=norm, recent=3, long_includes_short=long_includes_short)
    found = model.attention_of(BATCH.history, BATCH.candidates)
    assert torch.allclose(found.weight @ found.event, read_by_score("sdim", model, BATCH), atol=GRID)


@pytest.mark.parametrize("name", ["dare", "eta"])
@torch.no_grad()
def test_who_finds_every_event_is_exact_and_who_finds_fewer_is_further_off(name):
    every = model_of(name, retrieved=200).attention_of(BATCH.history, BATCH.candidates)
    assert float(every.elsewhere.max()) < 1e-12
    assert float(every.turned.max()) < 1e-12
    off = [
        float(model_of(name, retrieved=k).attention_of(BATCH.history, BATCH.candidates).elsewhere.mean())
        for k in (1, 4, 12)
    ]
    assert off[0] > off[1] > off[2] > 0


@torch.no_grad()
def test_dare_loses_just_the_attention_it_does_not_find():
    found = model_of("dare", retrieved=K).attention_of(BATCH.history, BATCH.candidates)
    best = found.exact.sort(-1, descending=True).values[..., :K].sum(-1)
    assert torch.allclose(found.elsewhere, 1 - best)


@torch.no_grad()
def test_hashing_nears_its_collision_chance_as_groups_grow():
    config = {"norm": "none", "bits": 3}
    off = [
        float(model_of("sdim", groups=g, **config).attention_of(BATCH.history, BATCH.candidates).elsewhere.nanmean())
        for g in (4, 64, 1024)
    ]
    assert off[0] > 2 * off[1] > 4 * off[2]
    assert off[2] < 0.1
    found = model_of("sdim", groups=4, **config)
    attention = found.attention_of(BATCH.history, BATCH.candidates)
    padded = BATCH.history.padded(200)
    s, q = (
        found.fields.semantic(item, WORLD.items.embedding_row).double() for item in (padded.item, BATCH.candidates.item)
    )
    cosine = torch.cosine_similarity(s[:, None], q[:, :, None], dim=-1)
    expected = collision(cosine, 3).masked_fill(~padded.mask[:, None], 0.0)
    assert torch.allclose(attention.exact, expected, atol=1e-9)


@torch.no_grad()
def test_sim_finds_nothing_of_a_category_that_is_not_there():
    model = model_of("sim_hard", retrieved=K)
    found = model.attention_of(BATCH.history, BATCH.candidates)
    column = WORLD.items.column("category")
    there = (
        column[BATCH.history.padded(200).item.long()][:, None] == column[BATCH.candidates.item.long()][..., None]
    ).any(-1)
    assert bool((~there).any())
    assert (found.elsewhere[~there] == 1).all()
    assert (found.turned[~there] == 1).all()
    assert (found.elsewhere[there] < 1).all()


def test_distances_are_those_of_a_case_done_by_hand():
    weight = torch.tensor([[[0.5, 0.5, 0.0], [0.0, 0.0, 0.0]]], dtype=torch.float64)
    exact = torch.tensor([[[0.2, 0.3, 0.5], [0.2, 0.8, 0.0]]], dtype=torch.float64)
    event = torch.eye(3, dtype=torch.float64)[None]
    found = Attention(weight, exact, event)
    assert found.elsewhere.tolist() == [pytest.approx([1 - (0.2 + 0.3), 1.0])]
    cosine = (0.1 + 0.15) / (0.5**0.5 * (0.04 + 0.09 + 0.25) ** 0.5)
    assert found.turned.tolist() == [pytest.approx([1 - cosine, 1.0])]
    empty = Attention(weight * 0, exact * 0, event)
    assert bool(empty.elsewhere.isnan().all())
    assert bool(empty.turned.isnan().all())


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """A prepared set, three models with random weights, and their evaluation."""
    folder = tmp_path_factory.mktemp("attention")
    done = prepare(ingested(synthetic(2_000), [], folder / "part"), folder / "set", CONFIG)
    models = {}
    plain = {"category": None}
    for name, settings in {"dare": plain | {"retrieved": 2}, "din": plain, "sdim": plain, "popularity": {}}.items():
        config_class, model_class = RANKERS[name]
        torch.manual_seed(0)
        models[name] = model_class(config_class(**settings), done.items)
    config = EvaluateConfig(
        samplers=("uniform",), history_edges=(20, 50), attention_requests=40, full_ranking_requests=5, resamples=20
    )
    return done, models, evaluate(models, done, config)


def test_distances_by_length_are_means_of_requests_looked_at_one_by_one(evaluated):
    done, models, result = evaluated
    chosen = draw_requests(done, "test", 20_000, result.config.seed)
    few = choose(len(chosen), 40, result.config.seed, "evaluate/attention")
    sets = done.candidates("test", "uniform")
    found = {(one.model, one.segment): one for one in result.attention.distances}
    assert {model for model, _ in found} == {"dare", "sdim"}  # DIN is exact, popularity looks at nothing
    for (name, segment), told in found.items():
        low, high = {"history_0_19": (0, 20), "history_20_49": (20, 50), "history_50_up": (50, 10**9)}[segment]
        elsewhere = []
        for place in few[(chosen.length[few] >= low) & (chosen.length[few] < high)].tolist():
            items = sets.item[sets.offsets[place] : sets.offsets[place + 1]]
            item = items[[k * len(items) // 8 for k in range(8)]]
            with torch.inference_mode():
                batch = assemble_requests(models[name], done, chosen.take(np.array([place])), item[None])
                value = models[name].eval().attention_of(batch.history, batch.candidates).elsewhere
            if not value.isnan().any():
                elsewhere.append(float(value.mean()))
        assert told.requests == len(elsewhere)
        assert told.elsewhere[0] == pytest.approx(np.mean(elsewhere), abs=1e-9)


def test_examples_name_items_of_the_history_and_the_rank_of_what_was_taken(evaluated, tmp_path):
    done, _, result = evaluated
    assert len(result.attention.examples) == 3
    for one in result.attention.examples:
        assert [view.model for view in one.views] == ["dare", "din", "sdim"]
        for view in one.views:
            assert 1 <= view.rank <= one.candidates
            shares = [looked.share for looked in view.looked]
            assert shares == sorted(shares, reverse=True)
            assert 0 < sum(shares) <= 1 + 1e-9
            assert all(looked.days > 0 and looked.back >= 1 and looked.item.startswith("i") for looked in view.looked)
    result.save(tmp_path / "evaluation")
    assert Evaluation.load(tmp_path / "evaluation") == result
    page = build_page(result, {}, done.manifest)
    for text in (render_html(page), render_markdown(page)):
        assert "Attention that lies elsewhere" in text
        assert "Not defined: negatives were drawn, not shown" in text
        assert page.looks[0].title in text
