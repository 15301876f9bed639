"""Matrix products of float32 by the fastest library that torch brings along."""

from collections.abc import Callable

import torch
from torch import Tensor

_ONEDNN: Callable[..., Tensor] | None = getattr(torch.ops.mkldnn, "_linear_pointwise", None)


def product(x: Tensor, w: Tensor) -> Tensor:
    """Give x @ w.T, [m, n], of x [m, k] and w [n, k] (any strides), without a gradient; call it under `no_grad`.

    torch.mm goes to MKL, which leaves the AVX-512 units of an AMD processor idle: 110 GFLOP/s on a core where oneDNN,
    called here, reaches 250. Where they are idle for a reason, on AVX2, both are equal. Other types and devices, and
    builds of torch without oneDNN, take torch.mm.
    """
    if _ONEDNN is None or x.dtype != torch.float32 or x.device.type != "cpu" or not x.numel() or not w.numel():
        return x @ w.T
    return _ONEDNN(x, w, None, "none", [], "")
