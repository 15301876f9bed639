"""Which index finds the best 100 of a million items: recall, time per query, time to build, memory.

    OMP_NUM_THREADS=1 python tests/benchmarks/index_choice.py --out index_choice.json     # about 10 minutes, 3 GiB
    OMP_NUM_THREADS=1 python tests/benchmarks/index_choice.py --bundle BUNDLE --snapshot SNAPSHOT --out trained.json

The vectors lie around 5,000 centres whose sizes follow a power law; queries lie around the same centres and are not
among the items. With a bundle they are those of its retriever, each taken several times with noise of half the distance
to its tenth neighbour, and the queries are the vectors of the snapshot's users: trained vectors differ in length, and
users lie elsewhere than items.

Recall is against the exact search. Every index is built, written and read back memory-mapped, as a bundle has it, and
searched on one thread: queries one by one, and in batches of 64. The last row is what `ranking.index` builds by itself.
Times are CPU times of that thread, so that other work on the machine counts little.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch
from numpy.typing import NDArray

from ranking.batch import FIRST_ITEM, assemble
from ranking.bundle import Bundle
from ranking.index import ROUNDS, TRAINED_ON, Index
from ranking.index import build as build_shipped
from ranking.snapshot import SnapshotReader
from recsys.history import Events

CENTRES = 5_000
BATCH = 64
QUERIES = 512
K = 100
SHIPPED = "ranking.index"


@dataclass(frozen=True)
class Row:
    """What was measured of one index at one setting."""

    index: str
    setting: str
    recall: float
    single_ms: float
    batch_ms: float
    build_seconds: float
    mebibytes: float


def clustered(n: int, width: int, seed: int, centre: NDArray[np.float32], spread: float) -> NDArray[np.float32]:
    """Return n vectors around the centres, of which the first are the most frequent."""
    rng = np.random.default_rng(seed)
    weight = 1 / np.arange(1, len(centre) + 1) ** 0.7
    of = rng.choice(len(centre), n, p=weight / weight.sum())
    vectors = rng.standard_normal((n, width), dtype=np.float32)
    vectors *= spread
    vectors += centre[of]
    return vectors


def trained(bundle: Path, snapshot: Path, n: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return n vectors like those of a bundle's retriever, and the vectors of the snapshot's users."""
    served, users = Bundle.load(bundle, golden=False), SnapshotReader(snapshot)
    assert served.retriever is not None, "a bundle without a retriever has no vectors"
    histories = [events for user in users.users(QUERIES) if (events := users.read(user))]
    ends = np.cumsum([len(events) for events in histories])
    starts = ends - [len(events) for events in histories]
    late, none = np.full(len(ends), 2**60), np.empty((len(ends), 0), np.int32)
    columns = ([getattr(events, name) for events in histories] for name in ("item", "action", "time"))
    events, window = Events(*(np.concatenate(column) for column in columns)), served.retriever_window
    with torch.inference_mode():
        batch = assemble(events, starts, ends, late, none, served.key_to_row, window=window)
        queries = served.retriever.user_vectors(batch.history).float().numpy()
        items = served.retriever.item_vectors()[served.items.trained].float().numpy()
    flat = faiss.IndexFlatL2(items.shape[1])
    flat.add(items)
    tenth = float(np.sqrt(flat.search(items[:1_000], 11)[0][:, 10]).mean())
    rng = np.random.default_rng(2)
    vectors = rng.standard_normal((n, items.shape[1]), dtype=np.float32)
    vectors *= tenth / 2 / items.shape[1] ** 0.5
    vectors += items[rng.integers(0, len(items), n)]
    return vectors, np.ascontiguousarray(queries)


def settings(index: Any, name: str) -> Iterator[tuple[str, Callable[[], None]]]:
    """Yield the settings an index is searched with, from fast to exact."""
    if name in ("Flat", SHIPPED):
        yield "-", lambda: None
    elif name.startswith("HNSW"):
        hnsw = faiss.downcast_index(index).hnsw
        for ef in (128, 256, 512):
            yield f"efSearch {ef}", lambda ef=ef: setattr(hnsw, "efSearch", ef)
    elif "RFlat" in name:
        inverted = faiss.extract_index_ivf(index)
        for probes, factor in ((32, 4), (64, 4), (64, 8), (128, 8), (256, 8)):

            def choose(probes: int = probes, factor: int = factor) -> None:
                inverted.nprobe, index.k_factor = probes, factor

            yield f"nprobe {probes}, k_factor {factor}", choose
    else:
        for probes in (16, 32, 64, 128):
            yield f"nprobe {probes}", lambda probes=probes: setattr(index, "nprobe", probes)


def build(name: str, vectors: NDArray[np.float32]) -> Any:
    """Build an index by its factory name, trained on at most 64 vectors per list."""
    index = faiss.index_factory(vectors.shape[1], name, faiss.METRIC_INNER_PRODUCT)
    if not index.is_trained:
        inverted = faiss.extract_index_ivf(index)
        inverted.cp.max_points_per_centroid, inverted.cp.niter = TRAINED_ON, ROUNDS
        index.train(vectors)
    index.add(vectors)
    return index


class Shipped:
    """The index of a bundle, in FAISS's words."""

    def __init__(self, index: Index) -> None:
        self._index = index

    def search(self, vectors: NDArray[np.float32], k: int) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
        """Return scores and places."""
        rows, scores = self._index.search(vectors, k)
        return scores, rows - FIRST_ITEM


def opened(name: str, vectors: NDArray[np.float32], folder: Path) -> tuple[Any, float, int]:
    """Build an index, write it and read it back; gives it with the seconds of building and its bytes."""
    started = time.process_time()
    if name == SHIPPED:
        own = build_shipped(vectors, np.arange(FIRST_ITEM, len(vectors) + FIRST_ITEM))
        seconds = time.process_time() - started
        paths = own.save(folder)
        return Shipped(Index.load(paths)), seconds, sum(path.stat().st_size for path in paths)
    built = build(name, vectors)
    seconds = time.process_time() - started
    path = folder / "index.faiss"
    faiss.write_index(built, str(path))
    del built
    return faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC), seconds, path.stat().st_size


def measure(
    name: str, vectors: NDArray[np.float32], queries: NDArray[np.float32], truth: NDArray[np.int64], folder: Path
) -> list[Row]:
    """Build one index and search it at every setting."""
    index, seconds, size = opened(name, vectors, folder)
    rows = []
    for setting, choose in settings(index, name):
        choose()
        found = np.concatenate([index.search(queries[i : i + BATCH], K)[1] for i in range(0, len(queries), BATCH)])
        recall = np.mean([len(np.intersect1d(a, b)) / K for a, b in zip(found, truth, strict=True)])
        batch = milliseconds(index, queries[:256], BATCH)
        single = milliseconds(index, queries[: 32 if name == "Flat" else 128], 1)
        rows.append(Row(name, setting, float(recall), single, batch, seconds, size / 2**20))
        print(line(rows[-1]), flush=True)
    return rows


def milliseconds(index: Any, queries: NDArray[np.float32], size: int) -> float:
    """Return the time per query in batches of a size, the best of three."""
    found = []
    for _ in range(3):
        started = time.process_time()
        for start in range(0, len(queries), size):
            index.search(queries[start : start + size], K)
        found.append(time.process_time() - started)
    return min(found) / len(queries) * 1e3


def line(row: Row) -> str:
    """Return one line of the table."""
    return (
        f"| {row.index} | {row.setting} | {row.recall:.4f} | {row.single_ms:.3f} | {row.batch_ms:.3f} | "
        f"{row.build_seconds:.0f} | {row.mebibytes:.0f} |"
    )


def main() -> None:
    """Print a Markdown table and write it as JSON if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=1_000_000)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--spread", type=float, default=0.5, help="of a cluster; centres have spread 1")
    parser.add_argument("--bundle", type=Path, help="with a retriever, whose vectors are taken; of width 64 by default")
    parser.add_argument("--snapshot", type=Path, help="published with the bundle: its users ask")
    parser.add_argument("--graph", action="store_true", help="HNSW too, which takes about 10 minutes to build")
    parser.add_argument("--indexes", nargs="+", help="FAISS factory names; a usual choice if absent")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if bool(options.bundle) != bool(options.snapshot):
        parser.error("a bundle and its snapshot go together")
    faiss.omp_set_num_threads(1)
    lists = 2 ** round(np.log2(options.items**0.5))
    codes = f"PQ{options.width}x4fs"
    names = options.indexes or [
        "Flat",
        f"IVF{lists},Flat",
        f"IVF{lists},SQ8,RFlat",
        f"IVF{lists},PQ{options.width // 2}x4fs,RFlat",
        f"IVF{lists},{codes},RFlat",
        f"IVF{2 * lists},{codes},RFlat",
        SHIPPED,
        *(["HNSW32"] if options.graph else []),
    ]
    if options.bundle:
        vectors, queries = trained(options.bundle, options.snapshot, options.items)
    else:
        centre = np.random.default_rng(1).standard_normal((CENTRES, options.width), dtype=np.float32)
        vectors = clustered(options.items, options.width, 2, centre, options.spread)
        queries = clustered(QUERIES, options.width, 3, centre, options.spread)
    exact = faiss.IndexFlatIP(options.width)
    exact.add(vectors)
    truth = np.concatenate([exact.search(queries[i : i + BATCH], K)[1] for i in range(0, len(queries), BATCH)])
    del exact
    print(f"{options.items:,} items of width {options.width}, one thread, faiss {faiss.__version__}\n")
    print("| index | setting | recall@100 | ms, single | ms, in batches of 64 | build s | MiB |")
    print("|---|---|---|---|---|---|---|")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            rows += measure(name, vectors, queries, truth, Path(folder))
    if options.out:
        about = {"items": options.items, "width": options.width, "faiss": faiss.__version__}
        options.out.write_text(json.dumps({**about, "rows": [asdict(row) for row in rows]}, indent=2) + "\n")


if __name__ == "__main__":
    main()
