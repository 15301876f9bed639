"""How far a diagonal re-weighting of the query vector could go at all: LexSemBridge's ceiling, without training.

z is optimised freely for each query, within a range R = max z - min z, so that a target passage comes first. With
hundreds of free weights any passage can be brought to rank 1, a wrong one too: a share is worth nothing without that of
random wrong targets beside it, which is why both are given.

    Q queries    N passages    d width
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ranking.lexsembridge import enhance
from ranking.text_models import Vectors
from recsys.randomness import generator

STEPS = 200
RATE = 0.1
TEMPERATURE = 0.02


@dataclass(frozen=True)
class HeadRoom:
    """Shares of queries whose target came first."""

    bound: float
    gold: float
    wrong: float


def head_room(
    queries: Vectors,
    passages: Vectors,
    gold: NDArray[np.int64],
    bounds: Sequence[float] = (0.16, 1.0, 2.0),
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> list[HeadRoom]:
    """Return the shares for the queries' own passages and for random wrong ones, one entry per bound of R.

    Args:
        queries: float32 [Q, d], plain vectors.
        passages: float32 [N, d].
        gold: [Q] the row of each query's passage.
        bounds: of R.
        seed: of the wrong targets.
        device: where to search.
    """
    shift = generator(seed, 0, "wrong targets").integers(1, len(passages), len(gold))
    wrong = (np.asarray(gold) + shift) % len(passages)
    e, p, own, other = (torch.from_numpy(np.asarray(one)).to(device) for one in (queries, passages, gold, wrong))
    return [HeadRoom(bound, _share(e, p, own, bound), _share(e, p, other, bound)) for bound in bounds]


def _share(e: Tensor, p: Tensor, wanted: Tensor, bound: float) -> float:
    free = torch.zeros_like(e, requires_grad=True)
    optimiser = torch.optim.Adam([free], lr=RATE)
    found = torch.zeros(len(e), dtype=torch.bool, device=e.device)
    for _ in range(STEPS + 1):
        scores = enhance(e, bound * torch.sigmoid(free)) @ p.T  # [Q, N]; the sigmoid keeps z within the bound
        found |= scores.argmax(dim=1) == wanted
        optimiser.zero_grad()
        loss = torch.nn.functional.cross_entropy(scores / TEMPERATURE, wanted)
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    return float(found.float().mean())
