"""Arrays larger than memory, written from front to back: plain npy files, and safetensors files of many arrays.

A memory-mapped file would do the same, but its dirty pages count as memory of the process until it is closed.
"""

import json
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
    """Give a file open after the npy header of a vector; what is written must add up to `length` elements."""
    header = {"descr": np.lib.format.dtype_to_descr(np.dtype(kind)), "fortran_order": False, "shape": (length,)}
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        yield file


@contextmanager
def safetensors_file(
    path: Path, layout: Layout, metadata: Mapping[str, str] | None = None
) -> Iterator[dict[str, IO[bytes]]]:
    """Give one open file per array of a safetensors file, each at the place of its first element.

    The same layout always gives the same bytes: 8 bytes of header length, the JSON header padded to a multiple of 8,
    then the arrays in the layout's order (put the widest types first, so that all are aligned).
    """
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    starts, end = {}, 0
    for name, (kind, shape) in layout.items():
        starts[name], end = end, end + np.dtype(kind).itemsize * prod(shape)
        header[name] = {"dtype": _DTYPES[kind], "shape": list(shape), "data_offsets": [starts[name], end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    with ExitStack() as stack:
        files: dict[str, IO[bytes]] = {name: stack.enter_context(path.open("r+b")) for name in layout}
        for name, opened in files.items():
            opened.seek(8 + len(text) + starts[name])
        yield files


@contextmanager
def growing_safetensors(path: Path, kinds: Mapping[str, Kind]) -> Iterator[dict[str, IO[bytes]]]:
    """Give one open file per vector of a safetensors file whose lengths show only when all is written.

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


def put(file: IO[bytes], values: NDArray[Any]) -> None:
    """Write an array's elements."""
    file.write(np.ascontiguousarray(values).data)


def put_file(file: IO[bytes], path: Path) -> None:
    """Write what a file of bare elements holds."""
    with path.open("rb") as source:
        copyfileobj(source, file, _COPIED_AT_ONCE)
