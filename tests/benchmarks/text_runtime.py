"""Texts per CPU second of one encoder by runtime: a fixed-length loop, batches by length, bfloat16, and onnxruntime.

    RECSYS_DATA=data python tests/benchmarks/text_runtime.py --out runtime.json        minutes
    python tests/benchmarks/text_runtime.py --smoke                                    made-up texts, seconds

The passages are drawn from Cranfield, MED and SciFact, and those nearest to each corpus' median length are timed beside
a sample of all, since what a batch by length saves is the padding up to the encoder's 256 tokens. Every runtime encodes
the same ones in turn within each round, on one thread; CPU time of the process is counted, so other work on the machine
matters little. Beside each stands how far its inner products are from those of the fixed-length loop in float32.
onnxruntime is timed where `onnxruntime` and `onnxscript` are installed; they are not among the dependencies.
"""

import argparse
import copy
import importlib.util
import os
import platform
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pipelines.text_corpus import read_corpus
from ranking.dense_encoder import DenseEncoder
from ranking.text_backbone import in_passes, padded
from ranking.text_models import Vectors
from recsys.files import write_json

LONGEST = 256
CORPORA = ("cranfield", "med", "scifact")
BATCH = 16
Rows = Sequence[Sequence[int]]
Forward = Callable[[Tensor, Tensor], Tensor]


def by_length(rows: Rows, pad: int, forward: Forward) -> Vectors:
    return in_passes(rows, pad, torch.device("cpu"), forward)


def fixed_length(rows: Rows, pad: int, forward: Forward) -> Vectors:
    """What a loop without thought does: every text padded to the longest there may be."""
    parts = []
    for first in range(0, len(rows), BATCH):
        ids, mask = padded([*rows[first : first + BATCH], [pad] * LONGEST], pad)
        mask[-1] = 0
        with torch.inference_mode():
            parts.append(forward(ids[:-1], mask[:-1]).float().numpy())
    return np.concatenate(parts)


def onnx_forward(encoder: DenseEncoder, directory: Path) -> Forward | None:
    """The encoder as an ONNX graph under onnxruntime; None where it is not installed."""
    if any(importlib.util.find_spec(name) is None for name in ("onnxruntime", "onnxscript")):
        return None
    import onnxruntime

    ids, mask = padded([[101, 7592, 102], [101, 102]], 0)
    sizes = {0: torch.export.Dim("texts", min=1, max=4096), 1: torch.export.Dim("tokens", min=1, max=LONGEST)}
    path = directory / "encoder.onnx"
    names = ["ids", "mask"]
    torch.onnx.export(
        encoder, (ids, mask), str(path), input_names=names, dynamic_shapes={"ids": sizes, "mask": sizes}, dynamo=True
    )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda ids, mask: torch.from_numpy(session.run(None, {"ids": ids.numpy(), "mask": mask.numpy()})[0])


def measure(
    encoder: DenseEncoder, graph: Forward | None, texts: Sequence[str], rounds: int
) -> list[dict[str, float | str]]:
    """One row per runtime: texts per CPU second, the ratio to the fixed-length loop, and the largest difference."""
    rows, pad = encoder.tokenizer.encode(texts, LONGEST), encoder.tokenizer.pad
    half = copy.deepcopy(encoder)
    half.transformer.to(torch.bfloat16)
    calls: dict[str, Callable[[], Vectors]] = {
        "eager, fixed length": lambda: fixed_length(rows, pad, encoder),
        "eager, by length": lambda: by_length(rows, pad, encoder),
        "eager, by length, bfloat16": lambda: by_length(rows, pad, half),
    }
    if graph is not None:
        calls["onnxruntime, by length"] = lambda: by_length(rows, pad, graph)
    times: dict[str, list[float]] = {name: [] for name in calls}
    vectors: dict[str, Vectors] = {}
    for _ in range(rounds + 1):
        for name, call in calls.items():
            began = time.process_time()
            vectors[name] = call()
            times[name].append(time.process_time() - began)
    seconds = {name: float(np.median(values[1:])) for name, values in times.items()}
    first = next(iter(calls))
    exact = vectors[first] @ vectors[first].T
    return [
        {
            "runtime": name,
            "texts_per_cpu_second": round(len(texts) / value, 1),
            "ratio": round(seconds[first] / value, 2),
            "largest_difference": float(np.abs(vectors[name] @ vectors[name].T - exact).max()),
        }
        for name, value in seconds.items()
    ]


def sampled(encoder: DenseEncoder, data: Path, texts: int) -> dict[str, list[str]]:
    """Return texts by kind: of each corpus a sample and those of about the median length, and short queries."""
    kinds = {}
    for name in CORPORA:
        whole = read_corpus(data / name).passages
        lengths = np.array([len(row) for row in encoder.tokenizer.encode(whole, LONGEST)])
        drawn = np.random.default_rng(0).permutation(len(whole))[:texts]
        kinds[f"passages of {name}"] = [whole[place] for place in drawn.tolist()]
        middle = np.argsort(np.abs(lengths - np.median(lengths)), kind="stable")[:texts]
        kinds[f"passages of {name}'s median length"] = [whole[place] for place in middle.tolist()]
    kinds["queries of 6 words"] = [" ".join(text.split()[:6]) for text in kinds[f"passages of {CORPORA[0]}"]]
    return kinds


def main() -> None:
    """Measure passages and short queries, print tables, and write them as JSON."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--data", type=Path, default=Path(os.environ.get("RECSYS_DATA", "data")), help="BEIR folders")
    options.add_argument("--texts", type=int, default=32)
    options.add_argument("--rounds", type=int, default=2)
    options.add_argument("--smoke", action="store_true", help="made-up texts and few of them: does it run?")
    options.add_argument("--out", type=Path, default=None, help="JSON file for the rows")
    given = options.parse_args()
    torch.set_num_threads(1)
    encoder = DenseEncoder.of()
    if given.smoke:
        given.rounds = 1
        made = [f"wing {'flow ' * (number % 9)}" for number in range(12)]
        kinds = {"made-up passages": made, "queries of 6 words": [" ".join(text.split()[:6]) for text in made]}
    else:
        kinds = sampled(encoder, given.data, given.texts)
    found = {}
    with tempfile.TemporaryDirectory() as directory:
        graph = onnx_forward(encoder, Path(directory))
        for kind, texts in kinds.items():
            tokens = float(np.median([len(row) for row in encoder.tokenizer.encode(texts, LONGEST)]))
            found[kind] = {"median_tokens": tokens, "rows": measure(encoder, graph, texts, given.rounds)}
            print(f"{len(texts)} {kind}, {tokens:.0f} tokens at the median")
            for row in found[kind]["rows"]:  # type: ignore[attr-defined]
                speed = f"{row['texts_per_cpu_second']:>9}/s{row['ratio']:>7}x"
                print(f"  {row['runtime']:<28}{speed}{row['largest_difference']:>10.1e}")
    if given.out:
        about = {"processor": platform.processor() or platform.machine(), "threads": 1}
        write_json(given.out, {**about, **found})


if __name__ == "__main__":
    main()
