"""Arrays larger than memory, written from front to back: plain npy files, and safetensors files of many arrays.

A memory-mapped file would do the same, but its dirty pages count as memory of the process until it is closed.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from math import prod
from pathlib import Path
from shutil import copyfileobj
from tempfile import TemporaryDirectory
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

Kind = type[np.generic]
Layout = Mapping[str, tuple[Kind, Sequence[int]]]
"""array name -> (type, shape)"""
_DTYPES: dict[Kind, str] = {
    np.int64: "I64",
    np.uint64: "U64",
    np.int32: "I32",
    np.float32: "F32",
    np.uint8: "U8",
}
_COPIED_AT_ONCE = 1 << 20
"""bytes"""


@contextmanager
def npy_file(path: Path, kind: Kind, length: int) -> Iterator[IO[bytes]]:
    """Yield a file open after the npy header of a vector; what is written must add up to `length` elements."""
    header = {"descr": np.lib.format.dtype_to_descr(np.dtype(kind)), "fortran_order": False, "shape": (length,)}
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        yield file


@contextmanager
def safetensors_file(
    path: Path, layout: Layout, metadata: Mapping[str, str] | None = None
) -> Iterator[dict[str, IO[bytes]]]:
    """Yield one open file per array of a safetensors file, each at the place of its first element.

    The same arrays always give the same bytes: 8 bytes of header length, the JSON header padded to a multiple of 8,
    then the arrays in the layout's order (put the widest types first, so that all are aligned). Vectors may turn out
    shorter than the layout says: what comes after them is then moved down, which costs a tenth of writing it anew.
    """
    header, starts, end = _head(layout, metadata)
    with path.open("wb") as file:
        file.truncate(end)
    with ExitStack() as stack:
        files: dict[str, IO[bytes]] = {name: stack.enter_context(path.open("r+b")) for name in layout}
        for name, opened in files.items():
            opened.seek(starts[name])
        yield files
        sizes = {name: opened.tell() - starts[name] for name, opened in files.items()}
    true = {
        name: (kind, shape if len(shape) != 1 else (sizes[name] // np.dtype(kind).itemsize,))
        for name, (kind, shape) in layout.items()
    }
    header, places, end = _head(true, metadata)
    with path.open("r+b") as file:
        for name, size in sizes.items():
            _move_down(file.fileno(), starts[name], places[name], size)
        file.write(header)
        file.truncate(end)


def _head(layout: Layout, metadata: Mapping[str, str] | None) -> tuple[bytes, dict[str, int], int]:
    """Return the bytes before the arrays, where each array starts, and where the last one ends."""
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    starts, end = {}, 0
    for name, (kind, shape) in layout.items():
        starts[name], end = end, end + np.dtype(kind).itemsize * prod(shape)
        header[name] = {"dtype": _DTYPES[kind], "shape": list(shape), "data_offsets": [starts[name], end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    first = 8 + len(text)
    return len(text).to_bytes(8, "little") + text, {name: first + start for name, start in starts.items()}, first + end


def _move_down(file: int, source: int, target: int, size: int) -> None:
    """Move bytes of an open file towards its beginning."""
    for done in range(0, size if target < source else 0, _COPIED_AT_ONCE):
        os.pwrite(file, os.pread(file, min(_COPIED_AT_ONCE, size - done), source + done), target + done)


@contextmanager
def growing_safetensors(path: Path, kinds: Mapping[str, Kind]) -> Iterator[dict[str, IO[bytes]]]:
    """Yield one open file per vector of a safetensors file whose lengths show only when all is written.

    Costs a second copy: each vector lies in a file of its own until the end. For the order see `safetensors_file`.
    """
    with TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        with ExitStack() as stack:
            yield {name: stack.enter_context((Path(folder) / name).open("wb")) for name in kinds}
        sizes = {name: (Path(folder) / name).stat().st_size // np.dtype(kind).itemsize for name, kind in kinds.items()}
        layout = {name: (kind, (sizes[name],)) for name, kind in kinds.items()}
        with safetensors_file(path, layout) as files:
            for name, file in files.items():
                put_file(file, Path(folder) / name)


def map_safetensors(path: Path) -> dict[str, NDArray[Any]]:
    """Return the arrays of a safetensors file, mapped into memory; only of the types that are written here."""
    kinds = {name: kind for kind, name in _DTYPES.items()}
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    values = np.memmap(path, np.uint8, "r", 8 + length) if path.stat().st_size > 8 + length else np.empty(0, np.uint8)
    arrays = {name: (entry, *entry["data_offsets"]) for name, entry in header.items() if name != "__metadata__"}
    return {
        name: values[start:end].view(kinds[entry["dtype"]]).reshape(entry["shape"])
        for name, (entry, start, end) in arrays.items()
    }


def put(file: IO[bytes], values: NDArray[Any]) -> None:
    """Write an array's elements."""
    file.write(np.ascontiguousarray(values).data)


def put_file(file: IO[bytes], path: Path) -> None:
    """Write what a file of bare elements holds."""
    with path.open("rb") as source:
        copyfileobj(source, file, _COPIED_AT_ONCE)
