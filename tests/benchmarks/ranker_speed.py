"""How fast the rankers train and score, beside third-party implementations and the machine's own limits, in one run.

    pip install --no-deps --target peers ...                          # see peer_models.py
    OMP_NUM_THREADS=1 THP_MEM_ALLOC_ENABLE=1 python tests/benchmarks/ranker_speed.py --peers peers --out speed.json

Both sides run in one process, in turn, with transparent huge pages for torch's memory and as many threads as
`OMP_NUM_THREADS` says; a figure is the median of `--rounds` rounds of three calls. Histories are random and full,
weights untrained.

- **training SDIM**: LongCTR's SDIM made the same function on the same weights (`peer_models.same_sdim`): the loss and
  the gradient of the item table are compared first, and a difference ends the run. 256 samples a step on both sides.
- **scoring**: 200 candidates of one user from 1,000 raw events, what we encode included.
- **from the table**: 1,000 candidates against 100, 1,000 and 10,000 events that are already in SDIM's table, beside a
  gather of as many rows and a matrix product of as many numbers as the read-out needs.
- **MQSA-TED**: targets a second, both its branches, distillation left out, beside RecBole's SASRec with as many blocks,
  which trains one target per row where ours trains every position.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import peer_models
import torch

from pipelines.optimise import OptimiserConfig, build_optimisers, update
from ranking.batch import FIRST_ITEM, Batch, Candidates, History, Request
from ranking.bucket_sums import bucket_rows, read
from ranking.dare import Dare, DareConfig
from ranking.din import Din, DinConfig
from ranking.embeddings import FieldWidths
from ranking.items import ItemTable
from ranking.mqsa_ted import MqsaTed, MqsaTedConfig
from ranking.products import product
from ranking.sdim import GRID, Sdim, SdimConfig

WIDTH, ITEMS, SAMPLES = 64, 100_000, 256
CALLS = 3
"""Calls in a row, the same on both sides: the first finds the caches full of the other side's numbers."""
OURS = OptimiserConfig(learning_rate=peer_models.RATE)


Softmax = Literal["chunked", "sampled"]


@dataclass(frozen=True)
class Row:
    """One comparison; `ratio` says how many times faster ours is."""

    what: str
    peer: str
    unit: str
    ours: float
    theirs: float
    ratio: float
    goal: float | None


def item_table(items: int) -> ItemTable:
    count = torch.ones(items + FIRST_ITEM, dtype=torch.int64)
    count[:FIRST_ITEM] = 0
    return ItemTable((), torch.zeros(len(count), 0, dtype=torch.int32), (), count)


def random_batch(items: int, users: int, length: int, candidates: int, seed: int = 0) -> Batch:
    """Return full histories and candidates, uniform over the catalogue; half of the labels are 1."""
    draws = np.random.default_rng(seed)
    item = torch.from_numpy(draws.integers(FIRST_ITEM, items + FIRST_ITEM, users * length).astype(np.int32))
    history = History(
        item,
        torch.zeros_like(item),
        torch.arange(length, dtype=torch.int64).repeat(users) * 86_400_000_000,
        torch.arange(users + 1) * length,
    )
    asked = torch.from_numpy(draws.integers(FIRST_ITEM, items + FIRST_ITEM, (users, candidates)).astype(np.int32))
    label = torch.from_numpy((draws.random((users, candidates)) < 0.5).astype(np.float32))
    at = torch.full((users,), length * 86_400_000_000)
    return Batch(history, Request(at), Candidates(asked), label, torch.ones_like(label))


def side_by_side(ours: Callable[[], object], theirs: Callable[[], object], rounds: int) -> tuple[float, float]:
    """Return the median seconds of both, `CALLS` calls of each in turn; the first round does not count."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for turn in range(rounds + 1):
        for work, taken in zip((ours, theirs), seconds, strict=True):
            for _ in range(CALLS):
                began = time.perf_counter()
                work()
                if turn:
                    taken.append(time.perf_counter() - began)
    return statistics.median(seconds[0]), statistics.median(seconds[1])


def stepper(model: Any, batch: Batch) -> Callable[[], object]:
    """Return one training step of ours, as `recsys train` takes it."""
    optimisers = build_optimisers(model, OURS)

    def step() -> None:
        model.loss(batch, torch.Generator().manual_seed(0)).total.backward()
        update(optimisers, OURS)

    model.train()
    return step


def check_same(ours: Sdim, peer: Any, batch: Batch, length: int) -> None:
    """End the run unless loss and gradient of the item table agree."""
    inputs = peer_models.rows_for_longctr(batch, length)
    losses = []
    for loss in (
        ours.train().loss(batch, torch.Generator().manual_seed(0)).total,
        peer.train().compute_loss(peer(inputs), peer.get_labels(inputs)),
    ):
        loss.backward()
        losses.append(loss.item())
    table = ours.fields.item
    assert table is not None
    mine = table.weight.grad
    assert mine is not None
    theirs = peer.embedding_layer.embedding_layer.embedding_layers["item"].weight.grad
    apart = float((mine.to_dense() - theirs).abs().max() / theirs.abs().max())
    if abs(losses[0] - losses[1]) > 1e-5 or apart > 1e-3:
        raise SystemExit(f"not the same function: losses {losses[0]} and {losses[1]}, gradients apart by {apart}")
    for model in (ours, peer):
        model.zero_grad(set_to_none=True)


def train_sdim(rounds: int, smoke: bool) -> Iterator[Row]:
    """SDIM's training step beside LongCTR's."""
    cases = [(ITEMS, 1000, 8, 20.0), (ITEMS, 1000, 1, 4.0), (1_000_000, 200, 8, 60.0)]
    for items, length, targets, goal in [(500, 60, 4, None)] if smoke else cases:
        config = SdimConfig(
            window=length, recent=50, item_width=WIDTH, category_width=0, category=None, unknown_rate=0.0
        )
        ours = Sdim(config, item_table(items))
        peer = peer_models.same_sdim(ours)
        batch = random_batch(items, SAMPLES // targets, length, targets)
        check_same(ours, peer, batch, length)
        inputs = peer_models.rows_for_longctr(batch, length)
        mine, theirs = side_by_side(stepper(ours, batch), lambda: peer.train_step(inputs), rounds)  # noqa: B023
        what = f"train SDIM, {length:,} events, {items:,} items, {targets} targets per user"
        yield Row(what, "LongCTR SDIM", "samples/s", SAMPLES / mine, SAMPLES / theirs, theirs / mine, goal)


def scorers(length: int, items: int) -> Iterator[tuple[str, Any, str, Any, float]]:
    """Yield what is scored: name, our model, the peer's name, its model, the goal."""
    table, widths, none = item_table(items), FieldWidths(WIDTH, 0, 0), {"category": None, "unknown_rate": 0.0}
    sdim = Sdim(SdimConfig(window=length, item_width=WIDTH, category_width=0, **none), table)
    yield "SDIM", sdim, "LongCTR SDIM", peer_models.same_sdim(sdim), 200.0
    settings = DareConfig(window=length, attention=widths, representation=widths, **none)
    twin = peer_models.longctr("TWIN", items + FIRST_ITEM, WIDTH, topk=settings.retrieved)
    yield "TWIN", Dare(replace(settings, tied=True), table), "LongCTR TWIN", twin, 100.0
    yield "DARE", Dare(settings, table), "LongCTR TWIN", twin, 100.0
    din = Din(DinConfig(window=length, widths=widths, **none), table)
    yield "DIN", din, "LongCTR DIN", peer_models.longctr("DIN", items + FIRST_ITEM, WIDTH), 20.0


def score_raw(rounds: int, smoke: bool) -> Iterator[Row]:
    """200 candidates from raw events, beside LongCTR's forward pass."""
    length, candidates, items = (60, 8, 500) if smoke else (1000, 200, ITEMS)
    batch = random_batch(items, 1, length, candidates)
    for name, ours, other, peer, goal in scorers(length, items):
        ours.eval()
        peer.eval()

        def score(model: Any = ours) -> object:
            return model.score(model.encode(batch.history), batch.request, batch.candidates)

        def forward(model: Any = peer) -> object:
            return model(peer_models.rows_for_longctr(batch, length))

        with torch.inference_mode():
            mine, theirs = side_by_side(score, forward, rounds)
        what = f"score {candidates} x {length:,} raw events, {name}"
        yield Row(what, other, "ms", mine * 1e3, theirs * 1e3, theirs / mine, goal)


def score_from_table(rounds: int, smoke: bool) -> Iterator[dict[str, float]]:
    """1,000 candidates against a table that is there, beside what the machine needs for the same reading."""
    for length in (100, 1_000) if smoke else (100, 1_000, 10_000):
        config = SdimConfig(window=length, item_width=WIDTH, category_width=0, category=None)
        items = 500 if smoke else ITEMS
        model = Sdim(config, item_table(items)).eval()
        batch = random_batch(items, 1, length, 1_000)
        with torch.inference_mode():
            state = model.encode(batch.history)
            code = model.item_signatures().index_select(0, batch.candidates.item[0])[None]  # [1, C, G]

        def long(state: Any = state, model: Any = model, code: Any = code) -> object:
            rows = bucket_rows(state.table.double() * GRID, state.size, model.config.norm).float()
            return read(rows, state.size, code, model.config.norm)

        def whole(state: Any = state, model: Any = model, batch: Batch = batch) -> object:
            return model.score(state, batch.request, batch.candidates)

        rows = state.table.float().view(-1, WIDTH)
        index = torch.randint(len(rows), (code.numel(),))
        hot = torch.rand(code.shape[1], len(rows))
        with torch.inference_mode():
            read_s, whole_s = side_by_side(long, whole, rounds)
            gather_s, gemm_s = side_by_side(lambda: rows.index_select(0, index), lambda: hot @ rows, rounds)  # noqa: B023
        found = {"read_ms": read_s, "score_ms": whole_s, "gather_ms": gather_s, "gemm_ms": gemm_s}
        yield {"events": length, "candidates": 1_000} | {name: value * 1e3 for name, value in found.items()}


def train_mqsa_ted(rounds: int, smoke: bool) -> Iterator[Row]:
    """Targets a second of MQSA-TED, every position one, beside RecBole's SASRec, every row one, by full softmax.

    For the large catalogue by our sampled softmax too, which is how such a catalogue is trained.
    """
    cases: list[tuple[int, int, Softmax]] = [(items, n, "chunked") for items in (12_101, ITEMS) for n in (50, 200)]
    cases += [(ITEMS, n, "sampled") for n in (50, 200)]
    for items, length, softmax in [(500, 20, "chunked"), (500, 20, "sampled")] if smoke else cases:
        config = MqsaTedConfig(width=WIDTH, window=length, lambda_kd=0.0, baskets=False, softmax=softmax)
        ours = MqsaTed(config, item_table(items))
        users = 4 if smoke else max(1, 3_200 // length)
        batch = random_batch(items, users, length, 1)
        peer = peer_models.recbole_sasrec(items, length, config).train()
        adam = torch.optim.Adam(peer.parameters(), lr=peer_models.RATE)
        rows = random_batch(items, 16 if smoke else SAMPLES, length, 1)
        given = {
            "item_list": rows.history.item.view(-1, length).long() - 1,
            "length": torch.full((len(rows),), length),
            "item": rows.candidates.item[:, 0].long() - 1,
        }

        def step(peer: Any = peer, adam: Any = adam, given: Any = given) -> None:
            adam.zero_grad()
            peer.calculate_loss(given).backward()
            adam.step()

        mine, theirs = side_by_side(stepper(ours, batch), step, rounds)
        us, them = users * length / mine, len(rows) / theirs
        yield Row(
            f"train MQSA-TED, {length} events, {items:,} items" + (", sampled softmax" if softmax == "sampled" else ""),
            "RecBole SASRec",
            "targets/s",
            us,
            them,
            us / them,
            20.0,
        )


def limits(rounds: int) -> dict[str, float]:
    """Return what the machine can do in the same run: float32 products, as we call them and as torch does; a gather."""
    x, w = torch.randn(1024, WIDTH), torch.randn(4096, WIDTH)
    table, row = torch.randn(ITEMS, WIDTH), torch.randint(ITEMS, (32_000,), dtype=torch.int32)
    out = torch.empty(len(row), WIDTH)
    with torch.inference_mode():
        ours, torchs = side_by_side(lambda: product(x, w), lambda: x @ w.T, rounds)
        gather, call = side_by_side(lambda: torch.index_select(table, 0, row, out=out), lambda: x[0] + x[1], rounds)
    work = 2e-9 * len(x) * len(w) * WIDTH
    return {
        "product_gflops": work / ours,
        "torch_gflops": work / torchs,
        "gather_gb_per_s": out.numel() * 4e-9 / gather,
        "smallest_call_us": call * 1e6,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=Path, required=True, help="folder the peers are installed in")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=["sdim", "score", "table", "mqsa_ted"], help="one part instead of all")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes: does it run?")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args()
    peer_models.import_from(args.peers)
    if os.environ.get("THP_MEM_ALLOC_ENABLE") != "1":
        print("THP_MEM_ALLOC_ENABLE=1 is not set: both sides will be slower than they can be")
    torch.manual_seed(0)
    parts = {"sdim": train_sdim, "score": score_raw, "mqsa_ted": train_mqsa_ted}
    found: dict[str, Any] = {"threads": torch.get_num_threads(), "rounds": args.rounds, "rows": [], "table": []}
    print(f"| what | beside | unit | ours | theirs | times faster | goal |\n|{'---|' * 7}")
    for name, part in parts.items():
        for row in part(args.rounds, args.smoke) if args.only in (None, name) else ():
            found["rows"].append(asdict(row))
            goal = "" if row.goal is None else f"{row.goal:g}"
            figures = f"{row.ours:,.2f} | {row.theirs:,.2f} | {row.ratio:.1f}"
            print(f"| {row.what} | {row.peer} | {row.unit} | {figures} | {goal} |", flush=True)
    print(f"\n| events in the table | read, ms | whole score, ms | gather, ms | product, ms |\n|{'---|' * 5}")
    for line in score_from_table(args.rounds, args.smoke) if args.only in (None, "table") else ():
        found["table"].append(line)
        figures = " | ".join(f"{line[name]:.2f}" for name in ("read_ms", "score_ms", "gather_ms", "gemm_ms"))
        print(f"| {line['events']:,} | {figures} |", flush=True)
    found["limits"] = limits(args.rounds)
    print("\n" + ", ".join(f"{name} {value:.1f}" for name, value in found["limits"].items()))
    if args.out:
        args.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
