"""The contract of `ranking.ranker.Ranker`, held by every model in `ranking.models.RANKERS`.

Models are trained on a small world first: at their initial weights all scores are nearly equal and nothing can fail.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
from ranker_world import SEED, SETTINGS, build, requests, trained, world
from safetensors.torch import load_file, save_file
from torch import Tensor

import worlds
from ranking.batch import FIRST_ITEM, PAD, UNKNOWN, History
from ranking.models import RANKERS
from ranking.ranker import NEGATIVE
from recsys.config import parse

TOLERANCE = 1e-6


def held_to(test: str) -> pytest.MarkDecorator:
    """Parametrise over every setting that is not excused from a test."""
    return pytest.mark.parametrize("name", [name for name, setting in SETTINGS.items() if test not in setting.exempt])


def agree(found: Tensor, expected: Tensor) -> None:
    """Hold scores to 1e-6 relative (absolute below 1)."""
    error = ((found - expected).abs() / expected.abs().clamp_min(1)).max()
    assert float(error) <= TOLERANCE


@held_to("permuting_candidates")
def test_permuting_candidates_permutes_scores(name: str) -> None:
    model, batch = trained(name), requests()
    order = torch.randperm(batch.candidates.item.shape[1], generator=torch.Generator().manual_seed(SEED))
    shuffled = worlds.with_candidates(batch, batch.candidates.item[:, order])
    agree(worlds.scores(model, shuffled), worlds.scores(model, batch)[:, order])


@held_to("alone")
def test_a_candidate_alone_scores_as_among_many(name: str) -> None:
    model, batch = trained(name), requests()
    together = worlds.scores(model, batch)
    for c in range(together.shape[1]):
        alone = worlds.with_candidates(batch, batch.candidates.item[:, c : c + 1])
        agree(worlds.scores(model, alone), together[:, c : c + 1])


@held_to("batching")
def test_padding_order_and_batch_size_change_nothing(name: str) -> None:
    model, batch = trained(name), requests()
    expected = worlds.scores(model, batch)
    order = torch.randperm(len(batch), generator=torch.Generator().manual_seed(SEED))
    agree(worlds.scores(model, worlds.take(batch, order)), expected[order])

    # Alone, a short history has no padding; among the others it is padded to the longest of them.
    assert batch.history.lengths.min() < batch.history.lengths.max()
    agree(torch.cat([worlds.scores(model, worlds.take(batch, [b])) for b in range(len(batch))]), expected)

    padding = torch.zeros(len(batch), 5, dtype=torch.int32)
    wider = worlds.with_candidates(batch, torch.cat([batch.candidates.item, padding], 1))
    found = worlds.scores(model, wider)
    agree(found[:, :-5], expected)
    assert (found[:, -5:] == NEGATIVE).all()


@pytest.mark.parametrize("name", SETTINGS)
def test_no_candidates_have_no_scores(name: str) -> None:
    model, batch = trained(name), requests()
    assert worlds.scores(model, worlds.with_candidates(batch, batch.candidates.item[:, :0])).shape == (len(batch), 0)


@held_to("strangers")
def test_empty_histories_and_unknown_items_score_finite(name: str) -> None:
    model, batch = trained(name), requests()
    h = batch.history
    nothing = History(h.item[:0], h.action[:0], h.time[:0], torch.zeros_like(h.offsets))
    strangers = replace(h, item=torch.full_like(h.item, UNKNOWN))
    for history in (nothing, strangers):
        found = worlds.scores(model, replace(batch, history=history))
        assert found.isfinite().all()
        assert (found[batch.candidates.item == PAD] == NEGATIVE).all()
        assert (found[batch.candidates.item >= FIRST_ITEM] > NEGATIVE).all()


@held_to("state")
def test_a_state_serves_every_moment_and_every_candidate(name: str) -> None:
    """What `encode` gave once may be cached: scoring other candidates at another moment in between changes nothing."""
    model, batch = trained(name), requests()
    with torch.no_grad():
        state = model.encode(batch.history)
    tensors = [state] if isinstance(state, Tensor) else list(state)
    assert all(len(tensor) == len(batch) for tensor in tensors)
    before = [tensor.clone() for tensor in tensors]
    later = replace(batch.request, at=batch.request.at + 30 * worlds.DAY)
    other = worlds.with_candidates(batch, batch.candidates.item.roll(1, 0))
    with torch.no_grad():
        model.score(state, later, other.candidates)
        found = model.score(state, batch.request, batch.candidates)
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))
    assert torch.equal(found, worlds.scores(model, batch))


@held_to("saving")
def test_saving_and_loading_is_exact(name: str, tmp_path: Any) -> None:
    model = trained(name)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    other = build(name, world(), seed=SEED + 1)
    other.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert torch.equal(worlds.scores(other, requests()), worlds.scores(model, requests()))


@held_to("overfits")
def test_64_requests_can_be_learned_by_heart(name: str) -> None:
    (batch,) = world().requests("train", size=64)[:1]
    model = build(name, world())
    worlds.fit(model, [batch], 150, SETTINGS[name].learning_rate)
    assert worlds.auc(model, [batch]) > 0.99


@held_to("gradients")
def test_every_parameter_gets_a_gradient(name: str) -> None:
    model = build(name, world()).train()
    parameters = dict(model.named_parameters())
    # Two steps: a gate or bias that starts at zero may hold back what lies behind it in the first.
    worlds.fit(model, world().training(model.trains_on)[:2], 2, SETTINGS[name].learning_rate)
    model.train()
    model.zero_grad()
    model.loss(world().training(model.trains_on)[0], torch.Generator().manual_seed(SEED)).total.backward()
    for key, parameter in parameters.items():
        assert parameter.grad is not None, key
        gradient = parameter.grad.to_dense() if parameter.grad.is_sparse else parameter.grad
        assert gradient.isfinite().all(), key
        assert gradient.abs().max() > 0, key


@held_to("same_losses")
def test_the_same_seed_gives_the_same_losses(name: str) -> None:
    batches = world().training(build(name, world()).trains_on)
    runs = []
    for seed in (SEED, SEED, SEED + 1):
        torch.manual_seed(seed * 7)  # the global generator must not matter once the model is built
        model = build(name, world())
        torch.manual_seed(seed * 13)
        runs.append(worlds.fit(model, batches, 8, SETTINGS[name].learning_rate, seed=seed))
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]


@held_to("beats_references")
def test_it_beats_popularity_and_mean_pooling(name: str) -> None:
    test = world().requests("test", size=300, negatives=20)
    references = {other: worlds.auc(trained(other), test) for other in ("popularity", "mean_pooling")}
    assert references["popularity"] < 0.55 < references["mean_pooling"]
    reached = [worlds.auc(trained(name, SEED + at), test) for at in range(SETTINGS[name].trainings)]
    assert sum(reached) / len(reached) > max(references.values()) + SETTINGS[name].margin


@pytest.mark.parametrize("name", SETTINGS)
def test_histories_of_10_000_events_train_and_score(name: str) -> None:
    """Each model reads them whole, but for MQSA-TED, whose attention is quadratic in what it reads."""
    setting, rows = SETTINGS[name], len(world().items)
    config_class, model_class = RANKERS[setting.model]
    whole = {"window": 10_000} if setting.model != "mqsa_ted" and "window" in config_class.__annotations__ else {}
    torch.manual_seed(SEED)
    model: Any = model_class(parse(config_class, setting.config | whole, name), world().items)
    if setting.model == "lightgbm":  # it has no window, and scores once its trees are grown
        model = trained(name)
    draws = torch.Generator().manual_seed(SEED)
    item = torch.randint(FIRST_ITEM, rows, (10_003,), generator=draws, dtype=torch.int32)
    long = History(item, torch.zeros_like(item), torch.arange(10_003), torch.tensor([0, 10_000, 10_003]))
    (few,) = world().requests("test", size=2, negatives=5)[:1]
    request = replace(few.request, at=torch.full((2,), 20_000))
    batch = replace(few, history=long, request=request)
    if name in [other for other, it in SETTINGS.items() if "gradients" not in it.exempt]:
        loss = model.train().loss(batch, draws).total
        loss.backward()
        assert loss.isfinite()
        assert all(p.grad is None or p.grad.to_dense().isfinite().all() for p in model.parameters())
    scores = worlds.scores(model.eval(), batch)
    assert scores.isfinite().all()
    agree(worlds.scores(model, worlds.take(batch, [1])), scores[1:])


def test_every_model_is_held_to_the_contract_and_excuses_name_tests_that_exist() -> None:
    tests = {"permuting_candidates", "alone", "batching", "strangers", "state", "saving"}
    tests |= {"overfits", "gradients", "same_losses", "beats_references"}
    assert {setting.model for setting in SETTINGS.values()} == set(RANKERS)
    assert all(set(setting.exempt) <= tests for setting in SETTINGS.values())
