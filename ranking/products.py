"""Matrix products of float32 by the fastest library that torch brings along, and such that no batch shape shows."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

_ONEDNN: Callable[..., Tensor] | None = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
FEWEST_ROWS = 16
"""For which linear layers of a whole module are worth handing to oneDNN: its every other call takes longer for it."""


def product(x: Tensor, w: Tensor) -> Tensor:
    """Return x @ w.T, [m, n], of x [m, k] and w [n, k] (any strides), without a gradient; call it under `no_grad`.

    torch.mm goes to MKL, which leaves the AVX-512 units of an AMD processor idle: 110 GFLOP/s on a core where oneDNN,
    called here, reaches 250. Where they are idle for a reason, on AVX2, both are equal. Other types and devices, and
    builds of torch without oneDNN, take torch.mm.
    """
    if not _takes(x, w):
        return x @ w.T
    if not (w.is_contiguous() or w.T.is_contiguous()):
        w = w.contiguous()  # oneDNN has no fast path for other strides of w: a thousand times the time
    return _ONEDNN(x, w, None, "none", [], "")  # type: ignore[misc]


def fast_linear(rows: int) -> AbstractContextManager[object]:
    """Within it, on this thread, the linear layers of any module go where `product` goes; for inference alone.

    A transformer of a library, which calls `torch.nn.functional.linear` by itself, so reads nearly twice as many texts.

    Args:
        rows: of the inputs those layers will see; for a few it would cost more than it saves, and is left out.
    """
    return _OneDnnLinear() if rows >= FEWEST_ROWS else nullcontext()


class _OneDnnLinear(TorchFunctionMode):
    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is F.linear and not kwargs and _takes(*args[:2]) and args[1].is_contiguous():
            x, w, *bias = args
            return _ONEDNN(x, w, bias[0] if bias else None, "none", [], "")  # type: ignore[misc]
        return func(*args, **(kwargs or {}))


def _takes(x: Tensor, w: Tensor) -> bool:
    """Whether oneDNN is there for factors like these."""
    return (
        _ONEDNN is not None
        and x.dtype == w.dtype == torch.float32
        and x.device.type == "cpu"
        and bool(x.numel() and w.numel())
    )


def steady(x: Tensor, w: Tensor) -> Tensor:
    """Return x @ w.T in the type of x, without a gradient, so that a number does not depend on which others go with it.

    Args:
        x: [..., k].
        w: [n, k].

    oneDNN adds up k in one order whatever the numbers of rows are, as long as both are above 1. Where it is missing,
    or `_is_steady` finds it otherwise, float32 is multiplied in float64 and rounded.
    """
    rows, w = x.detach().reshape(-1, x.shape[-1]), w.detach()
    if x.dtype != torch.float32:
        total = rows @ w.T
    elif x.device.type != "cpu" or not _is_steady():
        total = (rows.double() @ w.double().T).float()
    else:
        total = _two_at_least(rows, w)
    return total.view(*x.shape[:-1], len(w))


def steady_each(x: Tensor, w: Tensor) -> Tensor:
    """Return `steady` of each request's x [B, m, k] and w [B, n, k], [B, m, n]."""
    return torch.stack([steady(a, b) for a, b in zip(x, w, strict=True)]) if len(x) else x.detach() @ w.detach().mT


def _two_at_least(x: Tensor, w: Tensor) -> Tensor:
    m, n = len(x), len(w)
    if m == 1:
        x = F.pad(x, (0, 0, 0, 1))
    if n == 1:
        w = F.pad(w, (0, 0, 0, 1))
    return product(x, w)[:m, :n]


@cache
def _is_steady() -> bool:
    """Whether products of a few shapes agree to the last digit on this machine; some milliseconds, once."""
    if _ONEDNN is None:
        return False
    draws = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        for k in (16, 65, 128, 320):
            x, w = (torch.randn(150, k, generator=draws) for _ in range(2))
            whole = product(x, w)
            for m, n in ((1, 150), (2, 36), (3, 1), (7, 5), (33, 80), (150, 2), (1, 1), (100, 64)):
                if not torch.equal(_two_at_least(x[20 : 20 + m], w[-n:]), whole[20 : 20 + m, -n:]):
                    return False
    return True
