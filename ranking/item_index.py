"""The index of a retriever's items, held to its recall when it is built."""

from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray

from ranking.batch import FIRST_ITEM
from ranking.index import RECALL_AT, Index, IndexConfig, build, sample_of
from ranking.manifest import IndexRecall
from ranking.ranker import AnyRanker, Retriever
from recsys.errors import BundleError, GateError


def item_index(model: AnyRanker, config: IndexConfig, queries: NDArray[np.float32] | None) -> tuple[Index, IndexRecall]:
    """Return the index of a retriever's items, and its recall.

    Args:
        model: the retriever; items whose vector is zero are left out.
        config: of the index.
        queries: float32 [n, D] vectors of users; those of items stand in where there are none.

    Raises:
        BundleError: no item has a vector.
        GateError: recall is below `IndexConfig.recall`.
    """
    retriever = cast(Retriever, model)
    with torch.inference_mode():
        vectors = retriever.item_vectors().detach().float().cpu().numpy()
    rows = np.flatnonzero(vectors.any(axis=1))
    rows = rows[rows >= FIRST_ITEM]
    if not len(rows):
        raise BundleError(f"{type(model).__name__} has no item vector that is not zero; is it trained?")
    asked = sample_of(vectors[rows]) if queries is None or not len(queries) else queries
    index = build(vectors[rows], rows, config, asked)
    recall = index.recall(asked)
    if recall < config.recall:
        raise GateError(
            f"the index finds {recall:.4f} of the exact best {RECALL_AT} of {len(asked)} queries; expected "
            f"{config.recall} or more: raise [index] probes, or leave it at 0 to have it chosen"
        )
    return index, IndexRecall(
        value=recall, at=RECALL_AT, queries=len(asked), of="items" if asked is not queries else "users"
    )
