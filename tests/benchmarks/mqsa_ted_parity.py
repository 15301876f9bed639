"""MQSA-TED under its paper's protocol: four sets, all items ranked, seen items masked, beside POP and TRANS.

    RECSYS_DATA=... python tests/benchmarks/mqsa_ted_parity.py beauty --epochs 200

The data (`<RECSYS_DATA>/<set>/interactions.parquet`: user_id, item_id, position, split) is the paper's own split: each
user's last item is the test target, the one before it the validation target. Training input is the newest 50 training
items without the last, targets are shifted by one; Adam 1e-3 with coupled L2 1e-4; 256 users a batch. After every epoch
all N items are ranked, ties to the lowest id, 2^32 off the score of what the user has had. The reported line is the
test line of the epoch with the best validation NDCG@20. A run that is interrupted goes on where it was when it is
started again; every draw is a function of (seed, step), so the numbers are the same.
"""

import argparse
import json
import os
import sys
import time
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ranking.batch import FIRST_ITEM, Batch, assemble
from ranking.items import ItemTable, Transitions, identity_rows
from ranking.mqsa_ted import MqsaTed, MqsaTedConfig
from recsys.config import parse
from recsys.files import whole_file, write_json
from recsys.history import Events
from recsys.randomness import derive, generator

SETS = ("beauty", "sports", "toys", "yelp")
LENGTH = 50  # newest training items that count, for input, transitions, popularity and the mask
CUTS = (5, 10, 20)
MASK = 2.0**32
BATCH = 256


@dataclass(frozen=True)
class Interactions:
    """One set: every user's items in order, packed; the last is the test target, the one before it validation's."""

    items: int  # N
    events: Events  # item ids as keys, time = position
    offsets: NDArray[np.int64]  # [U + 1]

    @property
    def users(self) -> int:
        """Number of users."""
        return len(self.offsets) - 1

    def target(self, split: str) -> NDArray[np.int64]:
        """Give each user's target of a split, [U] item ids."""
        return self.events.item[self.offsets[1:] - (1 if split == "test" else 2)].astype(np.int64)

    def train(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Give start and end of each user's training items, cut to the newest 50, [U] each."""
        ends = self.offsets[1:] - 2
        return np.maximum(self.offsets[:-1], ends - LENGTH), ends


def load(name: str, root: Path | None = None) -> Interactions:
    """Read a set from `root` (default: the environment variable RECSYS_DATA)."""
    path = (root or Path(os.environ["RECSYS_DATA"])) / name / "interactions.parquet"
    table = pl.read_parquet(path).sort("user_id", "position")
    split = table["split"].to_numpy()
    item = table["item_id"].to_numpy().astype(np.uint32)
    lengths = table.group_by("user_id", maintain_order=True).len()["len"].to_numpy().astype(np.int64)
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
    if not (np.all(split[offsets[1:] - 1] == "test") and np.all(split[offsets[1:] - 2] == "valid")):
        raise SystemExit(f"{path}: expected each user's last two rows to be of split valid and test")
    events = Events(item, np.zeros(len(item), np.uint8), table["position"].to_numpy().astype(np.int64))
    return Interactions(int(item.max()) + 1, events, offsets)


def runs(start: NDArray[np.int64], end: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Give (user, place) of every event between start and end, users in order."""
    length = np.maximum(end - start, 0)
    user = np.repeat(np.arange(len(start)), length)
    return user, np.arange(length.sum()) - np.repeat(np.cumsum(length) - length, length) + start[user]


def counts(data: Interactions) -> NDArray[np.int64]:
    """Give POP, how often each item is in the training sequences cut to 50, [N]."""
    _, place = runs(*data.train())
    return np.bincount(data.events.item[place], minlength=data.items).astype(np.int64)


def transitions(data: Interactions, span: int = 1) -> Transitions:
    """Give directed counts of (item, item up to `span` later) in the training sequences cut to 50, by model row."""
    start, end = data.train()
    pairs = []
    for back in range(1, span + 1):
        _, place = runs(start, end - back)
        pairs.append(data.events.item[place].astype(np.int64) * data.items + data.events.item[place + back])
    edge, weight = np.unique(np.concatenate(pairs), return_counts=True)
    offsets = np.zeros(data.items + FIRST_ITEM + 1, np.int64)
    offsets[FIRST_ITEM + 1 :] = np.cumsum(np.bincount(edge // data.items, minlength=data.items))
    target = (edge % data.items + FIRST_ITEM).astype(np.int32)
    return Transitions(torch.from_numpy(offsets), torch.from_numpy(target), torch.from_numpy(weight.astype(np.float32)))


def item_table(data: Interactions) -> ItemTable:
    """Give the catalogue. The protocol knows no untrained items: all N count as seen at least once."""
    count = np.concatenate([np.zeros(FIRST_ITEM, np.int64), np.maximum(counts(data), 1)])
    empty = torch.zeros(len(count), 0, dtype=torch.int32)
    return ItemTable([], empty, [], torch.from_numpy(count), transitions(data))


def training_batch(data: Interactions, users: NDArray[np.int64]) -> Batch:
    """Give one row per user: the training items cut to 50 without the last, which is the labelled candidate."""
    start, end = (bound[users] for bound in data.train())
    last = data.events.item[end - 1].astype(np.int32)[:, None] + FIRST_ITEM
    one = np.ones(last.shape, np.float32)
    return assemble(data.events, start, end - 1, end, last, identity_rows(data.items), one)


def request_batch(data: Interactions, users: NDArray[np.int64], split: str) -> Batch:
    """Give the histories a split's targets are ranked for: all training items, at test also the validation item."""
    end = data.offsets[users + 1] - (1 if split == "test" else 2)
    none = np.zeros((len(users), 1), np.int32)
    return assemble(data.events, data.offsets[users], end, end, none, identity_rows(data.items), window=LENGTH)


def chunks(data: Interactions, size: int = 128) -> Iterator[NDArray[np.int64]]:
    """Give all users, those with histories of similar length together."""
    order = np.argsort(np.diff(data.offsets), kind="stable")
    for start in range(0, data.users, size):
        yield order[start : start + size]


Scorer = Callable[[NDArray[np.int64], str], Tensor]
"""(users, split) -> scores of all items [len(users), N]"""


def ranks(data: Interactions, scorer: Scorer, split: str) -> NDArray[np.int64]:
    """Give the rank of each user's target among all N items, from 0; ties go to the lowest id."""
    start, end = data.train()
    if split == "test":
        end = end + 1  # the validation item has been seen by then
    target, rank = data.target(split), np.empty(data.users, np.int64)
    for users in chunks(data):
        scores = scorer(users, split)
        row, place = runs(start[users], end[users])
        seen = np.unique(row * data.items + data.events.item[place])
        scores.view(-1)[torch.from_numpy(seen).to(scores.device)] -= MASK
        rank[users] = rank_of(scores, torch.from_numpy(target[users]).to(scores.device)).cpu().numpy()
    return rank


def rank_of(scores: Tensor, target: Tensor) -> Tensor:
    """Give the rank of one item per row of scores [B, N], from 0; ties go to the lowest id."""
    own = scores.gather(1, target[:, None])
    ahead = count(scores > own)
    tied = count(scores >= own) > ahead + 1
    if tied.any():
        below = torch.arange(scores.shape[1], device=scores.device) < target[tied, None]
        ahead[tied] += count((scores[tied] == own[tied]) & below)
    return ahead


def count(mask: Tensor) -> Tensor:
    """Give the number of True per row; eight times as fast as summing bools."""
    return mask.view(torch.int8).sum(1, dtype=torch.int32)


def metrics(rank: NDArray[np.int64]) -> dict[str, float]:
    """Give HR and NDCG (1 / log2(rank + 2)) at 5, 10 and 20, means over users."""
    gain = 1 / np.log2(rank + 2.0)
    values = {}
    for cut in CUTS:
        values[f"hr_at_{cut}"] = float(np.mean(rank < cut))
        values[f"ndcg_at_{cut}"] = float(np.mean(np.where(rank < cut, gain, 0.0)))
    return values


def popularity(data: Interactions) -> Scorer:
    """Give POP: the training count of each item."""
    scores = torch.from_numpy(counts(data)).double()
    return lambda users, split: scores.expand(len(users), -1).clone()


def markov(data: Interactions) -> Scorer:
    """Give TRANS: the training transitions from the newest item, ties broken by 1e-6 of POP."""
    table, small = transitions(data), 1e-6 * torch.from_numpy(counts(data)).double()

    def score(users: NDArray[np.int64], split: str) -> Tensor:
        newest = data.events.item[data.offsets[users + 1] - (2 if split == "test" else 3)].astype(np.int64) + FIRST_ITEM
        scores = small.expand(len(users), -1).clone()
        first, last = table.offsets[newest].numpy(), table.offsets[newest + 1].numpy()
        row, edge = runs(first, last)
        scores[row, table.target[edge].long() - FIRST_ITEM] += table.weight[edge].double()
        return scores

    return score


def of_model(data: Interactions, model: MqsaTed, device: torch.device) -> Scorer:
    """Give the model as a scorer of all items."""
    vectors = model.item_vectors()[FIRST_ITEM:].detach()

    def score(users: NDArray[np.int64], split: str) -> Tensor:
        history = request_batch(data, users, split).to(device).history
        return model.user_vectors(history) @ vectors.T

    return score


@dataclass(frozen=True)
class Epoch:
    """What one epoch gave."""

    epoch: int  # from 1
    rec: float
    kd: float
    seconds: float
    valid: dict[str, float]
    test: dict[str, float]


class Run:
    """A training run that can be interrupted: everything it needs is in one file, written after every epoch."""

    def __init__(self, data: Interactions, config: MqsaTedConfig, seed: int, device: torch.device, path: Path) -> None:
        self.data, self.seed, self.device, self.path = data, seed, device, path
        torch.manual_seed(derive(seed, 0, "weights"))
        self.model = MqsaTed(config, item_table(data)).to(device)
        self.optimiser = torch.optim.Adam(self.model.parameters(), lr=1e-3, weight_decay=1e-4, fused=True)
        self.identity = json.dumps({"config": asdict(config), "seed": seed, "users": data.users, "items": data.items})
        self.epochs: list[Epoch] = []
        if path.exists():
            self._restore()

    def epoch(self) -> Epoch:
        """Train one epoch, rank both splits, write the checkpoint."""
        number, began = len(self.epochs), time.perf_counter()
        order = generator(self.seed, number, "users").permutation(self.data.users)
        steps = range(0, self.data.users, BATCH)
        parts = np.zeros(2)
        self.model.train()
        for step, start in enumerate(steps, number * len(steps)):
            batch = training_batch(self.data, order[start : start + BATCH]).to(self.device)
            draws = torch.Generator(self.device).manual_seed(derive(self.seed, step, "dropout"))
            loss = self.model.loss(batch, draws)
            loss.total.backward()
            self.optimiser.step()
            self.optimiser.zero_grad()
            parts += float(loss.parts["rec"]), float(loss.parts["kd"])
        seconds = time.perf_counter() - began
        rec, kd = (parts / len(steps)).tolist()
        test = self.ranks("test")
        self.epochs.append(Epoch(number + 1, rec, kd, seconds, metrics(self.ranks("valid")), metrics(test)))
        self._save(test)
        return self.epochs[-1]

    @torch.no_grad()
    def ranks(self, split: str) -> NDArray[np.int64]:
        """Give the rank of each user's target of a split."""
        self.model.eval()
        return ranks(self.data, of_model(self.data, self.model, self.device), split)

    def best(self) -> Epoch:
        """Give the epoch with the best validation NDCG@20."""
        return max(self.epochs, key=lambda epoch: epoch.valid["ndcg_at_20"])

    def _save(self, test: NDArray[np.int64]) -> None:
        tensors = {f"weight/{name}": value.detach() for name, value in self.model.named_parameters()}
        for name, value in self.model.named_parameters():
            for key, moment in self.optimiser.state[value].items():
                tensors[f"{key}/{name}"] = moment
        about = {"identity": self.identity, "epochs": json.dumps([asdict(epoch) for epoch in self.epochs])}
        with whole_file(self.path) as temporary:
            save_file(tensors, temporary, metadata=about)
        if self.best() is self.epochs[-1]:
            with whole_file(self.path.with_name("test_ranks.npy")) as temporary, temporary.open("wb") as file:
                np.save(file, test.astype(np.int32))

    @torch.no_grad()
    def _restore(self) -> None:
        with safe_open(self.path, "pt", device=str(self.device)) as file:
            about = file.metadata()
            if about["identity"] != self.identity:
                raise SystemExit(f"{self.path}: of another run ({about['identity']}); give another --out")
            self.epochs = [Epoch(**epoch) for epoch in json.loads(about["epochs"])]
            for name, value in self.model.named_parameters():
                value.copy_(file.get_tensor(f"weight/{name}"))
                self.optimiser.state[value] = {
                    key: file.get_tensor(f"{key}/{name}") for key in ("step", "exp_avg", "exp_avg_sq")
                }


def line(name: str, values: dict[str, float], extra: str = "") -> str:
    """Give one row of the table: HR/NDCG at 5, 10, 20."""
    cells = "  ".join(f"{values[f'hr_at_{cut}']:.4f}/{values[f'ndcg_at_{cut}']:.4f}" for cut in CUTS)
    return f"{name:<16}{cells}  {extra}"


def references(data: Interactions) -> dict[str, dict[str, float]]:
    """Give the test lines of POP and TRANS."""
    return {
        name: metrics(ranks(data, scorer, "test"))
        for name, scorer in (("POP", popularity(data)), ("TRANS", markov(data)))
    }


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("set", choices=SETS)
    parser.add_argument("--epochs", type=int, default=200, help="epochs in all; those of the checkpoint count")
    parser.add_argument("--seed", type=int, default=2023)
    parser.add_argument(
        "--set", dest="options", action="append", default=[], metavar="key=value", help="model option in TOML"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, help="default: runs/mqsa_ted_parity/<set>-<seed>")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    out = arguments.out or Path("runs/mqsa_ted_parity") / f"{arguments.set}-{arguments.seed}"
    out.mkdir(parents=True, exist_ok=True)
    data = load(arguments.set)
    known = references(data)
    print(f"{arguments.set}: {data.users} users, {data.items} items; test split, HR/NDCG @5 @10 @20")
    for name, values in known.items():
        print(line(name, values), flush=True)
    config = parse(MqsaTedConfig, tomllib.loads("\n".join(arguments.options)), "--set")
    run = Run(data, config, arguments.seed, torch.device(arguments.device), out / "checkpoint.safetensors")
    while len(run.epochs) < arguments.epochs:
        done = run.epoch()
        text = (
            f"valid NDCG@20 {done.valid['ndcg_at_20']:.4f}  rec {done.rec:.3f}  kd {done.kd:.3f}  {done.seconds:.1f} s"
        )
        print(line(f"epoch {done.epoch}", done.test, text), flush=True)
    best = run.best()
    print("\nbest epoch by validation NDCG@20, and its neighbours")
    for epoch in run.epochs[max(best.epoch - 3, 0) : best.epoch + 2]:
        print(line(f"epoch {epoch.epoch}", epoch.test, f"valid NDCG@20 {epoch.valid['ndcg_at_20']:.4f}"))
    report = {
        "set": arguments.set,
        "seed": arguments.seed,
        "config": asdict(config),
        "torch": torch.__version__,
        "device": arguments.device,
        "threads": arguments.threads,
        "references": known,
        "best_epoch": best.epoch,
        "test": best.test,
        "epochs": [asdict(epoch) for epoch in run.epochs],
    }
    write_json(out / "result.json", report)
    print(f"written: {out / 'result.json'}", file=sys.stderr)


if __name__ == "__main__":
    main()
