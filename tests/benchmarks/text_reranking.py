"""MVP beside pointwise controls over one frozen backbone: same pairs, lists, steps, targets; cells of text_studies.py.

Read apart (`mvp_apart`): MiniLM reads queries and passages of at most 256 tokens once, in bfloat16; the control is the
same model without its step over the list. Read together (`mvp`, `cross_encoder`): it reads each pair once, four view
tokens, [CLS], the query, and as much of the passage as makes 128 tokens; MVP's decoder learns on the vectors of the
view tokens, the cross-encoder's head on that of [CLS], out of the same pass. A model of one or two views takes the
first of the four. Pools, folds, seeds, views and shuffled input then cost nothing but the last step. The first stage is
RRF of BM25 and dense; its best 20 are reranked, and also its best 100 by those trained in full and, on Cranfield, by
those that read apart.

Trained in full (`_full`): each model reads every pair itself, at its own length of 256 tokens, and its encoder learns
with what stands above it; both see the same lists at the same steps, out of the best 50 of RRF.

Cranfield: five folds over its queries. SciFact: trained on 400 of its training queries, in full on all of them.
"""

import dataclasses
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from text_place import Place

from pipelines.first_stages import FirstStages
from pipelines.pair_vectors import PairVectors
from pipelines.reranker_task import Pool, RerankerTask, rerank_pool
from pipelines.shipped import CONFIGS
from pipelines.text_config import TextTrainConfig
from pipelines.text_corpus import Queries, read_queries
from pipelines.text_measures import best_possible, compare, measure
from pipelines.text_models import TEXT_MODELS, load_text_config
from pipelines.text_pairs import split_of
from pipelines.text_train import TextLoop
from ranking.cross_encoder import CrossEncoder
from ranking.fusion import Ranking
from ranking.mvp import Mvp, MvpConfig
from ranking.mvp_apart import READINGS, MvpApart, MvpApartConfig
from ranking.text_backbone import device_of
from ranking.text_models import Vectors

PLACES = 20
"""Passages of the first stage that are reranked."""
DEEP = {("apart", "cranfield"): 100, ("full", "cranfield"): 100, ("full", "scifact"): 100}
"""These are ranked that deep as well; reading so many pairs would take too long for the others."""
LEARNED = {"cranfield": PLACES, "scifact": 9}
"""Places of the first stage that training lists draw from, if every pair has to be read."""
QUERIES = 400
"""Of SciFact's training queries, those that are used if every pair has to be read and kept."""
FULL_DEPTH = 50
"""Places that lists of full training draw from."""
FOLDS = 5
TOKENS = 128
VIEWS = 4
SHUFFLES = 5
SETTINGS = [
    *("train=fusion", "rows=16", "group=10", "optimiser.learning_rate_fresh=5e-4"),
    *("stop.steps=120", "stop.validate_every=20", "stop.patience=6"),
]
FULL = [
    *("train=full", "rows=16", "group=5", "depth=50", "stop.patience=10"),
    *("optimiser.learning_rate=5e-5", "optimiser.learning_rate_fresh=5e-4", "optimiser.dropout=false"),
]
FULL_STEPS = {
    "cranfield": ["stop.steps=40", "stop.validate_every=20"],
    "scifact": ["stop.steps=250", "stop.validate_every=50"],
}
APART = {
    "cranfield": [],
    "scifact": ["optimiser.learning_rate_fresh=1e-2", "stop.steps=300", "stop.patience=12"],
}
"""What differs from the shipped config; SciFact's own dev queries preferred it to two others."""
NO_CHECKPOINT = "stop.checkpoint_every=1000000"
"""A fold must not go on where another one was: what one trains on is what the other is judged on."""
ROWS: dict[str, tuple[str, list[str]]] = {
    "cross_encoder": ("cross_encoder", []),
    "mvp_4_views": ("mvp", []),
    "mvp_2_views": ("mvp", ["model.views=2"]),
    "mvp_1_view": ("mvp", ["model.views=1"]),
    "mvp_4_views_not_orthogonal": ("mvp", ["orthogonal=0.0"]),
    "cross_encoder_full": ("cross_encoder", []),
    "mvp_full": ("mvp", []),
    "mvp_full_2_views": ("mvp", ["model.views=2"]),
    "mvp_full_1_view": ("mvp", ["model.views=1"]),
    "mvp_full_not_orthogonal": ("mvp", ["orthogonal=0.0"]),
    "mvp_apart": ("mvp_apart", []),
    "mvp_apart_pointwise": ("mvp_apart", ["model.listwise=false"]),
    "mvp_apart_2_views": ("mvp_apart", ["model.views=2"]),
    "mvp_apart_1_view": ("mvp_apart", ["model.views=1"]),
    "mvp_apart_orthogonal": ("mvp_apart", ["orthogonal=1.0"]),
    "mvp_apart_without_words": ("mvp_apart", ["model.words=false"]),
    "mvp_apart_pointwise_without_words": ("mvp_apart", ["model.listwise=false", "model.words=false"]),
}
"""row -> model and what differs"""
HEADLINE = ("mvp_apart", "mvp_apart_pointwise")
"""Rows of three seeds."""
HEADLINE_SCIFACT = (*HEADLINE, "mvp_full", "cross_encoder_full")
"""and on SciFact, which is no five folds"""
PAIRS_TIMED, ROUNDS = 20, 5


Family = Literal["together", "apart", "full"]
Begin = Callable[[int], tuple[Any, PairVectors | None]]
"""Gives the model of a fold, and what has read its pairs where the backbone is frozen."""


def family(row: str) -> Family:
    """Which pairs a row reads, and how."""
    return "full" if "_full" in row else "apart" if row.startswith("mvp_apart") else "together"


def reader(kind: str, place: Place, stages: FirstStages) -> PairVectors:
    """The frozen backbone and what it has read."""
    cache = stages.cache
    if kind == "mvp_apart":
        apart = MvpApart.of(MvpApartConfig()).to(place.device)
        apart.transformer.to(torch.bfloat16)
        apart.count_words(stages.corpus.passages)
        return PairVectors.of(apart, cache)
    torch.manual_seed(0)
    model = Mvp.of(MvpConfig(views=VIEWS, max_len=TOKENS)).to(place.device)
    model.transformer.to(torch.bfloat16)

    def encode(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = model.transformer(input_ids=ids, attention_mask=mask).last_hidden_state
        return hidden[:, : VIEWS + 1]

    return PairVectors.of(model, cache / "views_and_cls", encode)


def pools(data: Path, stages: FirstStages, name: str, how: Family) -> tuple[Pool, list[tuple[Pool, Pool, list[int]]]]:
    """The test pool, and per fold a training and a dev pool and the test queries they may be judged on."""
    queries = read_queries(data / name, stages.corpus, "test")
    test = pool(stages, queries, DEEP.get((how, name), PLACES))
    if name == "cranfield":
        known, folds = queries, [list(range(fold, len(queries), FOLDS)) for fold in range(FOLDS)]
    else:
        known = read_queries(data / name, stages.corpus, "train")
        known = known if how == "full" else known.only(range(min(QUERIES, len(known))))
        folds = [list(range(len(queries)))]
    depth = {"apart": PLACES, "together": LEARNED[name], "full": FULL_DEPTH}[how]
    made = []
    for fold in folds:
        held = set(fold) if name == "cranfield" else set()
        free = [place for place in range(len(known)) if place not in held]
        dev = {place for place in free if split_of(name, f"query/{known.ids[place]}") == "dev"}
        learn = known.only([place for place in free if place not in dev])
        made.append((pool(stages, learn, depth), pool(stages, known.only(sorted(dev)), depth), fold))
    return test, made


def pool(stages: FirstStages, queries: Queries, places: int) -> Pool:
    return Pool(queries, stages.all(queries.texts)["rrf"].top(places))


def prefetch(vectors: PairVectors, corpus_passages: list[str], pools: list[Pool], name: str) -> None:
    """Read all pairs that training and tests will ask for, resumable, with what is missing counted aloud."""
    queries, passages = [], []
    for one in pools:
        for place, text in enumerate(one.queries.texts):
            judged = [row for row, grade in one.queries.grades[place].items() if grade > 0]
            rows = dict.fromkeys([*(int(row) for row in one.ranking.rows[place] if row >= 0), *judged])
            queries += [text] * len(rows)
            passages += [corpus_passages[row] for row in rows]
    vectors.get(queries, passages, lambda done, total: print(f"  {name}: {done}/{total} pairs", flush=True))


def reranking(place: Place, name: str, row: str, seed: int) -> dict[str, Any]:
    """One row of one seed on one corpus, beside the first stage."""
    kind, changes = ROWS[row]
    how, stages = family(row), place.stages(name)
    test, folds = pools(place.data, stages, name, how)
    settings = {
        "full": [*FULL, *FULL_STEPS[name], f"bfloat16={place.half}"],
        "apart": APART[name],
        "together": SETTINGS,
    }[how]
    settings = [*settings, NO_CHECKPOINT, *changes, f"seed={seed}", *place.changes]
    config = load_text_config(CONFIGS / f"{kind}.toml", settings)
    if how == "full":
        begin: Begin = lambda _: (TEXT_MODELS[kind][1].of(config.model).to(place.device), None)  # noqa: E731
    else:
        vectors = reader(kind, place, stages)
        prefetch(vectors, stages.corpus.passages, [test, *(one for fold in folds for one in fold[:2])], name)
        begin = lambda _: learner(kind, config.model, vectors)  # noqa: E731
    found = row_of(stages, test, folds, config, begin)
    deep = max(found)
    first = measure(test.ranking, test.queries)
    hybrid = measure(stages.hybrid(test.queries.texts), test.queries)["ndcg_at_10"]
    each = {places: np.array(one["per_query"]) for places, one in found.items()}
    return {
        "places": PLACES,
        "settings": settings,
        "best_possible": best_possible(test.ranking, test.queries, PLACES),
        "first_stage": {key: float(value.mean()) for key, value in first.items()},
        "reranked": found[PLACES],
        "against_first_stage": compare(each[PLACES], first["ndcg_at_10"]).table(),
        "hybrid": float(hybrid.mean()),
        "against_hybrid": compare(each[PLACES], hybrid).table(),
        **(
            {}
            if deep == PLACES
            else {
                "deep": found[deep],
                "deep_best_possible": best_possible(test.ranking, test.queries, deep),
                "deep_against_first_stage": compare(each[deep], first["ndcg_at_10"]).table(),
                "deep_against_hybrid": compare(each[deep], hybrid).table(),
            }
        ),
    }


def row_of(
    stages: FirstStages,
    test: Pool,
    folds: list[tuple[Pool, Pool, list[int]]],
    config: TextTrainConfig,
    begin: Begin,
) -> dict[int, dict[str, Any]]:
    """Train one model per fold and rank that fold's queries; gives measures by places reranked."""
    depths = {PLACES, test.ranking.rows.shape[1]}
    ranked = {places: np.full((len(test.queries), places), -1, np.int32) for places in sorted(depths)}
    seconds, moved, best_steps, curves = 0.0, 0, [], []
    for number, (learn, dev, judged) in enumerate(folds):
        torch.manual_seed(1000 * config.seed + number)
        model, vectors = begin(number)
        with tempfile.TemporaryDirectory() as kept:
            task = RerankerTask(config, model, stages.corpus, learn, dev, vectors)
            nowhere = Path(kept) / "no_checkpoint"
            loop = TextLoop(task, nowhere, "study", config.optimiser, config.stop, config.seed)
            loop.run_to_end(lambda done, total, what: print(f"  {done}/{total} {what}", flush=True))
            assert not nowhere.exists(), "a fold left a checkpoint"
            seconds += loop.state.seconds
            best_steps.append(loop.state.best_step)
            curves.append([round(point["valid/ndcg_at_10"], 5) for point in loop.state.curve])
            part = Pool(test.queries.only(judged), Ranking(test.ranking.rows[judged], test.ranking.scores[judged]))
            read = vectors or PairVectors.of(model, Path(kept))  # shuffles then cost no reading
            for places, rows in ranked.items():
                rows[judged] = rerank_pool(model, stages.corpus, part, places, vectors=read).rows
            for shuffle in range(SHUFFLES):
                order = np.random.default_rng(shuffle).permutation(PLACES).tolist()
                again = rerank_pool(model, stages.corpus, part, PLACES, order, read).rows
                moved += int((again != ranked[PLACES][judged]).sum())
    out: dict[int, dict[str, Any]] = {}
    for places, rows in ranked.items():
        measured = measure(Ranking(rows, np.zeros(rows.shape, np.float32)), test.queries)
        out[places] = {key: float(value.mean()) for key, value in measured.items() if key != "recall_at_100"}
        out[places]["per_query"] = [round(float(value), 5) for value in measured["ndcg_at_10"]]
    out[PLACES] |= {"train_seconds": round(seconds, 1), "places_moved_by_shuffling": moved}
    out[PLACES] |= {"best_steps": best_steps, "dev_ndcg_at_10": curves}
    return out


def learner(kind: str, options: Any, vectors: PairVectors) -> tuple[Any, PairVectors]:
    """A fresh model over the backbone that has read the pairs, and the ones of a pair's vectors it learns from."""
    read_by: Any = vectors.model
    device = device_of(read_by.transformer)
    transformer, tokenizer = read_by.transformer, read_by.tokenizer
    keep: slice | list[int]
    if kind == "mvp":
        model: Any = Mvp(options, transformer, tokenizer)
        keep = slice(0, options.views)
    elif kind == "cross_encoder":
        model, keep = CrossEncoder(options, transformer, tokenizer), slice(VIEWS, VIEWS + 1)
    else:
        model, keep = MvpApart(options, transformer, tokenizer), [*range(options.views), READINGS]
        model.idf.copy_(read_by.idf)
        model.mean_length.copy_(read_by.mean_length)
    return model.to(device), dataclasses.replace(vectors, keep=keep)


def rerank_cost(passages: list[str], query: str) -> dict[str, Any]:
    """Milliseconds of one rerank by MVP, by the cross-encoder, and of the backbone alone, in turn, in one run."""
    torch.manual_seed(0)
    mvp = Mvp.of(MvpConfig(views=VIEWS, max_len=TOKENS))
    config = load_text_config(CONFIGS / "cross_encoder.toml", [f"model.max_len={TOKENS - VIEWS}"]).model
    pointwise = CrossEncoder(config, mvp.transformer, mvp.tokenizer)
    apart = MvpApart(MvpApartConfig(max_len=TOKENS), mvp.transformer, mvp.tokenizer)
    texts = passages[:PAIRS_TIMED]
    calls: dict[str, Any] = {
        "cross_encoder": lambda: pointwise.rerank(query, texts),
        "mvp": lambda: mvp.rerank(query, texts),
        "mvp_apart": lambda: apart.rerank(query, texts),
        "encoder alone": lambda: mvp.encode_pairs(query, texts),
    }
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            began = time.process_time()  # of this process: a busy machine counts less
            result: Vectors = call()
            times[name].append(time.process_time() - began)
            assert len(result) == len(texts)
    median = {name: float(np.median(values)) for name, values in times.items()}
    return {
        "passages": len(texts),
        "cpu_milliseconds": {name: round(1e3 * value, 1) for name, value in median.items()},
        "mvp_over_cross_encoder": median["mvp"] / median["cross_encoder"],
        "mvp_apart_over_cross_encoder": median["mvp_apart"] / median["cross_encoder"],
        "mvp_over_encoder_alone": median["mvp"] / median["encoder alone"],
    }
