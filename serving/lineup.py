"""Which bundles serve: the champion answers, the challenger answers a share of the users, the shadow answers nobody.

A `Plan` names bundles by directory and version: what the watcher decides and Ray Serve carries to every replica as
its `user_config`. A `Lineup` is a plan loaded, and the one reference that a swap replaces.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray

from ranking.bundle import Bundle
from ranking.ladder import Budget
from ranking.searched import Searched
from ranking.searcher import Searcher
from recsys.errors import RequestError
from recsys.messages import ItemFilter, RankRequest, RankResponse, RecommendRequest, RecommendResponse
from serving.name_search import NameSearch

Role = Literal["champion", "challenger", "shadow"]
ROLES: tuple[Role, ...] = get_args(Role)
"""Also the names of the aliases in MLflow."""

SHARE_SEED = 8
"""Of the hash that gives users to the challenger: a user stays with it as long as the share does not shrink."""


class Answers(Protocol):
    """The request path: `ranking.recommender.Recommender`."""

    def recommend(
        self, request: RecommendRequest, now: int, budget: Budget | None = None, searched: Searched | None = None
    ) -> RecommendResponse:
        """Return the k best items, of what was found for a query if there is one."""
        ...

    def rank(self, request: RankRequest, now: int, budget: Budget | None = None) -> RankResponse:
        """Return the scores of given items."""
        ...

    def allowed(self, filters: Sequence[ItemFilter] = ()) -> NDArray[np.bool_] | None:
        """Return bool [V] by model row, the items that may be shown at all and pass the filters; None for all."""
        ...

    def warnings(self, filters: Sequence[ItemFilter]) -> list[str]:
        """Name the values of a request's filters that no item has."""
        ...

    def settings_digest(self) -> str:
        """Name what answers depend on beside bundle, history and request."""
        ...


@dataclass(frozen=True)
class NoRanker:
    """Answers for a bundle that only searches text: that it cannot."""

    version: str

    def recommend(
        self,
        request: RecommendRequest,  # noqa: ARG002
        now: int,  # noqa: ARG002
        budget: Budget | None = None,  # noqa: ARG002
        searched: Searched | None = None,  # noqa: ARG002
    ) -> RecommendResponse:
        """Raise `RequestError` 409."""
        raise self._error()

    def rank(
        self,
        request: RankRequest,  # noqa: ARG002
        now: int,  # noqa: ARG002
        budget: Budget | None = None,  # noqa: ARG002
    ) -> RankResponse:
        """Raise `RequestError` 409."""
        raise self._error()

    def allowed(self, filters: Sequence[ItemFilter] = ()) -> NDArray[np.bool_] | None:
        """Return none: documents that are no items may all be shown; raise `RequestError` 409 for a filter of them."""
        if filters:
            text = f"the documents of bundle {self.version} have no columns to filter by; leave out `filters`"
            raise RequestError(409, "not_supported", text)
        return None

    def warnings(self, filters: Sequence[ItemFilter]) -> list[str]:  # noqa: ARG002
        """Return none."""
        return []

    def settings_digest(self) -> str:
        """Return none."""
        return ""

    def _error(self) -> RequestError:
        text = f"bundle {self.version} has no ranker, it only searches text; publish one with `recsys publish --ranker`"
        return RequestError(409, "not_supported", text)


@dataclass(frozen=True)
class Served:
    """A bundle and what answers from it: what a request takes hold of once, and a swap replaces at once."""

    bundle: Bundle
    recommender: Answers
    searcher: Searcher | None = None

    @cached_property
    def item_vectors(self) -> NDArray[np.float32] | None:
        """Float32 [V, D] of the retriever, computed at first use; None without one."""
        if self.bundle.retriever is None:
            return None
        with torch.inference_mode():
            vectors: NDArray[np.float32] = self.bundle.retriever.item_vectors().float().cpu().numpy()
        return vectors

    @cached_property
    def names(self) -> NameSearch:
        """Search over the names of the items."""
        bundle = self.bundle
        return NameSearch(bundle.names, bundle.item_ids, bundle.items.count.cpu().numpy())


@dataclass(frozen=True)
class BundlePlace:
    """A bundle by where it lies and which one is meant to be there."""

    directory: Path
    version: str


@dataclass(frozen=True)
class Plan:
    """The bundles that are meant to serve."""

    champion: BundlePlace
    challenger: BundlePlace | None = None
    shadow: BundlePlace | None = None

    def places(self) -> Iterator[tuple[Role, BundlePlace]]:
        """Yield the roles that are filled, the champion first."""
        for role in ROLES:
            place: BundlePlace | None = getattr(self, role)
            if place is not None:
                yield role, place

    def table(self) -> dict[str, dict[str, str]]:
        """Return the plan as plain values."""
        return {role: {"bundle": str(place.directory), "version": place.version} for role, place in self.places()}

    @staticmethod
    def of(table: Mapping[str, Mapping[str, str]]) -> "Plan":
        """Read what `table` gave; what is no role in it is passed over."""
        entries = {role: table[role] for role in ROLES if role in table}
        places = {role: BundlePlace(Path(entry["bundle"]), entry["version"]) for role, entry in entries.items()}
        return Plan(**places)

    def with_role(self, role: Role, place: BundlePlace | None) -> "Plan":
        """Return the plan with another bundle in a role; None leaves the role empty."""
        changed: dict[str, Any] = {role: place}
        return replace(self, **changed)


@dataclass(frozen=True)
class Lineup:
    """The bundles that serve now.

    Attributes:
        champion: answers.
        challenger: answers the users that `share` gives it.
        shadow: scores what the champion answered, after the answer has gone out.
        share: of the users, 0 to 1, by a hash of the user id that never changes.
    """

    champion: Served
    challenger: Served | None = None
    shadow: Served | None = None
    share: float = 0.0

    def role_of(self, user_id: str | None) -> Role:
        """Return the role that answers a user; a request without a user id goes to the champion."""
        if self.challenger is None or user_id is None:
            return "champion"
        place = xxhash.xxh64_intdigest(user_id.encode(), SHARE_SEED) / 2**64
        return "challenger" if place < self.share else "champion"

    def of(self, role: Role) -> Served | None:
        """Return who has a role."""
        served: Served | None = getattr(self, role)
        return served

    def answering(self, user_id: str | None) -> Served:
        """Return who answers a user."""
        served = self.of(self.role_of(user_id))
        return self.champion if served is None else served

    def rival(self, role: Role) -> tuple[Role, Served] | None:
        """Return who scores beside an answer of `role`, None for nobody.

        The shadow does beside the champion, and the champion beside the challenger: both comparisons are of the same
        requests.
        """
        if role == "challenger":
            return "champion", self.champion
        return None if self.shadow is None else ("shadow", self.shadow)

    def members(self) -> Iterator[tuple[Role, Served]]:
        """Yield the roles that are filled, the champion first."""
        for role in ROLES:
            served = self.of(role)
            if served is not None:
                yield role, served
