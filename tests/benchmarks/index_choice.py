"""Which index finds the best 100 of a million items: recall, time per query, time to build, memory.

    OMP_NUM_THREADS=1 python tests/benchmarks/index_choice.py --out index_choice.json     # about 10 minutes, 3 GiB

The vectors lie around 5,000 centres whose sizes follow a power law; queries lie around the same centres and are not
among the items. Recall is against the exact search. Every index is built, written and read back memory-mapped, as a
bundle has it, and searched on one thread: queries one by one, and in batches of 64.
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
from numpy.typing import NDArray

CENTRES = 5_000
BATCH = 64
QUERIES = 1_024
K = 100


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
    """Give n vectors around the centres, of which the first are the most frequent."""
    rng = np.random.default_rng(seed)
    weight = 1 / np.arange(1, len(centre) + 1) ** 0.7
    of = rng.choice(len(centre), n, p=weight / weight.sum())
    vectors = rng.standard_normal((n, width), dtype=np.float32)
    vectors *= spread
    vectors += centre[of]
    return vectors


def settings(index: Any, name: str) -> Iterator[tuple[str, Callable[[], None]]]:
    """Give the settings an index is searched with, from fast to exact."""
    if name == "Flat":
        yield "-", lambda: None
    elif name.startswith("HNSW"):
        hnsw = faiss.downcast_index(index).hnsw
        for ef in (128, 256, 512):
            yield f"efSearch {ef}", lambda ef=ef: setattr(hnsw, "efSearch", ef)
    elif "RFlat" in name:
        inverted = faiss.extract_index_ivf(index)
        for probes, factor in ((8, 4), (16, 4), (16, 8), (32, 8)):

            def choose(probes: int = probes, factor: int = factor) -> None:
                inverted.nprobe, index.k_factor = probes, factor

            yield f"nprobe {probes}, k_factor {factor}", choose
    else:
        for probes in (4, 8, 16, 32):
            yield f"nprobe {probes}", lambda probes=probes: setattr(index, "nprobe", probes)


def build(name: str, vectors: NDArray[np.float32]) -> Any:
    """Build an index by its factory name, trained on at most 64 vectors per list."""
    index = faiss.index_factory(vectors.shape[1], name, faiss.METRIC_INNER_PRODUCT)
    if not index.is_trained:
        sample = np.random.default_rng(0).permutation(len(vectors))[:262_144]
        index.train(vectors[sample])
    index.add(vectors)
    return index


def measure(
    name: str, vectors: NDArray[np.float32], queries: NDArray[np.float32], truth: NDArray[np.int64], folder: Path
) -> list[Row]:
    """Build one index and search it at every setting."""
    started = time.perf_counter()
    built = build(name, vectors)
    seconds = time.perf_counter() - started
    path = folder / "index.faiss"
    faiss.write_index(built, str(path))
    del built
    try:
        index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC)
    except RuntimeError:
        index = faiss.read_index(str(path))
    rows = []
    for setting, choose in settings(index, name):
        choose()
        found = np.concatenate([index.search(queries[i : i + BATCH], K)[1] for i in range(0, len(queries), BATCH)])
        recall = np.mean([len(np.intersect1d(a, b)) / K for a, b in zip(found, truth, strict=True)])
        batch = milliseconds(index, queries[:256], BATCH)
        single = milliseconds(index, queries[: 32 if name == "Flat" else 128], 1)
        size = path.stat().st_size / 2**20
        rows.append(Row(name, setting, float(recall), single, batch, seconds, size))
        print(line(rows[-1]), flush=True)
    return rows


def milliseconds(index: Any, queries: NDArray[np.float32], size: int) -> float:
    """Give the time per query in batches of a size, the best of three."""
    found = []
    for _ in range(3):
        started = time.perf_counter()
        for start in range(0, len(queries), size):
            index.search(queries[start : start + size], K)
        found.append(time.perf_counter() - started)
    return min(found) / len(queries) * 1e3


def line(row: Row) -> str:
    """Give one line of the table."""
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
    parser.add_argument("--indexes", nargs="+", help="FAISS factory names; a usual choice if absent")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    faiss.omp_set_num_threads(1)
    lists = 2 ** round(np.log2(options.items**0.5))
    names = options.indexes or [
        "Flat",
        f"IVF{lists},Flat",
        f"IVF{4 * lists},Flat",
        f"IVF{lists},PQ{options.width // 2}x4fs,RFlat",
        "HNSW16",
        "HNSW32",
    ]
    centre = np.random.default_rng(1).standard_normal((CENTRES, options.width), dtype=np.float32)
    vectors = clustered(options.items, options.width, 2, centre, options.spread)
    queries = clustered(QUERIES, options.width, 3, centre, options.spread)
    exact = faiss.IndexFlatIP(options.width)
    exact.add(vectors)
    truth = np.concatenate([exact.search(queries[i : i + BATCH], K)[1] for i in range(0, QUERIES, BATCH)])
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
