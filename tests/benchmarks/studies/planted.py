"""What each way of reading a long history finds of what was planted far back in it (`worlds.make_planted`).

    python tests/benchmarks/studies/planted.py

200 events; a candidate is positive if its category is among the oldest 100, and a tenth of the labels are flipped, so
that no model passes an AUC of .9 by more than chance. Every model takes the same 100 steps of 64 requests of 8
candidates; 400 further requests judge it. Mean and deviation over seeds of weights and draws; the world stays.
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from sklearn.metrics import roc_auc_score

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from benchmarks.studies.tables import table  # noqa: E402

import worlds  # noqa: E402
from pipelines.tracking import git_commit  # noqa: E402
from ranking.dare import Dare, DareConfig  # noqa: E402
from ranking.din import Din, DinConfig  # noqa: E402
from ranking.eta import Eta, EtaConfig  # noqa: E402
from ranking.items import ItemTable  # noqa: E402
from ranking.mean_pooling import MeanPooling, MeanPoolingConfig  # noqa: E402
from ranking.sdim import Sdim, SdimConfig  # noqa: E402
from recsys.files import write_json  # noqa: E402

STEPS, SIZE, JUDGED = 100, 64, 400
MODELS: dict[str, Callable[[ItemTable], Any]] = {
    "mean pooling": lambda items: MeanPooling(MeanPoolingConfig(), items),
    "DIN, 20 newest": lambda items: Din(DinConfig(window=20), items),
    "DIN": lambda items: Din(DinConfig(), items),
    "ETA": lambda items: Eta(EtaConfig(), items),
    "TWIN": lambda items: Dare(DareConfig(tied=True), items),
    "DARE": lambda items: Dare(DareConfig(), items),
    "SDIM": lambda items: Sdim(SdimConfig(), items),
    "SDIM, plain sum": lambda items: Sdim(SdimConfig(norm="none"), items),
}


def auc(name: str, world: worlds.PlantedWorld, seed: int, steps: int = STEPS) -> float:
    """Train a model and return its AUC on requests it has not seen."""
    batches = [world.requests(start, start + SIZE) for start in range(0, SIZE * steps, SIZE)]
    test = world.requests(SIZE * steps)
    torch.manual_seed(seed)
    model = MODELS[name](world.items)
    worlds.fit(model, batches, steps, seed=seed)
    return float(roc_auc_score(test.label.flatten(), worlds.scores(model, test).flatten()))


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "planted.json")
    options = parser.parse_args()
    world = worlds.make_planted(SIZE * STEPS + JUDGED)
    found = {name: [auc(name, world, seed) for seed in range(options.seeds)] for name in MODELS}
    write_json(options.out, {"steps": STEPS, "requests": SIZE * STEPS, "auc": found, "commit": git_commit()})
    rows = (
        [name, f"{statistics.fmean(values):.3f}", f"{statistics.stdev(values) if len(values) > 1 else 0:.3f}"]
        for name, values in found.items()
    )
    print("\n".join(table(["model", "AUC", "deviation"], rows)))


if __name__ == "__main__":
    main()
