"""Where a request's time goes, stage by stage, and what kept states save: cold misses, hits, bytes per user.

    OMP_NUM_THREADS=1 python tests/benchmarks/request_stages.py --out request_stages.json     # about 5 minutes, 4 GiB

One process, one thread, no HTTP: `Recommender.recommend` over a million items of width 64, histories of 1,000 events,
some 200 candidates, ranked by SDIM and by DARE whose windows hold the whole history. Weights are random, the
retriever's vectors lie in clusters: what is measured does not depend on what was learned. `plain` encodes every
history anew, `miss` does so and keeps the state, `hit` finds it, `event` brings it up to date by one event.
"""

import argparse
import json
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
import torch
from big_world import LISTED, lay_in_clusters

from ranking.batch import FIRST_ITEM
from ranking.bundle import Bundle, Contents, write_bundle
from ranking.bundle_models import NamedModel
from ranking.content import content_features, match_content
from ranking.items import ItemTable, identity_rows
from ranking.manifest import Provenance
from ranking.models import RANKERS
from ranking.recommender import Recommender
from ranking.recommender_config import RecommenderConfig, StatesConfig
from ranking.state_cache import StateCache
from recsys.history import Events
from recsys.memory import keep_freed_memory
from recsys.messages import RecommendRequest

DAY = 86_400_000_000
CATEGORIES = 1_000
NEW = 4_000
QUOTAS = RecommenderConfig(retrieval=100, repeats=50, transitions=0, popularity=30, new_items=20)


@dataclass
class Histories:
    """Histories in memory, to which an event may be added."""

    events: dict[str, Events] = field(default_factory=dict)

    def read(self, user_id: str) -> Events | None:
        return self.events.get(user_id)


@dataclass(frozen=True)
class Row:
    """Time of one stage, milliseconds."""

    model: str
    states: str
    stage: str
    p50_ms: float
    p99_ms: float


def make_histories(users: int, length: int, items: int, now: int) -> Histories:
    """Return users who return to some 300 items each, the popular ones more often."""
    rng = np.random.default_rng(2)
    found = Histories()
    for user in range(users):
        own = (items * rng.random(300) ** 3).astype(np.uint32)
        time = np.sort(now - rng.integers(1, 700 * DAY, length))
        found.events[str(user)] = Events(rng.choice(own, length), np.zeros(length, np.uint8), time)
    return found


def make_bundle(name: str, items: int, length: int, folder: Path) -> Bundle:
    """Publish a ranker of random weights behind a retriever of clustered vectors."""
    rng = np.random.default_rng(1)
    rows = items + FIRST_ITEM
    count = np.zeros(rows, np.int64)
    count[FIRST_ITEM : rows - NEW] = rng.zipf(1.5, items - NEW).clip(max=10**6)
    code = np.concatenate([[0, 1], rng.integers(2, CATEGORIES + 2, items)]).astype(np.int32)[:, None]
    table = ItemTable(["category"], torch.from_numpy(code), [CATEGORIES + 2], torch.from_numpy(count))
    words = [f"word{n}" for n in range(500)]
    texts = ["", "", *(" ".join(words[w] for w in picked) for picked in rng.integers(0, 500, (items, 3)))]
    torch.manual_seed(0)
    ranker_config, ranker_class = RANKERS[name]
    config = ranker_config(window=length)
    finder_config, finder_class = RANKERS["mqsa_ted"]
    wide = finder_config(width=64)
    finder = finder_class(wide, table)
    lay_in_clusters(finder.item)
    ids = ["", "", *(str(number) for number in range(items))]
    contents = Contents(
        table,
        ids,
        ids,
        identity_rows(items),
        {},
        ["", "buy"],
        NamedModel(name, config, ranker_class(config, table)),
        NamedModel("mqsa_ted", wide, finder),
        match_content(content_features(table, texts), table.count),
    )
    write_bundle(folder, contents, Provenance(created="", commit="", data_digest=""), LISTED)
    return Bundle.load(folder)


def measure(name: str, bundle: Bundle, histories: Histories, now: int) -> tuple[list[Row], float]:
    """Ask for every user plainly, cold, warm and after one more event; gives the times and the bytes kept of a user."""
    cache = StateCache(StatesConfig(bytes=2**31))
    plain, kept = Recommender(bundle, histories, QUOTAS), Recommender(bundle, histories, QUOTAS, states=cache)
    asked = [RecommendRequest(user_id=user, k=20, at=now + 2) for user in histories.events]
    for request in asked[:20]:
        plain.recommend(request, now)
    rows = []
    for states, recommender in (("plain", plain), ("miss", kept), ("hit", kept), ("event", kept)):
        if states == "event":
            one = Events(np.array([7], np.uint32), np.zeros(1, np.uint8), np.array([now + 1]))
            histories.events = {user: Events.concatenate(each, one) for user, each in histories.events.items()}
        answers = [recommender.recommend(request, now) for request in asked]
        for stage in answers[0].timings:
            times = np.array([answer.timings[stage] for answer in answers]) * 1e3
            rows.append(Row(name, states, stage, float(np.quantile(times, 0.5)), float(np.quantile(times, 0.99))))
    counts = cache.counts
    assert (counts.misses, counts.hits, counts.updates) == (len(asked), len(asked), len(asked))
    return rows, counts.bytes / len(asked)


def main() -> None:
    """Print a Markdown table per model and write JSON if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=1_000_000)
    parser.add_argument("--events", type=int, default=1_000)
    parser.add_argument("--users", type=int, default=300)
    parser.add_argument("--models", nargs="+", default=["sdim", "dare"])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()  # as the hosts do
    now = 1_735_689_600_000_000
    results: dict[str, object] = {"items": options.items, "events": options.events}
    for name in options.models:
        with tempfile.TemporaryDirectory() as folder:
            bundle = make_bundle(name, options.items, options.events, Path(folder) / "bundle")
            histories = make_histories(options.users, options.events, options.items - NEW, now)
            rows, size = measure(name, bundle, histories, now)
        print(f"\n{name}, {options.items:,} items, {options.events:,} events; {size:,.0f} bytes kept per user\n")
        print("| stage, p50 / p99 ms | plain | miss | hit | one more event |\n|---|---|---|---|---|")
        for stage in dict.fromkeys(row.stage for row in rows):
            cells = [f"{row.p50_ms:.2f} / {row.p99_ms:.2f}" for row in rows if row.stage == stage]
            print(f"| {stage} | {' | '.join(cells)} |")
        results[name] = {"bytes_per_user": size, "rows": [asdict(row) for row in rows]}
    if options.out:
        options.out.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
