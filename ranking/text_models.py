"""The two seams of text ranking: what a searcher may ask of an encoder and of a reranker, and how either is loaded.

A text model is a directory of `config.json` (kind, options, architecture), `model.safetensors` (every parameter) and
`tokenizer.json`. Nothing in it is a pickle, nothing is downloaded when it is loaded, and importing this module imports
no model library.

    N texts    D width    n passages of one list
"""

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from recsys.errors import DataError
from recsys.files import read_json
from recsys.progress import Progress, silent

if TYPE_CHECKING:
    from ranking.windows import Windows

Vectors = NDArray[np.float32]

CONFIG, WEIGHTS, TOKENIZER = "config.json", "model.safetensors", "tokenizer.json"
FORMAT = 1


class TextEncoder(Protocol):
    """Texts to vectors whose inner product is their similarity."""

    @property
    def dim(self) -> int:
        """Length of a vector, D."""
        ...

    @property
    def digest(self) -> str:
        """Hexadecimal digest of weights and options: equal digests encode alike, so caches are keyed by it."""
        ...

    def encode_queries(self, texts: Sequence[str], progress: Progress = silent) -> Vectors:
        """Return float32 [N, D], rows of length 1, in the order of the input; empty strings are legal."""
        ...

    def encode_passages(self, texts: Sequence[str], progress: Progress = silent) -> Vectors:
        """Return float32 [N, D], rows of length 1, in the order of the input; empty strings are legal."""
        ...

    def truncated(self, texts: Sequence[str]) -> NDArray[np.bool_]:
        """Return bool [N]: of which passages only the beginning is read."""
        ...

    def windows(self, texts: Sequence[str]) -> "Windows":
        """Return what to encode so that all of every passage is read."""
        ...

    def save(self, directory: Path) -> None:
        """Write the model whole; `load_encoder` gives one back that encodes bit for bit alike."""
        ...


class TextReranker(Protocol):
    """Orders the passages a first stage found. Scores speak of one list only: never merge those of two.

    Attributes:
        whole_list: whether a passage's score depends on the others of its list.
    """

    whole_list: ClassVar[bool]

    @property
    def digest(self) -> str:
        """Hexadecimal digest of weights and options."""
        ...

    def rerank(self, query: str, passages: Sequence[str], progress: Progress = silent) -> Vectors:
        """Return float32 [n], higher is better, in the order of the passages; an empty list gives an empty array.

        `progress` is called after every micro-batch of pairs; an exception it raises ends the work there.
        """
        ...

    def rerank_many(
        self, queries: Sequence[str], lists: Sequence[Sequence[str]], progress: Progress = silent
    ) -> list[Vectors]:
        """Rerank one list per query, of any lengths; equals `rerank` one by one."""
        ...

    def truncated(self, query: str, passages: Sequence[str]) -> NDArray[np.bool_]:
        """Return bool [n]: which passages are longer than what the model reads of them beside this query."""
        ...

    def save(self, directory: Path) -> None:
        """Write the model whole; `load_reranker` gives one back that scores bit for bit alike."""
        ...


ENCODERS = {
    "dense": ("ranking.dense_encoder", "DenseEncoder"),
    "lexsembridge": ("ranking.lexsembridge", "LexSemBridge"),
}
"""kind -> module and class; imported when a directory of that kind is loaded"""

RERANKERS = {
    "mvp": ("ranking.mvp", "Mvp"),
    "cross_encoder": ("ranking.cross_encoder", "CrossEncoder"),
    "mvp_apart": ("ranking.mvp_apart", "MvpApart"),
    "sequence": ("ranking.sequence_reranker", "SequenceReranker"),
}


def load_encoder(directory: Path) -> TextEncoder:
    """Load the encoder that `save` wrote; raises `DataError` for anything else."""
    return cast(TextEncoder, _load(directory, ENCODERS))


def load_reranker(directory: Path) -> TextReranker:
    """Load the reranker that `save` wrote; raises `DataError` for anything else."""
    return cast(TextReranker, _load(directory, RERANKERS))


def read_config(directory: Path) -> dict[str, Any]:
    """Read `config.json` of a text model; raises `DataError` unless it is of this format."""
    table = read_json(directory / CONFIG)
    found = table.get("format") if isinstance(table, dict) else None
    if found != FORMAT:
        raise DataError(
            f"{directory / CONFIG}: text model of format {found}, this version reads {FORMAT}; save it again"
        )
    return cast(dict[str, Any], table)


def _load(directory: Path, kinds: dict[str, tuple[str, str]]) -> Any:
    kind = read_config(directory).get("kind")
    if kind not in kinds:
        raise DataError(f"{directory / CONFIG}: kind is {kind!r}, expected one of {', '.join(kinds)}")
    module, name = kinds[kind]
    return getattr(importlib.import_module(module), name).load(directory)
