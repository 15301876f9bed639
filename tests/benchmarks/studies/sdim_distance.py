"""How near SDIM's table comes to the attention it estimates, as groups (G) and planes per group (tau) vary.

    python tests/benchmarks/studies/sdim_distance.py --run runs/studies/completejourney/runs/sdim_sum-<digest>

Item vectors are those of a trained SDIM; requests are validation requests with their candidates. The attention that the
hash stands for is exact: sum c s / sum c and sum c s, c = (1 - arccos(cos(q, s)) / pi)^tau (`collision`). Against it:

    ratio   sum u / sum n, cosine with sum c s / sum c       tends to it as G grows
    none    1/G sum u, cosine with sum c s                   unbiased
    l2      1/G sum u / |u|, cosine with sum c s / sum c     the paper's read-out, which keeps a gap

Means over candidates, with the deviation over plane seeds; `error` is |none - sum c s| / |sum c s|.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from benchmarks.studies.tables import table  # noqa: E402

from pipelines.prepared import PreparedSet  # noqa: E402
from pipelines.scoring import assemble_requests, draw_requests  # noqa: E402
from pipelines.train import trained_run  # noqa: E402
from ranking.bucket_sums import bucket_rows, collision, pool, read, signatures  # noqa: E402
from ranking.sdim import Sdim  # noqa: E402
from recsys.files import write_json  # noqa: E402
from recsys.randomness import generator  # noqa: E402

GROUPS = (1, 2, 4, 8, 16, 32, 64)
BITS = (1, 2, 3, 5, 8)
KINDS = ("ratio", "none", "l2")
PLANE_SEEDS = 5


def vectors(model: Sdim, prepared: PreparedSet, requests: int, candidates: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return candidates q [B, C, D], events s [B, T, D] (0 at padding) and which events are real [B, T]."""
    sample = draw_requests(prepared, "valid", requests, 2023)
    sets = prepared.candidates("valid", "uniform").take(sample.index)
    first = sets.offsets[:-1, None] + np.arange(candidates)  # the positives, then negatives
    batch = assemble_requests(model, prepared, sample, sets.item[first])
    padded, row_of = batch.history.padded(model.config.window), model.items.embedding_row
    s = model.fields.semantic(padded.item, row_of).masked_fill(~padded.mask.unsqueeze(-1), 0.0)
    return model.fields.semantic(batch.candidates.item, row_of).double(), s.double(), padded.mask


def exact(q: Tensor, s: Tensor, mask: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Return sum c s / sum c and sum c s, [B, C, D] each."""
    cosine = F.normalize(q, dim=-1) @ F.normalize(s, dim=-1).mT
    weight = collision(cosine, bits).masked_fill(~mask[:, None, :], 0.0)  # [B, C, T]
    total = weight @ s
    return total / weight.sum(-1, keepdim=True), total


def distance(q: Tensor, s: Tensor, mask: Tensor, bits: int, groups: int, seed: int) -> dict[str, float]:
    """Return the mean cosine of each read-out with what it estimates, and the relative error of `none`."""
    planes = torch.from_numpy(generator(seed, 0, "sdim planes").standard_normal((groups, bits, q.shape[-1])))
    buckets, code = 1 << bits, signatures(q, planes)
    sums, count = pool(s, signatures(s, planes), mask, buckets)
    mean, total = exact(q, s, mask, bits)
    found = {}
    for kind in KINDS:
        long = read(bucket_rows(sums, count, kind), count, code, kind)
        found[kind] = float(F.cosine_similarity(long, total if kind == "none" else mean, dim=-1).mean())
        if kind == "none":
            found["error"] = float(((long - total).norm(dim=-1) / total.norm(dim=-1)).mean())
    return found


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="directory of a trained SDIM's run")
    parser.add_argument("--prepared", type=Path, help="default: the prepared set of the run's workspace")
    parser.add_argument("--requests", type=int, default=100)
    parser.add_argument("--candidates", type=int, default=50)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "sdim_distance.json")
    options = parser.parse_args()
    prepared = PreparedSet(options.prepared or options.run.parent.parent / "prepared")
    model = trained_run(options.run, prepared).model
    assert isinstance(model, Sdim)
    with torch.inference_mode():
        q, s, mask = vectors(model, prepared, options.requests, options.candidates)
        kept = mask.any(1)
        q, s, mask = q[kept], s[kept], mask[kept]
        measured = []
        for bits, groups in [(bits, 16) for bits in BITS] + [(3, groups) for groups in GROUPS if groups != 16]:
            seeds = [distance(q, s, mask, bits, groups, seed) for seed in range(PLANE_SEEDS)]
            values = {name: [one[name] for one in seeds] for name in seeds[0]}
            measured.append({"bits": bits, "groups": groups, "values": values})
    about = {"run": options.run.name, "data": prepared.digest, "requests": len(q), "candidates": options.candidates}
    write_json(options.out, about | {"measured": measured})
    names = list(measured[0]["values"])
    rows = (
        [str(one["bits"]), str(one["groups"]), *(f"{np.mean(v):.3f} ± {np.std(v):.3f}" for v in one["values"].values())]
        for one in measured
    )
    print("\n".join(table(["tau", "G", *names], rows)))


if __name__ == "__main__":
    main()
