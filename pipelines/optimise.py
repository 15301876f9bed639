"""Optimisers of a training run: sparse updates for the embedding rows a step read, dense ones for the rest.

Dense Adam over a table of a million rows costs more than the whole of the step; `RowAdam` touches only the rows that
have a gradient.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ranking.embeddings import sparse_parameters
from ranking.rows import put, summed
from recsys.errors import ConfigError

ROWS = 1024
"""Rows of a table that a CPU updates at once: 256 KB at a width of 64."""


@dataclass(frozen=True)
class OptimiserConfig:
    """How weights are updated."""

    kind: Literal["sparse_adam", "adam"] = "sparse_adam"  # adam: dense updates everywhere, coupled weight decay
    learning_rate: float = 3e-3
    weight_decay: float = 0.0  # coupled L2, kind = "adam" only
    clip: float | None = 10.0  # global gradient norm; none = no clipping

    def __post_init__(self) -> None:
        if self.kind == "sparse_adam" and self.weight_decay:
            raise ConfigError(
                f'[optimiser] weight_decay = {self.weight_decay} needs kind = "adam", found kind = "sparse_adam": '
                "a decay would touch every row of the tables"
            )
        if not 0 < self.learning_rate < math.inf:
            raise ConfigError(f"[optimiser] learning_rate must be a number above 0, found {self.learning_rate}")


class RowAdam(torch.optim.Optimizer):
    """`torch.optim.SparseAdam` to the rounding of single numbers, some thousand rows at a time.

    Its many temporaries then stay in a CPU's cache; a GPU takes all rows at once. State by parameter: `step`,
    `exp_avg`, `exp_avg_sq`.

    Args:
        parameters: tables [V, D] whose gradients are sparse.
        lr: learning rate.
        betas: decay of the two averages.
        eps: added to the root of the second.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        super().__init__(parameters, {"lr": lr, "betas": betas, "eps": eps})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Take one step; raises `RuntimeError` at a dense gradient."""
        if closure is not None:
            closure()
        for group in self.param_groups:
            for table in group["params"]:
                if table.grad is not None:
                    self._step(table, group)

    def _step(self, table: Tensor, group: dict[str, Any]) -> None:
        state = self.state[table]
        if not state:
            state |= {"step": 0, "exp_avg": torch.zeros_like(table), "exp_avg_sq": torch.zeros_like(table)}
        state["step"] += 1
        first, second = group["betas"]
        size = group["lr"] * math.sqrt(1 - second ** state["step"]) / (1 - first ** state["step"])
        gradient = summed(table.grad)  # type: ignore[arg-type]
        at_once = ROWS if table.device.type == "cpu" else max(gradient._nnz(), 1)
        runs = zip(torch.split(gradient.indices()[0], at_once), torch.split(gradient.values(), at_once), strict=True)
        for row, g in runs:
            mean, square = (state[name].index_select(0, row) for name in ("exp_avg", "exp_avg_sq"))
            mean.lerp_(g, 1 - first)
            square.mul_(second).addcmul_(g, g, value=1 - second)
            put(state["exp_avg"], row, mean)
            put(state["exp_avg_sq"], row, square)
            root = square.sqrt_().add_(group["eps"])
            put(table, row, table.index_select(0, row).addcdiv_(mean, root, value=-size))


def build_optimisers(model: nn.Module, config: OptimiserConfig) -> list[torch.optim.Optimizer]:
    """Return the optimisers that together own every parameter of the model once."""
    sparse = sparse_parameters(model) if config.kind == "sparse_adam" else []
    owned = {id(parameter) for parameter in sparse}
    dense = [p for p in model.parameters() if id(p) not in owned and p.requires_grad]
    optimisers: list[torch.optim.Optimizer] = []
    if sparse:
        optimisers.append(RowAdam(sparse, config.learning_rate))
    if dense:
        optimisers.append(
            torch.optim.Adam(dense, lr=config.learning_rate, weight_decay=config.weight_decay, fused=True)
        )
    return optimisers


def update(optimisers: Sequence[torch.optim.Optimizer], config: OptimiserConfig) -> Tensor:
    """Clip by the global norm and take one step; gives the norm before clipping, a scalar.

    Where the norm is not finite no step is taken: the caller knows which batch it was. Gradients are cleared
    afterwards. Sparse gradients are summed per row first (they list a row once per use).
    """
    parameters = [p for o in optimisers for group in o.param_groups for p in group["params"] if p.grad is not None]
    for p in parameters:
        if p.grad is not None and p.grad.is_sparse:
            p.grad = summed(p.grad) if config.kind == "sparse_adam" else p.grad.to_dense()
    values = [_values(p.grad) for p in parameters if p.grad is not None]
    norm: Tensor = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(v) for v in values]))
    if not torch.isfinite(norm):
        return norm
    if config.clip is not None and float(norm) > config.clip:
        for v in values:
            v.mul_(config.clip / norm)
    for optimiser in optimisers:
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
    return norm


def _values(grad: Tensor) -> Tensor:
    values: Tensor = grad._values() if grad.is_sparse else grad
    return values
