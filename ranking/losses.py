"""Losses over a request's candidates: each judged by itself, or each positive beside the negatives of its request.

B requests    C candidates
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ranking.batch import Batch
from ranking.ranker import Loss


def binary_cross_entropy(logits: Tensor, label: Tensor, weight: Tensor, log_q: Tensor | None = None) -> Tensor:
    """Return the weighted mean of binary cross-entropy over all numbers; weight is 0 at padding.

    With `log_q`, log of how often each candidate is drawn as a negative, the logits learn the log-odds of an item
    being taken, whatever the sampler: of positives p and negatives q the best classifier has the logit log p - log q
    (noise-contrastive estimation, Gutmann and Hyvarinen 2010).
    """
    if log_q is not None:
        logits = logits - log_q
    each = F.binary_cross_entropy_with_logits(logits, label, weight, reduction="sum")
    return each / weight.sum().clamp_min(torch.finfo(weight.dtype).tiny)


def pointwise_loss(logits: Tensor, batch: Batch) -> Loss:
    """Return binary cross-entropy of the logits [B, C] of a batch's candidates: the whole loss of a model, `main`."""
    main = binary_cross_entropy(logits, batch.label, batch.weight, batch.log_q)
    return Loss(main, {"main": main.detach()})


def listwise_cross_entropy(logits: Tensor, label: Tensor, weight: Tensor, log_q: Tensor | None = None) -> Tensor:
    """Return the mean over requests of how far each positive is from leading its own request's negatives.

    For a positive p among the negatives N of its request, -log(e^p / (e^p + sum of e^n over N)), a mean over the
    positives of a request and then over the requests that have any: a request counts once, however much was taken.
    Other positives of the request are not held against p. Numbers [B, C] all; weight is 0 at padding.

    With `log_q`, log of how often each candidate is drawn as a negative, this is the sampled softmax with its logQ
    correction (Bengio and Senecal 2008), and the logits learn the log-odds of an item being taken, up to a constant of
    each request.
    """
    if log_q is not None:
        logits = logits - log_q
    real, least = weight > 0, torch.finfo(logits.dtype).min
    positive = real & (label > 0)
    negatives = logits.masked_fill(positive | ~real, least).logsumexp(1, keepdim=True)  # [B, 1]
    each = F.softplus(negatives - logits).masked_fill(~positive, 0.0)
    number = positive.sum(1)
    by_request = each.sum(1) / number.clamp_min(1)
    return by_request.sum() / (number > 0).sum().clamp_min(1)


def with_positives(label: Tensor, weight: Tensor) -> Tensor:
    """Return the number of requests that `listwise_cross_entropy` is a mean over, of the type of weight, []."""
    return ((weight > 0) & (label > 0)).any(1).sum().to(weight.dtype)
