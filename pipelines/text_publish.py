"""What search needs, made ready to publish: an encoder and a reranker by name, and passages from items or a corpus."""

from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

import numpy as np
import polars as pl
import torch
from torch import nn

from pipelines.cold_start import item_texts
from pipelines.first_stages import NATURAL, FirstStages
from pipelines.prepared import PreparedSet
from pipelines.text_cache import VectorCache
from pipelines.text_corpus import Corpus, Queries, read_corpus, read_queries
from pipelines.text_pairs import sample
from pipelines.text_train import finished_run
from pipelines.tracking import git_commit
from ranking.batch import FIRST_ITEM
from ranking.bundle import Contents, write_bundle
from ranking.dense_encoder import DenseEncoder, described
from ranking.devices import pick_device
from ranking.fusion import Mix
from ranking.items import ItemTable
from ranking.manifest import Provenance
from ranking.passages import Passages
from ranking.search_part import SearchContents
from ranking.sequence_reranker import SequenceReranker
from ranking.snapshot import write_snapshot
from ranking.text_models import CONFIG, TextEncoder, TextReranker, load_encoder, load_reranker, read_config
from ranking.windows import beside_beginning
from recsys.columns import ITEM_ID
from recsys.errors import ConfigError, DataError
from recsys.files import read_json, sha256_file
from recsys.history import Events, Histories
from recsys.progress import Progress, silent

M = TypeVar("M")

BY_QUERY = "by-query"
"""How much words count is decided by the query (`ranking.fusion.Mix`)."""
TUNED_ON = ("dev", "train")
"""Splits of a corpus whose queries choose the weight of the words: never test."""
TUNING_QUERIES = 200

WORDS_ALONE = "none"
"""In place of an encoder: search by words, without vectors."""


def find_encoder(name: str, runs: Path) -> TextEncoder | None:
    """Load an encoder, onto the GPU where there is one.

    Args:
        name: a finished run under `runs`, a directory that a text model was saved to, or a backbone as
            `ranking.dense_encoder` takes it; `none` gives None.
        runs: directory of the workspace's runs.
    """
    if name == WORDS_ALONE:
        return None
    if (runs / name / "run.json").is_file():
        return _placed(load_encoder(finished_run(runs / name)[1]))
    if _is_saved(Path(name)):
        return _placed(load_encoder(Path(name)))
    return _placed(DenseEncoder.of(described(name)))


def find_reranker(name: str, runs: Path) -> TextReranker:
    """Load a reranker, onto the GPU where there is one.

    Args:
        name: a finished run under `runs`, a directory that a text model was saved to, or a cross-encoder with one logit
            as a Hugging Face name or folder.
        runs: directory of the workspace's runs.
    """
    if (runs / name / "run.json").is_file():
        return _placed(load_reranker(finished_run(runs / name)[1]))
    if _is_saved(Path(name)):
        return _placed(load_reranker(Path(name)))
    if not Path(name).is_dir() and name.count("/") != 1:
        raise ConfigError(
            f"no run {name!r} under {runs} and no directory of that name; train one with `--config mvp`, or name one "
            "of Hugging Face as cross-encoder/ms-marco-MiniLM-L-6-v2"
        )
    return _placed(SequenceReranker.of(name))


def mix_of(text: str) -> Mix:
    """Read how words and vectors are joined.

    Args:
        text: `by-query`; another weight of the words where no passage holds those of the query, as `recsys evaluate`
            chooses one; or `rrf` for reciprocal ranks.
    """
    if text == BY_QUERY:
        return Mix()
    if text == "rrf":
        return Mix(weight=None)
    try:
        weight = float(text)
    except ValueError:
        weight = -1.0
    if not 0 <= weight <= 1:
        raise ConfigError(f"--fusion is {text!r}; expected by-query, rrf, or a weight of the words from 0 to 1")
    return Mix(weight)


def tuning_queries(corpus: Path, opened: Corpus, but: str = "") -> Queries | None:
    """Return the judged queries that choose a corpus' weight of words: of its dev split, else its train split.

    Args:
        corpus: a folder in BEIR's layout; None without such a split.
        opened: the corpus there.
        but: a split that something else is to be judged on.
    """
    splits = [name for name in TUNED_ON if name != but and (corpus / "qrels" / f"{name}.tsv").is_file()]
    return sample(read_queries(corpus, opened, splits[0]), TUNING_QUERIES, 0) if splits else None


def split_learned_from(name: str, runs: Path, corpus: Path) -> str:
    """Return the split of a corpus' judged queries that an encoder was trained on; "" where it was on none."""
    if not (runs / name / "run.json").is_file():
        return ""
    learned = read_json(runs / name / "run.json")["config"]["corpus"]
    folders = (Path(path).resolve() for path in (learned["path"], *learned["also"]))
    return str(learned["natural"]) if corpus.resolve() in folders else ""


def chosen_mix(corpus: Path, encoder: TextEncoder, cache: Path, but: str = "") -> Mix:
    """Choose the weight of the words on a corpus' own judged queries; the shipped one stays where there are none.

    Args:
        corpus: a folder in BEIR's layout.
        encoder: of queries and passages, whose vectors are in the cache by now.
        cache: directory of vectors.
        but: a split that the encoder learned from, whose queries would choose too little of the words.
    """
    opened = read_corpus(corpus)
    queries = tuning_queries(corpus, opened, but)
    return Mix() if queries is None else Mix(FirstStages(opened, encoder, cache).choose_weight({NATURAL: queries}))


def search_contents(
    passages: Passages,
    encoder: TextEncoder | None,
    reranker: TextReranker | None,
    mix: Mix,
    cache: Path,
    progress: Progress = silent,
) -> SearchContents:
    """Encode the passages' windows, those that are not in the cache yet, and give what search needs.

    Args:
        passages: what is to be found.
        encoder: None searches by words alone.
        reranker: of the head of a search, if there is one.
        mix: how words and vectors are joined.
        cache: directory of vectors, by the encoder's digest.
        progress: told (encoded, in all).
    """
    if encoder is None:
        return SearchContents(passages, None, reranker, mix)
    windows = encoder.windows(list(passages.texts))
    known = VectorCache(cache / encoder.digest / "passages")
    vectors = beside_beginning(known.get(windows.texts, encoder.encode_passages, progress), windows.passage)
    return SearchContents(passages, encoder, reranker, mix, vectors, windows.passage)


def item_passages(prepared: PreparedSet) -> Passages:
    """Return the items' texts, each distinct one once; of its items the most frequent in training comes first.

    Raises:
        DataError: the catalogue has no item.
    """
    texts, count = item_texts(prepared), prepared.items.count.cpu().numpy()
    ids = [""] * len(prepared.items)
    for item, row in item_rows(prepared).items():
        ids[row] = item
    rows = np.arange(FIRST_ITEM, len(ids), dtype=np.int32)
    return Passages.of(ids[FIRST_ITEM:], texts[FIRST_ITEM:], rows, count[FIRST_ITEM:])


def item_rows(prepared: PreparedSet) -> dict[str, int]:
    """Return the model row of every item id."""
    ids = prepared.catalogue[ITEM_ID].cast(pl.String).to_list()
    return {item: row for item, row in zip(ids, prepared.key_to_row.tolist(), strict=True) if row >= FIRST_ITEM}


def corpus_passages(directory: Path, row_of: dict[str, int] | None = None, tuned: bool = False) -> tuple[Passages, int]:
    """Return the documents of a corpus in BEIR's layout, and how many were left out since they have no text.

    Those whose id is an item's can be ranked for a user.

    Args:
        directory: holds corpus.jsonl.
        row_of: model row by item id.
        tuned: whether its judged queries will choose the weight of words: what is wrong with them is then told here,
            before anything is encoded.
    """
    corpus = read_corpus(directory)
    if tuned:
        tuning_queries(directory, corpus)
    some = [place for place, text in enumerate(corpus.passages) if text]
    if not some:
        raise DataError(f"{directory / 'corpus.jsonl'}: none of {len(corpus)} documents has a text")
    ids, texts = [corpus.ids[place] for place in some], [corpus.passages[place] for place in some]
    rows = None
    if row_of is not None:
        rows = np.array([row_of.get(document, 0) for document in ids], np.int32)
    return Passages.of(ids, texts, rows), len(corpus) - len(some)


def publish_text(corpus: Path, text: SearchContents, out: Path, snapshot: Path) -> str:
    """Write a bundle that only searches text, and a snapshot without users, and give the bundle's version.

    Args:
        corpus: directory its passages are from; its digest is the bundle's data digest.
        text: passages and models.
        out: the bundle's directory.
        snapshot: the snapshot's directory.
    """
    nothing = torch.zeros(FIRST_ITEM, dtype=torch.int64)
    items = ItemTable([], torch.zeros(FIRST_ITEM, 0, dtype=torch.int32), [], nothing)
    contents = Contents(
        items=items,
        item_ids=[""] * FIRST_ITEM,
        names=[""] * FIRST_ITEM,
        key_to_row=np.empty(0, np.int32),
        vocabulary={},
        actions=[""],
        ranker=None,
        text=text,
    )
    digest = sha256_file(corpus / "corpus.jsonl")
    created = datetime.now(UTC).isoformat(timespec="seconds")
    version = write_bundle(out, contents, Provenance(created=created, commit=git_commit(), data_digest=digest))
    write_snapshot(snapshot, [], Histories(Events.empty(), np.zeros(1, np.int64)), digest)
    return version


def _placed(model: M) -> M:
    if isinstance(model, nn.Module):
        model.to(pick_device("auto"))
    return model


def _is_saved(directory: Path) -> bool:
    """Whether a directory is a text model of ours rather than a Hugging Face one."""
    if not (directory / CONFIG).is_file():
        return False
    try:
        return bool(read_config(directory))
    except DataError:
        return False
