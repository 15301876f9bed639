"""Optimisers of a training run: sparse updates for the embedding rows a step read, dense ones for the rest.

Dense Adam over a table of a million rows costs more than the whole of the step; `torch.optim.SparseAdam` touches only
the rows that have a gradient.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ranking.embeddings import sparse_parameters
from recsys.errors import ConfigError


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
        if self.learning_rate <= 0:
            raise ConfigError(f"[optimiser] learning_rate must be above 0, found {self.learning_rate}")


def build_optimisers(model: nn.Module, config: OptimiserConfig) -> list[torch.optim.Optimizer]:
    """Give the optimisers that together own every parameter of the model once."""
    sparse = sparse_parameters(model) if config.kind == "sparse_adam" else []
    owned = {id(parameter) for parameter in sparse}
    dense = [p for p in model.parameters() if id(p) not in owned and p.requires_grad]
    optimisers: list[torch.optim.Optimizer] = []
    if sparse:
        optimisers.append(torch.optim.SparseAdam(sparse, lr=config.learning_rate))
    if dense:
        optimisers.append(
            torch.optim.Adam(dense, lr=config.learning_rate, weight_decay=config.weight_decay, fused=True)
        )
    return optimisers


def update(optimisers: Sequence[torch.optim.Optimizer], config: OptimiserConfig) -> Tensor:
    """Clip by the global norm and take one step; gives the norm before clipping, a scalar.

    Gradients are cleared afterwards. Sparse gradients are summed per row first (they list a row once per use).
    """
    parameters = [p for o in optimisers for group in o.param_groups for p in group["params"] if p.grad is not None]
    for p in parameters:
        if p.grad is not None and p.grad.is_sparse:
            p.grad = p.grad.coalesce() if config.kind == "sparse_adam" else p.grad.to_dense()
    values = [_values(p.grad) for p in parameters if p.grad is not None]
    norm: Tensor = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(v) for v in values]))
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
