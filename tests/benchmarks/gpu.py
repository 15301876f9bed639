"""What a GPU does for this system, beside one and all cores of its machine, in one run.

    python tests/benchmarks/gpu.py --out gpu.json                # about a minute, a GPU with 8 GiB, 8 GiB of memory

- **search**: the best 100 of clustered vectors of width 64 by the index that a bundle of so many items has, one query
  and 64 at a time; recall against the exhaustive search of the same index.
- **rank**: 200 candidates of one user from 1,000 raw events, transfers and the wait for the answer included.
- **train** (on the processor with `--train-cpu` alone): samples (MQSA-TED: targets) a second, 256 samples a step, 1,000
  events, 100,000 items of width 64.
- **text**: passages of some 100 words encoded by the default encoder, and pairs read by a cross-encoder of its size.

Seconds are of the clock, medians of `--rounds` calls after two that do not count; a CUDA call ends when its result is
there.
"""

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch
from index_choice import CENTRES, clustered
from ranker_speed import OURS, WIDTH, item_table, random_batch

from pipelines.optimise import build_optimisers, update
from ranking.aw_moe import AwMoe, AwMoeConfig
from ranking.batch import Batch
from ranking.cross_encoder import CrossEncoder
from ranking.dare import Dare, DareConfig
from ranking.dense_encoder import DenseEncoder
from ranking.din import Din, DinConfig
from ranking.embeddings import FieldWidths
from ranking.index import IndexConfig, build, use_threads
from ranking.mqsa_ted import MqsaTed, MqsaTedConfig
from ranking.sdim import Sdim, SdimConfig

CORES = torch.get_num_threads()
LENGTH, ITEMS, SAMPLES, K = 1_000, 100_000, 256, 100


@dataclass(frozen=True)
class Row:
    """One measurement on one device."""

    what: str
    device: str
    value: float
    unit: str
    note: str = ""


def seconds(work: Callable[[], object], device: str, rounds: int) -> float:
    """Return the median seconds of a call, its result waited for."""
    taken = []
    for turn in range(rounds + 2):
        began = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        if turn >= 2:
            taken.append(time.perf_counter() - began)
    return statistics.median(taken)


def searches(sizes: list[int], rounds: int) -> Iterator[Row]:
    """One query and 64 at a time, by the index that a bundle of so many items has: one core, all cores, the GPU."""
    centre = np.random.default_rng(0).standard_normal((CENTRES, WIDTH), dtype=np.float32)
    queries = clustered(64 * (rounds + 2), WIDTH, 2, centre, 0.5)
    for size in sizes:
        index = build(clustered(size, WIDTH, 1, centre, 0.5), np.arange(2, size + 2), IndexConfig())
        placed = index._placed
        for threads in (*thread_counts(), 0):
            if not threads and placed is None:
                continue
            device = f"cpu, {threads} threads" if threads else "cuda"
            use_threads(threads or 1)
            index._placed = None if threads else placed
            recall = index.recall(queries[:64], K)
            for number in (1, 64):
                calls = iter(range(rounds + 2))

                def search(number: int = number, calls: Iterator[int] = calls, index: Any = index) -> None:
                    at = next(calls) * number
                    index.search(queries[at : at + number], K)

                took = seconds(search, device, rounds) / number
                yield Row(f"search {size:,}, {number} at once", device, took * 1e3, "ms/query", f"recall {recall:.4f}")
        index._placed = placed


def thread_counts() -> list[int]:
    """Return one, and as many as OMP_NUM_THREADS says or the machine has."""
    return sorted({1, CORES})


def models(items: int, length: int) -> Iterator[tuple[str, Any]]:
    """The long-sequence rankers at one size, untrained."""
    table, widths, none = item_table(items), FieldWidths(WIDTH, 0, 0), {"category": None, "unknown_rate": 0.0}
    yield "DIN", Din(DinConfig(window=length, widths=widths, **none), table)
    yield "DARE", Dare(DareConfig(window=length, attention=widths, representation=widths, **none), table)
    yield "SDIM", Sdim(SdimConfig(window=length, item_width=WIDTH, category_width=0, **none), table)
    yield "AW-MoE", AwMoe(AwMoeConfig(window=length, item_width=WIDTH, category_width=0, **none), table)
    sequence = MqsaTedConfig(width=WIDTH, window=length, lambda_kd=0.0, baskets=False, softmax="sampled")
    yield "MQSA-TED", MqsaTed(sequence, table)


def stepper(model: Any, batch: Batch, device: str) -> Callable[[], object]:
    """Return one training step, as `recsys train` takes it."""
    optimisers = build_optimisers(model, OURS)

    def step() -> None:
        model.loss(batch.to(torch.device(device)), torch.Generator(device).manual_seed(0)).total.backward()
        update(optimisers, OURS)

    model.train()
    return step


def rank_and_train(items: int, length: int, rounds: int, device: str, train: bool) -> Iterator[Row]:
    """Latency of one user's candidates, and training steps."""
    asked, learned = random_batch(items, 1, length, 200), random_batch(items, SAMPLES // 8, length, 8)
    for name, model in models(items, length):
        ours = model.to(device).eval()

        def score(ours: Any = ours) -> object:
            there = asked.to(torch.device(device))
            return ours.score(ours.encode(there.history), there.request, there.candidates).cpu()

        with torch.inference_mode():
            yield Row(f"rank 200 x {length:,} events, {name}", device, seconds(score, device, rounds) * 1e3, "ms")
        if not train:
            continue
        took = seconds(stepper(ours, learned, device), device, rounds)
        samples = len(learned) * length if name == "MQSA-TED" else SAMPLES
        unit = "targets/s" if name == "MQSA-TED" else "samples/s"
        yield Row(f"train, {length:,} events, {name}", device, samples / took, unit)


def texts(count: int, rounds: int, device: str) -> Iterator[Row]:
    """Encode passages, and read pairs."""
    draws = np.random.default_rng(0)
    words = [f"word{number}" for number in range(2_000)]
    passages = [" ".join(draws.choice(words, 100)) for _ in range(count)]
    encoder = DenseEncoder.of()
    encoder.to(device)
    took = seconds(lambda: encoder.encode_passages(passages), device, rounds)
    yield Row("encode passages", device, count / took, "passages/s")
    reader = CrossEncoder.of()
    reader.to(device).eval()
    took = seconds(lambda: reader.rerank(passages[0][:60], passages[:20]), device, rounds)
    yield Row("rerank 20 passages", device, took * 1e3, "ms")


def measured(args: argparse.Namespace) -> Iterator[Row]:
    """Yield all rows: searches, then the rest on one core, on all of them and on the GPU."""
    sizes = [2_000] if args.smoke else [100_000, 1_000_000]
    items, length, count = (500, 60, 16) if args.smoke else (ITEMS, LENGTH, 256)
    yield from searches(sizes, args.rounds)
    for threads in thread_counts():
        torch.set_num_threads(threads)
        rows = [rank_and_train(items, length, args.rounds, "cpu", args.train_cpu), texts(count // 16, 1, "cpu")]
        for row in itertools.chain.from_iterable(rows):
            yield replace(row, device=f"cpu, {threads} threads")
    if torch.cuda.is_available():
        yield from rank_and_train(items, length, args.rounds, "cuda", True)
        yield from texts(count, args.rounds, "cuda")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--smoke", action="store_true", help="tiny sizes: does it run?")
    parser.add_argument("--train-cpu", action="store_true", help="training steps on the processor, too")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    found: dict[str, Any] = {"gpu": device, "faiss": faiss.__version__, "torch": torch.__version__, "rows": []}
    print(f"{device}, {CORES} cores\n\n| what | where | | |\n|---|---|---|---|")
    for row in measured(args):
        found["rows"].append(asdict(row))
        print(f"| {row.what} | {row.device} | {row.value:,.3g} {row.unit} | {row.note} |", flush=True)
        if args.out:
            args.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
