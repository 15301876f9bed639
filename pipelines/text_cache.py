"""Vectors of texts on disk, keyed by content: computed once per text and model, kept in parts, resumed after a kill.

A part is one safetensors file of digests uint64 [n, 2] (xxh3-128 of the text) and values float32 [n, ...]; parts are
only ever added. Values come back in the order asked for, whatever is already there.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from ranking.text_models import Vectors
from recsys.files import whole_file
from recsys.progress import Progress, silent

PART = 256
"""Texts computed between two writes: what a kill loses."""


class VectorCache:
    """Values of texts under one directory.

    Args:
        directory: of the parts; name it by model digest and purpose, e.g. `root / encoder.digest / "passages"`.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._place: dict[bytes, tuple[int, int]] = {}
        self._parts: list[Vectors] = []
        for path in sorted(directory.glob("*.safetensors")):
            tensors = load_file(path)
            self._remember(tensors["digests"], tensors["values"])

    def __len__(self) -> int:
        return len(self._place)

    def get(
        self, texts: Sequence[str], compute: Callable[[Sequence[str]], Vectors], progress: Progress = silent
    ) -> Vectors:
        """Return float32 [N, ...], calling `compute` for the texts that are not there, `PART` at a time.

        Those are computed from short to long, so that a part's texts are of like length.
        """
        keys = [xxhash.xxh3_128_digest(text.encode()) for text in texts]
        missing = sorted(
            {key: text for key, text in zip(keys, texts, strict=True) if key not in self._place}.items(),
            key=lambda one: (len(one[1]), one[0]),
        )
        for first in range(0, len(missing), PART):
            chosen = missing[first : first + PART]
            values = compute([text for _, text in chosen])
            digests = np.frombuffer(b"".join(key for key, _ in chosen), np.uint64).reshape(-1, 2).copy()
            with whole_file(self.directory / f"{xxhash.xxh3_64_hexdigest(digests.tobytes())}.safetensors") as path:
                save_file({"digests": digests, "values": np.ascontiguousarray(values, np.float32)}, path)
            self._remember(digests, values)
            progress(min(first + PART, len(missing)), len(missing))
        if not keys:
            return compute([])
        return np.stack([self._parts[part][row] for part, row in (self._place[key] for key in keys)])

    def _remember(self, digests: NDArray[np.uint64], values: Vectors) -> None:
        raw = np.ascontiguousarray(digests).tobytes()
        for row in range(len(values)):
            self._place[raw[16 * row : 16 * row + 16]] = (len(self._parts), row)
        self._parts.append(values)
