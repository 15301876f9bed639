"""Items near to an item: by the retriever's vectors, or by content where it has none."""

from typing import Literal

import numpy as np

from ranking.batch import UNKNOWN
from recsys.errors import RequestError
from recsys.messages import SimilarRequest
from serving.lineup import Served
from serving.replies import SimilarItem, SimilarResponse


def similar(served: Served, item_id: str, request: SimilarRequest) -> SimilarResponse:
    """Return the k items nearest to an item.

    Neighbours are items that may be recommended: in stock, and let through by the config's filters and the request's.
    The item itself need not be one.

    Raises:
        RequestError: 404 for an item the bundle does not know, 409 for a bundle with neither retriever nor content,
            422 for a filter of a column that the bundle does not have.
    """
    bundle, vectors = served.bundle, served.item_vectors
    if vectors is None and bundle.content is None:
        reason = f"bundle {bundle.version} has neither retriever nor content; publish one with `--ranker`"
        raise RequestError(409, "not_supported", reason)
    row = bundle.row_of.get(item_id)
    if row is None:
        raise RequestError(404, "unknown_item", f"bundle {bundle.version} does not know item {item_id!r}")
    k, allowed = request.k, served.recommender.allowed(request.filters)
    by: Literal["vectors", "content"] = "content"
    if bundle.index is not None and vectors is not None and vectors[row].any():
        by = "vectors"
        found, scores = (some[0] for some in bundle.index.search(vectors[row : row + 1], k + 1, allowed))
    else:
        likeness = np.zeros(0, np.float32) if bundle.content is None else bundle.content.likeness(row)
        if allowed is not None and len(likeness):
            likeness = np.where(allowed, likeness, 0)
        found = np.argsort(-likeness, kind="stable")[: k + 1]
        found = found[likeness[found] > 0]
        scores = likeness[found]
    items = [
        SimilarItem(item_id=bundle.item_ids[other], name=bundle.names[other], score=float(score))
        for other, score in zip(found.tolist(), scores.tolist(), strict=True)
        if other > UNKNOWN and other != row
    ]
    warnings = served.recommender.warnings(request.filters)
    return SimilarResponse(item_id=item_id, name=bundle.names[row], by=by, items=items[:k], warnings=warnings)
