"""The contract every ranking model keeps; `tests/test_ranker_contract.py` holds each model to it.

`encode` sees the user's history and nothing else: neither candidates nor the moment of the request. So its result can
be cached under (user, history version, model digest), and the history is embedded once however many candidates follow.
What depends on the moment of the request (ages) is computed once per request inside `score`.
"""

from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeVar

import torch
from torch import Tensor

from ranking.batch import Batch, Candidates, History, Request
from ranking.items import ItemTable

NEGATIVE = -1e9
"""Score of padding, and of what a model can never recommend: large, negative, finite."""

TrainsOn = Literal["requests", "sequences", "nothing"]

S = TypeVar("S")


@dataclass(frozen=True)
class Loss:
    """What to minimise, and its parts by name (detached) for the log."""

    total: Tensor  # []
    parts: dict[str, Tensor]
    counted: Tensor | None = None  # [], how much `total` is a mean over; None: the weights of all candidates


class Ranker(Protocol[S]):
    """Scores candidates for a user. Every implementation is also a `torch.nn.Module` built as `Model(config, items)`.

    Attributes:
        trains_on: `requests` (a request with sampled negatives per row), `sequences` (one row per user: the newest
            history and the items that followed it, no negatives) or `nothing` (no parameters).
        window: newest events of a history the model reads; None reads all.
    """

    items: ItemTable

    @property
    def trains_on(self) -> TrainsOn:
        """What a training row of this model is."""
        ...

    @property
    def window(self) -> int | None:
        """Newest events of a history the model reads; None reads all."""
        ...

    def encode(self, history: History) -> S:
        """Return the user side of B histories; every tensor in it has B as its first dimension."""
        ...

    def score(self, state: S, request: Request, candidates: Candidates) -> Tensor:
        """Return logits float32 [B, C], `NEGATIVE` at padding; a score never depends on the other candidates."""
        ...

    def loss(self, batch: Batch, generator: torch.Generator) -> Loss:
        """Return the training loss of a batch; all randomness comes from `generator`."""
        ...


class Retriever(Protocol):
    """A model whose score is an inner product, so that an index can find the best of all items."""

    def user_vectors(self, history: History) -> Tensor:
        """Return float32 [B, D]."""
        ...

    def item_vectors(self) -> Tensor:
        """Return float32 [V, D]; rows that must never be retrieved are zero."""
        ...


AnyRanker = Ranker[Any]
