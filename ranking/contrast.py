"""A contrastive loss between what a model makes of a whole and of a thinned history: the rarer a user, the thinner.

    L = -mean_i log( e^(sim(g_i, g'_i)/tau) / (e^(sim(g_i, g'_i)/tau) + sum_n e^(sim(g_i, z_n)/tau)) )

Used by AW-MoE (our reading of arXiv 2306.05011) on its gate; g' sees each event with probability 1 - p.

    B requests   T events   K columns of g
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

SHORTEST = 1e-8
"""Least length a gate vector is divided by."""

Against = Literal["views", "gates"]

Similarity = Literal["cosine", "dot"]


def masked_view(mask: Tensor, p: float, generator: torch.Generator) -> Tensor:
    """Return mask [B, T] with each real event lost with probability p; who would lose all keeps the newest (last slot).

    The expected share kept of n events is (1 - p) + p^n / n.
    """
    draw = torch.rand(mask.shape, generator=generator, device=generator.device).to(mask.device)
    kept = mask & (draw >= p)
    kept[:, -1] |= mask[:, -1] & ~kept.any(1)
    return kept


def others(items: Tensor, mask: Tensor) -> Tensor:
    """Return who may be whose negative, bool [B, B]: both have events (items [B, T]), not the same in any order."""
    _, history = torch.unique(items.sort(1).values, dim=0, return_inverse=True)
    real = mask.any(1)
    allowed: Tensor = (history[:, None] != history[None, :]) & real[:, None] & real[None, :]
    return allowed


def some_of(negative: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Return at most `count` of each row's negatives, bool [B, B], drawn at random."""
    draw = torch.rand(negative.shape, generator=generator, device=generator.device).to(negative.device)
    best = draw.masked_fill(~negative, -1.0).topk(min(count, len(draw)), dim=1).indices
    return negative & torch.zeros_like(negative).scatter(1, best, True)


def contrastive_loss(
    gate: Tensor, view: Tensor, negative: Tensor, real: Tensor, against: Against, similarity: Similarity, tau: float
) -> Tensor:
    """Return L_cl, a scalar: the mean over the requests with events; one without negatives adds 0.

    Args:
        gate: [B, K], g.
        view: [B, K], g' of the same requests.
        negative: bool [B, B], of `others`.
        real: bool [B], who has events.
        against: compare with the others' views (A) or their gates (B).
        similarity: `cosine`, or `dot`, which also sees lengths.
        tau: temperature.
    """
    if similarity == "cosine":
        gate, view = F.normalize(gate, dim=1, eps=SHORTEST), F.normalize(view, dim=1, eps=SHORTEST)
    other = gate @ (view if against == "views" else gate).mT  # [B, B]
    own = (gate * view).sum(1, keepdim=True)  # [B, 1]
    logits = torch.cat([own, other.masked_fill(~negative, -torch.inf)], 1) / tau
    each = logits.logsumexp(1) - logits[:, 0]
    loss: Tensor = (each * real).sum() / real.sum().clamp_min(1)
    return loss
