"""MQSA-TED against its equations, written a second time as plain loops, and against numbers worked out by hand."""

import math
from dataclasses import replace

import faiss
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ranking import mqsa_ted
from ranking.baskets import Slots, arrange
from ranking.batch import FIRST_ITEM, Batch, Candidates, History, Request
from ranking.items import ItemTable, Transitions
from ranking.mqsa_ted import FILL, Block, Branch, MqsaTed, MqsaTedConfig, pool, teacher
from ranking.ranker import NEGATIVE
from ranking.softmax import chunked_log_partition, log_partition
from recsys.config import parse
from recsys.errors import ConfigError

ITEMS = 9
Users = list[list[list[int]]]  # users of baskets of item rows


def keep(x):
    return x


def identity(width):
    return torch.eye(width)


def edges(count):
    """Return transitions from a dense [V, V] table."""
    head, target = np.nonzero(count)
    offsets = np.concatenate([[0], np.cumsum(np.bincount(head, minlength=len(count)))])
    weight = torch.tensor(count[head, target], dtype=torch.float32)
    return Transitions(torch.from_numpy(offsets), torch.tensor(target, dtype=torch.int32), weight)


def item_table(items=ITEMS, untrained=(), seed=0):
    """Return a catalogue with random transitions (none from row 4 on in every third row) and counts."""
    draws = np.random.default_rng(seed)
    dense = np.zeros((items + 2, items + 2))
    dense[2:, 2:] = draws.integers(0, 4, (items, items)) * (draws.random((items, items)) < 0.4)
    dense[4::3] = 0
    count = torch.from_numpy(draws.integers(1, 9, items + 2))
    count[list(untrained)] = 0
    return ItemTable([], torch.zeros(items + 2, 0, dtype=torch.int32), [], count, edges(dense))


def make_model(items=None, seed=0, **options):
    """Return a model in evaluation mode whose every weight, bias and gain is far from its initial value."""
    torch.manual_seed(seed)
    config = MqsaTedConfig(**({"width": 6, "window": 8, "dropout": 0.0} | options))
    model = MqsaTed(config, items or item_table()).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.5)
        model.item[0] = 0
    return model


def packed(users: Users):
    """Return histories in which basket g happened at moment g."""
    item = [row for baskets in users for basket in baskets for row in basket]
    time = [10 * g + 5 for baskets in users for g, basket in enumerate(baskets) for _ in basket]
    offsets = np.concatenate([[0], np.cumsum([sum(map(len, baskets)) for baskets in users])])
    item = torch.tensor(item, dtype=torch.int32)
    return History(item, torch.zeros_like(item), torch.tensor(time, dtype=torch.int64), torch.from_numpy(offsets))


def singles(*rows: list[int]) -> History:
    return packed([[[item] for item in row] for row in rows])


def make_batch(users: Users, following: list[list[int]]):
    width = max(map(len, following))
    item = torch.tensor([row + [0] * (width - len(row)) for row in following], dtype=torch.int32)
    label = (item != 0).float()
    request = Request(torch.full((len(users),), 10**6))
    return Batch(packed(users), request, Candidates(item), label, label)


def outputs(model, users: Users):
    """Return Zhat of every basket, user by user, oldest first."""
    padded = packed(users).padded(model.config.window)
    slots = arrange(padded, model.items.embedding_row, model.config.baskets)
    z = model(slots, keep)
    return [row[count > 0] for row, count in zip(z, slots.count, strict=True)]


def written_branch(model, branch, window, baskets):
    """Return Z of each basket by the equations of the paper, in loops over positions; all in double precision."""
    c, model, branch = model.config, model.double(), branch.double()
    first = c.window - len(baskets)
    slots = [
        (g, math.sqrt(c.width) * model.item[item] + model.position[first + g])
        for g, basket in enumerate(baskets)
        for item in basket
    ]
    for block in branch.blocks:
        out = []
        for g in range(len(baskets)):
            mean = torch.stack([s for h, s in slots if g - window < h <= g]).mean(0)
            query = block.query_norm(mean)
            keys = torch.stack([block.key(s) for h, s in slots if h <= g])
            values = torch.stack([block.value(s) for h, s in slots if h <= g])
            parts = []
            for head in range(c.heads):
                cut = slice(head * c.width // c.heads, (head + 1) * c.width // c.heads)
                logits = keys[:, cut] @ block.query(query)[cut] / math.sqrt(c.width / c.heads)
                parts.append(torch.softmax(logits, 0) @ values[:, cut])
            o = block.output_norm(torch.cat(parts) + query)
            out.append(o + block.contract(torch.relu(block.expand(o))))
        slots = [(g, out[g]) for g, _ in slots]
    return torch.stack([branch.norm(o) for o in out])


def written_outputs(model, baskets):
    short, long = (
        written_branch(model, branch, window, baskets)
        for branch, window in ((model.short, 1), (model.long, model.config.averaged))
    )
    return model.config.alpha * short + (1 - model.config.alpha) * long


def written_losses(model, users: Users, following):
    """Return (L_rec, L_kd) with dense logits and a dense teacher."""
    c, E = model.config, model.double().item
    rows, heads = [], []
    for baskets, after in zip(users, following, strict=True):
        heads += [item for basket in baskets for item in basket if item >= 2]
        for z, wanted in zip(written_outputs(model, baskets), [*baskets[1:], after], strict=True):
            known = sorted({item for item in wanted if item >= 2})
            if known:
                logits = torch.cat([torch.zeros(1), E[2:] @ z])  # the padding class first
                rows.append(-torch.log_softmax(logits, 0)[[item - 1 for item in known]].mean())
    t = model.items.transitions
    each = []
    for head in heads:
        target, weight = t.of(head)
        if len(target):
            r = torch.zeros(len(E) - 2).double()
            r[target.long() - 2] = weight.double() / weight.max()
            p = torch.softmax(r / model.tau, 0)
            q = torch.log_softmax(math.sqrt(c.width) * E[2:] @ E[head] / model.tau, 0)
            each.append(-(p * q).sum())
    return torch.stack(rows).mean(), torch.stack(each).mean() if each else torch.zeros(()).double()


basket_of_items = st.lists(st.integers(1, ITEMS + 1), min_size=1, max_size=3)
some_users = st.lists(st.lists(basket_of_items, min_size=1, max_size=4), min_size=1, max_size=4).filter(
    lambda users: all(sum(map(len, baskets)) <= 8 for baskets in users)
)
some_options = st.fixed_dictionaries(
    {
        "averaged": st.integers(1, 5),
        "blocks": st.integers(1, 3),
        "heads": st.sampled_from([1, 2, 3]),
        "alpha": st.sampled_from([0.0, 0.3, 1.0]),
        "seed": st.integers(0, 3),
    }
)


@settings(max_examples=40, deadline=None)
@given(some_users, some_options)
def test_outputs_are_the_equations_on_baskets(users, options):
    model = make_model(**options).double()
    for got, baskets in zip(outputs(model, users), users, strict=True):
        torch.testing.assert_close(got, written_outputs(model, baskets), rtol=1e-9, atol=1e-9)
    newest = model.encode(packed(users))
    torch.testing.assert_close(newest, torch.stack([z[-1] for z in outputs(model, users)]), rtol=1e-9, atol=1e-9)


@settings(max_examples=40, deadline=None)
@given(some_users, some_options, st.sampled_from(["full", "chunked"]), st.data())
def test_losses_are_the_equations_on_baskets(users, options, softmax, data):
    following = [data.draw(basket_of_items) for _ in users]
    following[0] = [*following[0], 5]
    model = make_model(**options, softmax=softmax, tau=0.7, lambda_kd=0.3).double()
    loss = model.loss(make_batch(users, following), torch.Generator())
    rec, kd = written_losses(model, users, following)
    torch.testing.assert_close(loss.parts["rec"], rec.detach(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(loss.parts["kd"], kd.detach(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(loss.total.detach(), (rec + 0.3 * kd).detach(), rtol=1e-9, atol=1e-9)


@settings(max_examples=30, deadline=None)
@given(some_users, some_options, st.randoms(use_true_random=False))
def test_order_inside_a_basket_changes_nothing_at_all(users, options, random):
    model = make_model(**options).train()
    model.config = replace(model.config, dropout=0.3)
    shuffled = [[random.sample(basket, len(basket)) for basket in baskets] for baskets in users]
    assert torch.equal(model.encode(packed(users)), model.encode(packed(shuffled)))
    losses = [
        model.loss(make_batch(some, [[3]] * len(users)), torch.Generator().manual_seed(1)).total
        for some in (users, shuffled)
    ]
    assert torch.equal(*losses)


def test_at_distinct_times_baskets_are_single_items():
    rows = [[3, 3, 5, 1, 8], [4, 2], [7]]
    model = make_model()
    other = make_model(baskets=False)
    users = [[[item] for item in row] for row in rows]
    together = replace(packed(users), time=torch.zeros(8, dtype=torch.int64))  # one moment, told to ignore it
    assert torch.equal(model.encode(packed(users)), other.encode(together))
    assert not torch.allclose(model.encode(packed(users)), model.encode(together))


def test_one_query_window_makes_both_branches_the_same_function():
    model = make_model(averaged=1)
    model.long.load_state_dict(model.short.state_dict())
    history = singles([2, 5, 7, 3], [9, 9])
    encoded = []
    for alpha in (0.0, 0.4, 1.0):
        model.config = replace(model.config, alpha=alpha)
        encoded.append(model.encode(history))
    torch.testing.assert_close(encoded[0], encoded[2], rtol=0, atol=0)
    torch.testing.assert_close(encoded[0], encoded[1])


@pytest.mark.parametrize(("alpha", "silent"), [(1.0, "long"), (0.0, "short")])
def test_a_branch_without_weight_gets_no_gradient_and_changes_nothing(alpha, silent):
    batch = make_batch([[[2], [5], [7], [3]]], [[4]])
    results = []
    for seed in (1, 2):
        model = make_model(alpha=alpha, lambda_kd=0.0, dropout=0.5).train()
        branch = getattr(model, silent)
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in branch.parameters():
                parameter.normal_()
        model.loss(batch, torch.Generator().manual_seed(3)).total.backward()
        assert all(parameter.grad is None for parameter in branch.parameters())  # not even computed
        rest = [p.grad for name, p in model.named_parameters() if not name.startswith(silent)]
        assert all(torch.count_nonzero(grad) for grad in rest)
        results.append(rest)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_mixing_vectors_is_mixing_logits():
    history, every = singles([2, 5, 7, 3], [9, 9]), torch.arange(2, ITEMS + 2, dtype=torch.int32).repeat(2, 1)
    request = Request(torch.zeros(2, dtype=torch.int64))
    logits = {}
    for alpha in (0.0, 0.3, 1.0):
        model = make_model(alpha=alpha)
        logits[alpha] = model.score(model.encode(history), request, Candidates(every))
    torch.testing.assert_close(logits[0.3], 0.3 * logits[1.0] + 0.7 * logits[0.0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("blocks", [1, 2, 3])
@pytest.mark.parametrize("averaged", [1, 2, 3, 4, 5])
def test_no_basket_sees_a_later_one(averaged, blocks):
    model = make_model(averaged=averaged, blocks=blocks)
    old, new = [[2, 3], [4], [5], [6, 7]], [[2, 3], [4], [9], [8, 8]]
    before, after = outputs(model, [old])[0], outputs(model, [new])[0]
    assert torch.equal(before[:2], after[:2])
    assert not torch.isclose(before[2:], after[2:]).all(1).any()


def test_the_pooled_query_is_the_mean_of_the_real_items_of_the_window():
    rows = torch.tensor([[[0, 0], [0, 0], [1, 2], [3, 4], [5, 6], [7, 8]]], dtype=torch.float32)
    real = torch.tensor([[0, 0, 1, 1, 1, 1]], dtype=torch.float32)
    expected = torch.tensor([[[0, 0], [0, 0], [1, 2], [2, 3], [3, 4], [5, 6]]], dtype=torch.float32)
    assert torch.equal(pool(rows, real, 3), expected)
    for window in range(1, 6):  # item t - j enters iff j < window
        weights = pool(torch.eye(8)[None], torch.ones(1, 8), window)[0]
        t, s = torch.meshgrid(torch.arange(8), torch.arange(8), indexing="ij")
        assert torch.equal(weights > 0, (s <= t) & (t - s < window))
    # Items and not baskets are averaged: a basket of two (sum 4) and one of one (sum 5) give (4 + 5) / 3.
    assert pool(torch.tensor([[[4.0], [5.0]]]), torch.tensor([[2.0, 1.0]]), 2)[0, 1, 0] == 3


def test_positions_are_counted_from_the_newest():
    model = make_model()
    alone = model.encode(singles([5, 3]))
    among = model.encode(singles([5, 3], [2, 3, 4, 5, 6, 7, 8, 9]))[:1]
    torch.testing.assert_close(alone, among, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(model.encode(singles(list(range(2, 11)))), model.encode(singles(list(range(3, 11)))))
    shifted = outputs(model, [[[5], [3], [4]]])[0][1]
    assert not torch.allclose(shifted, alone[0])  # the same items one slot older
    with torch.no_grad():
        model.position[:-2] = 1e6  # rows that only older slots would read
        assert torch.equal(model.encode(singles([5, 3])), alone)
        model.position.zero_()
    torch.testing.assert_close(outputs(model, [[[5], [3], [4]]])[0][1], model.encode(singles([5, 3]))[0])


def test_each_branch_notices_only_its_own_swaps():
    def newest(alpha, row):
        model = make_model(alpha=alpha, averaged=3)
        with torch.no_grad():
            model.position.zero_()
        return model.encode(singles(row))

    row = [2, 3, 4, 5, 6]
    swaps = {"outside": [3, 2, 4, 5, 6], "inside": [2, 3, 5, 4, 6], "across": [4, 3, 2, 5, 6], "last": [2, 3, 4, 6, 5]}
    unchanged = {
        (name, alpha): torch.allclose(newest(alpha, row), newest(alpha, swapped), rtol=1e-5, atol=1e-6)
        for name, swapped in swaps.items()
        for alpha in (1.0, 0.0)
    }
    assert {key for key, same in unchanged.items() if not same} == {("across", 0.0), ("last", 1.0)}


@pytest.mark.parametrize(
    ("items", "parameters", "rec"),
    [
        (12_101, 820_032, 9.401126),
        (18_357, 1_220_416, 9.817821),
        (11_924, 808_704, 9.386392),
        (20_033, 1_327_680, 9.905186),
    ],
)
def test_sizes_are_known_and_an_item_table_of_zeros_loses_the_logarithm_of_its_size(items, parameters, rec):
    offsets = torch.cat([torch.tensor([0, 0, 0]), torch.ones(items, dtype=torch.int64)])  # row 2 has one edge, to row 3
    edge = Transitions(offsets, torch.tensor([3], dtype=torch.int32), torch.ones(1))
    rows = torch.ones(items + 2, dtype=torch.int64)
    model = MqsaTed(MqsaTedConfig(), ItemTable([], torch.zeros(items + 2, 0, dtype=torch.int32), [], rows, edge))
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters + 2 * 64  # and rows 0 and 1
    assert torch.count_nonzero(model.item[:FIRST_ITEM]) == 0
    nn.init.zeros_(model.item)
    loss = model.loss(make_batch([[[2], [3], [4]]], [[5]]), torch.Generator())
    assert loss.parts["rec"].item() == pytest.approx(math.log(items + 1), rel=1e-6)
    assert loss.parts["rec"].item() == pytest.approx(rec, rel=1e-6)
    assert loss.parts["kd"].item() == pytest.approx(math.log(items), rel=1e-6)


def test_scores_are_inner_products_and_unknown_items_are_never_found():
    model = make_model(item_table(untrained=(5, 8)))
    history = singles([2, 6, 7, 3], [9, 9], [5, 4], [])
    every = torch.arange(ITEMS + 2, dtype=torch.int32).repeat(4, 1)
    scores = model.score(model.encode(history), Request(torch.zeros(4, dtype=torch.int64)), Candidates(every)).detach()
    users, vectors = model.user_vectors(history).detach(), model.item_vectors().detach()
    torch.testing.assert_close(users @ vectors[2:].T, scores[:, 2:], rtol=1e-6, atol=1e-6)
    assert (scores[:, :2] == NEGATIVE).all()
    assert torch.count_nonzero(vectors[[0, 1, 5, 8]]) == 0
    known = [2, 3, 4, 6, 7, 9, 10]
    index = faiss.IndexIDMap(faiss.IndexFlatIP(6))
    index.add_with_ids(vectors[known].numpy(), np.array(known))
    best = scores[:, known].argsort(1, descending=True)
    assert np.array_equal(index.search(users.numpy(), 7)[1], np.array(known)[best.numpy()])
    # An untrained item in a history is the unknown item.
    torch.testing.assert_close(model.encode(singles([5, 4])), model.encode(singles([1, 4])), rtol=0, atol=0)


def test_renaming_items_renames_the_scores_and_actions_and_times_say_nothing():
    model, order = make_model(), torch.cat([torch.tensor([0, 1]), torch.randperm(ITEMS) + 2])
    renamed = make_model()
    with torch.no_grad():
        renamed.item[order] = model.item
    history = singles([2, 6, 7, 3], [9, 9], [5, 4])
    other = replace(
        history, item=order[history.item.long()].int(), action=history.action + 3, time=history.time * 7 + 1
    )
    every = torch.arange(ITEMS + 2, dtype=torch.int32).repeat(3, 1)
    scores = model.score(model.encode(history), Request(torch.zeros(3)), Candidates(every))
    again = renamed.score(renamed.encode(other), Request(torch.ones(3)), Candidates(order[every.long()].int()))
    torch.testing.assert_close(scores, again, rtol=1e-6, atol=1e-6)


def test_distillation_teaches_the_item_table_only_and_disturbs_no_other_draw():
    batch = make_batch([[[2], [5, 1], [7], [3]], [[1], [9, 2]]], [[4], [6, 0]])
    gradients = {}
    for weight in (0.0, 5.0):
        model = make_model(lambda_kd=weight, dropout=0.5).train()
        model.loss(batch, torch.Generator().manual_seed(3)).total.backward()
        gradients[weight] = {name: parameter.grad for name, parameter in model.named_parameters()}
        assert torch.count_nonzero(gradients[weight]["item"][0]) == 0
        assert torch.count_nonzero(gradients[weight]["item"][1]) > 0
    same = {name for name, grad in gradients[0.0].items() if torch.equal(grad, gradients[5.0][name])}
    assert same == set(gradients[0.0]) - {"item"}


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([0.02, 0.1, 0.5, 3.0]))
def test_the_teacher_from_edges_is_the_dense_teacher(seed, tau):
    torch.manual_seed(seed)
    items = item_table(seed=seed)
    heads = torch.tensor([row for row in range(2, ITEMS + 2) if len(items.transitions.of(row)[0])] * 2)
    table, x = torch.randn(ITEMS + 2, 5).double().requires_grad_(), torch.randn(len(heads), 5).double()
    mean = teacher(items.transitions, heads, table, tau)
    cheap = torch.logsumexp(x @ table[2:].T, 1) - (x * mean).sum(1)
    p = torch.zeros(len(heads), ITEMS).double()
    for row, head in enumerate(heads.tolist()):
        target, weight = items.transitions.of(head)
        p[row, target.long() - 2] = weight.double() / weight.max()
    p = torch.softmax(p / tau, 1)
    q = torch.softmax(x @ table[2:].T, 1)
    dense = -(p * q.log()).sum(1)
    torch.testing.assert_close(cheap, dense, rtol=1e-12, atol=1e-10)
    entropy = -(p * p.clamp(min=1e-300).log()).sum(1)
    assert (cheap >= entropy - 1e-10).all()
    gradient = torch.autograd.grad(cheap.sum(), table)[0]  # of logits q - p, times the head that made them
    torch.testing.assert_close(gradient[2:], (q - p).T @ x, rtol=1e-9, atol=1e-9)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.booleans(), st.integers(1, 40), st.sampled_from([1.0, 80.0]), st.booleans())
def test_the_chunked_partition_is_the_full_one(seed, pad_class, rows, scale, tiles):
    torch.manual_seed(seed)
    query, table, weight = torch.randn(rows, 4).double() * scale, torch.randn(6, 4).double(), torch.rand(rows).double()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ranking.softmax.CHUNK_BYTES", 7 * 6 * 8)  # seven rows at a time
        patch.setattr("ranking.softmax.CHUNK_ROWS", 1)
        patch.setattr("ranking.softmax.FEW_ROWS", 8 if tiles else 1)
        patch.setattr("ranking.softmax.TILE_ROWS", 9)  # against four or five classes
        results = []
        for chunked in (True, False):
            a, b = query.clone().requires_grad_(), table.clone().requires_grad_()
            if chunked:
                value = chunked_log_partition(a, b, weight, pad_class)
            else:
                value = (weight * log_partition(a, b, pad_class)).sum()
            (3 * value).backward()
            results.append((value.detach(), a.grad, b.grad))
    torch.testing.assert_close(results[0], results[1], rtol=1e-10, atol=1e-10 * scale)


@pytest.mark.parametrize("pad_class", [True, False])
@pytest.mark.parametrize("classes", [9_000, 30_000])
@pytest.mark.parametrize("scale", [1.0, 0.5])  # of logits that have to be made smaller first, and that need not
def test_the_chunked_partition_is_the_full_one_in_single_precision(pad_class, classes, scale):
    torch.manual_seed(0)
    query, table, weight = torch.randn(300, 64) * scale, torch.randn(classes, 64), torch.full((300,), 1 / 300)
    inputs = query.requires_grad_(), table.requires_grad_()
    chunked = chunked_log_partition(query, table, weight, pad_class)
    full = log_partition(query, table, pad_class).mean()
    torch.testing.assert_close(chunked, full, rtol=1e-6, atol=0)
    for mine, plain in zip(torch.autograd.grad(chunked, inputs), torch.autograd.grad(full, inputs), strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-4, atol=1e-5 * float(plain.abs().max()))


def test_attention_is_that_worked_out_by_hand():
    S = torch.tensor([[[1.0, 0], [0, 1], [1, 1]]])
    block, allowed = Block(2, 1), torch.ones(1, 1, 3, dtype=torch.bool)
    expected = {
        1: ([0.248255, 0.248255, 0.503490], [0.751745, 0.751745]),
        2: ([0.224606, 0.319866, 0.455527], [0.680134, 0.775394]),
        3: ([0.277605, 0.277605, 0.444790], [0.722395, 0.722395]),
    }
    for window, (weights, output) in expected.items():
        query = pool(S, torch.ones(1, 3), window)[:, -1:]
        seen = block._attend(query, S, torch.eye(3)[None, :, :2], allowed, keep)[0, 0]
        torch.testing.assert_close(seen, torch.tensor(weights[:2]), atol=1e-6, rtol=0)
        torch.testing.assert_close(
            block._attend(query, S, S, allowed, keep)[0, 0], torch.tensor(output), atol=1e-6, rtol=0
        )
    assert torch.tensor(FILL).isfinite()


def plain_branch(window):
    """Return a branch of width 3 with unit projections and no feed-forward part."""
    branch = Branch(MqsaTedConfig(width=3), window)
    block = branch.blocks[0]
    with torch.no_grad():
        for layer in (block.query, block.key, block.value, block.expand, block.contract):
            layer.weight.copy_(torch.eye(3) if layer in (block.query, block.key, block.value) else torch.zeros(3, 3))
            layer.bias.zero_()
    return branch


def test_one_block_and_the_mixed_logits_are_those_worked_out_by_hand():
    S = torch.tensor([[[0.0, 0, 0], [1, 0, 0], [0, 2, 0], [1, 1, 4]]])
    slots = Slots(torch.tensor([[0, 2, 3, 4]]), torch.arange(4)[None], torch.tensor([[0.0, 1, 1, 1]]), single=True)
    last = {
        1: (-0.710921, -0.703286, 1.414207),
        2: (-1.136983, -0.159831, 1.296813),
        3: (-1.011569, -0.350104, 1.361673),
    }
    second = {
        1: (-0.675081, 1.413737, -0.738656),
        2: (-0.241397, 1.327469, -1.086073),
        3: (-0.241397, 1.327469, -1.086073),
    }
    z = {}
    for window, expected in last.items():
        z[window] = plain_branch(window)(S, slots, keep, newest=False)[0].detach()
        rows = [(0.0, 0.0, 0.0), (1.414214, -0.707107, -0.707107), second[window], expected]
        torch.testing.assert_close(z[window], torch.tensor(rows), atol=2e-6, rtol=0)
    logits = 0.5 * z[1][3] + 0.5 * z[3][3]
    torch.testing.assert_close(logits, torch.tensor([-0.861245, -0.526695, 1.387940]), atol=2e-6, rtol=0)
    for pad_class, expected in ((True, 0.407110), (False, 0.225446)):
        loss = log_partition(logits[None], identity(3), pad_class)[0] - logits[2]
        assert loss.item() == pytest.approx(expected, abs=2e-6)


def test_distillation_is_that_worked_out_by_hand():
    count = np.zeros((6, 6))
    count[2, 2:4] = 2, 1
    table = torch.tensor([[0.0, 0], [0, 0], [1, 0], [0, 1], [1, 1], [0, 0]], dtype=torch.float64, requires_grad=True)
    p = torch.tensor([0.610296, 0.224515, 0.082595, 0.082595], dtype=torch.float64)
    heads = torch.tensor([2])
    mean = teacher(edges(count), heads, table, tau=0.5)
    torch.testing.assert_close(mean[0].detach(), p @ table[2:].detach(), atol=1e-6, rtol=0)
    x = math.sqrt(2) * table[2:3].detach() / 0.5
    loss = (torch.logsumexp(x @ table[2:].T, 1) - (x * mean).sum(1)).sum()
    assert loss.item() == pytest.approx(1.619210, abs=1e-6)
    difference = torch.autograd.grad(loss, table)[0][2:, 0] / x[0, 0]  # q - p
    expected = torch.tensor([-0.138199, -0.196612, 0.389502, -0.054691], dtype=torch.float64)
    torch.testing.assert_close(difference, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("items", [12_101, 10**5, 10**6])
def test_automatic_tau_keeps_a_head_with_one_edge_as_sharp(items):
    model = make_model(item_table(4), tau="auto")
    assert model.tau == pytest.approx(1 / math.log(1.8203690740 * 3))
    tau = 1 / math.log(1.8203690740 * (items - 1))
    assert math.exp(1 / tau) / (math.exp(1 / tau) + items - 1) == pytest.approx(0.645436, abs=1e-6)


def test_drawing_all_heads_is_distilling_every_token():
    batch = make_batch([[[2], [5, 3], [2], [3]], [[2], [9, 2]]], [[4], [6]])
    losses = [make_model(kd_heads=heads).loss(batch, torch.Generator()).parts["kd"] for heads in (0, 100)]
    torch.testing.assert_close(*losses)
    few = make_model(kd_heads=1)
    drawn = [few.loss(batch, torch.Generator().manual_seed(seed)).parts["kd"] for seed in range(400)]
    assert torch.stack(drawn).mean().item() == pytest.approx(losses[0].item(), rel=0.1)


def test_sampled_softmax_nears_the_full_one():
    batch = make_batch([[[2], [5, 3], [2], [3]], [[2], [9, 2]]], [[4], [6, 8]])
    full = make_model().loss(batch, torch.Generator()).parts["rec"]
    sampled = make_model(softmax="sampled", negatives=200_000).loss(batch, torch.Generator()).parts["rec"]
    assert sampled.item() == pytest.approx(full.item(), abs=0.01)


def test_64_sequences_can_be_learnt_by_heart():
    draws = np.random.default_rng(0)
    first = draws.permutation(64)  # the first items differ, so every next item can be known
    rows = [[int(item) + 2 for item in (head, *draws.integers(0, 64, 5))] for head in first]
    batch = make_batch([[[item] for item in row[:-1]] for row in rows], [row[-1:] for row in rows])
    torch.manual_seed(0)
    model = MqsaTed(MqsaTedConfig(width=32, window=8, dropout=0.0, lambda_kd=0.0), item_table(64))
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
    for step in range(150):
        loss = model.loss(batch, torch.Generator().manual_seed(step))
        loss.total.backward()
        optimiser.step()
        optimiser.zero_grad()
    best = (model.user_vectors(batch.history) @ model.item_vectors().T)[:, 2:].argmax(1) + 2
    assert torch.equal(best, batch.candidates.item[:, 0].long())
    assert loss.parts["rec"] < 0.05


def test_users_without_a_target_add_nothing():
    users, following = [[[2], [5]], [], [[1]], [[3]]], [[4], [6], [7], [0]]
    model = make_model(lambda_kd=0.0)
    rec = model.loss(make_batch(users, following), torch.Generator()).parts["rec"]
    kept = model.loss(make_batch([users[0], users[2]], [[4], [7]]), torch.Generator()).parts["rec"]
    torch.testing.assert_close(rec, kept)
    nothing = model.loss(make_batch([[], [[3]]], [[4], [1]]), torch.Generator())
    nothing.total.backward()
    assert nothing.total.item() == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 6, "heads": 4}, "multiple of heads, found 6 and 4"),
        ({"alpha": 1.5}, r"alpha must lie in \[0, 1\], found 1.5"),
        ({"tau": 0.0}, 'tau must be above 0 or "auto", found 0.0'),
        ({"dropout": 1.0}, "dropout must lie"),
        ({"averaged": 0}, "averaged must be at least 1, found 0"),
        ({"widht": 6}, "did you mean 'width'"),
    ],
)
def test_a_config_that_cannot_be_meant_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        parse(MqsaTedConfig, options, "[model]")


def request_batch(label, item):
    history = packed([[[2, 3], [4]], [[5], [6, 7]]])
    label = torch.tensor(label)
    item = torch.tensor(item, dtype=torch.int32)
    return Batch(history, Request(torch.tensor([100, 100])), Candidates(item), label, (item > 0).float())


@pytest.mark.parametrize("lambda_kd", [0.0, 0.3])
def test_candidates_objective_is_softmax_for_one_positive_else_binary_cross_entropy(lambda_kd):
    model = make_model(objective="candidates", lambda_kd=lambda_kd).train()
    assert model.trains_on == "requests"
    item = [[8, 3, 9, 0], [4, 10, 2, 6]]
    one = request_batch([[0.0, 1.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]], item)
    scores = model.score(model.encode(one.history), one.request, one.candidates).detach()
    expected = -(scores[0, :3].log_softmax(0)[1] + scores[1].log_softmax(0)[0]) / 2
    loss = model.loss(one, torch.Generator().manual_seed(1))
    assert float(loss.parts["rec"]) == pytest.approx(float(expected), rel=1e-5)
    sequence = make_model(lambda_kd=lambda_kd).train().loss(one, torch.Generator().manual_seed(1))
    tokens = float(sequence.parts["kd"])  # TED reads the same tokens in either objective
    assert float(loss.parts["kd"]) == pytest.approx(tokens, rel=1e-5)

    two = request_batch([[0.0, 1.0, 1.0, 0.0], [1.0, 0.0, 0.0, 0.0]], item)
    real = two.candidates.mask
    expected = nn.functional.binary_cross_entropy_with_logits(scores[real], two.label[real])
    loss = model.loss(two, torch.Generator().manual_seed(1))
    assert float(loss.parts["rec"]) == pytest.approx(float(expected), rel=1e-5)
    loss.total.backward()
    assert model.item.grad[0].abs().sum() == 0


def test_a_hidden_positive_leaves_its_row_out_and_the_loss_of_the_others_as_it_was(monkeypatch):
    """With items hidden at random, the kind of loss must not change from step to step."""
    monkeypatch.setattr(mqsa_ted, "hide_items", lambda items, rate, generator: hidden)
    model = make_model(objective="candidates", lambda_kd=0.0).train()
    hidden = torch.arange(len(model.item), dtype=torch.int32)
    hidden[10] = 1  # the first row's positive
    batch = request_batch([[0.0, 1.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]], [[8, 10, 9, 0], [4, 3, 2, 6]])
    scores = model.score(model.encode(batch.history), batch.request, batch.candidates).detach()
    loss = model.loss(batch, torch.Generator().manual_seed(1))
    assert float(loss.parts["rec"]) == pytest.approx(-float(scores[1].log_softmax(0)[0]), rel=1e-5)


@pytest.mark.parametrize("label", [[[0.0, 1.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]], [[0.0, 1.0, 1.0, 0.0], [0.0] * 4]])
def test_what_is_drawn_often_is_corrected_for(label):
    """The loss with log q is the loss without it of logits that log q has been taken off."""
    model = make_model(objective="candidates", lambda_kd=0.0).train()
    batch = request_batch(label, [[8, 3, 9, 0], [4, 10, 2, 6]])
    scores = model.score(model.encode(batch.history), batch.request, batch.candidates).detach()
    log_q = torch.tensor([[0.5, -1.0, 2.0, 0.0], [0.0, 3.0, -0.2, 1.0]])
    real = batch.candidates.mask
    moved = (scores - log_q).masked_fill(~real, -torch.inf)
    if batch.label.sum(1).eq(1).all():
        expected = -(moved.log_softmax(1)[batch.label > 0]).mean()
    else:
        expected = nn.functional.binary_cross_entropy_with_logits(moved[real], batch.label[real])
    loss = model.loss(replace(batch, log_q=log_q), torch.Generator().manual_seed(1))
    assert float(loss.parts["rec"]) == pytest.approx(float(expected), rel=1e-5)
