"""Arrays larger than memory, written from front to back: plain npy files, and safetensors files of many arrays.

A memory-mapped file would do the same, but its dirty pages count as memory of the process until it is closed.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

Layout = Mapping[str, tuple[type[np.generic], int]]
"""array name -> (type, length)"""
_DTYPES: dict[type[np.generic], str] = {np.int64: "I64", np.int32: "I32", np.uint64: "U64"}


@contextmanager
def npy_file(path: Path, kind: type[np.generic], length: int) -> Iterator[IO[bytes]]:
    """Give a file open after the npy header of a vector; what is written must add up to `length` elements."""
    header = {"descr": np.lib.format.dtype_to_descr(np.dtype(kind)), "fortran_order": False, "shape": (length,)}
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        yield file


@contextmanager
def safetensors_file(path: Path, layout: Layout) -> Iterator[dict[str, IO[bytes]]]:
    """Give one open file per vector of a safetensors file, each at the place of its first element.

    The same layout always gives the same bytes: 8 bytes of header length, the JSON header padded to a multiple of 8,
    then the vectors in the layout's order (put the widest types first, so that all are aligned).
    """
    header, start = {}, 0
    for name, (kind, length) in layout.items():
        end = start + np.dtype(kind).itemsize * length
        header[name] = {"dtype": _DTYPES[kind], "shape": [length], "data_offsets": [start, end]}
        start = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + start)
    with ExitStack() as stack:
        files: dict[str, IO[bytes]] = {}
        start = 0
        for name, (kind, length) in layout.items():
            files[name] = stack.enter_context(path.open("r+b"))
            files[name].seek(8 + len(text) + start)
            start += np.dtype(kind).itemsize * length
        yield files


def put(file: IO[bytes], values: NDArray[Any]) -> None:
    """Write a vector's elements."""
    file.write(np.ascontiguousarray(values).data)
