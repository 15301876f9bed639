"""AW-MoE in training: every setting of the contrastive loss reaches it, and both views of a history learn from it."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from test_aw_moe import ROWS, build, draws, gate_of, make_batch
from torch import Tensor

from ranking.aw_moe import AwMoe
from ranking.batch import UNKNOWN, Batch
from ranking.contrast import masked_view, others, some_of


def small(**changes: Any) -> AwMoe:
    """Return a model in training mode whose gates are of the size of 1."""
    model = build(27, masking=0.4, contrast=1.0, **changes).train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.6)
    return model


def requests() -> Batch:
    """Return requests whose cross-entropy weighs nothing, so that the whole loss is the contrastive one."""
    batch = make_batch(28, users=6)
    return replace(batch, weight=torch.zeros_like(batch.weight))


def written(model: AwMoe, batch: Batch, hold: str = "") -> Tensor:
    """Return L_cl as the model's settings want it, written apart from `AwMoe.loss`; `hold` keeps one side still."""
    config, generator = model.config, draws(3)
    row_of, row = model.items.embedding_row, torch.arange(len(batch))
    event, mask = model._events(batch.history, row_of)
    h = model.inner(model.fields.semantic(batch.candidates.item, row_of))
    first = [int(labels.nonzero()[0]) if labels.any() else 0 for labels in batch.label]
    context = h[row, first][:, None]
    view = masked_view(mask, config.masking, generator)
    negative = others(batch.history.padded(config.window).item, mask)
    if config.negatives is not None:
        negative = some_of(negative, config.negatives, generator)
    g, seen = (gate_of(model, event, context, real)[:, 0] for real in (mask, view))
    g, seen = (side.detach() if hold == name else side for name, side in (("gate", g), ("view", seen)))
    each = []
    for own in mask.any(1).nonzero().flatten().tolist():
        against = seen if config.variant == "views" else g
        compared = torch.stack([seen[own], *(against[n] for n in negative[own].nonzero().flatten().tolist())])
        cosine = torch.cosine_similarity(g[own][None], compared)
        similar = cosine if config.similarity == "cosine" else compared @ g[own]
        each.append(-(similar / config.temperature).log_softmax(0)[0])
    return torch.stack(each).mean()


SETTINGS = [
    {},
    {"variant": "gates"},
    {"similarity": "dot"},
    {"temperature": 0.25},
    {"negatives": 1},
    {"variant": "gates", "similarity": "dot", "temperature": 3.0, "negatives": 2},
]


def test_each_setting_of_the_contrastive_loss_reaches_it():
    batch, found = requests(), []
    for changes in SETTINGS:
        loss = small(**changes).loss(batch, draws(3))
        found.append(float(loss.total.detach()))
        assert (
            found[-1] == float(loss.parts["cl"]) == pytest.approx(float(written(small(**changes), batch).detach()))
        ), changes
    assert len({round(value, 3) for value in found}) == len(SETTINGS)


@pytest.mark.parametrize("changes", SETTINGS, ids=str)
def test_the_whole_history_and_the_masked_one_both_learn(changes):
    model, batch = small(**changes), requests()
    losses = [model.loss(batch, draws(3)).total, *(written(model, batch, hold) for hold in ("", "gate", "view"))]
    found, both, of_view, of_gate = (torch.autograd.grad(loss, model.gate_unit.last.weight)[0] for loss in losses)
    torch.testing.assert_close(found, both)
    for part in (of_view, of_gate):
        assert (found - part).norm() > 0.01 * found.norm()


def test_items_are_hidden_from_history_and_candidates_alike():
    model, shown = (build(29, unknown_rate=rate, contrast=0.0).train() for rate in (0.5, 0.0))
    hidden = torch.rand(ROWS, generator=draws(3)) < 0.5
    hidden[0] = False
    shown.items.embedding_row = shown.items.embedding_row.masked_fill(hidden, UNKNOWN)
    found, expected = (float(one.loss(make_batch(30), draws(3)).total.detach()) for one in (model, shown))
    assert found == pytest.approx(expected)
    assert found != pytest.approx(float(build(29, contrast=0.0).train().loss(make_batch(30), draws(3)).total.detach()))
