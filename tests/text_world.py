"""A tiny random encoder, a reranker that counts words, and a published bundle that searches, for tests of search."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from ranking import text_models
from ranking.batch import FIRST_ITEM
from ranking.bundle import Contents, write_bundle
from ranking.bundle_models import NamedModel
from ranking.dense_encoder import DenseConfig, DenseEncoder
from ranking.fusion import Mix
from ranking.items import ItemTable
from ranking.mqsa_ted import MqsaTed, MqsaTedConfig
from ranking.passages import Passages
from ranking.personal_frequency import PersonalFrequency, PersonalFrequencyConfig
from ranking.search_part import SearchContents
from ranking.snapshot import write_snapshot
from ranking.text_backbone import TextTokenizer, build_transformer
from ranking.text_models import CONFIG, FORMAT, TOKENIZER, WEIGHTS
from recsys.files import read_json, write_json
from recsys.progress import Progress, silent
from worlds import PROVENANCE, make_world

COLOURS = ["red", "green", "blue", "black", "white"]
THINGS = ["tea", "bread", "jam", "milk", "soap", "rice"]
NAMES = [f"{colour} {thing}" for thing in THINGS for colour in COLOURS]  # 30 distinct names for 62 items
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *COLOURS, *THINGS, "and"]
USERS = 20


def tiny_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel({word: place for place, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", None, [("[CLS]", 2), ("[SEP]", 3)])
    return tokenizer


def tiny_encoder(seed: int = 0) -> DenseEncoder:
    architecture = {
        "model_type": "bert",
        "vocab_size": len(WORDS),
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "max_position_embeddings": 300,
    }
    torch.manual_seed(seed)
    return DenseEncoder(
        DenseConfig(backbone="tiny"), build_transformer(architecture), TextTokenizer.wrap(tiny_tokenizer())
    )


@dataclass
class WordCount:
    """A reranker that counts how many of the first `reads` words of a passage are in the query; slow if asked to be.

    `scored` counts the passages it has looked at, so that a test sees where work stopped.
    """

    reads: int = 8
    seconds: float = 0.0
    scored: int = 0
    digest: str = "words"
    whole_list: bool = True

    def rerank(self, query: str, passages: Sequence[str], progress: Progress = silent) -> np.ndarray:
        wanted, scores = set(query.lower().split()), []
        for done, passage in enumerate(passages, 1):
            time.sleep(self.seconds)
            self.scored += 1
            scores.append(sum(word in wanted for word in passage.lower().split()[: self.reads]))
            progress(done, len(passages))
        return np.array(scores, np.float32)

    def rerank_many(self, queries, lists, progress: Progress = silent) -> list[np.ndarray]:
        return [self.rerank(query, passages, progress) for query, passages in zip(queries, lists, strict=True)]

    def truncated(self, query: str, passages: Sequence[str]) -> np.ndarray:
        return np.array([len(passage.split()) > self.reads for passage in passages], bool)

    def save(self, directory: Path) -> None:
        directory.mkdir()
        options = {"reads": self.reads, "seconds": self.seconds}
        write_json(directory / CONFIG, {"format": FORMAT, "kind": "word_count", "options": options})
        save_file({"nothing": torch.zeros(1)}, directory / WEIGHTS)
        tiny_tokenizer().save(str(directory / TOKENIZER))

    @staticmethod
    def load(directory: Path) -> "WordCount":
        return WordCount(**read_json(directory / CONFIG)["options"])


text_models.RERANKERS["word_count"] = ("text_world", "WordCount")


def catalogue() -> tuple[ItemTable, Contents]:
    """A catalogue of sixty-two items with thirty names, and a ranker."""
    table = make_world(users=USERS).items
    known = len(table) - FIRST_ITEM
    config = PersonalFrequencyConfig()
    return table, Contents(
        items=table,
        item_ids=["", ""] + [f"item-{number}" for number in range(known)],
        names=["", ""] + [NAMES[number % len(NAMES)] for number in range(known)],
        key_to_row=np.arange(FIRST_ITEM, len(table), dtype=np.int32),
        vocabulary={},
        actions=["", "purchase"],
        ranker=NamedModel("personal_frequency", config, PersonalFrequency(config, table)),
    )


def item_passages(contents: Contents) -> Passages:
    rows = np.arange(FIRST_ITEM, len(contents.items), dtype=np.int32)
    return Passages.of(
        list(contents.item_ids[FIRST_ITEM:]),
        list(contents.names[FIRST_ITEM:]),
        rows,
        contents.items.count.numpy()[FIRST_ITEM:],
    )


def empty_catalogue() -> Contents:
    """No item and no ranker."""
    table = ItemTable([], torch.zeros(FIRST_ITEM, 0, dtype=torch.int32), [], torch.zeros(FIRST_ITEM, dtype=torch.int64))
    return Contents(table, ["", ""], ["", ""], np.empty(0, np.int32), {}, [""], None)


def publish_search(directory: Path, encoder: bool = True, reranker: WordCount | None = None, weight=0.3) -> Path:
    """Write a bundle over the catalogue that searches its names."""
    _, contents = catalogue()
    text = SearchContents(
        item_passages(contents), tiny_encoder() if encoder else None, reranker, Mix(weight, covered=None)
    )
    write_bundle(directory, with_text(contents, text), PROVENANCE)
    return directory


def publish_whole(directory: Path) -> Path:
    """Write a bundle that can do everything: no operation is answered with 409."""
    table, contents = catalogue()
    config = MqsaTedConfig(width=8)
    text = SearchContents(item_passages(contents), tiny_encoder(), WordCount())
    retriever = NamedModel("mqsa_ted", config, MqsaTed(config, table))
    write_bundle(directory, with_text(replace(contents, retriever=retriever), text), PROVENANCE)
    return directory


def publish_corpus(directory: Path, texts: Sequence[str], **parts) -> Path:
    """Write a bundle without items and rankers that searches documents d0, d1, ..."""
    passages = Passages.of([f"d{number}" for number in range(len(texts))], list(texts))
    write_bundle(directory, with_text(empty_catalogue(), SearchContents(passages, **parts)), PROVENANCE)
    return directory


def with_text(contents: Contents, text: SearchContents) -> Contents:
    return replace(contents, text=text)


def snapshot(directory: Path) -> Path:
    world = make_world(users=USERS)
    write_snapshot(directory, [f"user-{number}" for number in range(USERS)], world.histories, "digest")
    return directory
