"""Checkpoints of a training run: one safetensors file, replaced as a whole, holding all that the next step needs.

There is no generator state in it, because no generator outlives a step (`recsys.randomness`).
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from recsys.errors import DataError, RecsysError
from recsys.files import whole_file

OptimiserState = dict[int, dict[str, Any]]
"""parameter number -> name -> tensor or number"""


class TrainingError(RecsysError):
    """A run can't go on: its loss stopped being a number, or a worker failed."""


@dataclass(frozen=True)
class RunState:
    """Where a run stands."""

    step: int = 0
    best_step: int = 0
    best_value: float = float("-inf")
    without_gain: int = 0  # validations since the best one
    seconds: float = 0.0  # spent in training steps, validation not counted
    finished: bool = False
    curve: list[dict[str, float]] = field(default_factory=list)  # one entry per validation

    @property
    def gained(self) -> bool:
        """Whether the newest validation was the best so far."""
        return bool(self.curve) and not self.without_gain

    def after(self, value: float, values: Mapping[str, float]) -> "RunState":
        """Return the state after a validation that found `value` of the measure that decides, and `values` to keep."""
        gained = value > self.best_value
        return replace(
            self,
            best_step=self.step if gained else self.best_step,
            best_value=max(value, self.best_value),
            without_gain=0 if gained else self.without_gain + 1,
            curve=[*self.curve, {"step": self.step, **values}],
        )


@dataclass(frozen=True)
class Checkpoint:
    """A run at the end of a step: weights, the best weights so far, optimiser states, and where it stands.

    `inputs` is the digest of configuration and data the run was started with; another digest is another run.
    """

    inputs: str
    state: RunState
    weights: dict[str, Tensor]
    best: dict[str, Tensor]
    optimisers: list[OptimiserState]  # torch `state_dict()["state"]` of each optimiser

    def save(self, path: Path) -> None:
        """Write the checkpoint under a temporary name, then rename."""
        tensors = {f"weights/{name}": tensor for name, tensor in self.weights.items()}
        tensors |= {f"best/{name}": tensor for name, tensor in self.best.items()}
        numbers: dict[str, float] = {}
        for i, state in enumerate(self.optimisers):
            for parameter, values in state.items():
                for name, value in values.items():
                    key = f"optimiser/{i}/{parameter}/{name}"
                    if isinstance(value, Tensor):
                        tensors[key] = value
                    else:
                        numbers[key] = value
        about = {"inputs": self.inputs, "progress": asdict(self.state), "numbers": numbers}
        with whole_file(path) as temporary:
            save_file(
                {key: tensor.detach().cpu().contiguous().clone() for key, tensor in tensors.items()},
                temporary,
                metadata={"about": json.dumps(about)},
            )

    @staticmethod
    def load(path: Path, optimisers: int) -> "Checkpoint":
        """Read a checkpoint; raises `DataError` if the file is not one."""
        try:
            with safe_open(path, "pt") as file:
                about = json.loads(file.metadata()["about"])
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
        except Exception as error:
            raise DataError(f"{path}: not a checkpoint ({error}); remove it to start the run again") from error
        states: list[OptimiserState] = [{} for _ in range(optimisers)]
        for key, value in {**tensors, **about["numbers"]}.items():
            kind, _, rest = key.partition("/")
            if kind == "optimiser":
                i, parameter, name = rest.split("/")
                states[int(i)].setdefault(int(parameter), {})[name] = value
        return Checkpoint(
            about["inputs"],
            RunState(**about["progress"]),
            _under("weights/", tensors),
            _under("best/", tensors),
            states,
        )


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}


def restore(optimisers: Sequence[torch.optim.Optimizer], states: Sequence[OptimiserState]) -> None:
    """Put saved states back into freshly built optimisers over the same parameters."""
    for optimiser, state in zip(optimisers, states, strict=True):
        optimiser.load_state_dict({**optimiser.state_dict(), "state": state})
