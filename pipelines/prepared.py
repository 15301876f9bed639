"""A prepared set on disk: what `prepare` writes and everything after it reads.

    manifest.json             config, counts, time range, split cuts, digest
    catalogue.parquet         item_key, item_id, text, the catalogue's columns, train_count; row i is item key i
    users.parquet             user_key, user_id, the users' columns; row u is history row u
    vocabulary.json           {column: [value of code 2, value of code 3, ...]}
    items.safetensors         ranking.items.ItemTable
    key_to_row.npy            int32 [keys]
    histories/                recsys.history.Histories over item keys
    requests/{train,valid,test}.safetensors            Requests
    candidates/{valid,test}_{sampler}.safetensors      CandidateSets, request by request
    requests/impressions, candidates/impressions_impressions        what was shown (`pipelines.shown`), if the log says;
                              `valid_impressions` are those of the validation period
    growth/                   what `append` needs (`pipelines.growth`); outside the digest, nothing else reads it

Everything is plain Parquet, npy, safetensors or JSON, but for the bare 64-bit words under growth/.
"""

from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Literal

import numpy as np
import polars as pl
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from pipelines.streams import map_safetensors
from ranking.items import ItemTable
from recsys.errors import DataError
from recsys.files import read_json, sha256_file, sha256_json
from recsys.history import Histories, side_by_side

Split = Literal["train", "valid", "test", "impressions", "valid_impressions"]
IMPRESSIONS: Literal["impressions"] = "impressions"
"""The split of answers that were shown in the test period, and the name of its only candidates: what was shown."""
VALID_IMPRESSIONS: Literal["valid_impressions"] = "valid_impressions"
"""The split of those shown in the validation period: what calibrations are fitted on."""
FORMAT = 1
GROWTH = "growth"
"""folder of what `append` needs"""


def contents(directory: Path) -> list[Path]:
    """Return the files of a prepared set that its digest covers: all but the manifest and the means of growth."""
    return sorted(
        path
        for path in directory.rglob("*")
        if path.is_file() and path.relative_to(directory).parts[0] not in ("manifest.json", GROWTH)
    )


def file_digests(files: Iterable[Path]) -> dict[Path, str]:
    """Return the SHA-256 of each file, hashing them side by side."""
    with ThreadPoolExecutor(2) as pool:
        paths = list(files)
        return dict(zip(paths, pool.map(sha256_file, paths), strict=True))


def digest_of(directory: Path, known: Mapping[Path, str] = MappingProxyType({})) -> str:
    """Return the SHA-256 over names and contents of `contents`; files that are `known` are not read again."""
    files = contents(directory)
    found = {**known, **file_digests(path for path in files if path not in known)}
    return sha256_json({str(path.relative_to(directory)): found[path] for path in files})


@dataclass(frozen=True)
class Requests:
    """R requests of one split, ordered by (at, user).

    `user` int64 [R] is a history row; `at` int64 [R] the moment; `end` int64 [R] the absolute end of the history in the
    packed events (all of them strictly before `at`). Request r's positives are the distinct item rows
    positive[offsets[r]] .. positive[offsets[r + 1]], ascending (int32).
    """

    user: NDArray[np.int64]
    at: NDArray[np.int64]
    end: NDArray[np.int64]
    offsets: NDArray[np.int64]
    positive: NDArray[np.int32]

    KINDS: ClassVar[Mapping[str, type[np.generic]]] = MappingProxyType(
        {**dict.fromkeys(("user", "at", "end", "offsets"), np.int64), "positive": np.int32}
    )
    """types of the arrays, in the order of a file"""

    def __len__(self) -> int:
        return len(self.user)

    def take(self, index: NDArray[np.int64]) -> "Requests":
        """Return the requests at `index`, in that order."""
        where, offsets = side_by_side(self.offsets[index], np.diff(self.offsets)[index])
        return Requests(self.user[index], self.at[index], self.end[index], offsets, self.positive[where])

    def save(self, path: Path) -> None:
        """Write one safetensors file."""
        save_file({name: np.ascontiguousarray(value) for name, value in vars(self).items()}, path)

    @staticmethod
    def load(path: Path) -> "Requests":
        """Read what `save` wrote."""
        return Requests(**load_file(path))

    @staticmethod
    def map(path: Path) -> "Requests":
        """Map what `save` wrote into memory instead of reading it: for one pass over a long split."""
        return Requests(**map_safetensors(path))


@dataclass(frozen=True)
class CandidateSets:
    """The fixed candidates of the requests of one split: request r scores item[offsets[r]]..item[offsets[r + 1]].

    `item` int32 model rows, all positives of the request first, then the sampled negatives; `label` uint8.
    """

    offsets: NDArray[np.int64]
    item: NDArray[np.int32]
    label: NDArray[np.uint8]

    KINDS: ClassVar[Mapping[str, type[np.generic]]] = MappingProxyType(
        {"offsets": np.int64, "item": np.int32, "label": np.uint8}
    )
    """types of the arrays, in the order of a file"""

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def take(self, index: NDArray[np.int64]) -> "CandidateSets":
        """Return the candidates of the requests at `index`, in that order."""
        where, offsets = side_by_side(self.offsets[index], np.diff(self.offsets)[index])
        return CandidateSets(offsets, self.item[where], self.label[where])

    def save(self, path: Path) -> None:
        """Write one safetensors file."""
        save_file({name: np.ascontiguousarray(value) for name, value in vars(self).items()}, path)

    @staticmethod
    def load(path: Path) -> "CandidateSets":
        """Read what `save` wrote."""
        return CandidateSets(**load_file(path))


@dataclass(frozen=True)
class PreparedSet:
    """Lazy access to a prepared set; each part is read once, on first use."""

    directory: Path

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """The manifest; raises `DataError` for a directory without one or of another format."""
        manifest = read_json(self.directory / "manifest.json")
        if manifest.get("format") != FORMAT:
            raise DataError(
                f"{self.directory}: prepared set of format {manifest.get('format')}, this version reads {FORMAT}; "
                "run `recsys prepare` again"
            )
        return dict(manifest)

    @property
    def digest(self) -> str:
        """SHA-256 over the contents of the set."""
        return str(self.manifest["digest"])

    @cached_property
    def histories(self) -> Histories:
        """Memory-mapped histories over item keys."""
        return Histories.load(self.directory / "histories")

    @cached_property
    def key_to_row(self) -> NDArray[np.int32]:
        """Model row of each item key."""
        rows: NDArray[np.int32] = np.load(self.directory / "key_to_row.npy", allow_pickle=False)
        return rows

    @cached_property
    def items(self) -> ItemTable:
        """Item attributes, training counts and transitions by model row."""
        return ItemTable.load(self.directory / "items.safetensors")

    @cached_property
    def catalogue(self) -> pl.DataFrame:
        """item_key, item_id, text and the catalogue's columns; row i is item key i."""
        return pl.read_parquet(self.directory / "catalogue.parquet")

    @cached_property
    def users(self) -> pl.DataFrame:
        """user_key, user_id and the users' columns; row u is history row u."""
        return pl.read_parquet(self.directory / "users.parquet")

    def requests(self, split: Split) -> Requests:
        """Return the requests of a split; raises `DataError` for impressions in a set without."""
        if split in (IMPRESSIONS, VALID_IMPRESSIONS) and split not in self.manifest["counts"]:
            period = "test" if split == IMPRESSIONS else "validation"
            raise DataError(
                f"{self.directory}: no impressions in its {period} period; ingest a log that has them "
                "(`--from-serving`, or source.impressions of a mapping) and prepare it under the split `time`, with "
                "split.valid_days and split.test_days such that they lie in both periods"
            )
        return Requests.load(self.directory / "requests" / f"{split}.safetensors")

    def candidates(self, split: Split, sampler: str) -> CandidateSets:
        """Return the fixed candidates of a split by sampler name; raises `DataError` naming those there are."""
        path = self.directory / "candidates" / f"{split}_{sampler}.safetensors"
        if not path.exists():
            known = sorted(other.stem for other in path.parent.glob("*.safetensors"))
            raise DataError(f"{path}: no such candidates; this set has {', '.join(known) or 'none'}")
        return CandidateSets.load(path)
