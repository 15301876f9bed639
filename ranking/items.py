"""What a bundle knows of every item row: attributes, training counts and transitions, looked up by row, never sent."""

from collections.abc import Mapping, Sequence
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
        """Return the targets and weights of one row."""
        start, end = int(self.offsets[row]), int(self.offsets[row + 1])
        return self.target[start:end], self.weight[start:end]

    @staticmethod
    def none(rows: int) -> "Transitions":
        """Return a matrix without edges."""
        return Transitions(torch.zeros(rows + 1, dtype=torch.int64), torch.empty(0, dtype=torch.int32), torch.empty(0))


@dataclass(frozen=True)
class MultiValued:
    """A column with several values per item: row r has the distinct codes code[offsets[r]] .. code[offsets[r + 1]].

    Codes are those of a categorical column, and every row has one at least: 0 at row 0, 1 where nothing is known.
    """

    offsets: Tensor  # int64 [V + 1]
    code: Tensor  # int32 [values]
    cardinality: int  # number of codes, counting 0 and 1

    def of(self, row: Tensor) -> tuple[Tensor, Tensor]:
        """Return the codes of integer rows [n], one row's after the other's, and where each row begins, both int64."""
        begin = self.offsets.index_select(0, row)  # [n]
        length = self.offsets.index_select(0, row + 1) - begin
        start = length.cumsum(0) - length
        shift = torch.repeat_interleave(begin - start, length)
        return self.code.index_select(0, torch.arange(len(shift), device=shift.device) + shift).long(), start

    def shares(self, row: Tensor) -> Tensor:
        """Return the share of the rows [n] each code stands for, float64 [codes]; codes of one row divide its vote."""
        code, start = self.of(row)
        length = torch.diff(start, append=start.new_tensor([len(code)]))
        vote = torch.repeat_interleave(length.double().reciprocal(), length)
        return torch.bincount(code, vote, self.cardinality) / max(len(row), 1)


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
        multi: columns with several values per item, by name.
        missing: bool [V, Fd], where a 0 in `dense` stands for a number that is not there. Models read the 0.
        unlisted: bool [V], the items that have events but no row in the catalogue. Nothing but filters reads it.

    Attributes:
        trained: bool [V], whether a row has training events.
        embedding_row: int32 [V], the row whose learned vector stands for an item: itself if trained, else row 1, so
            that an item first seen after training is an unknown item with its own attributes.
    """

    categorical: Tensor
    count: Tensor
    dense: Tensor
    missing: Tensor
    unlisted: Tensor
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
        multi: Mapping[str, MultiValued] | None = None,
        missing: Tensor | None = None,
        unlisted: Tensor | None = None,
    ) -> None:
        super().__init__()
        rows = len(count)
        dense = torch.zeros(rows, 0) if dense is None else dense
        transitions = transitions or Transitions.none(rows)
        multi = multi or {}
        self.columns = tuple(columns)
        self.multi_columns = tuple(multi)
        self._multi_cardinality = tuple(column.cardinality for column in multi.values())
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
            ("dense", dense),
            ("missing", torch.zeros(dense.shape, dtype=torch.bool) if missing is None else missing),
            ("unlisted", torch.zeros(rows, dtype=torch.bool) if unlisted is None else unlisted),
            ("trained", trained),
            ("embedding_row", row),
            ("transition_offsets", transitions.offsets),
            ("transition_target", transitions.target),
            ("transition_weight", transitions.weight),
            *((f"multi_offsets_{place}", column.offsets) for place, column in enumerate(multi.values())),
            *((f"multi_code_{place}", column.code) for place, column in enumerate(multi.values())),
        ):
            self.register_buffer(name, tensor, persistent=False)

    def __len__(self) -> int:
        return len(self.count)

    @property
    def transitions(self) -> Transitions:
        """The training-period transitions between rows."""
        return Transitions(self.transition_offsets, self.transition_target, self.transition_weight)

    def column(self, name: str) -> Tensor:
        """Return one categorical column, int32 [V]; raises `ConfigError` if there is none of that name."""
        return self.categorical[:, self._index(name)]

    def multi(self, name: str) -> MultiValued:
        """Return one multi-valued column; raises `ConfigError` if there is none of that name."""
        if name not in self.multi_columns:
            there = ", ".join(self.multi_columns) or "none"
            raise ConfigError(f"no multi-valued item column {name!r}; there are {there}")
        place = self.multi_columns.index(name)
        offsets, code = self.get_buffer(f"multi_offsets_{place}"), self.get_buffer(f"multi_code_{place}")
        return MultiValued(offsets, code, self._multi_cardinality[place])

    def held(self, name: str) -> tuple[Tensor, ...]:
        """Return the tensors that hold a column of either kind: what a digest of it has to cover."""
        if name not in self.multi_columns:
            return (self.column(name),)
        column = self.multi(name)
        return (column.offsets, column.code)

    def codes(self, name: str) -> int:
        """Return the number of codes of a categorical or multi-valued column, counting padding and missing."""
        if name in self.multi_columns:
            return self._multi_cardinality[self.multi_columns.index(name)]
        return self.cardinality[self._index(name)]

    def _index(self, name: str) -> int:
        if name in self.multi_columns:
            raise ConfigError(
                f"item column {name!r} has several values per item; expected one value each: "
                f"{', '.join(self.columns) or 'there is no such column'}"
            )
        if name not in self.columns:
            raise ConfigError(f"no categorical item column {name!r}; there are {', '.join(self.columns) or 'none'}")
        return self.columns.index(name)

    def tensors(self) -> dict[str, Tensor]:
        """Return what a file of the table holds, by name."""
        tensors = {
            "categorical": self.categorical,
            "cardinality": torch.tensor(self.cardinality, dtype=torch.int64),
            "count": self.count,
            "dense": self.dense,
            "transition_offsets": self.transition_offsets,
            "transition_target": self.transition_target,
            "transition_weight": self.transition_weight,
        }
        for name, marks in (("missing", self.missing), ("unlisted", self.unlisted)):
            if marks.any():
                tensors[name] = marks.to(torch.uint8)
        if self.multi_columns:
            tensors["multi_cardinality"] = torch.tensor(self._multi_cardinality, dtype=torch.int64)
            for place, column in enumerate(map(self.multi, self.multi_columns)):
                tensors |= {f"multi_offsets_{place}": column.offsets, f"multi_code_{place}": column.code}
        return {name: tensor.contiguous() for name, tensor in tensors.items()}

    def metadata(self) -> dict[str, str]:
        """Return what the file says of itself: the names of the columns by kind."""
        names = [self.columns, self.numeric]
        if self.multi_columns:
            names.append(self.multi_columns)
        # One entry, since several are not written in the same order twice; an empty line parts the lists.
        return {"columns": "\n\n".join("\n".join(some) for some in names)}

    def save(self, path: Path) -> None:
        """Write everything as one safetensors file."""
        save_file(self.tensors(), path, metadata=self.metadata())

    @staticmethod
    def load(path: Path) -> "ItemTable":
        """Read what `save` wrote."""
        from safetensors import safe_open

        with safe_open(path, "pt") as file:
            kinds = [*file.metadata()["columns"].split("\n\n"), "", ""]
        columns, numeric, multi = ([name for name in names.split("\n") if name] for names in kinds[:3])
        t = load_file(path)
        return ItemTable(
            columns,
            t["categorical"],
            t["cardinality"].tolist(),
            t["count"],
            Transitions(t["transition_offsets"], t["transition_target"], t["transition_weight"]),
            t["dense"],
            numeric,
            {
                name: MultiValued(
                    t[f"multi_offsets_{place}"], t[f"multi_code_{place}"], int(t["multi_cardinality"][place])
                )
                for place, name in enumerate(multi)
            },
            *(t[name].bool() if name in t else None for name in ("missing", "unlisted")),
        )


def identity_rows(items: int) -> NDArray[np.int32]:
    """Return the usual `key_to_row` of a bundle that knows item keys 0..items-1: row = key + 2."""
    return np.arange(FIRST_ITEM, items + FIRST_ITEM, dtype=np.int32)
