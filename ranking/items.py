"""What a bundle knows of every item row: attributes, training counts and transitions, looked up by row, never sent."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ranking.batch import FIRST_ITEM, UNKNOWN
from recsys.errors import ConfigError


@dataclass(frozen=True)
class Transitions:
    """Directed item-to-item counts of the training period, a sparse matrix [V, V] by rows."""

    offsets: Tensor  # int64 [V + 1]
    target: Tensor  # int32 [edges] item rows, ascending within a row
    weight: Tensor  # float32 [edges]

    def of(self, row: int) -> tuple[Tensor, Tensor]:
        """Give the targets and weights of one row."""
        start, end = int(self.offsets[row]), int(self.offsets[row + 1])
        return self.target[start:end], self.weight[start:end]

    @staticmethod
    def none(rows: int) -> "Transitions":
        """Give a matrix without edges."""
        return Transitions(torch.zeros(rows + 1, dtype=torch.int64), torch.empty(0, dtype=torch.int32), torch.empty(0))


class ItemTable(nn.Module):
    """Item attributes by row. A module only so that it moves with the model; nothing in it is a weight.

    Args:
        columns: names of the categorical columns, in order.
        categorical: int32 [V, Fi] codes: 0 at row 0, 1 = missing, values from 2.
        cardinality: number of codes of each column, counting 0 and 1.
        count: int64 [V], training-period events of each row.
        transitions: training-period transitions between rows.
        dense: float32 [V, Fd].
        numeric: names of the dense columns, in order.

    Attributes:
        trained: bool [V], whether a row has training events.
        embedding_row: int32 [V], the row whose learned vector stands for an item: itself if trained, else row 1, so
            that an item first seen after training is an unknown item with its own attributes.
    """

    categorical: Tensor
    count: Tensor
    dense: Tensor
    trained: Tensor
    embedding_row: Tensor
    transition_offsets: Tensor
    transition_target: Tensor
    transition_weight: Tensor

    def __init__(
        self,
        columns: Sequence[str],
        categorical: Tensor,
        cardinality: Sequence[int],
        count: Tensor,
        transitions: Transitions | None = None,
        dense: Tensor | None = None,
        numeric: Sequence[str] = (),
    ) -> None:
        super().__init__()
        rows = len(count)
        transitions = transitions or Transitions.none(rows)
        self.columns = tuple(columns)
        self.cardinality = tuple(cardinality)
        self.numeric = tuple(numeric)
        trained = count > 0
        trained[:FIRST_ITEM] = False
        own = torch.arange(rows, dtype=torch.int32)
        row = torch.where(trained, own, torch.full_like(own, UNKNOWN))
        row[0] = 0
        for name, tensor in (
            ("categorical", categorical),
            ("count", count),
            ("dense", torch.zeros(rows, 0) if dense is None else dense),
            ("trained", trained),
            ("embedding_row", row),
            ("transition_offsets", transitions.offsets),
            ("transition_target", transitions.target),
            ("transition_weight", transitions.weight),
        ):
            self.register_buffer(name, tensor, persistent=False)

    def __len__(self) -> int:
        return len(self.count)

    @property
    def transitions(self) -> Transitions:
        """The training-period transitions between rows."""
        return Transitions(self.transition_offsets, self.transition_target, self.transition_weight)

    def column(self, name: str) -> Tensor:
        """Give one categorical column, int32 [V]; raises `ConfigError` if there is none of that name."""
        return self.categorical[:, self._index(name)]

    def codes(self, name: str) -> int:
        """Give the number of codes of a categorical column, counting padding and missing."""
        return self.cardinality[self._index(name)]

    def _index(self, name: str) -> int:
        if name not in self.columns:
            raise ConfigError(f"no categorical item column {name!r}; there are {', '.join(self.columns) or 'none'}")
        return self.columns.index(name)

    def save(self, path: Path) -> None:
        """Write everything as one safetensors file."""
        tensors = {
            "categorical": self.categorical,
            "cardinality": torch.tensor(self.cardinality, dtype=torch.int64),
            "count": self.count,
            "dense": self.dense,
            "transition_offsets": self.transition_offsets,
            "transition_target": self.transition_target,
            "transition_weight": self.transition_weight,
        }
        save_file(
            {name: tensor.contiguous() for name, tensor in tensors.items()},
            path,
            # One entry, since several are not written in the same order twice; an empty line parts the two lists.
            metadata={"columns": "\n".join(self.columns) + "\n\n" + "\n".join(self.numeric)},
        )

    @staticmethod
    def load(path: Path) -> "ItemTable":
        """Read what `save` wrote."""
        from safetensors import safe_open

        with safe_open(path, "pt") as file:
            first, _, second = file.metadata()["columns"].partition("\n\n")
        columns, numeric = ([name for name in names.split("\n") if name] for names in (first, second))
        t = load_file(path)
        return ItemTable(
            columns,
            t["categorical"],
            t["cardinality"].tolist(),
            t["count"],
            Transitions(t["transition_offsets"], t["transition_target"], t["transition_weight"]),
            t["dense"],
            numeric,
        )


def identity_rows(items: int) -> NDArray[np.int32]:
    """Give the usual `key_to_row` of a bundle that knows item keys 0..items-1: row = key + 2."""
    return np.arange(FIRST_ITEM, items + FIRST_ITEM, dtype=np.int32)
