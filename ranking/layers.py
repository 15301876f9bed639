"""Small parts that several models share: dropout with its own generator, the scoring head, masked softmax, losses.

Scores are computed in float64 and rounded at the end. A float32 matrix product depends on the shape of the batch in its
last digits, enough that the same candidate, scored alone and among others, differed by 1.7e-6 with DIN; in float64 the
two agree to the rounding of the result, so offline and online answers can be compared. Training stays in float32.
"""

import copy
import itertools
import threading
import weakref
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ranking.ranker import NEGATIVE

CHUNK_ELEMENTS = 1 << 20
"""Numbers in the largest temporary of a chunked loop: 4-8 MB, which stays in the last-level cache of one core."""


def dropout(x: Tensor, p: float, generator: torch.Generator | None) -> Tensor:
    """Zero each number with probability p and scale the rest by 1 / (1 - p); without a generator give x itself."""
    if p == 0 or generator is None:
        return x
    keep = torch.rand(x.shape, generator=generator, device=generator.device).to(x.device) >= p
    return x * keep / (1 - p)


def masked_softmax(scores: Tensor, mask: Tensor) -> Tensor:
    """Give softmax over the last dimension where mask is True, exactly 0 elsewhere and in rows without any True.

    Scores behind the mask are never read: they may be infinite or NaN.
    """
    weights = scores.masked_fill(~mask, torch.finfo(scores.dtype).min).softmax(-1)
    return weights.masked_fill(~mask, 0.0)


def exact(module: nn.Module, *inputs: Tensor) -> Tensor:
    """Give module(*inputs), in float64 unless the module is training."""
    if module.training:
        output: Tensor = module(*inputs)
    else:
        output = in_float64(module)(*(x.double() for x in inputs))
    return output


_doubles: "weakref.WeakKeyDictionary[nn.Module, tuple[list[Tensor], nn.Module]]" = weakref.WeakKeyDictionary()
_doubles_lock = threading.Lock()


def in_float64(module: nn.Module) -> nn.Module:
    """Give a float64 copy of a module, made anew only when one of its numbers has changed.

    A copy, because swapping the weights of the module itself would show them to other threads that score with it. The
    numbers are compared, some 20 us for a scoring head: fused optimisers write to weights without counting a version.
    """
    tensors = list(itertools.chain(module.parameters(), module.buffers()))
    with _doubles_lock:
        known = _doubles.get(module)
        if known is None or not all(_same(a, b) for a, b in zip(known[0], tensors, strict=True)):
            with torch.inference_mode(False), torch.no_grad():
                kept = [tensor.detach().clone() for tensor in tensors]
                known = (kept, copy.deepcopy(module).double().eval().requires_grad_(False))
            _doubles[module] = known
    return known[1]


def _same(a: Tensor, b: Tensor) -> bool:
    return a.device == b.device and a.dtype == b.dtype and torch.equal(a, b)


def interaction(v: Tensor, h: Tensor) -> Tensor:
    """Give [v ; h ; v * h], [..., 3D]: a candidate, what the history says of it, and where the two agree."""
    return torch.cat([v, h, v * h], -1)


class ScoringHead(nn.Module):
    """BatchNorm -> (Linear -> PReLU)* -> Linear to one logit per row.

    Args:
        width: number of input features.
        hidden: widths of the hidden layers.
    """

    def __init__(self, width: int, hidden: Sequence[int] = (200, 80)) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(width)
        layers: list[nn.Module] = []
        for inner in hidden:
            layers += [nn.Linear(width, inner), nn.PReLU()]
            width = inner
        self.layers = nn.Sequential(*layers, nn.Linear(width, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Give logits [R] for features [R, width]; every row counts in the batch statistics."""
        if self.training and len(x) < 2:  # one row has no variance: use what was learned so far
            norm = self.norm
            x = F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)
        else:
            x = self.norm(x)
        logits: Tensor = self.layers(x).squeeze(-1)
        return logits


def score_real(head: ScoringHead, features: Tensor, mask: Tensor) -> Tensor:
    """Give logits [B, C] with `NEGATIVE` where mask is False; the head sees the real rows only.

    Args:
        head: what to apply.
        features: [B, C, F].
        mask: bool [B, C], True at real candidates.
    """
    index = mask.flatten().nonzero().squeeze(1)  # [R]
    rows = features.flatten(0, 1)
    if len(index) < len(rows):
        rows = rows.index_select(0, index)
    logits = torch.full((mask.numel(),), NEGATIVE, dtype=head.norm.weight.dtype, device=features.device)
    return logits.index_copy(0, index, exact(head, rows).to(logits.dtype)).view(mask.shape)


def binary_cross_entropy(logits: Tensor, label: Tensor, weight: Tensor) -> Tensor:
    """Give the weighted mean of binary cross-entropy over all numbers; weight is 0 at padding."""
    each = F.binary_cross_entropy_with_logits(logits, label, weight, reduction="sum")
    return each / weight.sum().clamp_min(torch.finfo(weight.dtype).tiny)


def candidate_chunks(candidates: int, elements_each: int) -> list[slice]:
    """Cut C candidates into runs whose temporaries stay within `CHUNK_ELEMENTS` numbers (at least one at a time)."""
    step = max(1, CHUNK_ELEMENTS // max(1, elements_each))
    return [slice(start, min(start + step, candidates)) for start in range(0, candidates, step)]
