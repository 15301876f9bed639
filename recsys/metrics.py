"""Ranking metrics over many groups at once: one sort, exact under ties, one small function per formula.

A group is a request, a user, or everything. `rank` sorts all groups' candidates in one pass and keeps only the tie
blocks that hold a positive; every formula below is a short sum over those blocks. A tie is worth its expectation over
all orders of the tied candidates, so a constant scorer gets exactly what chance gets. A group for which a formula is
not defined (one class only, no positive) gives NaN; callers skip such groups and say how many there were.

    G groups   N candidates over all groups   K tie blocks that hold a positive   M highest grade
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from recsys.errors import DataError

RUN = 1 << 16
"""Candidates whose keys are made at once."""

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Ranking:
    """Where the positives of G groups ended up.

    Attributes:
        candidates: int64 [G], candidates of each group.
        grades: int64 [G, M], how many candidates of grade 1..M each group has; M = 1 for plain labels.
        group: int64 [K], the group of each block, ascending; within a group best block first.
        start: int64 [K], candidates of the group with a higher score than the block's.
        size: int64 [K], candidates that share the block's score.
        positive: int64 [K], how many of them have a grade above 0.
        gain: int64 [K], the sum of their grades.
        depth: ranks from here on are not recorded (None: all are). Formulas with a cutoff up to it are exact.
    """

    candidates: Ints
    grades: Ints
    group: Ints
    start: Ints
    size: Ints
    positive: Ints
    gain: Ints
    depth: int | None = None

    @property
    def positives(self) -> Ints:
        """Candidates with a grade above 0, int64 [G]."""
        total: Ints = self.grades.sum(axis=1)
        return total


def rank(
    score: NDArray[np.floating], label: NDArray[np.generic], group: Ints | None = None, groups: int = 1
) -> Ranking:
    """Rank the candidates of every group, best score first.

    Args:
        score: [N]; any float. Infinities are ordered, NaN is refused.
        label: [N] booleans or whole grades 0..255; grades are linear gains for `ndcg` and positive above 0 elsewhere.
        group: int [N], group of each candidate in any order; everything is one group if absent.
        groups: G.

    Raises:
        DataError: lengths differ, a score is NaN, a label is no grade; the message names the first such row.

    Cost: one sort of the negatives' keys (group, score), 64 bits or 32 without groups, and one of the few positives',
    who are then looked up; 10 M rows in under a second. Scores that float32 cannot hold exactly are replaced by their
    ranks first, which takes an argsort: several times slower.
    """
    grade = _grades(score, label)
    bits = max(int(grade.max(initial=0)).bit_length(), 1)
    if int(groups - 1).bit_length() + 32 + bits > 64:
        raise DataError(f"{groups} groups of grades up to {grade.max()} do not fit one 64-bit key; evaluate in parts")
    candidates = np.array([len(score)]) if group is None else np.bincount(group, minlength=groups)
    if len(candidates) != groups:
        raise DataError(f"group numbers go up to {len(candidates) - 1}; expected them below {groups}")
    negative, own = _keys(score, grade, group, bits)
    negative.sort()
    own.sort()
    grade = (own & np.uint64((1 << bits) - 1)).astype(np.int64)  # of the positives, best first
    block = own >> np.uint64(bits)
    head = np.flatnonzero(np.r_[True, block[1:] != block[:-1]][: len(block)])  # first positive of each block
    name = block[head]
    above, tied = _place(negative, name.astype(negative.dtype))
    count = np.diff(head, append=len(block))
    owner = (name >> np.uint64(32)).astype(np.int64)
    highest = max(int(grade.max(initial=0)), 1)
    cell = (block >> np.uint64(32)).astype(np.int64) * highest + grade - 1
    return Ranking(
        candidates=candidates.astype(np.int64),
        grades=np.bincount(cell, minlength=groups * highest).reshape(groups, highest),
        group=owner,
        start=above + head - (np.cumsum(candidates) - candidates)[owner],
        size=count + tied,
        positive=count,
        gain=np.add.reduceat(grade, head) if len(head) else head,
    )


def _keys(
    score: NDArray[np.floating], grade: NDArray[np.uint8], group: Ints | None, bits: int
) -> tuple[NDArray[np.unsignedinteger], NDArray[np.uint64]]:
    """Return the keys (group, score), best first, of candidates of grade 0, and (group, score, grade) of the others.

    Made in runs that stay in cache: whole temporaries would cost as much as half of the sort.
    """
    code = None if score.dtype == np.float32 else ordered_bits(score)
    positives = int(np.count_nonzero(grade))
    kind: type[np.unsignedinteger] = np.uint32 if group is None else np.uint64
    negative: NDArray[np.unsignedinteger] = np.empty(len(score) - positives, kind)
    own = np.empty(positives, np.uint64)
    done = 0
    for first in range(0, len(score), RUN):
        run = slice(first, first + RUN)
        key: NDArray[np.unsignedinteger] = ~(ordered_bits(score[run]) if code is None else code[run])
        if group is not None:
            key = (group[run].astype(np.uint64) << np.uint64(32)) | key
        positive = grade[run] > 0
        found = own[done : done + np.count_nonzero(positive)]
        np.left_shift(key[positive], np.uint64(bits), out=found, dtype=np.uint64)
        found |= grade[run][positive]
        negative[first - done : first - done + len(key) - len(found)] = key[~positive]
        done += len(found)
    return negative, own


def _place(ascending: NDArray[np.generic], wanted: NDArray[np.generic]) -> tuple[Ints, Ints]:
    """Return how many are less than each wanted number, and how many are equal; most are met by none."""
    below = np.searchsorted(ascending, wanted, "left")
    equal = np.zeros_like(below)
    met = np.flatnonzero(below < len(ascending))
    met = met[ascending[below[met]] == wanted[met]]
    equal[met] = np.searchsorted(ascending, wanted[met], "right") - below[met]
    return below, equal


def groups_of(offsets: Ints) -> Ints:
    """Return the group of each candidate of packed groups: 0 for offsets[0]..offsets[1], then 1 and so on."""
    return np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))


def auc(ranking: Ranking) -> Floats:
    """Area under the ROC curve of each group, float64 [G]; NaN where there is only one class.

    The share of (positive, negative) pairs in the right order, a tie counting one half: the Mann-Whitney statistic
    (Hanley and McNeil, Radiology 143, 1982). Counted in whole numbers, so a constant scorer has exactly 0.5.
    """
    if ranking.depth is not None:
        raise DataError(f"AUC needs every rank, this ranking keeps the first {ranking.depth}; use a cutoff metric")
    positives = ranking.positives
    negatives = ranking.candidates - positives
    before = (np.cumsum(positives) - positives)[ranking.group]  # positives of all earlier groups
    above = np.cumsum(ranking.positive) - ranking.positive - before  # positives of the group in better blocks
    tied = ranking.size - ranking.positive
    below = negatives[ranking.group] - (ranking.start - above) - tied
    twice = np.bincount(ranking.group, ranking.positive * (2 * below + tied), len(positives))
    return ratio(twice, 2.0 * positives * negatives)


def gauc(ranking: Ranking) -> float:
    """Mean of the groups' AUCs weighted by their candidates, one-class groups left out.

    The groups are users: Zhu et al., "Optimized Cost per Click in Taobao Display Advertising", KDD 2017, section 4.
    """
    return weighted_mean(auc(ranking), ranking.candidates)


def ndcg(ranking: Ranking, k: int) -> Floats:
    """Normalised discounted cumulative gain of the first k, float64 [G]; NaN where there is no positive.

    DCG = sum over ranks r < k of gain(r) / log2(r + 2), with linear gains; the ideal is the group's own best order cut
    at the same k (Jarvelin and Kekalainen, TOIS 20(4), 2002). Ties as in McSherry and Najork, ECIR 2008.
    """
    discount = np.r_[0.0, np.cumsum(1.0 / np.log2(np.arange(2, _cutoff(ranking, k) + 2)))]  # [k + 1] of first n ranks
    slots = discount[np.minimum(ranking.start + ranking.size, k)] - discount[np.minimum(ranking.start, k)]
    dcg = np.bincount(ranking.group, ranking.gain * slots / ranking.size, len(ranking.candidates))
    ideal = np.zeros(len(ranking.candidates))
    placed = np.zeros(len(ranking.candidates), np.int64)
    for grade in range(ranking.grades.shape[1], 0, -1):
        after = placed + ranking.grades[:, grade - 1]
        ideal += grade * (discount[np.minimum(after, k)] - discount[np.minimum(placed, k)])
        placed = after
    return ratio(dcg, ideal)


def recall(ranking: Ranking, k: int) -> Floats:
    """Share of the group's positives among its first k, float64 [G]; NaN where there is no positive.

    It cannot reach 1 in a group with more than k positives.
    """
    inside = np.minimum(ranking.start + ranking.size, _cutoff(ranking, k)) - np.minimum(ranking.start, k)
    found = np.bincount(ranking.group, ranking.positive * inside / ranking.size, len(ranking.candidates))
    return ratio(found, ranking.positives)


def mrr(ranking: Ranking, k: int) -> Floats:
    """Reciprocal rank (1 = best) of the first positive, 0 beyond rank k, float64 [G]; NaN where there is no positive.

    Voorhees, TREC-8 question answering track, 1999.
    """
    return _first_positive(ranking, k, reciprocal=True)


def hit_rate(ranking: Ranking, k: int) -> Floats:
    """Whether any positive is among the first k, float64 [G]; NaN where there is no positive."""
    return _first_positive(ranking, k, reciprocal=False)


def mean(values: Floats) -> float:
    """Mean over the groups where the metric is defined; NaN if it is defined nowhere."""
    return weighted_mean(values, np.ones(len(values)))


def weighted_mean(values: Floats, weight: NDArray[np.generic]) -> float:
    """Weighted mean over the groups where the metric is defined; NaN if it is defined nowhere."""
    defined = ~np.isnan(values)
    total = float(weight[defined].sum())
    return float(np.dot(values[defined], weight[defined]) / total) if total else float("nan")


def ordered_bits(score: NDArray[np.floating]) -> NDArray[np.uint32]:
    """Return uint32 codes [N] in the same order and with the same ties as the scores.

    A float32's bits, with the sign flipped for positive and all bits flipped for negative numbers, sort as whole
    numbers. Scores float32 cannot hold exactly get their dense rank instead.
    """
    with np.errstate(over="ignore"):
        single = score.astype(np.float32)
    if score.dtype != np.float32 and not np.array_equal(single, score):
        dense: NDArray[np.uint32] = np.unique(score, return_inverse=True)[1].astype(np.uint32)
        return dense
    single += np.float32(0)  # -0.0 becomes 0.0: they are equal, their bits are not
    bits: NDArray[np.uint32] = single.view(np.uint32)
    bits ^= (single.view(np.int32) >> 31).view(np.uint32) | np.uint32(0x80000000)
    return bits


def _first_positive(ranking: Ranking, k: int, reciprocal: bool) -> Floats:
    """Expectation over tie orders of 1/rank (or 1) of the first positive if it is among the first k.

    Only a group's best block matters. With p positives among b tied candidates the first stands at place j of the
    block with probability C(b - j, p - 1) / C(b, p); the ratio of neighbours is (b - j - p + 1) / (b - j).
    """
    result = np.where(ranking.positives > 0, 0.0, np.nan)
    head = np.flatnonzero(np.r_[True, ranking.group[1:] != ranking.group[:-1]][: len(ranking.group)])
    head = head[ranking.start[head] < _cutoff(ranking, k)]
    start, size, positive = ranking.start[head], ranking.size[head], ranking.positive[head]
    chance = positive / size
    total = np.zeros(len(head))
    for place in range(1, k + 1):
        at = start + place  # rank, 1 = best
        total += np.where(at <= k, chance / at if reciprocal else chance, 0.0)
        chance = chance * np.maximum(size - place - positive + 1, 0) / np.maximum(size - place, 1)
        if not chance.any():
            break
    result[ranking.group[head]] = total
    return result


def _cutoff(ranking: Ranking, k: int) -> int:
    if k < 1 or (ranking.depth is not None and k > ranking.depth):
        raise DataError(f"cutoff {k}: expected 1 to {ranking.depth or 'any number'}, the ranks this ranking keeps")
    return k


def ratio(above: NDArray[np.generic], below: NDArray[np.generic]) -> Floats:
    """Return above / below, float64 [N], NaN where below is 0."""
    result = np.full(len(below), np.nan)
    np.divide(above, below, out=result, where=below != 0)
    return result


def _grades(score: NDArray[np.floating], label: NDArray[np.generic]) -> NDArray[np.uint8]:
    if len(score) != len(label):
        raise DataError(f"{len(score)} scores for {len(label)} labels; expected one score per candidate")
    if len(score) and np.isnan(score.min()):
        raise DataError(f"score of row {int(np.argmax(np.isnan(score)))} is NaN; a model must give finite scores")
    with np.errstate(invalid="ignore"):
        grade = label.astype(np.uint8)
    if label.dtype not in (np.bool_, np.uint8) and not np.array_equal(grade, label):
        row = int(np.argmax(grade != label))
        raise DataError(f"label of row {row} is {label[row]}; expected a whole grade 0..255 (0 = negative)")
    return grade
