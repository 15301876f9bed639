"""What a bundle says of itself, and the check that its files are those it was published with."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from pydantic import Field, ValidationError

from recsys.config import first_problem
from recsys.errors import BundleError
from recsys.files import sha256_file
from recsys.messages import Message

FORMAT = 1
MANIFEST = "manifest.json"
Role = Literal["ranker", "retriever"]


class FileEntry(Message):
    """What a file must be."""

    sha256: str
    bytes: int


class ModelEntry(Message):
    """A model by its name in `ranking.models.RANKERS`, its config and the file of its weights."""

    name: str
    config: dict[str, Any]
    weights: str = Field(description="file of the bundle")


class Provenance(Message):
    """Where a bundle comes from."""

    created: str = Field(description="ISO 8601, UTC")
    commit: str
    data_digest: str
    metrics: dict[str, float] = Field(default_factory=dict)


class TextEntry(Message):
    """The text part of a bundle (`ranking.search_part`)."""

    passages: int = Field(description="distinct texts")
    documents: int
    encoder: str | None = Field(description="kind of the encoder; null where search goes by words alone")
    reranker: str | None = Field(description="kind of the reranker, if there is one")
    weight: float | None = Field(description="of the words in the convex sum; null for reciprocal ranks")
    covered: float | None = Field(default=None, description="of the words where one passage holds those of the query")
    index: list[str] = Field(description="files of the passage index's shards, in order")
    windows: int | None = Field(
        default=None,
        description="vectors in the index; null: one per passage, of a long one's beginning",
    )


class IndexRecall(Message):
    """How well the index finds what an exhaustive search finds, measured when it was built."""

    value: float = Field(description="mean share of the exact best `at` that were found")
    at: int
    queries: int
    of: Literal["users", "items"] = Field(description="whose vectors the queries were")


class Manifest(Message):
    """Everything a bundle says of itself."""

    format: Literal[1]
    provenance: Provenance
    counts: dict[str, int]
    actions: list[str] = Field(description='names of the action codes 0, 1, ...; code 0 means none and is named ""')
    models: dict[Role, ModelEntry]
    index: list[str] = Field(description="files of the index shards, in order")
    text: TextEntry | None = Field(default=None, description="absent where the bundle searches no text")
    index_recall: IndexRecall | None = None
    files: dict[str, FileEntry]


def describe_file(path: Path) -> FileEntry:
    """Return size and digest of a file."""
    return FileEntry(sha256=sha256_file(path), bytes=path.stat().st_size)


def describe(directory: Path) -> dict[str, FileEntry]:
    """Return size and digest of every file under a directory, by relative path."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return {path.relative_to(directory).as_posix(): describe_file(path) for path in files}


def version_of(manifest: bytes) -> str:
    """Return the version of a bundle: the first 12 hexadecimal digits of its manifest's SHA-256."""
    return hashlib.sha256(manifest).hexdigest()[:12]


def read_manifest(directory: Path) -> tuple[Manifest, str]:
    """Return manifest and version of a bundle; raises `BundleError` for anything else than one of this format."""
    path = directory / MANIFEST
    try:
        raw = path.read_bytes()
        table = json.loads(raw)
    except FileNotFoundError:
        raise BundleError(f"{directory}: no {MANIFEST}, so not a bundle; publish one with `recsys publish`") from None
    except ValueError as error:
        raise BundleError(f"{path}: not valid JSON ({error}); publish again") from None
    found = table.get("format") if isinstance(table, dict) else None
    if found != FORMAT:
        raise BundleError(f"{path}: bundle of format {found}, this version reads {FORMAT}; publish it again")
    try:
        return Manifest.model_validate(table), version_of(raw)
    except ValidationError as error:
        raise BundleError(f"{path}: {first_problem(error)}; publish again") from None


def checked_files(directory: Path, manifest: Manifest) -> dict[str, Path]:
    """Return the path of every listed file; raises `BundleError` unless its place, size and digest are right."""
    root = directory.resolve()
    paths = {}
    for name, entry in manifest.files.items():
        pure = PurePosixPath(name)
        path = root / name
        if pure.is_absolute() or ".." in pure.parts or "\\" in name or not path.resolve().is_relative_to(root):
            raise BundleError(f"{directory}: file {name!r} lies outside the bundle; it is refused")
        if not path.is_file():
            raise BundleError(f"{directory}: file {name!r} is missing; copy or publish the bundle again")
        if path.stat().st_size != entry.bytes:
            raise BundleError(f"{directory}: file {name!r} has {path.stat().st_size} bytes, expected {entry.bytes}")
        if (digest := sha256_file(path)) != entry.sha256:
            raise BundleError(
                f"{directory}: file {name!r} has sha256 {digest[:12]}..., expected {entry.sha256[:12]}...; "
                "it was changed after publishing"
            )
        paths[name] = path
    return paths


def listed(paths: Mapping[str, Path], name: str, directory: Path) -> Path:
    """Return the checked path of a file the loader needs; raises `BundleError` if the manifest does not list it."""
    if name not in paths:
        raise BundleError(f"{directory}: {MANIFEST} needs file {name!r} but does not list it; publish again")
    return paths[name]
