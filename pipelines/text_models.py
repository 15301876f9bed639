"""From a text config to a trained model: which model, which corpus, which queries."""

from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipelines.encoder_task import EncoderTask, State
from pipelines.first_stages import NATURAL, PLACES, FirstStages
from pipelines.neighbour_task import NeighbourTask, Source
from pipelines.pair_vectors import PairVectors
from pipelines.reranker_task import Pool, RerankerTask
from pipelines.text_config import RERANKERS, CorpusConfig, TextTrainConfig
from pipelines.text_corpus import Corpus, Queries, catalogue_corpus, read_corpus, read_queries
from pipelines.text_pairs import VERSION, PairSource, Split, sample, split_of, unasked, words_of
from pipelines.text_train import Task, TextRun, own_draws, train_text
from ranking.cross_encoder import CrossEncoder, CrossEncoderConfig
from ranking.dense_encoder import DenseConfig, DenseEncoder, pooling_of
from ranking.devices import pick_device
from ranking.fusion import NONE, Ranking
from ranking.lexsembridge import LexSemBridge, LexSemBridgeConfig
from ranking.mvp import Mvp, MvpConfig
from ranking.mvp_apart import MvpApart, MvpApartConfig
from ranking.text_backbone import files_digest
from recsys.config import parse, read_toml
from recsys.errors import ConfigError
from recsys.files import sha256_json
from recsys.progress import Progress, silent, titled
from recsys.randomness import derive

TEXT_MODELS: dict[str, tuple[type[Any], type[Any]]] = {
    "lexsembridge": (LexSemBridgeConfig, LexSemBridge),
    "mvp": (MvpConfig, Mvp),
    "cross_encoder": (CrossEncoderConfig, CrossEncoder),
    "mvp_apart": (MvpApartConfig, MvpApart),
}
"""name -> config and model"""
CATALOGUE = "catalogue"
DEV = "dev"
_READ_BY: dict[str, tuple[str, ...]] = {
    "batches": ("queries", "passages"),
    "temperature": ("queries", "passages"),
    "group": ("queries", *RERANKERS),
    **dict.fromkeys(("cuts", "layers", "train_tokens"), ("passages",)),
    **dict.fromkeys(("depth", "teacher", "positives", "rank_tau", "loss_variant", "force_positive_first"), RERANKERS),
    "orthogonal": ("mvp", "mvp_apart"),
}
"""key of a config -> rerankers that read it, and batches of LexSemBridge that do; what is not here all read"""


def load_text_config(path: Path, assignments: Sequence[str] = ()) -> TextTrainConfig:
    """Read a text training TOML: [model] with a name and its options, [corpus], [optimiser], [stop], seed."""
    table = read_toml(path, assignments)
    model = dict(table.pop("model", {}))
    name = model.pop("name", None)
    if name not in TEXT_MODELS:
        raise ConfigError(f"{path} [model]: name must be one of {', '.join(TEXT_MODELS)}, found {name!r}")
    options = parse(TEXT_MODELS[name][0], model, f"{path} [model]")
    config = parse(TextTrainConfig, {"name": name, "model": options, **table}, str(path))
    reader = name if name in RERANKERS else config.batches
    for key in table:
        if reader not in _READ_BY.get(key, {reader}):
            of = name if name in RERANKERS else f"{name} with batches = {reader!r}"
            raise ConfigError(f"{path}: {key} would do nothing for {of}; leave it out")
    if "temperature" in table and config.tau != config.temperature:
        raise ConfigError(f"{path}: normalized = false forces a temperature of 1; leave temperature out")
    return config


def open_corpus(path: str, items: Path) -> Corpus:
    """Return the corpus of a folder, or the item texts of a log for "catalogue"."""
    return catalogue_corpus(items) if path == CATALOGUE else read_corpus(Path(path))


def cut_queries(options: CorpusConfig, source: PairSource, split: Split) -> dict[str, Queries]:
    """Return the keyword and part-of-passage queries of one split's documents, by kind."""
    rows = source.rows(split) if options.cut else []
    made = {}
    if options.keyword:
        made["keyword"] = source.keyword(rows, options.terms)
    for length in options.part_of_passage:
        made[f"pop_{length}"] = source.part_of_passage(rows, length, options.unit)
    return {kind: queries for kind, queries in made.items() if len(queries)}


def training_queries(
    corpus: Corpus, options: CorpusConfig, source: PairSource
) -> tuple[dict[str, Queries], dict[str, Queries]]:
    """Return training and dev queries by kind.

    Natural ones are split by their ids, a tenth of them for dev; where queries are cut from documents too, those held
    out are nobody's positives in training, and no training query has the words of one that is cut from them.
    """
    dev, test = cut_queries(options, source, "dev"), cut_queries(options, source, "test")
    dev = {kind: unasked(queries, test.values()) for kind, queries in dev.items()}
    train = {
        kind: unasked(source.to_learn(queries), (*dev.values(), *test.values()))
        for kind, queries in cut_queries(options, source, "train").items()
    }
    if options.natural:
        learn, dev[NATURAL] = natural_queries(Path(options.path), corpus, options.natural)
        train[NATURAL] = source.to_learn(learn) if options.cut else learn
    limited = {kind: sample(queries, options.dev_queries, 0) for kind, queries in dev.items() if len(queries)}
    if not limited:
        raise ConfigError("[corpus]: 0 dev queries; name a natural split, keyword or shorter part_of_passage lengths")
    return train, limited


def build_model(config: TextTrainConfig) -> Any:
    """Build the model of a config with the initial weights its seed gives."""
    with own_draws(torch.device("cpu"), derive(config.seed, 0, "weights")):
        return TEXT_MODELS[config.name][1].of(config.model)


def plain_encoder(config: TextTrainConfig) -> DenseEncoder:
    """Return the plain encoder of the first stage: the model's own backbone for LexSemBridge, MiniLM for rerankers."""
    model = config.model
    if isinstance(model, LexSemBridgeConfig):
        if (trained := pooling_of(model.backbone)) not in (None, model.pool):
            raise ConfigError(
                f"[model] pool is {model.pool!r}, and {model.backbone} was trained with {trained!r}; set "
                f"model.pool={trained}"
            )
        options = DenseConfig(model.backbone, model.pool, max_passage_len=model.max_passage_len)
        return DenseEncoder.of(options)
    return DenseEncoder.of()


def train(
    config: TextTrainConfig,
    items: Path,
    directory: Path,
    cache: Path,
    uri: str,
    progress: Progress = silent,
    encoder: Callable[[TextTrainConfig], DenseEncoder] = plain_encoder,
    model: Callable[[TextTrainConfig], Any] = build_model,
    states: dict[str, State] | None = None,
    read: dict[tuple[int, ...], Tensor] | None = None,
) -> TextRun:
    """Train a text model, or go on with the run `directory` holds.

    Args:
        config: the run.
        items: `items.parquet` of the workspace's log, for the catalogue.
        directory: of the run.
        cache: where vectors are kept.
        uri: MLflow tracking URI.
        progress: called with passages encoded, then after every step.
        encoder: gives the first stage's encoder.
        model: gives the model with its initial weights.
        states: what a frozen backbone made of queries in earlier runs with the same kind of weights; it is added to.
        read: what the layers below the top ones made of passages in earlier runs cut at the same one; it is added to.
    """
    paths = (config.corpus.path, *config.corpus.also)
    corpora = [open_corpus(path, items) for path in paths]
    corpus = corpora[0]

    encoded = titled(progress, "passages encoded")

    def build() -> Task:
        device = pick_device(config.device)
        stages = FirstStages(corpus, encoder(config).to(device), cache, progress=encoded)
        made = model(config).to(device)
        if config.batches == "passages":
            each = [stages, *(FirstStages(one, stages.encoder, cache, progress=encoded) for one in corpora[1:])]
            return NeighbourTask(
                config, made, neighbour_sources(config.corpus, each, made), {} if read is None else read
            )
        source = PairSource(corpus, made.tokenizer)
        queries, dev = training_queries(corpus, config.corpus, source)
        if config.name == "lexsembridge":
            return EncoderTask(config, made, stages, queries, dev, {} if states is None else states)
        if isinstance(made, MvpApart):
            made.count_words(corpus.passages)
        vectors = PairVectors.of(made, cache) if config.train == "fusion" else None
        held = source.held_out if config.corpus.cut else frozenset()
        return RerankerTask(config, made, corpus, _pool(stages, queries, held), _pool(stages, dev), vectors)

    learned = [_learned(config, path, one) for path, one in zip(paths, corpora, strict=True)]
    backbones = {source: files_digest(source) for source in _backbones(config)}
    cut = {"pairs": VERSION} if config.corpus.cut or config.batches == "passages" else {}
    inputs = {"corpora": learned, "backbones": backbones, **cut}
    return train_text(build, config.table(), inputs, directory, uri, config.optimiser, config.stop, progress)


def _learned(config: TextTrainConfig, path: str, corpus: Corpus) -> dict[str, Any]:
    """Return what of a corpus decides what a run learns: digests, and how many natural queries are left out."""
    split = config.corpus.natural
    judged = natural_queries(Path(path), corpus, split) if _has_split(path, split) else ()
    left_out = 0
    if judged and (config.corpus.cut or config.batches == "passages"):
        left_out = len(judged[0]) - len(PairSource(corpus).to_learn(judged[0]))
    return {
        "name": corpus.name,
        "documents": sha256_json([corpus.ids, corpus.passages]),
        "judged": sha256_json(
            [[one.ids, one.texts, [sorted(known.items()) for known in one.grades]] for one in judged]
        ),
        "natural_left_out": left_out,
    }


def _backbones(config: TextTrainConfig) -> list[str]:
    """Return the backbones whose weights a run starts from or draws its lists by."""
    model = config.model
    if not isinstance(model, LexSemBridgeConfig):
        return sorted({model.backbone, DenseConfig.backbone})
    return sorted({model.backbone, *([model.clr_backbone] if model.weights == "clr" else [])} - {"own"})


def _has_split(path: str, split: str) -> bool:
    return bool(split) and (Path(path) / "qrels" / f"{split}.tsv").is_file()


def neighbour_sources(options: CorpusConfig, each: Sequence[FirstStages], model: LexSemBridge) -> list[Source]:
    """Return what corpora teach: natural queries where they have the split, dev spans and keywords of the first one.

    Raises:
        ConfigError: no corpus has natural queries of the split that is named.
    """
    made, found = [], not options.natural
    for place, (path, stages) in enumerate(zip((options.path, *options.also), each, strict=True)):
        source = PairSource(stages.corpus, model.tokenizer)
        shared = path == CATALOGUE  # whose texts share words
        test = cut_queries(options, source, "test") if shared else {}
        held_out = cut_queries(options, source, "dev") if shared or place == 0 else {}
        held_out = {kind: unasked(one, test.values()) for kind, one in held_out.items()}
        judged = [one for one in (*held_out.values(), *test.values()) if shared]
        dev = held_out if place == 0 else {}
        learn = held = Queries([], [], [])
        if _has_split(path, options.natural):
            learn, held = natural_queries(Path(path), stages.corpus, options.natural)
            learn, found = source.to_learn(learn), True
        if len(held):
            dev[NATURAL] = held
        dev = {kind: sample(one, options.dev_queries, 0) for kind, one in dev.items()}
        words = frozenset(words_of(text) for one in judged for text in one.texts)
        made.append(Source(stages, source, learn, dev, words))
    if not found:
        raise ConfigError(f"[corpus] natural = {options.natural!r}: no corpus has qrels/{options.natural}.tsv")
    return made


def natural_queries(directory: Path, corpus: Corpus, split: str) -> tuple[Queries, Queries]:
    """Return the natural queries of one split to train on, and those for dev.

    These are the corpus' own `qrels/dev.tsv` where there is one, else a tenth of the split, by their ids, at least one.
    """
    natural = read_queries(directory, corpus, split)
    if split != DEV and (directory / "qrels" / f"{DEV}.tsv").is_file():
        return natural, read_queries(directory, corpus, DEV)
    held = [split_of(corpus.name, f"query/{key}") == "dev" for key in natural.ids]
    if len(natural) > 1 and not any(held):
        held[-1] = True
    learn, dev = ([place for place, out in enumerate(held) if out is wanted] for wanted in (False, True))
    return natural.only(learn), natural.only(dev)


def _pool(stages: FirstStages, kinds: dict[str, Queries], but: Collection[int] = ()) -> Pool:
    """Return queries of all kinds with their pools, without some passages."""
    queries = Queries([], [], [])
    for one in kinds.values():
        queries = queries + one
    found = stages.all(queries.texts)["rrf"].top(PLACES)
    return Pool(queries, Ranking(np.where(np.isin(found.rows, list(but)), NONE, found.rows), found.scores))
