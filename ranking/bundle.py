"""A bundle: one directory that is a whole recommender, checked file by file before anything in it is used.

    manifest.json             format, models and their configs, counts, metrics, commit; path, size, sha256 of each file
    items.safetensors         ranking.items.ItemTable
    strings.safetensors       item ids and item names by row (ranking.strings)
    key_to_row.npy            int32 [keys], model row of each item key
    vocabulary.json           {column: [value of code 2, value of code 3, ...]}
    models/<role>.safetensors weights of the `ranker` and, if it is another model, the `retriever`
    index/shard_<n>.faiss     items by the retriever's vectors (ranking.index)
    content.safetensors       if there are items without training events: what is known of all (ranking.content)
    content_vectors.safetensors   if content tells them: retriever's vectors of such items (ranking.content_vectors)
    golden.json               synthetic requests and what they were answered (ranking.golden)
    reference.json            how the scores of recommended items lay at publish, if that was told (ranking.drift)
    calibration.json          scores as probabilities, if that was asked for (ranking.calibration)
    text/                     if it searches text: passages, indexes, text models (ranking.search_part)

A bundle may have rankers, or text, or both; without rankers its catalogue may be empty.

Everything is JSON, npy, safetensors or a FAISS index: nothing that can run code. Weights and index stay memory-mapped,
so the replicas of one machine share them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TypeVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from ranking.batch import FIRST_ITEM
from ranking.bundle_models import NamedModel, load_model, write_models
from ranking.calibration import Calibration
from ranking.content import ContentMatch
from ranking.content_vectors import ContentVectors, WithContent
from ranking.drift import ScoreReference
from ranking.golden import Answering, Golden, golden_error, make_golden, replay
from ranking.index import Index, IndexConfig
from ranking.item_index import item_index
from ranking.items import ItemTable
from ranking.manifest import (
    FORMAT,
    MANIFEST,
    Manifest,
    ModelEntry,
    Provenance,
    Role,
    checked_files,
    describe,
    describe_file,
    listed,
    read_manifest,
    version_of,
)
from ranking.models import RANKERS
from ranking.ranker import AnyRanker, Retriever
from ranking.search_golden import SearchGolden, replay_searches, write_text
from ranking.search_part import SearchContents, SearchPart, load_search_part
from ranking.strings import StringTable
from recsys.config import first_problem
from recsys.errors import BundleError, RecsysError, RequestError
from recsys.files import read_json, whole_directory, write_json
from recsys.history import UNKNOWN_KEY
from recsys.messages import Message

REFERENCE = "reference.json"
CALIBRATION = "calibration.json"
CONTENT_VECTORS = "content_vectors.safetensors"

M = TypeVar("M", bound=Message)


@dataclass(frozen=True)
class Contents:
    """What goes into a bundle. `item_ids` and `names` are by model row; rows 0 and 1 have none ("").

    `content` and `content_vectors` are for items without training events: what is like them, and where they would lie
    in the retriever's space. `text` is what search needs; without it there must be a ranker.
    """

    items: ItemTable
    item_ids: Sequence[str]
    names: Sequence[str]
    key_to_row: NDArray[np.int32]
    vocabulary: Mapping[str, Sequence[str]]
    actions: Sequence[str]
    ranker: NamedModel | None
    retriever: NamedModel | None = None
    content: ContentMatch | None = None
    content_vectors: ContentVectors | None = None
    text: SearchContents | None = None
    calibration: Calibration | None = None


@dataclass(frozen=True)
class Bundle:
    """A loaded bundle; immutable, safe to share between threads."""

    directory: Path
    manifest: Manifest
    version: str  # first 12 hexadecimal digits of the manifest's SHA-256
    items: ItemTable
    item_ids: list[str]  # by row, "" for rows 0 and 1
    names: list[str]  # by row
    key_to_row: NDArray[np.int32]
    vocabulary: dict[str, list[str]]
    ranking_model: AnyRanker | None
    retriever: Retriever | None
    index: Index | None
    content: ContentMatch | None
    text: SearchPart | None
    device: torch.device
    golden: Golden | None  # None without rankers
    reference: ScoreReference | None
    calibration: Calibration | None

    @property
    def ranker(self) -> AnyRanker:
        """The ranker; raises `RequestError` 409 for a bundle that only searches text."""
        if self.ranking_model is None:
            raise RequestError(
                409, "not_supported", f"bundle {self.version} only searches text; publish one with `--ranker`"
            )
        return self.ranking_model

    @property
    def retriever_window(self) -> int | None:
        """Newest events the retriever reads; every retriever is a ranker too."""
        return cast(AnyRanker, self.retriever).window

    @cached_property
    def row_of(self) -> dict[str, int]:
        """Model row of each item id."""
        return {item: row for row, item in enumerate(self.item_ids) if row >= FIRST_ITEM}

    @cached_property
    def _action_code(self) -> dict[str, int]:
        return {action: code for code, action in enumerate(self.manifest.actions)}

    @cached_property
    def _row_to_key(self) -> NDArray[np.uint32]:
        keys = np.full(len(self.items), UNKNOWN_KEY, np.uint32)
        keys[self.key_to_row] = np.arange(len(self.key_to_row), dtype=np.uint32)
        keys[:FIRST_ITEM] = UNKNOWN_KEY
        return keys

    def key_of(self, item_id: str) -> int:
        """Return the item key under which histories know an item, `UNKNOWN_KEY` if the bundle does not know it."""
        row = self.row_of.get(item_id)
        return UNKNOWN_KEY if row is None else int(self._row_to_key[row])

    def action_of(self, action: str) -> int:
        """Return the code of an action; actions the bundle does not know have code 0."""
        return self._action_code.get(action, 0)

    def knows_action(self, action: str) -> bool:
        """Say whether events of an action are told from those without one; where no action has a name, nobody asks."""
        return not action or action in self._action_code or not any(self.manifest.actions)

    @staticmethod
    def load(directory: Path, device: torch.device | str = "cpu", golden: bool = True) -> "Bundle":
        """Check every digest, load the parts, and replay the golden requests.

        Args:
            directory: what `write_bundle` wrote.
            device: where models run.
            golden: whether to replay; digests are checked in any case.

        Raises:
            BundleError: an unknown format, a missing or changed file, a path that leaves the directory, weights that
                do not fit their model, or an answer that differs from the published one.

        Cost: reading every file once.
        """
        manifest, version = read_manifest(directory)
        paths = checked_files(directory, manifest)
        try:
            bundle = _load_parts(directory, manifest, version, paths, torch.device(device))
        except BundleError:
            raise
        except (RecsysError, SafetensorError, OSError, ValueError, KeyError) as error:
            raise BundleError(f"{directory}: the bundle cannot be read ({error}); publish it again") from error
        if golden:
            try:
                if bundle.golden is not None:
                    replay(bundle.golden, _answering(bundle))
                if bundle.text is not None:
                    searches = read_json(listed(paths, "text/golden.json", directory))
                    replay_searches(SearchGolden.model_validate(searches), bundle.text)
            except (ValidationError, BundleError) as error:
                raise BundleError(f"{directory}: {error}") from None
        return bundle


def parity_error(bundle: Bundle, number: int) -> float:
    """Return how far a bundle's answer to its golden request `number` (counted around) is from the published one.

    That is the largest |a - b| / max(1, |a|) over the scores; more than `ranking.golden.TOLERANCE` is a defect.
    """
    if bundle.golden is None:
        return 0.0
    users = bundle.golden.users
    return golden_error(users[number % len(users)], _answering(bundle))


def write_bundle(
    directory: Path,
    contents: Contents,
    provenance: Provenance,
    index: IndexConfig | None = None,
    reference: Callable[["Bundle"], ScoreReference] | None = None,
    queries: NDArray[np.float32] | None = None,
) -> str:
    """Write a bundle, whole or not at all, and give its version; the same input gives the same version.

    Args:
        directory: replaced if it exists.
        contents: models, items and ids.
        provenance: commit, data digest, metrics and the time of creation.
        index: how the retriever's item vectors are indexed.
        reference: given the bundle so far, tells how the scores of its answers lie.
        queries: float32 [n, D], vectors of users on which the index's recall is measured; those of items if absent.

    Raises:
        BundleError: a model nobody knows, or a retriever without item vectors.
        GateError: the index finds less than `IndexConfig.recall` of what an exhaustive search finds.
    """
    named = _named_models(contents)
    with whole_directory(directory) as temporary:
        entries = write_models(temporary, named)
        _write_catalogue(temporary, contents)
        found, recall, shards = None, None, []
        if contents.ranker is not None:
            ranker, retriever = _answering_models(contents, contents.ranker.model, entries)
            if retriever is not None:
                found, recall = item_index(retriever, index or IndexConfig(), queries)
                (temporary / "index").mkdir()
                shards = found.save(temporary / "index")
            golden = make_golden(_answering_of(contents, ranker, retriever, found))
            write_json(temporary / "golden.json", golden.model_dump())
        text = None if contents.text is None else write_text(temporary, contents.text)
        manifest = Manifest(
            format=FORMAT,
            provenance=provenance,
            counts=_counts(contents, found),
            actions=list(contents.actions),
            models=entries,
            index=[path.relative_to(temporary).as_posix() for path in shards],
            text=text,
            index_recall=recall,
            files=describe(temporary),
        )
        write_json(temporary / MANIFEST, manifest.model_dump())
        if reference is not None and contents.ranker is not None:
            told = reference(Bundle.load(temporary, golden=False))
            write_json(temporary / REFERENCE, told.model_dump())
            files = manifest.files | {REFERENCE: describe_file(temporary / REFERENCE)}
            write_json(temporary / MANIFEST, manifest.model_copy(update={"files": files}).model_dump())
        return version_of((temporary / MANIFEST).read_bytes())


def _named_models(contents: Contents) -> list[tuple[Role, NamedModel]]:
    named: list[tuple[Role, NamedModel]] = []
    if contents.ranker is not None:
        named.append(("ranker", contents.ranker))
    elif contents.text is None or contents.retriever is not None:
        raise BundleError("neither ranker nor text to publish, or a retriever alone; name a ranker or a text encoder")
    if contents.retriever is not None:
        named.append(("retriever", contents.retriever))
    for _, model in named:
        if model.name not in RANKERS:
            raise BundleError(f"no model named {model.name!r}; known are {', '.join(sorted(RANKERS))}")
        cast(nn.Module, model.model).eval()
    return named


def _write_catalogue(directory: Path, contents: Contents) -> None:
    """Write what is known of the items."""
    contents.items.save(directory / "items.safetensors")
    tables = StringTable.of(contents.item_ids).tensors("item_id") | StringTable.of(contents.names).tensors("name")
    save_file(tables, directory / "strings.safetensors")
    np.save(directory / "key_to_row.npy", contents.key_to_row.astype(np.int32))
    write_json(directory / "vocabulary.json", {key: list(values) for key, values in contents.vocabulary.items()})
    if contents.content is not None:
        contents.content.save(directory / "content.safetensors")
    if contents.content_vectors is not None:
        contents.content_vectors.save(directory / CONTENT_VECTORS)
    if contents.calibration is not None:
        write_json(directory / CALIBRATION, contents.calibration.model_dump())


def _counts(contents: Contents, index: Index | None) -> dict[str, int]:
    return {
        "rows": len(contents.items),
        "items": len(contents.items) - FIRST_ITEM,
        "keys": len(contents.key_to_row),
        "trained_items": int(contents.items.trained.sum()),
        "indexed_items": 0 if index is None else len(index),
        "matched_items": 0 if contents.content is None else len(contents.content),
        "content_vectors": 0 if contents.content_vectors is None else len(contents.content_vectors),
    }


def _answering_models(
    contents: Contents, ranker: AnyRanker, entries: Mapping[Role, ModelEntry]
) -> tuple[AnyRanker, AnyRanker | None]:
    """Return ranker and retriever as a loaded bundle has them: one object if one model, with content if any."""
    if contents.retriever is None:
        return ranker, None
    retriever = contents.retriever.model
    if contents.content_vectors is not None:
        retriever = WithContent(retriever, contents.content_vectors)
    same = entries["ranker"].weights == entries["retriever"].weights
    return (retriever if same else ranker), retriever


def _load_parts(
    directory: Path, manifest: Manifest, version: str, paths: Mapping[str, Path], device: torch.device
) -> Bundle:
    items = ItemTable.load(listed(paths, "items.safetensors", directory))
    strings = load_file(listed(paths, "strings.safetensors", directory))
    item_ids = list(StringTable.from_tensors(strings, "item_id", str(directory)))
    names = list(StringTable.from_tensors(strings, "name", str(directory)))
    key_to_row = np.load(listed(paths, "key_to_row.npy", directory), allow_pickle=False)
    if not len(items) == len(item_ids) == len(names) or (len(key_to_row) and int(key_to_row.max()) >= len(items)):
        raise BundleError(
            f"{directory}: {len(items)} item rows, {len(item_ids)} ids, {len(names)} names and keys up to row "
            f"{int(key_to_row.max(initial=0))} do not fit together; publish again"
        )
    models: dict[str, AnyRanker] = {}  # by file of weights: a model in two roles is loaded once
    for entry in manifest.models.values():
        if entry.weights not in models:
            models[entry.weights] = load_model(entry, listed(paths, entry.weights, directory), items, device)
    ranker = manifest.models.get("ranker")
    if ranker is None and manifest.text is None:
        raise BundleError(f"{directory}: neither a model in the role 'ranker' nor text; publish again")
    retriever = manifest.models.get("retriever")
    if retriever is not None and CONTENT_VECTORS in paths:
        vectors = ContentVectors.load(paths[CONTENT_VECTORS])
        models[retriever.weights] = WithContent(models[retriever.weights], vectors).requires_grad_(False).eval()
    return Bundle(
        directory=directory,
        manifest=manifest,
        version=version,
        items=items.to(device),
        item_ids=item_ids,
        names=names,
        key_to_row=key_to_row,
        vocabulary=read_json(listed(paths, "vocabulary.json", directory)),
        ranking_model=models[ranker.weights] if ranker else None,
        retriever=cast(Retriever, models[retriever.weights]) if retriever else None,
        index=Index.load([listed(paths, shard, directory) for shard in manifest.index]) if manifest.index else None,
        content=ContentMatch.load(paths["content.safetensors"]) if "content.safetensors" in paths else None,
        text=load_search_part(directory, manifest.text, paths, device) if manifest.text is not None else None,
        device=device,
        golden=_message(Golden, listed(paths, "golden.json", directory)) if manifest.models else None,
        reference=_message(ScoreReference, paths[REFERENCE]) if REFERENCE in paths else None,
        calibration=_message(Calibration, paths[CALIBRATION]) if CALIBRATION in paths else None,
    )


def _message(kind: type[M], path: Path) -> M:
    try:
        return kind.model_validate(read_json(path))
    except ValidationError as error:
        raise BundleError(f"{path.parent}: {path.name}: {first_problem(error)}") from None


def _answering(bundle: Bundle) -> Answering:
    models = bundle.ranker, bundle.retriever, bundle.index, bundle.device
    return Answering(bundle.items, bundle.item_ids, bundle.key_to_row, *models)


def _answering_of(contents: Contents, ranker: AnyRanker, retriever: AnyRanker | None, index: Index | None) -> Answering:
    model = cast(nn.Module, ranker)
    device = next((tensor.device for tensor in model.state_dict().values()), torch.device("cpu"))
    models = ranker, cast(Retriever | None, retriever), index, device
    return Answering(contents.items, contents.item_ids, contents.key_to_row, *models)
