"""Who trains: one process alone, or several that each take a share of every batch and average their gradients.

All members hold the same weights and take the same step, so a team computes what one process would on the whole batch
(data-parallel training). `DistributedDataParallel` would need a `forward` to wrap and does not know the sparse
gradients of `ranking.embeddings.ItemEmbedding`, so the averaging is written out: dense gradients in one all-reduce,
each sparse one, of touched rows alone, in one of its own.
"""

import json
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ranking.embeddings import sparse_parameters


class Team(Protocol):
    """The processes of one training run."""

    @property
    def rank(self) -> int:
        """Number of this member; 0 validates, writes checkpoints and speaks to MLflow."""
        ...

    @property
    def size(self) -> int:
        """Number of members."""
        ...

    def average(self, module: nn.Module, weight: Tensor) -> None:
        """Give every member the mean of the gradients, each weighted by its share of the batch (a scalar)."""
        ...

    def agree(self, value: Any) -> Any:
        """Return every member what member 0 passes: plain values of JSON, NaN allowed; the others pass None."""
        ...


class Alone:
    """A single process: nothing to average, nobody to agree with."""

    rank = 0
    size = 1

    def average(self, module: nn.Module, weight: Tensor) -> None:
        """Leave the gradients as they are."""

    def agree(self, value: Any) -> Any:
        """Return the value."""
        return value


class Processes:
    """The members of the default group of `torch.distributed`, one process each."""

    @property
    def rank(self) -> int:
        """See `Team`."""
        return dist.get_rank()

    @property
    def size(self) -> int:
        """See `Team`."""
        return dist.get_world_size()

    def average(self, module: nn.Module, weight: Tensor) -> None:
        """See `Team`. A gradient that no member has stays None; running statistics (BatchNorm) are averaged too."""
        total = weight.detach().clone()
        dist.all_reduce(total)
        share = weight / total
        sparse = {id(parameter) for parameter in sparse_parameters(module)}
        for parameter in module.parameters():
            if id(parameter) in sparse:
                parameter.grad = _summed(parameter, share)
        _average_dense([p for p in module.parameters() if id(p) not in sparse and p.requires_grad], share)
        self._average_statistics(module)

    def agree(self, value: Any) -> Any:
        """See `Team`. The value travels as JSON."""
        text = torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8)
        length = torch.tensor([len(text)])
        dist.broadcast(length, 0)
        if self.rank:
            text = torch.empty(int(length), dtype=torch.uint8)
        dist.broadcast(text, 0)
        return json.loads(bytes(text.tolist()))

    def _average_statistics(self, module: nn.Module) -> None:
        own = {id(parameter) for parameter in module.parameters()}
        found = [v for v in module.state_dict(keep_vars=True).values() if id(v) not in own and v.is_floating_point()]
        if found:
            flat = torch.cat([tensor.flatten() for tensor in found])
            dist.all_reduce(flat)
            _unpack(flat / self.size, found)


def _average_dense(parameters: list[nn.Parameter], share: Tensor) -> None:
    """Put the weighted sum of all members' gradients into each, with one all-reduce of all numbers."""
    if not parameters:
        return
    present = torch.tensor([float(p.grad is not None) for p in parameters])
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = torch.cat([(grad * share).flatten() for grad in grads] + [present])
    dist.all_reduce(flat)
    anybody = flat[-len(parameters) :] > 0
    _unpack(flat, grads)
    for parameter, grad, some in zip(parameters, grads, anybody.tolist(), strict=True):
        parameter.grad = grad if some else None


def _unpack(flat: Tensor, into: list[Tensor]) -> None:
    start = 0
    for tensor in into:
        tensor.copy_(flat[start : start + tensor.numel()].view_as(tensor))
        start += tensor.numel()


def _summed(parameter: nn.Parameter, share: Tensor) -> Tensor | None:
    """Return the weighted sum of all members' sparse gradients of a table, coalesced; None if nobody has one."""
    if parameter.grad is None:
        index, value = torch.empty(1, 0, dtype=torch.int64), parameter.new_empty(0, parameter.shape[1])
        grad = torch.sparse_coo_tensor(index, value, parameter.shape)
    else:
        grad = parameter.grad.coalesce() * share
    dist.all_reduce(grad)
    summed = grad.coalesce()
    return summed if summed._nnz() else None
