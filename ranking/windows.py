"""Long texts in windows, each with a vector of its own.

An encoder reads the first 256 tokens or so, and what a text says later its vector does not know. So a longer text has
more vectors: of windows of nearly as many tokens as the encoder reads, each `OVERLAP` tokens into the one before and
the last up to the text's end. A query finds a text by the nearest of them (MaxP of Dai and Callan 2019, arXiv
1905.09217), each beside the beginning, which says what the text is about:

    score(q, text) = max over windows w of e_q . ((1 - b) e_w + b e_beginning)        b = BEGINNING

Chosen on SciFact's training queries: the hybrid's nDCG@10 is 72.1 by the beginning alone, 71.9 with b = 0, which
favours long texts, and 72.4 with 0.5.

    Q queries    K places    P passages    W windows, the first P of which are the passages, read from their beginning
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ranking.fusion import NONE, Ranking
from ranking.text_backbone import TextTokenizer

OVERLAP = 64
"""tokens that two neighbouring windows share, at most half of one"""
SPARE = 32
"""A window leaves one token in so many free: cut inside a word it may have more than the text had there."""
BEGINNING = 0.5
"""share of a text's beginning in the vector of each of its windows"""


@dataclass(frozen=True)
class Windows:
    """What is encoded of passages.

    Attributes:
        texts: [W]; the first P are the passages themselves, the encoder cuts them.
        passage: int32 [W], whose window it is.
    """

    texts: list[str]
    passage: NDArray[np.int32]


def windows_of(texts: Sequence[str], tokenizer: TextTokenizer, room: int) -> Windows:
    """Cut the texts that are longer than `room` tokens, special ones not counted.

    Args:
        texts: [P].
        tokenizer: of the encoder.
        room: tokens that the encoder reads of a passage.
    """
    room = max(room, 1)
    size = room - room // SPARE
    step = size - min(OVERLAP, size // 2)
    further, passage = [], list(range(len(texts)))
    for place, text in enumerate(texts):
        if len(text.encode()) <= room:  # a token has a byte at least
            continue
        offsets = tokenizer.tokenizer.encode(text, add_special_tokens=False).offsets
        last = len(offsets) - size
        for start in [*range(step, last, step), last] if len(offsets) > room else ():
            further.append(text[offsets[start][0] : offsets[start + size - 1][1]])
            passage.append(place)
    return Windows([*texts, *further], np.array(passage, np.int32))


def beside_beginning(vectors: NDArray[np.float32], passage: NDArray[np.int32]) -> NDArray[np.float32]:
    """Return what is indexed of windows [W, D]: each with its share of the text's beginning, which itself stays."""
    return (np.float32(1 - BEGINNING) * vectors + np.float32(BEGINNING) * vectors[passage]).astype(np.float32)


def by_passage(found: Ranking, passage: NDArray[np.int32], places: int) -> Ranking:
    """Return the passages of the windows that were found, each at the place of its best one.

    Args:
        found: windows, best first.
        passage: int32 [W].
        places: most passages of a query; empty places as in `Ranking` where it has fewer.
    """
    rows = np.full((len(found), places), NONE, np.int32)
    scores = np.full((len(found), places), -np.inf, np.float32)
    for query, (windows, values) in enumerate(zip(found.rows, found.scores, strict=True)):
        there = windows != NONE
        _, first = np.unique(passage[windows[there]], return_index=True)
        best = np.sort(first)[:places]
        rows[query, : len(best)] = passage[windows[there]][best]
        scores[query, : len(best)] = values[there][best]
    return Ranking(rows, scores)
