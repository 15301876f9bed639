"""Many strings as two arrays: UTF-8 bytes laid end to end, and where each one starts. Memory-mapped when read."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from recsys.errors import DataError


@dataclass(frozen=True)
class StringTable:
    """An immutable list of strings: `data` uint8 [bytes], string i is data[offsets[i]] .. data[offsets[i + 1]]."""

    data: NDArray[np.uint8]
    offsets: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> str:
        return self.raw(index).decode()

    def __iter__(self) -> Iterator[str]:
        data = self.data.tobytes()
        ends = self.offsets.tolist()
        return (data[start:end].decode() for start, end in itertools.pairwise(ends))

    def raw(self, index: int) -> bytes:
        """Return the UTF-8 bytes of one string."""
        return self.data[self.offsets[index] : self.offsets[index + 1]].tobytes()

    @staticmethod
    def of(strings: Sequence[str]) -> "StringTable":
        """Pack strings."""
        encoded = [string.encode() for string in strings]
        offsets = np.zeros(len(encoded) + 1, np.int64)
        np.cumsum([len(part) for part in encoded], out=offsets[1:])
        return StringTable(np.frombuffer(b"".join(encoded), np.uint8), offsets)

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Return the two arrays as tensors `<name>.data` and `<name>.offsets`, ready for a safetensors file."""
        return {
            f"{name}.data": torch.from_numpy(self.data.copy()),
            f"{name}.offsets": torch.from_numpy(np.ascontiguousarray(self.offsets)),
        }

    @staticmethod
    def from_tensors(tensors: dict[str, Tensor], name: str, where: str) -> "StringTable":
        """Read back what `tensors` gave, as views; raises `DataError` naming `where` if the two do not fit together."""
        try:
            data, offsets = tensors[f"{name}.data"].numpy(), tensors[f"{name}.offsets"].numpy()
        except KeyError as error:
            raise DataError(f"{where}: no tensor {error}; expected a table of strings named {name!r}") from None
        if not len(offsets) or int(offsets[-1]) != len(data):
            raise DataError(f"{where}: table {name!r} holds {len(data)} bytes, but its offsets end elsewhere")
        return StringTable(data, offsets)
