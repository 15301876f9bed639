"""The product that picks its library."""

import pytest
import torch

from ranking.products import product


@pytest.mark.parametrize("shape", [(3, 5, 7), (130, 64, 33), (1, 1, 1), (0, 4, 3), (4, 0, 3), (4, 3, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("strided", [False, True])
def test_a_product_is_the_product(shape, dtype, strided):
    m, k, n = shape
    x, w = torch.randn(m, k, dtype=dtype), torch.randn(n, k, dtype=dtype)
    if strided:
        w = w.T.contiguous().T
    found = product(x, w)
    torch.testing.assert_close(found.double(), x.double() @ w.double().T, rtol=1e-5, atol=1e-5)
    assert found.dtype == dtype
    assert torch.equal(found, product(x, w))
