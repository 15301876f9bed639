"""Vectors for items without training events: what vector a trained retriever would have given an item of that content.

A ridge regression from content (`ranking.content`) to the retriever's item vectors, learned on the items that have
training events when a bundle is published; serving reads finished vectors. They put such items into the index, and give
them a score where the retriever ranks, too.

    minimise over W [F, D]:   sum_i ||x_i W - (e_i - m)||^2 + penalty ||W||^2      over trained items i

m is the mean of the trained vectors e_i. Solved by conjugate gradients on the normal equations, all D columns at once:
no matrix is ever formed, so F may be large. 64,417 grocery items, 1.4 million entries and 64 columns take 3 to 5 s on
one core, both fits together.

A tenth of the trained items is held out first; vectors from content are used only if they tell those of the held-out
items better than the mean does and find them among others (`ContentQuality`). They need not: MQSA-TED's vectors of
groceries tell mostly how popular an item is. Content explains 2.7 % of what sets them apart and finds none, and among
new items such vectors would rank no better than chance (AUC .496), so there they are not used.

    V item rows    F features    D width    n items
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ranking.batch import FIRST_ITEM, Candidates, History, Request
from ranking.content import Features
from ranking.embeddings import take
from ranking.items import ItemTable
from ranking.ranker import AnyRanker, Loss, Retriever, TrainsOn
from recsys.errors import BundleError, ConfigError
from recsys.randomness import generator

LEAST_HELD_OUT = 20
"""With fewer items held out the check says nothing, and content is not used."""
MOST_HELD_OUT = 5_000
"""All pairs of held-out items are compared: 100 MB of cosines."""
NEIGHBOURS = 10
SURE = 3.0
"""standard errors by which content must beat the mean vector, and chance"""


@dataclass(frozen=True)
class VectorsConfig:
    """How vectors are learned from content."""

    penalty: float = 30.0
    """of the squared weights; an item counts 1"""
    held_out: float = 0.1
    """share of the trained items that the map is checked on"""
    iterations: int = 50
    """most steps of conjugate gradients"""
    tolerance: float = 1e-3
    """of the residual, relative, at which they stop"""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.iterations < 1 or not self.penalty > 0 or not 0 < self.held_out < 1:
            raise ConfigError(
                f"[content] iterations = {self.iterations}, penalty = {self.penalty}, held_out = {self.held_out}: "
                "expected iterations at least 1, penalty above 0, held_out in (0, 1)"
            )


@dataclass(frozen=True)
class ContentVectors:
    """Vectors of n items without training events: `row` int32 [n] ascending, `vector` float32 [n, D]."""

    row: NDArray[np.int32]
    vector: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.row)

    def save(self, path: Path) -> None:
        """Write one safetensors file."""
        save_file({"row": torch.from_numpy(self.row), "vector": torch.from_numpy(self.vector)}, path)

    @staticmethod
    def load(path: Path) -> "ContentVectors":
        """Memory-map what `save` wrote; raises `BundleError` if rows and vectors do not fit together."""
        tensors = load_file(path)
        row, vector = tensors["row"].numpy(), tensors["vector"].numpy()
        if vector.ndim != 2 or len(row) != len(vector):
            raise BundleError(f"{path}: {len(row)} rows for vectors of shape {vector.shape}; publish again")
        return ContentVectors(row, vector)


@dataclass(frozen=True)
class ContentQuality:
    """How well content tells the vectors of trained items it was not learned from.

    Attributes:
        items: held-out items.
        r2: share of the squared distance from the mean vector that content explains; 0 is the mean itself.
        r2_low: the same less three standard errors over the items.
        cosine: mean cosine between predicted and true vector.
        cosine_of_mean: the same for the mean vector.
        recall_at_10: share of the items whose own vector is among the 10 nearest (by cosine, among the held-out items'
            vectors) of the predicted one.
        chance_at_10: what a random vector gets.
    """

    items: int
    r2: float
    r2_low: float
    cosine: float
    cosine_of_mean: float
    recall_at_10: float
    chance_at_10: float

    @property
    def useful(self) -> bool:
        """Whether content surely beats the mean vector, and surely finds more than chance does."""
        error = (self.chance_at_10 * (1 - self.chance_at_10) / self.items) ** 0.5
        return self.r2_low > 0 and self.recall_at_10 > self.chance_at_10 + SURE * error


def learn_vectors(
    features: Features, vectors: Tensor, trained: Tensor, config: VectorsConfig = VectorsConfig()
) -> tuple[ContentVectors | None, ContentQuality | None]:
    """Return vectors for the items without training events, and how far content can be trusted.

    Args:
        features: of every item row.
        vectors: float32 [V, D], those of the trained items are learned from.
        trained: bool [V].
        config: how.

    Returns:
        No vectors if every item is trained or content is not useful; no quality if too few items are trained to tell.
        Items of which nothing is known get no vector.

    Cost: two fits, the second started from the first.
    """
    rows = trained.nonzero().squeeze(1)
    size = min(int(len(rows) * config.held_out), MOST_HELD_OUT)
    if size < LEAST_HELD_OUT:
        return None, None
    draws = generator(config.seed, 0, "content/held out")
    shuffled = rows[torch.from_numpy(draws.permutation(len(rows)))]
    held, kept = shuffled[:size], shuffled[size:]
    vectors = vectors.detach().float()
    mean = vectors[kept].mean(0)
    weight = _ridge(features.take(kept), vectors[kept] - mean, torch.zeros(features.width, vectors.shape[1]), config)
    quality = _quality(features.take(held).times(weight), vectors[held], mean)
    new = (~trained & (features.offsets.diff() > 0)).nonzero().squeeze(1)
    if not quality.useful or not len(new):
        return None, quality
    mean = vectors[rows].mean(0)
    weight = _ridge(features.take(rows), vectors[rows] - mean, weight, config)
    predicted = features.take(new).times(weight) + mean
    return ContentVectors(new.numpy().astype(np.int32), predicted.numpy()), quality


class WithContent(nn.Module):
    """A retriever whose items without training events have the vectors their content gives them.

    They score the inner product with the user's vector, as every other item does; nothing else changes.

    Args:
        model: a ranker that is a `Retriever` and whose state is the user's vector.
        content: vectors in the model's space.

    Raises:
        ConfigError: rows that the model does not have.
    """

    items: ItemTable
    place: Tensor  # int64 [V]: 0, or 1 + where the item's vector is
    vector: Tensor  # float32 [n + 1, D]

    def __init__(self, model: AnyRanker, content: ContentVectors) -> None:
        super().__init__()
        self.model, self.items = cast(nn.Module, model), model.items
        low, high = int(content.row.min(initial=FIRST_ITEM)), int(content.row.max(initial=FIRST_ITEM))
        if low < FIRST_ITEM or high >= len(model.items):
            raise ConfigError(
                f"content of rows {low} to {high}; the model has items in {FIRST_ITEM} to {len(model.items) - 1}"
            )
        place = torch.zeros(len(model.items), dtype=torch.int64)
        place[torch.from_numpy(content.row).long()] = torch.arange(1, len(content) + 1)
        device = model.items.count.device
        self.register_buffer("place", place.to(device), persistent=False)
        vector = F.pad(torch.from_numpy(content.vector), (0, 0, 1, 0))
        self.register_buffer("vector", vector.to(device), persistent=False)

    @property
    def _ranker(self) -> AnyRanker:
        return cast(AnyRanker, self.model)

    @property
    def trains_on(self) -> TrainsOn:
        """Nothing: the vectors are finished."""
        return "nothing"

    @property
    def window(self) -> int | None:
        """That of the model."""
        return self._ranker.window

    def encode(self, history: History) -> Any:
        """Return the model's state: the user's vector, float32 [B, D]."""
        return self._ranker.encode(history)

    def score(self, state: Tensor, request: Request, candidates: Candidates) -> Tensor:
        """Return the model's logits [B, C], and state . vector (in float64) where the vector comes from content."""
        logits: Tensor = self._ranker.score(state, request, candidates)
        place = take(self.place, candidates.item)  # [B, C]
        request_of, candidate = place.nonzero(as_tuple=True)
        if not len(request_of):
            return logits
        vector = self.vector.index_select(0, place[request_of, candidate]).double()
        own = (vector * state.index_select(0, request_of).double()).sum(1).to(logits.dtype)
        return logits.index_put((request_of, candidate), own)

    def loss(self, batch: Any, generator: torch.Generator) -> Loss:
        """Raise: what content gives is learned in closed form, see `learn_vectors`."""
        raise ConfigError("item vectors from content are not trained by a loss; train the model and publish it")

    def user_vectors(self, history: History) -> Tensor:
        """Return the model's user vectors, float32 [B, D]."""
        return cast(Retriever, self.model).user_vectors(history)

    def item_vectors(self) -> Tensor:
        """Return the model's item vectors, float32 [V, D], with those from content in their rows."""
        vectors = cast(Retriever, self.model).item_vectors()
        return torch.where((self.place > 0)[:, None], self.vector.index_select(0, self.place), vectors)


def _ridge(features: Features, target: Tensor, start: Tensor, config: VectorsConfig) -> Tensor:
    """Return W float32 [F, D]: conjugate gradients with the diagonal as preconditioner, each column on its own."""
    transposed = features.transposed()
    ones = torch.ones(len(features), 1)
    squares = Features(transposed.offsets, transposed.column, transposed.value.square(), transposed.width)
    diagonal = squares.times(ones) + config.penalty  # [F, 1]

    def normal(weight: Tensor) -> Tensor:
        return transposed.times(features.times(weight)) + config.penalty * weight

    right = transposed.times(target)
    enough = config.tolerance * right.norm(dim=0)
    weight = start.clone()
    residual = right - normal(weight)
    scaled = residual / diagonal
    direction, size = scaled, (residual * scaled).sum(0)
    for _ in range(config.iterations):
        if bool((residual.norm(dim=0) <= enough).all()):
            break
        image = normal(direction)
        step = size / (direction * image).sum(0).clamp(min=torch.finfo(size.dtype).tiny)
        weight += step * direction
        residual = residual - step * image
        scaled = residual / diagonal
        before, size = size, (residual * scaled).sum(0)
        direction = scaled + size / before.clamp(min=torch.finfo(size.dtype).tiny) * direction
    return weight


def _quality(predicted: Tensor, true: Tensor, mean: Tensor) -> ContentQuality:
    """Compare predicted deviations from the mean [n, D] with the true vectors [n, D]."""
    whole = predicted + mean
    away = (true - mean).square().sum(1)  # [n]
    gain = away - (true - whole).square().sum(1)
    scale = 1 / max(float(away.sum()), 1e-30)
    error = float(gain.std()) * len(true) ** 0.5
    unit = F.normalize(true, dim=1)
    similarity = F.normalize(whole, dim=1) @ unit.T  # [n, n]
    own = similarity.diagonal()
    tied = (similarity == own[:, None]).sum(1) - 1
    better = (similarity > own[:, None]).sum(1) + tied / 2
    return ContentQuality(
        items=len(true),
        r2=float(gain.sum()) * scale,
        r2_low=(float(gain.sum()) - SURE * error) * scale,
        cosine=float(own.mean()),
        cosine_of_mean=float((unit @ F.normalize(mean, dim=0)).mean()),
        recall_at_10=float((better < NEIGHBOURS).float().mean()),
        chance_at_10=min(NEIGHBOURS / len(true), 1.0),
    )
