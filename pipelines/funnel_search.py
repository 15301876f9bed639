"""The funnel of requests with a query: what the search finds, after its reranker, and in the order for the user.

A log of purchases holds no queries. One is made for each request from the name of an item that was taken: two
neighbouring words of it, drawn by seed. To be found are the request's positives whose names hold those words side by
side. That favours a search by words; what it tells is what each stage adds to the one before.

    search      the items of the first stage's passages, in its order
    reranked    the same after the reranker, if the bundle has one
    answer      blended with the ranker's order for this user, after the rules
"""

import re
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from pipelines.evaluation import defined
from pipelines.funnel import DEEP, K, PreparedHistories, Stage, ranking_of
from pipelines.prepared import PreparedSet, Requests, Split
from pipelines.scoring import Sample, draw_requests
from ranking.batch import FIRST_ITEM
from ranking.bundle import Bundle
from ranking.recommender import Recommender
from ranking.searcher import Searcher
from recsys.bootstrap import Ratio, Statistic, bootstrap
from recsys.messages import RecommendRequest
from recsys.metrics import mean, ndcg, recall
from recsys.progress import Progress, silent
from recsys.randomness import generator

WORDS = 2
WORD = re.compile(r"\w+")


def measure_search(
    bundle: Bundle,
    prepared: PreparedSet,
    split: Split = "test",
    requests: int = 200,
    resamples: int = 1000,
    seed: int = 2023,
    progress: Progress = silent,
) -> tuple[int, list[Stage]]:
    """Return the number of requests a query could be made for, and the stages; 0 and none without text in the bundle.

    Cost: a search for each, one with the reranker if there is one, and a request of the service.
    """
    part = bundle.text
    sample = draw_requests(prepared, split, requests, seed)
    if part is None or not part.passages.items.any() or not len(sample):
        return 0, []
    asked, queries = with_queries(sample, bundle.names, seed)
    reader = PreparedHistories(prepared)
    recommender, searcher = Recommender(bundle, reader), Searcher(part)
    names = ["search", *(["reranked"] if part.reranker is not None else []), "answer"]
    lists: dict[str, list[NDArray[np.int32]]] = {name: [] for name in names}
    for place, query in enumerate(queries):
        user, at = reader.ids[int(asked.requests.user[place])], int(asked.requests.at[place])
        first = searcher.search(query, rerank=False)
        last = first if part.reranker is None else searcher.search(query)
        answer = recommender.recommend(RecommendRequest(user_id=user, k=DEEP, at=at, query=query), at, searched=last)
        lists["search"].append(first.items()[0])
        if part.reranker is not None:
            lists["reranked"].append(last.items()[0])
        lists["answer"].append(np.array([bundle.row_of[item.item_id] for item in answer.items], np.int32))
        progress(place + 1, len(queries), "funnel of searches")
    return len(queries), _stages(asked, lists, resamples, seed) if queries else []


def with_queries(sample: Sample, names: Sequence[str], seed: int, length: int = WORDS) -> tuple[Sample, list[str]]:
    """Return the requests a query of so many words can be made for, with the positives to be found, and the queries."""
    queries: list[str] = []
    kept: list[int] = []
    positives: list[NDArray[np.int32]] = []
    requests = sample.requests
    for place, (start, end) in enumerate(zip(requests.offsets[:-1], requests.offsets[1:], strict=True)):
        own = [row for row in requests.positive[start:end].tolist() if row >= FIRST_ITEM]
        words = {row: WORD.findall(names[row].lower()) for row in own}
        named = [row for row in own if len(words[row]) >= length]
        if not named:
            continue
        draws = generator(seed, int(sample.index[place]), "funnel/query")
        source = words[named[int(draws.integers(len(named)))]]
        first = int(draws.integers(len(source) - length + 1))
        query = " ".join(source[first : first + length])
        kept.append(place)
        queries.append(query)
        positives.append(np.array([row for row in named if f" {query} " in f" {' '.join(words[row])} "], np.int32))
    asked = sample.take(np.array(kept, np.int64))
    offsets = np.r_[0, np.cumsum([len(rows) for rows in positives], dtype=np.int64)]
    positive = np.concatenate([*positives, np.empty(0, np.int32)])
    found = Requests(asked.requests.user, asked.requests.at, asked.requests.end, offsets, positive)
    return replace(asked, requests=found), queries


def _stages(asked: Sample, lists: dict[str, list[NDArray[np.int32]]], resamples: int, seed: int) -> list[Stage]:
    users, user = np.unique(asked.requests.user, return_inverse=True)
    rankings = {name: ranking_of(asked, rows) for name, rows in lists.items()}
    statistics: dict[str, Statistic] = {
        name: Ratio.of_groups(recall(ranking, DEEP), user, len(users)) for name, ranking in rankings.items()
    }
    estimates = bootstrap(statistics, len(users), resamples, seed)
    return [
        Stage(
            name,
            float(np.mean([len(rows) for rows in lists[name]])),
            *estimates[name].told(),
            defined(mean(recall(ranking, K))),
            defined(mean(ndcg(ranking, K))),
        )
        for name, ranking in rankings.items()
    ]
