"""Row-wise updates beside torch's own sparse ones, and gradients summed by row."""

import pytest
import torch
from torch import nn

from pipelines.optimise import OptimiserConfig, RowAdam, build_optimisers, update
from ranking.batch import PAD
from ranking.embeddings import ItemEmbedding
from ranking.rows import fetch, sum_all_by_row, sum_by_row, summed


@pytest.mark.parametrize("rows", [3, 4096, 10_000])
def test_row_adam_is_sparse_adam(rows):
    torch.manual_seed(0)
    mine, theirs = (nn.Parameter(torch.zeros(20_000, 3)) for _ in range(2))
    ours, torchs = RowAdam([mine], 3e-3), torch.optim.SparseAdam([theirs], lr=3e-3)
    for _ in range(4):
        row = torch.randperm(20_000)[:rows].sort().values
        gradient = torch.sparse_coo_tensor(row[None], torch.randn(rows, 3), mine.shape).coalesce()
        mine.grad, theirs.grad = gradient, gradient.clone()
        ours.step()
        torchs.step()
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-8)
        assert ours.state[mine]["step"] == torchs.state[theirs]["step"]
        for name in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(ours.state[mine][name], torchs.state[theirs][name], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("events", [0, 1, 500])
def test_rows_are_summed_as_a_dense_gradient_would_be(dtype, events):
    torch.manual_seed(1)
    row, value = torch.randint(0, 40, (events,), dtype=dtype), torch.randn(events, 5)
    rows, total = sum_by_row(row, value)
    assert torch.equal(rows, torch.unique(row.long()))
    dense = torch.zeros(40, 5, dtype=torch.float64).index_add_(0, row.long(), value.double())
    torch.testing.assert_close(total.double(), dense[rows], rtol=1e-5, atol=1e-5)
    if events:
        gradient = summed(torch.sparse_coo_tensor(row.long()[None], value, (40, 5)))
        assert gradient.is_coalesced()
        torch.testing.assert_close(gradient.to_dense().double(), dense, rtol=1e-5, atol=1e-5)


def test_a_fetched_row_has_the_gradient_of_an_embedding_and_padding_has_none():
    torch.manual_seed(2)
    table = nn.Parameter(torch.randn(9, 4))
    row = torch.randint(0, 9, (6, 7), dtype=torch.int32)
    row[0] = PAD
    weight = torch.randn(6, 7, 4)
    plain = torch.nn.functional.embedding(row, table, padding_idx=PAD)
    assert torch.equal(fetch(table, row)[0], plain)
    (expected,) = torch.autograd.grad((plain * weight).sum(), table)
    found, again = fetch(table, row, row[:, :2])
    ((found * weight).sum() + again.sum() + (fetch(table, row[:0])[0]).sum()).backward()
    expected.index_add_(0, row[:, :2].reshape(-1).long(), torch.ones(12, 4))
    expected[PAD] = 0
    assert table.grad is not None
    assert table.grad.is_sparse
    torch.testing.assert_close(table.grad.to_dense(), expected)
    assert PAD not in table.grad._indices()


@pytest.mark.parametrize("sizes", [(7, 300), (300, 7), (0, 5), (5, 0), (0, 0), (4, 4, 90)])
def test_lists_of_rows_are_summed_together(sizes):
    torch.manual_seed(3)
    rows = [torch.randint(0, 50, (size,), dtype=torch.int32) for size in sizes]
    values = [torch.randn(size, 3) for size in sizes]
    found, total = sum_all_by_row(rows, values)
    row, value = torch.cat(rows).long(), torch.cat(values)
    assert torch.equal(found, torch.unique(row[row != PAD]))
    dense = torch.zeros(50, 3, dtype=torch.float64).index_add_(0, row, value.double())
    torch.testing.assert_close(total.double(), dense[found], rtol=1e-5, atol=1e-5)


def test_a_step_of_nothing_but_padding_changes_nothing():
    table = ItemEmbedding(5, 2)
    before = table.weight.detach().clone()
    config = OptimiserConfig()
    optimisers = build_optimisers(table, config)
    table(torch.zeros(2, 3, dtype=torch.int32)).sum().backward()
    assert float(update(optimisers, config)) == 0
    assert torch.equal(table.weight, before)
