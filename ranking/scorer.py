"""The model's part of a request: history -> state and vector, then scores of candidates."""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ranking.batch import FIRST_ITEM, Batch, Candidates, Request, assemble
from ranking.bundle import Bundle
from ranking.ladder import Ladder
from ranking.state_cache import StateCache, States
from ranking.users import User
from recsys.history import Events


class Encoded(NamedTuple):
    """A user as the models see them: the request, the ranker's state, the retriever's vector float32 [1, D].

    State and vector are None where their model is out, the vector also where there is no retriever or no need of it.
    """

    request: Request
    state: object
    vector: NDArray[np.float32] | None


class Scorer:
    """Encodes users and scores candidates with the models of a bundle; one model in both roles encodes once.

    Args:
        bundle: the models.
        states: keeps states of long histories; None encodes every history anew.
    """

    def __init__(self, bundle: Bundle, states: StateCache | None = None) -> None:
        self._bundle = bundle
        self._states = None if states is None else States(bundle, states)
        self._count = bundle.items.count.cpu().numpy()
        self._shares_encode = self._state_is_vector()
        self._item_vectors: NDArray[np.float32] | None = None

    def encode(self, user: User, ladder: Ladder) -> Encoded:
        """Give the ranker's state and, if there is a retriever, its vector."""
        with torch.inference_mode():
            request, state = self._encode(user, ladder)
            vector = ladder.attempt("retrieval", lambda: self._vector(user, state), None)
        return Encoded(request, state, vector)

    def encode_ranker(self, user: User, ladder: Ladder) -> Encoded:
        """Give the ranker's state alone."""
        with torch.inference_mode():
            request, state = self._encode(user, ladder)
        return Encoded(request, state, None)

    def by_retriever(self, user: User, rows: NDArray[np.int32]) -> NDArray[np.float32] | None:
        """Give the retriever's inner products with rows int32 [C], float32 [C]; None without a retriever.

        For when the ranker is out: the item vectors are computed at the first call, which costs their size in memory.
        """
        if self._bundle.retriever is None:
            return None
        with torch.inference_mode():
            if self._item_vectors is None:
                self._item_vectors = self._bundle.retriever.item_vectors().float().cpu().numpy()
            vector = self._vector(user, None)
        assert vector is not None
        products: NDArray[np.float32] = self._item_vectors[rows] @ vector[0]
        return products

    def score(self, encoded: Encoded | None, rows: NDArray[np.int32]) -> NDArray[np.float32]:
        """Give the ranker's scores of rows int32 [C], float32 [C]; none depends on the other candidates.

        Where nothing is known of a user, which is None here, a score is log(1 + training events).
        """
        if encoded is None:
            popular: NDArray[np.float32] = np.log1p(self._count[rows]).astype(np.float32)
            return popular
        if not len(rows):
            return np.empty(0, np.float32)
        with torch.inference_mode():
            candidates = Candidates(torch.from_numpy(rows[None, :]).to(self._bundle.device))
            logits = self._bundle.ranker.score(encoded.state, encoded.request, candidates)[0]
            scores: NDArray[np.float32] = logits.float().cpu().numpy()
            return scores

    def _encode(self, user: User, ladder: Ladder) -> tuple[Request, object]:
        ranker = self._bundle.ranker

        def build() -> object:
            return ranker.encode(self._assemble(user.events, user.at, ranker.window).history)

        states = self._states
        state = ladder.attempt("rank", build if states is None else lambda: states.of(user, build), None)
        return Request(torch.tensor([user.at], device=self._bundle.device)), state

    def _vector(self, user: User, state: object) -> NDArray[np.float32] | None:
        retriever = self._bundle.retriever
        if retriever is None:
            return None
        if self._shares_encode and isinstance(state, Tensor):
            vector = state
        else:
            window = self._bundle.retriever_window
            vector = retriever.user_vectors(self._assemble(user.events, user.at, window).history)
        found: NDArray[np.float32] = vector.float().cpu().numpy()
        return found

    def _assemble(self, events: Events, at: int, window: int | None) -> Batch:
        batch = assemble(
            events,
            np.zeros(1, np.int64),
            np.array([len(events)], np.int64),
            np.array([at], np.int64),
            np.empty((1, 0), np.int32),
            self._bundle.key_to_row,
            window=window,
        )
        return batch if self._bundle.device.type == "cpu" else batch.to(self._bundle.device)

    def _state_is_vector(self) -> bool:
        """Whether ranker and retriever are one model whose state is the user's vector: then encoding once is enough."""
        retriever = self._bundle.retriever
        if retriever is None or id(retriever) != id(self._bundle.ranker):
            return False
        known = np.flatnonzero(self._bundle.key_to_row >= FIRST_ITEM)[:3].astype(np.uint32)
        events = Events(known, np.zeros(len(known), np.uint8), np.arange(len(known), dtype=np.int64))
        with torch.inference_mode():
            history = self._assemble(events, len(known), self._bundle.ranker.window).history
            state = self._bundle.ranker.encode(history)
            return isinstance(state, Tensor) and torch.equal(state, retriever.user_vectors(history))
