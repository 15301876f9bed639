"""The text part of a bundle: passages, their indexes and the models that search and rerank them.

    text/passages.safetensors   texts and documents (ranking.passages)
    text/bm25/                  npy and JSON (ranking.bm25)
    text/encoder/               if passages have vectors: the model that encodes queries (ranking.text_models)
    text/index/shard_<n>.faiss  with an encoder: vectors of the passages' windows under row + 1 (ranking.index)
    text/windows.safetensors    int32 [W], the passage of each window; only where one has several (ranking.windows)
    text/reranker/              if there is one
    text/golden.json            synthetic searches and what they were answered (ranking.search_golden)

The manifest's entry `text` says which of them there are.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from ranking.bm25 import Bm25
from ranking.fusion import NONE, Mix, Ranking
from ranking.index import Index, IndexConfig, build
from ranking.manifest import TextEntry, listed
from ranking.passages import Passages
from ranking.text_backbone import TextTokenizer
from ranking.text_models import (
    CONFIG,
    TOKENIZER,
    WEIGHTS,
    TextEncoder,
    TextReranker,
    load_encoder,
    load_reranker,
    read_config,
)
from ranking.windows import beside_beginning, by_passage
from recsys.errors import BundleError
from recsys.progress import Progress, silent

TEXT = "text"
TOKENS_PER_PASS = 512
"""Tokens of one forward pass of a reranker that serves: some 50 ms of a core for a small model."""

BY_QUERY = Mix()

SHIFT = 1
"""Window w has row w + 1 in the index, whose row 0 means nothing found."""
WINDOWS = "windows.safetensors"


@dataclass(frozen=True)
class SearchPart:
    """What a searcher works with; immutable, safe to share between threads.

    Attributes:
        passages: what is found.
        bm25: over their texts.
        encoder: of queries, and of the vectors in `index`; None where search goes by words alone.
        index: vectors of the passages' windows under row + 1.
        windows: int32 [W] the passage of each window; None where every passage has one.
        reranker: orders the head of a first stage.
        tokenizer: of the reranker, or of the encoder where there is none: cuts documents sent along.
        mix: how words and vectors are joined.
    """

    passages: Passages
    bm25: Bm25
    encoder: TextEncoder | None = None
    index: Index | None = None
    reranker: TextReranker | None = None
    tokenizer: TextTokenizer | None = None
    mix: Mix = BY_QUERY
    windows: NDArray[np.int32] | None = None
    kinds: Mapping[str, str] | None = None

    @cached_property
    def reranker_kind(self) -> str:
        """Kind of what orders documents: the reranker's, or the encoder's where there is none."""
        kinds = self.kinds or {}
        return kinds.get("reranker") or kinds.get("encoder") or "first_stage"

    def nearest(self, vectors: NDArray[np.float32], places: int, allowed: NDArray[np.bool_] | None = None) -> Ranking:
        """Return the passages nearest to query vectors float32 [Q, D], each by the nearest of its windows.

        Where passages have windows there may be fewer than `places`, but a tenth of them at least if there are so many:
        the windows nearest to a query may be of few passages, and the last places are not worth reading them all.

        Args:
            vectors: of the queries.
            places: passages wanted.
            allowed: bool [passages] that may be found; None for all.
        """
        assert self.index is not None, "asked for only where there are vectors"
        asked, places = places, min(places, len(self.passages))
        shown = (
            None
            if allowed is None
            else np.r_[[False] * SHIFT, allowed if self.windows is None else allowed[self.windows]]
        )
        if self.windows is None:
            rows, scores = self.index.search(vectors, places, shown)
            return Ranking(rows - SHIFT, scores)
        there = len(self.index) if shown is None else max(int(shown.sum()), 1)
        wanted, enough = 2 * asked, max(places // 10, 1)
        while True:
            rows, scores = self.index.search(vectors, min(wanted, there), shown)
            found = by_passage(Ranking(rows - SHIFT, scores), self.windows, places)
            if wanted >= there or not (found.rows[:, :enough] == NONE).any():
                return found
            wanted *= 4


@dataclass(frozen=True)
class SearchContents:
    """What goes into the text part of a bundle.

    Attributes:
        passages: what is to be found.
        encoder: encodes passages now and queries later; None indexes words alone.
        reranker: of the head of each search.
        mix: how words and vectors are joined.
        vectors: float32 [W, D] of the passages' windows (`ranking.windows`), if somebody has encoded them already.
        windows: int32 [W] the passage of each; None where every passage has one.
        index: how vectors are indexed.
        progress: told (encoded, in all).
    """

    passages: Passages
    encoder: TextEncoder | None = None
    reranker: TextReranker | None = None
    mix: Mix = BY_QUERY
    vectors: NDArray[np.float32] | None = None
    windows: NDArray[np.int32] | None = None
    index: IndexConfig | None = None
    progress: Progress = silent


def write_search_part(directory: Path, contents: SearchContents) -> TextEntry:
    """Write the text part under `directory`/text, golden searches aside, and give its entry of the manifest.

    Cost: mostly encoding the passages.
    """
    place, passages, encoder = directory / TEXT, contents.passages, contents.encoder
    place.mkdir()
    passages.save(place / "passages.safetensors")
    Bm25.build(list(passages.texts)).save(place / "bm25")
    shards: Sequence[Path] = []
    count = None
    if encoder is not None:
        encoder.save(place / "encoder")
        vectors, owner = contents.vectors, contents.windows
        if vectors is None:
            windows = encoder.windows(list(passages.texts))
            owner = windows.passage
            vectors = beside_beginning(encoder.encode_passages(windows.texts, contents.progress), owner)
        rows = np.arange(len(vectors), dtype=np.int64) + SHIFT
        if owner is not None and len(owner) > len(passages):
            save_file({"passage": torch.from_numpy(owner)}, place / WINDOWS)
        (place / "index").mkdir()
        count = len(vectors)
        shards = build(vectors, rows, contents.index or IndexConfig()).save(place / "index")
    if contents.reranker is not None:
        contents.reranker.save(place / "reranker")
    return TextEntry(
        passages=len(passages),
        documents=len(passages.document_ids),
        encoder=None if encoder is None else str(read_config(place / "encoder")["kind"]),
        reranker=None if contents.reranker is None else str(read_config(place / "reranker")["kind"]),
        weight=contents.mix.weight,
        covered=contents.mix.covered,
        index=[path.relative_to(directory).as_posix() for path in shards],
        windows=count,
    )


def load_search_part(
    directory: Path, entry: TextEntry, paths: Mapping[str, Path], device: torch.device | str = "cpu"
) -> SearchPart:
    """Load the text part of a bundle.

    Args:
        directory: of the bundle.
        entry: what the manifest says of it.
        paths: files of the bundle whose digests were checked; nothing else is read.
        device: where the models run.

    Raises:
        BundleError: a part is missing, was not listed, or does not fit the others.
    """
    unlisted = [
        name
        for path in sorted((directory / TEXT).rglob("*"))
        if path.is_file() and (name := path.relative_to(directory).as_posix()) not in paths
    ]
    if unlisted:
        raise BundleError(f"{directory}: file {unlisted[0]!r} is not of the published bundle; remove it")
    passages = Passages.load(listed(paths, f"{TEXT}/passages.safetensors", directory))
    bm25 = Bm25.load(directory / TEXT / "bm25")
    encoder = index = reranker = tokenizer = windows = None
    if entry.encoder is not None:
        encoder = load_encoder(_model(directory, "encoder", paths))
        index = Index.load([listed(paths, shard, directory) for shard in entry.index])
        tokenizer = TextTokenizer.of(str(directory / TEXT / "encoder"))
        windows = _windows(directory, entry, paths)
    if entry.reranker is not None:
        reranker = load_reranker(_model(directory, "reranker", paths))
        tokenizer = TextTokenizer.of(str(directory / TEXT / "reranker"))
    sizes = {entry.passages, len(passages), bm25.passages}
    if len(sizes) > 1:
        raise BundleError(f"{directory}: {sorted(sizes)} passages in the parts of {TEXT}/; publish again")
    vectors = len(passages) if windows is None else len(windows)
    if index is not None and len(index) != vectors:
        raise BundleError(f"{directory}: {len(index)} vectors of {vectors} windows in {TEXT}/; publish again")
    models: tuple[object, ...] = (encoder, reranker)
    for model in models:
        _in_short_passes(model)
        if isinstance(model, torch.nn.Module):
            model.requires_grad_(False).eval().to(device)
    kinds = {"encoder": entry.encoder or "", "reranker": entry.reranker or ""}
    mix = Mix(entry.weight, entry.covered)
    return SearchPart(passages, bm25, encoder, index, reranker, tokenizer, mix, windows, kinds)


def _windows(directory: Path, entry: TextEntry, paths: Mapping[str, Path]) -> NDArray[np.int32] | None:
    """Return the passage of each window, None where every passage has one."""
    if entry.windows is None or entry.windows == entry.passages:
        return None
    path = listed(paths, f"{TEXT}/{WINDOWS}", directory)
    passage = load_file(path).get("passage")
    if (
        passage is None
        or passage.dtype != torch.int32
        or passage.shape != (entry.windows,)
        or int(passage.min()) < 0
        or int(passage.max()) >= entry.passages
    ):
        raise BundleError(f"{path}: not the passages of {entry.windows} windows; publish again")
    return passage.numpy()


def _in_short_passes(model: object) -> None:
    """Let a reranker look at the clock every few documents: a long pass saves little time and cannot be ended."""
    config = getattr(model, "config", None)
    if dataclasses.is_dataclass(config) and getattr(config, "tokens_per_pass", 0) > TOKENS_PER_PASS:
        digest = getattr(model, "digest", None)  # said before the change, since it is that of what was published
        assert digest is not None
        model.config = dataclasses.replace(config, tokens_per_pass=TOKENS_PER_PASS)  # type: ignore[attr-defined, type-var]


def _model(directory: Path, role: str, paths: Mapping[str, Path]) -> Path:
    for name in (CONFIG, WEIGHTS, TOKENIZER):
        listed(paths, f"{TEXT}/{role}/{name}", directory)
    return directory / TEXT / role
