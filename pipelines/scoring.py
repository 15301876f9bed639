"""Scores of a model for requests of a prepared set: fixed candidates, or every known item.

Requests are put in batches of like history length, built by `ranking.batch.assemble` as everywhere else, encoded once
and scored; padding and memory follow real lengths. Nothing is learned here.

    R requests   N candidates over all requests   V item rows   P positives of a request
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pipelines.prepared import IMPRESSIONS, CandidateSets, PreparedSet, Requests, Split
from pipelines.samplers import SAMPLERS, log_density
from ranking.batch import FIRST_ITEM, Batch, Candidates, assemble, rows_of
from ranking.ranker import NEGATIVE, AnyRanker, Retriever
from recsys.errors import DataError
from recsys.history import Events, side_by_side
from recsys.metrics import Ranking
from recsys.progress import Progress, silent
from recsys.randomness import generator

CPU_CANDIDATES = 1 << 14
"""Most scores of one call on a CPU, so that what a model makes of each candidate stays in cache: DARE and DIN take 1.6
times as long with 2^18."""
GPU_CANDIDATES = 1 << 18
BATCH_EVENTS = 1 << 18  # most history events of one batch
SCORE_MATRIX = 1 << 22  # most scores held when all items are ranked: 16 MiB
GPU_SCORE_MATRIX = 1 << 24  # four times as many users at once: a GPU would wait for the next ones


@dataclass(frozen=True)
class Sample:
    """R requests of a split: their places in it, themselves, and where their histories start in the packed events."""

    index: NDArray[np.int64]
    requests: Requests
    start: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.index)

    @property
    def length(self) -> NDArray[np.int64]:
        """Events before each request, int64 [R]."""
        return self.requests.end - self.start

    def take(self, chosen: NDArray[np.int64]) -> "Sample":
        """Return the requests at `chosen`, in that order."""
        return Sample(self.index[chosen], self.requests.take(chosen), self.start[chosen])


def draw_requests(prepared: PreparedSet, split: Split, most: int, seed: int) -> Sample:
    """Return all requests of a split, or `most` of them chosen by seed, in their order."""
    requests = prepared.requests(split)
    index = choose(len(requests), most, seed, f"evaluate/{split}")
    taken = requests.take(index)
    return Sample(index, taken, np.asarray(prepared.histories.offsets[taken.user]))


def choose(total: int, most: int, seed: int, purpose: str) -> NDArray[np.int64]:
    """Return `most` of 0..total-1, ascending, chosen by seed; all of them if there are no more."""
    if most >= total:
        return np.arange(total)
    return np.sort(generator(seed, 0, purpose).choice(total, most, replace=False)).astype(np.int64)


def join_sets(parts: Sequence[CandidateSets]) -> tuple[CandidateSets, list[NDArray[np.int64]]]:
    """Return one list of candidates per request that holds those of every part, so that a history is encoded once.

    Also gives, per part, int64 [N of the part]: where its candidates lie in the joined list.
    """
    sizes = np.stack([np.diff(part.offsets) for part in parts])  # [parts, R]
    offsets = np.r_[0, np.cumsum(sizes.sum(axis=0))]
    before = offsets[:-1] + np.cumsum(sizes, axis=0) - sizes  # [parts, R] where a part of a request starts
    where = [side_by_side(start, size)[0] for start, size in zip(before, sizes, strict=True)]
    item, label = np.empty(offsets[-1], np.int32), np.empty(offsets[-1], np.uint8)
    for part, place in zip(parts, where, strict=True):
        item[place], label[place] = part.item, part.label
    return CandidateSets(offsets, item, label), where


def in_history(prepared: PreparedSet, sample: Sample, sets: CandidateSets) -> NDArray[np.bool_]:
    """Whether each candidate occurs in its request's whole history, bool [N]; row 1 (unknown) never does.

    A request's history is a beginning of its user's events, so an item is in it if the user's first event of that item
    lies in it. Cost: one sort of the users' events, however many requests they have.
    """
    users, which = np.unique(sample.requests.user, return_inverse=True)
    starts, ends = (np.asarray(prepared.histories.offsets[users + step]) for step in (0, 1))
    index, _ = side_by_side(starts, ends - starts)
    rows = rows_of(np.asarray(prepared.histories.events.item[index]), prepared.key_to_row)
    owner = np.repeat(np.arange(len(users)), ends - starts)
    known, first = np.unique(_pair(owner, rows), return_index=True)  # `first` is the earliest: np.unique promises it
    wanted = np.repeat(np.arange(len(sample)), np.diff(sets.offsets))  # request of each candidate
    pairs = _pair(which[wanted], sets.item)
    place = np.minimum(np.searchsorted(known, pairs), max(len(known) - 1, 0))
    if not len(known):
        return np.zeros(len(pairs), np.bool_)
    met = (known[place] == pairs) & (index[first[place]] < sample.requests.end[wanted])
    return np.asarray(met & (sets.item >= FIRST_ITEM))


def distinct_items(prepared: PreparedSet, sample: Sample) -> NDArray[np.int64]:
    """Count the distinct known items in each request's whole history, int64 [R]. Cost: one small sort per request."""
    key_to_row, item = prepared.key_to_row, prepared.histories.events.item
    counts = []
    for start, end in zip(sample.start, sample.requests.end, strict=True):
        rows = np.unique(rows_of(np.asarray(item[start:end]), key_to_row))
        counts.append(int((rows >= FIRST_ITEM).sum()))
    return np.array(counts, np.int64)


def score_sets(
    model: AnyRanker,
    prepared: PreparedSet,
    sample: Sample,
    sets: CandidateSets,
    batch_requests: int = 256,
    progress: Progress = silent,
) -> NDArray[np.float32]:
    """Score the candidates of every request, float32 [N]; raises `DataError` for a score that is not a number."""
    scores = np.empty(len(sets.item), np.float32)
    done = 0
    with evaluation_mode(model) as device:
        for chosen in _batches(model, sample, np.diff(sets.offsets), batch_requests, _most_candidates(device)):
            where, offsets = side_by_side(sets.offsets[chosen], np.diff(sets.offsets)[chosen])
            sizes = np.diff(offsets)
            mask = np.arange(max(sizes.max(), 1))[None, :] < sizes[:, None]  # [B, C]
            item = np.zeros(mask.shape, np.int32)
            item[mask] = sets.item[where]
            batch = assemble_requests(model, prepared, sample.take(chosen), item).to(device)
            logits = model.score(model.encode(batch.history), batch.request, batch.candidates)
            scores[where] = logits.cpu().numpy()[mask]
            done += len(chosen)
            progress(done, len(sample))
    if np.isnan(scores).any():
        place = int(np.argmax(np.isnan(scores)))
        request = int(sample.index[np.searchsorted(sets.offsets, place, "right") - 1])
        raise DataError(
            f"{type(model).__name__}: the score of item row {sets.item[place]} for request {request} is NaN"
        )
    return scores


def matched(
    scores: NDArray[np.float32], item: NDArray[np.int32], prepared: PreparedSet, sampler: str
) -> NDArray[np.float32]:
    """Return scores minus log of how often the sampler draws each item, float32 [N], the same rule for every model.

    A score estimates log p(item | user). Against negatives drawn by q the best order is by log p - log q; without it an
    AUC against popular negatives says how little a model believes in popular items. Uniform draws change nothing.
    Impressions were not drawn: their scores stay as they are.
    """
    if sampler == IMPRESSIONS:
        return scores
    matched: NDArray[np.float32] = scores - log_density([SAMPLERS[sampler](prepared.items)])[item]
    return matched


def rank_all_items(
    model: AnyRanker,
    prepared: PreparedSet,
    sample: Sample,
    depth: int,
    batch_requests: int = 256,
    by_vectors: bool = False,
    progress: Progress = silent,
) -> Ranking:
    """Rank all known items (rows 2..V-1) for every request, and find its positives among the first `depth`.

    Args:
        model: any ranker; with `by_vectors` also a `Retriever`.
        prepared: the set the requests come from.
        sample: the requests.
        depth: ranks kept; a positive further down counts as not found.
        batch_requests: most requests of one batch.
        by_vectors: score by the inner product of the retriever's vectors, as an index would; an item whose vector is
            zero is never retrieved and comes last.
        progress: told of requests after each batch.

    Cost: O(V) scores per request, items in chunks and requests in batches so that at most 2^22 scores are held.
    """
    rows = len(prepared.items) - FIRST_ITEM
    requests = sample.requests
    blocks: list[NDArray[np.int64]] = [np.empty((0, 4), np.int64)]
    most = min(batch_requests, max(SCORE_MATRIX // max(rows, 1), 1))
    done = 0
    with evaluation_mode(model) as device:
        vectors = _item_vectors(model) if by_vectors else None
        for chosen in _batches(model, sample, np.ones(len(sample), np.int64), most, SCORE_MATRIX):
            part = sample.take(chosen)
            batch = assemble_requests(model, prepared, part, np.zeros((len(chosen), 0), np.int32)).to(device)
            scores = all_scores(model, batch, rows) if vectors is None else _by_vectors(model, batch, vectors)
            table = scores.cpu().numpy()  # [B, V - 2]
            for request, row in zip(chosen, table, strict=True):
                start, end = requests.offsets[request : request + 2]
                blocks.append(_blocks_of(int(request), row, requests.positive[start:end] - FIRST_ITEM, depth))
            done += len(chosen)
            progress(done, len(sample))
    found = np.concatenate(blocks)
    found = found[np.lexsort((found[:, 1], found[:, 0]))]
    return Ranking(
        candidates=np.full(len(sample), rows),
        grades=np.diff(requests.offsets)[:, None],
        group=found[:, 0],
        start=found[:, 1],
        size=found[:, 2],
        positive=found[:, 3],
        gain=found[:, 3],
        depth=depth,
    )


def is_retriever(model: AnyRanker | type[AnyRanker]) -> bool:
    """Whether the score of a model, or of a class of models, is an inner product of vectors it gives out."""
    return hasattr(model, "user_vectors") and hasattr(model, "item_vectors")


@contextmanager
def evaluation_mode(model: AnyRanker) -> Iterator[torch.device]:
    """Switch a model to evaluation without gradients, give its device, and put back the mode it was in."""
    assert isinstance(model, nn.Module)
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield model.items.count.device
    finally:
        model.train(training)


def _batches(
    model: AnyRanker, sample: Sample, candidates: NDArray[np.int64], most: int, most_candidates: int
) -> Iterator[NDArray[np.int64]]:
    """Yield the requests of each batch: like lengths together, rectangles and histories within bounds."""
    length = sample.length if model.window is None else np.minimum(sample.length, model.window)
    order = np.lexsort((candidates, length))
    begin = 0
    while begin < len(order):
        size = np.arange(1, min(most, len(order) - begin) + 1)
        ahead = order[begin : begin + len(size)]
        fits = (size * np.maximum.accumulate(candidates[ahead]) <= most_candidates) & (
            size * length[ahead] <= BATCH_EVENTS
        )
        end = begin + max(int(fits.sum()), 1)
        yield order[begin:end]
        begin = end


def _most_candidates(device: torch.device) -> int:
    return CPU_CANDIDATES if device.type == "cpu" else GPU_CANDIDATES


def assemble_requests(model: AnyRanker, prepared: PreparedSet, part: Sample, item: NDArray[np.int32]) -> Batch:
    """Return the batch a model scores: the requests with candidates int32 [R, C], histories cut to what it reads."""
    events: Events = prepared.histories.events
    requests = part.requests
    return assemble(events, part.start, requests.end, requests.at, item, prepared.key_to_row, window=model.window)


def all_scores(model: AnyRanker, batch: Batch, rows: int) -> Tensor:
    """Return the scores of rows 2..V-1 (`rows` of them) for every request, float32 [B, V - 2]."""
    state = model.encode(batch.history)
    scores = torch.empty(len(batch), rows, device=batch.history.item.device)
    chunk = max(_most_candidates(scores.device) // len(batch), 1)
    for begin in range(0, rows, chunk):
        end = min(begin + chunk, rows)
        item = torch.arange(begin + FIRST_ITEM, end + FIRST_ITEM, dtype=torch.int32, device=scores.device)
        items = item.repeat(len(batch), 1)  # [B, chunk]
        scores[:, begin:end] = model.score(state, batch.request, Candidates(items))
    return scores


def _item_vectors(model: AnyRanker) -> Tensor:
    """Return the vectors of rows 2..V-1, float32 [V - 2, D]."""
    return _retriever(model).item_vectors()[FIRST_ITEM:]


def _by_vectors(model: AnyRanker, batch: Batch, vectors: Tensor) -> Tensor:
    scores = _retriever(model).user_vectors(batch.history) @ vectors.T
    return scores.masked_fill_(~vectors.any(dim=1), NEGATIVE)


def _retriever(model: AnyRanker) -> Retriever:
    if not is_retriever(model):
        raise DataError(f"{type(model).__name__} has no user and item vectors; rank it by its scores instead")
    return model  # type: ignore[return-value]


def _blocks_of(request: int, row: NDArray[np.float32], positive: NDArray[np.int32], depth: int) -> NDArray[np.int64]:
    """Return (request, start, size, positives) of each tie block that holds a positive and starts before `depth`.

    Counting what is above a positive costs O(V), so it is done only for those that reach the depth-th best score.
    """
    if np.isnan(row.min(initial=0.0)):
        raise DataError(f"the score of item row {int(np.argmax(np.isnan(row))) + FIRST_ITEM} is NaN")
    own = row[positive[(positive >= 0) & (positive < len(row))]]
    if len(row) > depth:
        own = own[own >= np.partition(row, len(row) - depth)[len(row) - depth]]
    values, counts = np.unique(own, return_counts=True)
    blocks = [
        (request, int((row > value).sum()), int((row == value).sum()), int(count))
        for value, count in zip(values, counts, strict=True)
    ]
    return np.array(blocks, np.int64).reshape(-1, 4)


def _pair(owner: NDArray[np.int64], row: NDArray[np.int32]) -> NDArray[np.int64]:
    return (owner << 32) | row
