"""DARE in training, its loss written out by hand: padded candidates, hidden items, log q, and the objective."""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from test_dare import ROWS, SMALL, WITH_ACTION, build, make_batch
from torch import Tensor

from ranking.batch import UNKNOWN, Batch, Candidates
from ranking.dare import Dare, DareConfig
from ranking.embeddings import EventTable, FieldWidths, ItemEmbedding
from ranking.layers import ScoringHead, search
from ranking.losses import listwise_cross_entropy


def padded_batch(seed: int = 31) -> Batch:
    """Return requests of one to five candidates, each drawn as often as it pleases."""
    batch = make_batch(seed)
    item = batch.candidates.item.masked_fill(torch.arange(5) >= torch.tensor([5, 3, 1, 4])[:, None], 0)
    log_q = torch.randn(item.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    real = (item > 0).double()
    return replace(batch, candidates=Candidates(item), label=batch.label * real, weight=real, log_q=log_q)


def logits_of(head: ScoringHead, x: Tensor) -> Tensor:
    """Return the logits [R] of rows [R, F] that BatchNorm sees all at once."""
    x = (x - x.mean(0)) / (x.var(0, unbiased=False) + head.norm.eps).sqrt() * head.norm.weight + head.norm.bias
    for layer in list(head.layers)[:-1]:
        linear = isinstance(layer, torch.nn.Linear)
        x = x @ layer.weight.T + layer.bias if linear else x.clamp(min=0) + layer.weight * x.clamp(max=0)
    last = head.layers[-1]
    return (x @ last.weight.T + last.bias).squeeze(1)


def attended(key: Tensor, bias: Tensor, q: Tensor, e: Tensor, most: int) -> Tensor:
    """Return h of one candidate: softmax attention over the best `most` events, the newer of equals; 0 without any."""
    scores = key @ q / math.sqrt(len(q)) + bias
    kept = sorted(range(len(scores)), key=lambda t: (-float(scores[t].detach()), -t))[:most]
    return scores[kept].softmax(0) @ e[kept] if kept else e.new_zeros(e.shape[1])


def written(model: Dare, batch: Batch, row_of: Tensor, objective: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """Return the parts of the loss, request by request, of real candidates only."""
    config, code = model.config, model.items.column("category").long()
    (att, rep), row_of = (model.attention, model.representation), row_of.long()

    def semantic(fields: object, items: Tensor) -> Tensor:
        return torch.cat([fields.item.weight[row_of[items.long()]], fields.category.weight[code[items.long()]]], 1)

    rows: dict[str, list[Tensor]] = {"main": [], "auxiliary": []}
    for b, candidates in enumerate(batch.candidates.item):
        first, end = batch.history.offsets[b : b + 2].tolist()
        used = slice(max(first, end - config.window), end)
        events, rows_of = batch.history.item[used], {"position": torch.arange(used.stop - used.start, 0, -1)}
        if rep.action is not None:
            rows_of["action"] = batch.history.action[used].long() + 1
        tables = [(getattr(att, name).weight, getattr(rep, name).weight, at) for name, at in rows_of.items()]
        key, e = semantic(att, events), torch.cat([semantic(rep, events), *(table[at] for _, table, at in tables)], 1)
        bias = sum((table[at] * table[0]).sum(1) / math.sqrt(table.shape[1]) for table, _, at in tables)
        for candidate in candidates[candidates > 0]:
            q = semantic(att, candidate[None])[0]
            v = torch.cat([semantic(rep, candidate[None])[0], *(table[0] for _, table, _ in tables)])
            for name, most in (("main", config.retrieved), ("auxiliary", config.window)):
                h = attended(key, bias, q, e, most)
                rows[name].append(torch.cat([v, h, v * h]))
    heads = {"main": model.head, "auxiliary": model.auxiliary_head}
    parts = {name: objective(logits_of(head, torch.stack(rows[name]))) for name, head in heads.items()}
    embeddings = {id(part.weight) for part in model.modules() if isinstance(part, ItemEmbedding | EventTable)}
    weights = [p for n, p in model.named_parameters() if id(p) not in embeddings and not n.endswith("bias")]
    return parts | {"l2": config.l2 * sum(p.square().sum() for p in weights)}


@pytest.mark.parametrize("objective", ["pointwise", "listwise"])
@pytest.mark.parametrize(("rate", "widths"), [(0.0, SMALL), (0.4, SMALL), (0.4, WITH_ACTION)])
def test_the_loss_is_that_of_real_candidates_with_hidden_items_and_log_q(
    rate: float, widths: FieldWidths, objective: str
) -> None:
    model = build(30, unknown_rate=rate, l2=0.01, objective=objective, attention=widths, representation=widths).train()
    batch = padded_batch()
    real, hidden = batch.candidates.mask, torch.rand(ROWS, generator=torch.Generator().manual_seed(5)) < rate
    hidden[0] = False
    seen = torch.cat([batch.candidates.item[real], batch.history.item]).long()
    assert bool(hidden[seen].any()) == bool(rate)

    def of(logits: Tensor) -> Tensor:
        moved, label = logits - batch.log_q[real], batch.label[real]
        if objective == "pointwise":
            return F.binary_cross_entropy_with_logits(moved, label)
        spread = torch.full(real.shape, -1e9, dtype=torch.float64).masked_scatter(real, moved)
        return listwise_cross_entropy(spread, batch.label, batch.weight)

    row_of = model.items.embedding_row.masked_fill(hidden, UNKNOWN)
    expected = written(model, batch, row_of, of)
    loss = model.loss(batch, torch.Generator().manual_seed(5))
    assert set(loss.parts) == set(expected)
    for name, part in loss.parts.items():
        assert float(part) == pytest.approx(float(expected[name].detach()), rel=1e-9), name
    total = sum(expected.values())
    assert float(loss.total.detach()) == pytest.approx(float(total.detach()), rel=1e-9)
    tables = [model.attention.item.weight, model.representation.item.weight]
    gradients = [torch.autograd.grad(one, tables) for one in (loss.total, total)]
    for found, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(found.to_dense(), wanted.to_dense(), rtol=1e-7, atol=1e-9)


def test_padded_candidates_move_no_running_statistic() -> None:
    batch = padded_batch()
    wider = replace(
        batch,
        candidates=Candidates(F.pad(batch.candidates.item, (0, 3))),
        **{name: F.pad(getattr(batch, name), (0, 3)) for name in ("label", "weight", "log_q")},
    )
    states = []
    for one in (batch, wider):
        model = build(32).train()
        model.loss(one, torch.Generator())
        states.append(model.head.norm.running_mean)
    torch.testing.assert_close(*states)


def test_zero_and_minus_zero_are_one_score_and_the_newer_event_wins() -> None:
    mask = torch.ones(1, 6, dtype=torch.bool)
    for row, best in (([0.0, -0.0, -0.0, 0.0, -0.0, -1.0], [3, 4]), ([-0.0, 0.0, -0.0, -1.0, -2.0, -3.0], [1, 2])):
        scores = torch.tensor([[row]])
        for one in (scores, scores.double()):  # each takes a way of its own
            index, found = search(one, mask, 2)
            assert sorted(index.flatten().tolist()) == best
            assert found.all()


def test_the_defaults_are_the_authors() -> None:
    config = DareConfig()
    assert (config.window, config.retrieved, config.scaling, config.features) == (200, 20, "split", "full")
    assert (config.auxiliary, config.tied, config.l2) == (True, False, 1e-6)
    for widths in (config.attention, config.representation):
        assert (widths.item, widths.category, widths.position) == (16, 16, 16)


def test_embeddings_start_small_and_the_padding_row_at_zero() -> None:
    torch.manual_seed(0)
    table, position = ItemEmbedding(1000, 16).weight.detach(), EventTable(1000, 16).weight.detach()
    assert table[0].abs().sum() == 0
    for weight in (table[1:], position):
        assert float(weight.std()) == pytest.approx(0.01, rel=0.05)  # 16,000 draws
        assert float(weight.mean()) == pytest.approx(0, abs=5e-4)
