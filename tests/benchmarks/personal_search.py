"""What a user's ranker adds to a search, by the words of the query: the blend beside one of all that was found.

    python tests/benchmarks/personal_search.py --workspace workspace           after `make quickstart`, some minutes
    python tests/benchmarks/personal_search.py --workspace workspace --out personal_search.json

A log of purchases holds no queries: each is so many neighbouring words of the name of an item of the test request
(`pipelines.funnel_search`). Histories end before the request. What is compared, on the same requests and candidates:

    search    the search alone
    all       reciprocal ranks of search and ranker, over all that was found
    alike     the same over what fits the query equally well, all else below: what is served
"""

import argparse
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from numpy.typing import NDArray

from pipelines.funnel import DEEP, K, PreparedHistories, ranking_of
from pipelines.funnel_search import with_queries
from pipelines.prepared import PreparedSet
from pipelines.scoring import draw_requests
from pipelines.workspace import Workspace
from ranking.bundle import Bundle
from ranking.recommender import Recommender
from ranking.searched import Searched
from ranking.searcher import Searcher
from recsys.bootstrap import Ratio, Statistic, bootstrap
from recsys.files import write_json
from recsys.messages import RecommendRequest
from recsys.metrics import ndcg

SEED = 2023


@contextmanager
def blending_all() -> Iterator[None]:
    """Blend over all that was found, as it once was."""

    def parted(found: Searched, known: bool) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        return np.arange(len(found)), np.full(len(found), known)

    with patch.object(Searched, "_parted", parted):
        yield


def compare(bundle: Bundle, prepared: PreparedSet, words: int, requests: int) -> dict[str, Any]:
    """Return NDCG@10 of each order and of the difference, with 95 % intervals over users."""
    assert bundle.text is not None, "publish with text"
    sample = draw_requests(prepared, "test", requests, SEED)
    asked, queries = with_queries(sample, bundle.names, SEED, words)
    reader = PreparedHistories(prepared)
    recommender, searcher = Recommender(bundle, reader), Searcher(bundle.text)
    lists: dict[str, list[NDArray[np.int32]]] = {"search": [], "all": [], "alike": []}
    for place, query in enumerate(queries):
        at = int(asked.requests.at[place])
        request = RecommendRequest(user_id=reader.ids[int(asked.requests.user[place])], k=DEEP, at=at, query=query)
        found = searcher.search(query)
        alike = recommender.recommend(request, at, searched=found)
        with blending_all():
            everything = recommender.recommend(request, at, searched=found)
        lists["search"].append(found.items()[0])
        for name, answer in (("all", everything), ("alike", alike)):
            lists[name].append(np.array([bundle.row_of[item.item_id] for item in answer.items], np.int32))
    users, user = np.unique(asked.requests.user, return_inverse=True)
    ratios = {name: Ratio.of_groups(ndcg(ranking_of(asked, rows), K), user, len(users)) for name, rows in lists.items()}
    statistics: dict[str, Statistic] = dict(ratios)
    found = bootstrap(statistics, len(users), 1000, SEED)
    found["alike - all"] = found["alike"].minus(found["all"])
    return {"words": words, "requests": len(queries)} | {
        name: {"ndcg_at_10": one.value, "interval": one.interval()} for name, one in found.items()
    }


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workspace", type=Path, default=Path("workspace"))
    parser.add_argument("--requests", type=int, default=400)
    parser.add_argument("--words", type=int, nargs="+", default=[1, 2, 3, 4])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    place = Workspace(options.workspace)
    bundle = Bundle.load(options.workspace / "bundle")
    rows = [compare(bundle, place.prepared, words, options.requests) for words in options.words]
    for row in rows:
        print(row)
    if options.out is not None:
        write_json(options.out, {"machine": platform.processor(), "bundle": bundle.version, "rows": rows})


if __name__ == "__main__":
    main()
