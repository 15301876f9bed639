"""What an event was: models that are told read it, and no other does; a log of one action is as one without."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import worlds
from pipelines import boost
from pipelines.shipped import find_config
from pipelines.train_config import load_config, suited
from ranking.batch import FIRST_ITEM, Batch, assemble
from ranking.embeddings import ACTIONS, ActionTable, Fields, FieldWidths
from ranking.gradient_boosting import FEATURES, booster
from ranking.models import RANKERS
from ranking.own_counts import add_event, last_action, own_events
from recsys.config import parse
from recsys.history import Events
from recsys.randomness import generator

NONE, VIEW, CART, ITEMS, SEEN = 0, 1, 2, 40, 8
FIELDS = {"item": 8, "category": 8, "position": 4}
TOLD = FIELDS | {"action": 4}
READERS = {
    "din": ("din", {"widths": FIELDS}, {"widths": TOLD}),
    "sim_hard": ("sim_hard", {"widths": FIELDS}, {"widths": TOLD}),
    "eta": ("eta", {"widths": FIELDS}, {"widths": TOLD}),
    "twin": (
        "dare",
        {"tied": True, "attention": FIELDS, "representation": FIELDS},
        {"tied": True, "attention": TOLD, "representation": TOLD},
    ),
    "dare": ("dare", {"attention": FIELDS, "representation": FIELDS}, {"attention": TOLD, "representation": TOLD}),
    "dare+own_counts": (
        "dare",
        {"own_counts": True, "attention": FIELDS, "representation": FIELDS},
        {"own_counts": True, "attention": TOLD, "representation": TOLD},
    ),
    "aw_moe": ("aw_moe", {"window": 20, "contrast": 0.0}, {"window": 20, "contrast": 0.0, "action_width": 8}),
    "sdim": (
        "sdim",
        {"norm": "none", "recent": 5, "window": 20},
        {"norm": "none", "recent": 5, "window": 20, "actions": True},
    ),
    "lightgbm": ("lightgbm", {"trees": 20, "leaves": 7}, {"trees": 20, "leaves": 7, "actions": True}),
}
"""name -> model, its settings without and with actions"""
WORLD = worlds.make_world(known=ITEMS)


def build(model: str, settings: dict[str, Any]) -> Any:
    torch.manual_seed(1)
    config, ranker = RANKERS[model]
    return ranker(parse(config, settings, model), WORLD.items).eval()


def carts(seed: int, requests: int) -> Batch:
    """Return requests whose candidates are the items that were seen: one was put in the cart, and that one is taken."""
    draws = generator(seed, 0, "carts")
    item = np.stack([draws.permutation(ITEMS)[:SEEN] for _ in range(requests)])  # [R, SEEN] keys
    taken = draws.integers(SEEN, size=requests)
    action = np.full(item.shape, VIEW, np.uint8)
    action[np.arange(requests), taken] = CART
    time = worlds.START + np.tile(np.arange(SEEN), requests) * worlds.DAY
    events = Events(item.astype(np.uint32).ravel(), action.ravel(), time)
    end = np.arange(1, requests + 1) * SEEN
    order = (taken[:, None] + np.arange(SEEN)) % SEEN  # what is taken stands first
    candidates = np.take_along_axis(item, order, 1).astype(np.int32) + FIRST_ITEM
    label = (order == taken[:, None]).astype(np.float32)
    at = np.full(requests, worlds.START + SEEN * worlds.DAY)
    return assemble(events, end - SEEN, end, at, candidates, WORLD.key_to_row, label)


def changed(batch: Batch, action: int) -> Batch:
    """Return the batch with every event's action another."""
    return replace(batch, history=replace(batch.history, action=torch.full_like(batch.history.action, action)))


def fitted(name: str) -> Any:
    model_name, _, settings = READERS[name]
    model = build(model_name, settings)
    batches = [carts(seed, 64) for seed in range(20)]
    if model_name == "lightgbm":
        each = ((batch, torch.ones(len(batch), dtype=torch.int64)) for batch in batches)
        boost.grow(model, each, boost.Recent(WORLD.items.count, since=0), seed=0)
    else:
        worlds.fit(model, batches, 200, 0.01)
    return model.eval()


@pytest.mark.parametrize("name", READERS)
def test_what_was_put_in_the_cart_is_found_by_those_who_are_told(name: str) -> None:
    test = carts(1000, 300)
    model = fitted(name)
    assert worlds.auc(model, [test]) > 0.9
    assert worlds.auc(model, [changed(test, VIEW)]) < 0.6  # nothing else gave the answer away


def untold() -> Iterator[tuple[str, str, dict[str, Any]]]:
    yield from ((name, model, settings) for name, (model, settings, _) in READERS.items() if model != "lightgbm")
    for name in ("mqsa_ted", "personal_frequency", "popularity", "transitions", "mean_pooling"):
        yield name, name, {}


@pytest.mark.parametrize(("model", "settings"), [case[1:] for case in untold()], ids=[case[0] for case in untold()])
def test_a_model_without_a_width_for_actions_scores_all_alike(model: str, settings: dict[str, Any]) -> None:
    ranker, batch = build(model, settings), carts(7, 20)
    assert torch.equal(worlds.scores(ranker, batch), worlds.scores(ranker, changed(batch, 9)))


def test_a_width_of_zero_has_no_weights() -> None:
    for model, without, told in READERS.values():
        names = [{name for name, _ in build(model, settings).named_parameters()} for settings in (without, told)]
        assert not any("action" in name for name in names[0])
        assert model == "lightgbm" or any("action" in name for name in names[1])


def test_an_unknown_action_starts_as_nothing_and_every_code_has_a_row() -> None:
    table = ActionTable(3)
    assert table.weight.shape == (ACTIONS + 1, 3)
    assert (table.weight[NONE + 1 :] == 0).all()
    assert (table.weight[0] != 0).all()
    fields = Fields(WORLD.items, FieldWidths(2, 2, 0, 3), "category", window=5)
    fields.action.weight.data.normal_()  # type: ignore[union-attr]
    batch = changed(carts(0, 2), ACTIONS - 1)
    padded = batch.history.padded(5)
    event = fields.history(padded, None, WORLD.items.embedding_row)
    assert torch.equal(event[..., 4:], fields.action.weight[ACTIONS].expand(2, 5, 3))  # type: ignore[union-attr]
    candidate = fields.candidate(batch.candidates.item, WORLD.items.embedding_row)
    assert torch.equal(candidate[..., 4:], fields.action.weight[0].expand(2, SEEN, 3))  # type: ignore[union-attr]


def test_the_last_action_on_a_candidate_is_that_of_its_newest_event() -> None:
    draws = np.random.default_rng(3)
    for _ in range(50):
        rows = [draws.integers(2, 6, draws.integers(0, 9)).tolist() for _ in range(3)]
        history = worlds.histories(rows)
        history = replace(history, action=torch.from_numpy(draws.integers(0, 4, len(history.item)).astype(np.int32)))
        candidate = torch.arange(1, 8, dtype=torch.int32).repeat(3, 1)
        new, action = torch.tensor([3, 4, 9], dtype=torch.int32), torch.tensor([2, 0, 1], dtype=torch.uint8)
        grown = add_event(own_events(history), new, torch.full((3,), 10**6), action)
        for own, more in ((own_events(history), 0), (grown, 1)):
            found = last_action(own, candidate)
            for b, (start, row) in enumerate(zip(history.offsets.tolist(), rows, strict=False)):
                known = dict(zip(row, history.action[start : start + len(row)].tolist(), strict=True))
                known |= {int(new[b]): int(action[b])} if more else {}
                expected = [known.get(item, -1) + 1 for item in range(1, 8)]
                assert found[b].tolist() == expected


TELLING = (
    *("din", "din_50", "dare", "twin", "dare_own_counts", "eta", "sim_hard"),
    *("sdim", "sdim_sum", "mean_pooling", "aw_moe", "lightgbm"),
)


@pytest.mark.parametrize("name", TELLING)
def test_a_shipped_model_tells_actions_apart_where_there_are_several(name: str) -> None:
    class Prepared:
        items = WORLD.items

        def __init__(self, actions: list[str]) -> None:
            self.manifest = {"actions": actions}

    config = load_config(find_config(name))
    several: Any = Prepared(["view", "cart"])
    assert suited(config, several) == config
    for actions in ([], ["buy"]):
        one: Any = Prepared(actions)
        model = suited(config, one).model
        assert model != config.model
        ranker = RANKERS[config.name][1]
        assert not any("action" in part for part, _ in ranker(model, WORLD.items).named_parameters())  # type: ignore[call-arg,attr-defined]
        assert not getattr(model, "actions", False)


def test_trees_take_the_last_action_as_a_category() -> None:
    trees = booster(fitted("lightgbm")).dump_model()["tree_info"]
    nodes = [tree["tree_structure"] for tree in trees]
    found = set()
    while nodes:
        node = nodes.pop()
        if "split_feature" in node:
            found.add((node["split_feature"] == len(FEATURES), node["decision_type"]))
            nodes += [node["left_child"], node["right_child"]]
    assert (True, "==") in found
    assert (True, "<=") not in found


def test_means_differ_by_what_the_events_were() -> None:
    model, batch = build("mean_pooling", {"widths": TOLD}), carts(3, 20)
    with torch.no_grad():
        model.fields.action.weight.normal_()
    assert not torch.allclose(worlds.scores(model, batch), worlds.scores(model, changed(batch, VIEW)))
