"""The model's part of a request: history -> state and vector, then scores of candidates."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ranking.batch import FIRST_ITEM, PAD, Batch, Candidates, Request, assemble
from ranking.bundle import Bundle
from ranking.ladder import Ladder
from ranking.state_cache import StateCache, States, Vectors
from ranking.users import User
from recsys.history import Events


class Encoded(NamedTuple):
    """A user as the models see them: the request, the ranker's state, the retriever's vector float32 [1, D].

    State and vector are None where their model is out, the vector also where there is no retriever or no need of it.
    """

    request: Request
    state: object
    vector: NDArray[np.float32] | None


class EncodedMany(NamedTuple):
    """B users encoded together: as `Encoded`, with B in place of 1."""

    request: Request
    state: object
    vectors: NDArray[np.float32] | None


class Scorer:
    """Encodes users and scores candidates with the models of a bundle; one model in both roles encodes once.

    Args:
        bundle: the models.
        states: keeps states and vectors of long histories; None encodes every history anew.
    """

    def __init__(self, bundle: Bundle, states: StateCache | None = None) -> None:
        self._bundle = bundle
        self._states = None if states is None else States(bundle, states)
        self._kept_vectors = None if states is None or bundle.retriever is None else Vectors(bundle, states)
        self._count = bundle.items.count.cpu().numpy()
        self._shares_encode = self._state_is_vector()
        self._item_vectors: NDArray[np.float32] | None = None

    def encode(self, user: User, ladder: Ladder) -> Encoded:
        """Return the ranker's state and, if there is a retriever, its vector."""
        with torch.inference_mode():
            request, state = self._encode(user, ladder)
            vector = ladder.attempt("retrieval", lambda: self._vectors([user], state), None)
        return Encoded(request, state, vector)

    def encode_many(self, users: Sequence[User]) -> EncodedMany:
        """Return what `encode` gives, for several users in one padded batch; best for histories of about one length."""
        at = torch.tensor([user.at for user in users], device=self._bundle.device)
        with torch.inference_mode():
            state = self._bundle.ranker.encode(self._assemble(users, self._bundle.ranker.window).history)
            vectors = self._vectors(users, state)
        return EncodedMany(Request(at), state, vectors)

    def encode_ranker(self, user: User, ladder: Ladder) -> Encoded:
        """Return the ranker's state alone."""
        with torch.inference_mode():
            request, state = self._encode(user, ladder)
        return Encoded(request, state, None)

    def by_retriever(self, user: User, rows: NDArray[np.int32]) -> NDArray[np.float32] | None:
        """Return the retriever's inner products with rows int32 [C], float32 [C]; None without a retriever.

        For when the ranker is out: the item vectors are computed at the first call, which costs their size in memory.
        """
        if self._bundle.retriever is None:
            return None
        with torch.inference_mode():
            if self._item_vectors is None:
                self._item_vectors = self._bundle.retriever.item_vectors().float().cpu().numpy()
            vector = self._vectors([user], None)
        assert vector is not None
        products: NDArray[np.float32] = self._item_vectors[rows] @ vector[0]
        return products

    def score(self, encoded: Encoded | None, rows: NDArray[np.int32]) -> NDArray[np.float32]:
        """Return the ranker's scores of rows int32 [C], float32 [C]; none depends on the other candidates.

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

    def score_many(self, encoded: EncodedMany, rows: Sequence[NDArray[np.int32]]) -> list[NDArray[np.float32]]:
        """Return what `score` gives for each user's rows, computed in one padded batch.

        A sum over more numbers may be rounded otherwise: a score may differ in its last float32 digit.
        """
        longest = max(len(some) for some in rows)
        if not longest:
            return [np.empty(0, np.float32) for _ in rows]
        item = np.full((len(rows), longest), PAD, np.int32)
        for place, some in enumerate(rows):
            item[place, : len(some)] = some
        with torch.inference_mode():
            candidates = Candidates(torch.from_numpy(item).to(self._bundle.device))
            logits = self._bundle.ranker.score(encoded.state, encoded.request, candidates)
            scores: NDArray[np.float32] = logits.float().cpu().numpy()
        return [scores[place, : len(some)] for place, some in enumerate(rows)]

    def _encode(self, user: User, ladder: Ladder) -> tuple[Request, object]:
        ranker = self._bundle.ranker

        def build() -> object:
            return ranker.encode(self._assemble([user], ranker.window).history)

        states = self._states
        state = ladder.attempt("rank", build if states is None else lambda: states.of(user, build), None)
        return Request(torch.tensor([user.at], device=self._bundle.device)), state

    def _vectors(self, users: Sequence[User], state: object) -> NDArray[np.float32] | None:
        retriever = self._bundle.retriever
        if retriever is None:
            return None
        if self._shares_encode and isinstance(state, Tensor):
            vector = state
        else:

            def build() -> Tensor:
                return retriever.user_vectors(self._assemble(users, self._bundle.retriever_window).history)

            kept = self._kept_vectors if len(users) == 1 else None
            vector = build() if kept is None else kept.of(users[0], build)
        found: NDArray[np.float32] = vector.float().cpu().numpy()
        return found

    def _assemble(self, users: Sequence[User], window: int | None) -> Batch:
        """Return the histories of users as a batch without candidates."""
        events = users[0].events if len(users) == 1 else Events.packed([user.events for user in users])
        ends = np.cumsum([len(user.events) for user in users])
        batch = assemble(
            events,
            np.append(0, ends[:-1]),
            ends,
            np.array([user.at for user in users], np.int64),
            np.empty((len(users), 0), np.int32),
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
            user = User(events, self._bundle.key_to_row[known], len(known), None)
            history = self._assemble([user], self._bundle.ranker.window).history
            state = self._bundle.ranker.encode(history)
            return isinstance(state, Tensor) and torch.equal(state, retriever.user_vectors(history))
