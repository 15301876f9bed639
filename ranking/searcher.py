"""Text search in stages: words and vectors -> one order -> rerank of its head -> blend with the user's ranker.

    bm25     words of the query in the passages                     best `depth`
    dense    inner product of query and passage vectors             best `depth`
    hybrid   both: a convex sum whose weight depends on how much of the query one passage holds, or reciprocal ranks
    rerank   the reranker orders the best `rerank` anew; what lies below stays as it was. Where one passage holds nearly
             all words of the query the first stage decides: a reranker only loses there
    blend    for a user: 1 / (60 + rank of the search) + personal_weight / (60 + rank by the ranker), of passages that
             hold nearly all words, or of the head

Service, batch job and evaluation use this one class. A request has a time budget. Work stops when it is over, between
forward passes of a few documents, and the answer is that of the stages before; `degraded` names what was left out. With
a budget a stage that fails is left out too; without one, as in evaluation, an error is an error. What was found, and
the blend, is in `ranking.searched`.
"""

import logging
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from ranking.deadline import Deadline, OutOfTimeError
from ranking.fusion import COVERED, POOL, Ranking
from ranking.search_part import SearchPart
from ranking.searched import Reranked, SearchConfig, Searched
from ranking.text_backbone import TextTokenizer
from ranking.trace import Clock
from recsys.errors import RequestError
from recsys.progress import silent
from recsys.search_messages import Mode

logger = logging.getLogger(__name__)

SHARE = 0.7
"""of a search's budget is for the reranker; the rest for the first stage, the user's ranker, and a busier machine"""
LEAST = 2
"""Passages that are reranked however slow the machine is: fewer have no order."""
CHARACTERS_PER_TOKEN = 32
"""No tokenizer needs more text for a token; what lies beyond is cut before it is looked at."""
DOCUMENTS_AT_ONCE = 64
"""Documents sent along that are scored before the next are begun, in the order of the request."""
OFTEN_ENOUGH = 8
"""Characters per token that are looked at first."""


class Searcher:
    """Searches the passages of a bundle. Keeps no state between requests; safe to call from several threads.

    Args:
        part: of the bundle.
        config: depths and budgets; the defaults if absent.
        pace: seconds the reranker takes for a passage on this machine (`ranking.rerank_depth`); 0 is not known.
    """

    def __init__(self, part: SearchPart, config: SearchConfig | None = None, pace: float = 0.0) -> None:
        self.part = part
        self.config = config or SearchConfig()
        self.pace = pace

    def rerank_depth(self, seconds: float) -> int:
        """Return how many passages a search of so many seconds reranks: what fits in `SHARE` of them."""
        if self.pace <= 0 or self.config.rerank <= LEAST:
            return self.config.rerank
        return max(LEAST, int(min(self.config.rerank, SHARE * seconds / self.pace)))

    def deadline(self, budget_ms: int | None) -> Deadline:
        """Start the clock of a search."""
        return Deadline((self.config.budget_ms if budget_ms is None else budget_ms) / 1e3)

    def search(
        self,
        query: str,
        deadline: Deadline | None = None,
        mode: Mode | None = None,
        rerank: bool | None = None,
        allowed: NDArray[np.bool_] | None = None,
    ) -> Searched:
        """Return the passages found for a query, best first.

        Args:
            query: the text.
            deadline: when to stop; None takes the time it needs, as evaluation does.
            mode: first stage; the best the bundle has if absent.
            rerank: whether the head is reranked, if the bundle has a reranker; None leaves it to the query: where one
                passage covers it the first stage decides, unless `rerank_covered`.
            allowed: bool [V] items that may be found; None for all. A passage of others alone is not looked at.

        Raises:
            RequestError: 409 for vectors from a bundle without an encoder.
        """
        clock = Clock()
        degraded: list[str] = []
        ranking, used, covered = self._first_stage(query, mode, deadline, degraded, clock, allowed)
        rows = ranking.rows[0][ranking.rows[0] >= 0]
        found = Searched(
            rows=rows,
            scores=ranking.scores[0][: len(rows)],
            first=np.arange(1, len(rows) + 1),
            reranked=0,
            truncated=np.zeros(len(rows), bool),
            mode=used,
            degraded=(),
            timings={},
            covered=False,
            query=query,
            part=self.part,
            allowed=allowed,
            config=self.config,
        )
        if rerank is not False and self.part.reranker is not None and self.config.rerank and len(rows):
            if rerank is None and covered and not self.config.rerank_covered:
                found = replace(found, covered=True)
            else:
                found = self._reranked(found, query, deadline, degraded)
                clock.lap("rerank")
        return replace(found, degraded=tuple(degraded), timings=clock.seconds())

    def rerank(
        self, query: str, documents: Sequence[str], max_tokens: int, deadline: Deadline | None = None
    ) -> Reranked:
        """Score documents that were sent along, by the reranker, or by the encoder's cosine where there is none.

        Where a score does not depend on the other documents, those that there was time for keep theirs.

        Raises:
            RequestError: 409 for a bundle with neither.
        """
        part = self.part
        if part.tokenizer is None:
            raise RequestError(
                409, "not_supported", "the bundle has no text model; publish one with `--text-encoder` or `--reranker`"
            )
        distinct = list(dict.fromkeys(documents))
        scores, cut = np.full(len(distinct), -np.inf, np.float32), np.zeros(len(distinct), bool)
        whole = deadline is None or (part.reranker is not None and part.reranker.whole_list)
        each = len(distinct) if whole else DOCUMENTS_AT_ONCE
        done = 0
        with suppress(OutOfTimeError):
            while done < len(distinct):
                some = slice(done, done + each)
                scores[some], cut[some] = self._scored(query, distinct[some], max_tokens, deadline)
                done += each
        place = {text: number for number, text in enumerate(distinct)}
        order = [place[text] for text in documents]
        return Reranked(scores[order] if done else None, cut[order])

    def _scored(
        self, query: str, documents: Sequence[str], max_tokens: int, deadline: Deadline | None
    ) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Return scores [n] and which documents were cut; raises `OutOfTimeError`."""
        part, check = self.part, silent if deadline is None else deadline.check
        assert part.tokenizer is not None, "asked for only where there is a text model"
        passages, cut = shortened(part.tokenizer, documents, max_tokens, deadline)
        check(0, len(documents), "")
        if part.reranker is not None:
            return part.reranker.rerank(query, passages, check), cut | part.reranker.truncated(query, passages)
        assert part.encoder is not None, "a tokenizer comes with a model"
        vector = part.encoder.encode_queries([query])
        return part.encoder.encode_passages(passages, check) @ vector[0], cut | part.encoder.truncated(passages)

    def _first_stage(
        self,
        query: str,
        mode: Mode | None,
        deadline: Deadline | None,
        degraded: list[str],
        clock: Clock,
        allowed: NDArray[np.bool_] | None,
    ) -> tuple[Ranking, Mode, bool]:
        part, depth = self.part, self.config.depth
        if part.encoder is None or part.index is None:
            if mode in ("dense", "hybrid"):
                raise RequestError(
                    409, "not_supported", f"mode {mode!r} needs vectors; publish the bundle with `--text-encoder`"
                )
            mode = "bm25"
        mode = mode or "hybrid"
        if mode == "hybrid" and deadline is not None and deadline.left <= 0:
            degraded.append("dense")
            mode = "bm25"
        lexical = dense = None
        coverage = np.zeros(1)
        places = max(depth, POOL) if mode == "hybrid" or allowed is not None else depth
        shown = None if allowed is None else part.passages.allows(allowed)
        if shown is not None and shown.all():
            shown = None
        if mode != "dense":
            lexical = part.bm25.search([query], places, shown)
            coverage = part.bm25.coverage([query], lexical, part.passages.text)
            clock.lap("bm25")
        if mode != "bm25":
            try:
                dense = self._dense(query, places, clock, shown)
            except Exception:
                if deadline is None or lexical is None:
                    raise
                logger.exception("vectors failed; the answer goes by words alone")
                degraded.append("dense")
                mode = "bm25"
        if lexical is None or dense is None:
            found = lexical if dense is None else dense
            assert found is not None, "every mode has a first stage"
            return found.top(depth), mode, bool(coverage[0] >= COVERED)
        found = part.mix.fuse(lexical, dense, coverage, depth)
        clock.lap("fuse")
        return found, mode, bool(coverage[0] >= COVERED)

    def _dense(self, query: str, depth: int, clock: Clock, shown: NDArray[np.bool_] | None) -> Ranking:
        assert self.part.encoder is not None, "asked for only where there are vectors"
        vector = self.part.encoder.encode_queries([query])
        clock.lap("encode_query")
        found = self.part.nearest(vector, depth, shown)
        clock.lap("dense")
        return found

    def _reranked(self, found: Searched, query: str, deadline: Deadline | None, degraded: list[str]) -> Searched:
        """Order the head anew, or leave it and say so if there is no time for it."""
        reranker = self.part.reranker
        assert reranker is not None, "asked for only where there is one"
        depth = self.config.rerank
        if deadline is not None and self.pace > 0:
            depth = self.rerank_depth(min(deadline.seconds, deadline.left / SHARE))  # after a long queue less is left
        head = found.rows[:depth]
        texts = [self.part.passages.text(row) for row in head.tolist()]
        try:
            if deadline is not None:
                deadline.check(0, len(texts))
            texts, cut = readable(self.part, texts, deadline)
            scores = reranker.rerank(query, texts, silent if deadline is None else deadline.check)
        except OutOfTimeError:
            degraded.append("rerank")
            return found
        except Exception:
            if deadline is None:
                raise
            logger.exception("the reranker failed; the answer does without")
            degraded.append("rerank")
            return found
        order = np.argsort(-scores, kind="stable")
        every = np.concatenate([order, np.arange(len(head), len(found))])
        truncated = found.truncated.copy()
        truncated[: len(head)] = cut | reranker.truncated(query, texts)
        return replace(
            found,
            rows=found.rows[every],
            scores=np.concatenate([scores[order], found.scores[len(head) :]]),
            first=found.first[every],
            truncated=truncated[every],
            reranked=len(head),
        )


def readable(
    part: SearchPart, texts: Sequence[str], deadline: Deadline | None = None
) -> tuple[list[str], NDArray[np.bool_]]:
    """Cut texts far behind what the reranker reads of them, so that it scores as before; gives them and which were cut.

    Its tokenizer would read all of a text to leave out most: 20 texts of 222 kB took it over a second. What it reads is
    `max_len` of its config; twice as many tokens are left, so that no word it reads is cut in two.
    """
    most = getattr(getattr(part.reranker, "config", None), "max_len", None)
    if most is None or part.tokenizer is None:
        return list(texts), np.zeros(len(texts), bool)
    return shortened(part.tokenizer, texts, 2 * most, deadline)


def shortened(
    tokenizer: TextTokenizer, texts: Sequence[str], tokens: int, deadline: Deadline | None = None
) -> tuple[list[str], NDArray[np.bool_]]:
    """Cut texts after so many tokens; gives them and bool [n], which were cut."""
    cut = np.zeros(len(texts), bool)
    short = list(texts)
    for place, given in enumerate(texts):
        if deadline is not None:
            deadline.check(place, len(texts))
        text = given
        most = tokens * CHARACTERS_PER_TOKEN
        if len(text) > most:  # blanks are no tokens, and there may be any number of them
            text = " ".join(text.split())
        if len(text.encode()) <= tokens:  # a token has a byte at least
            continue
        offsets = _offsets(tokenizer, text, tokens)
        cut[place] = len(offsets) > tokens or len(text) > most
        if cut[place]:
            short[place] = text[: offsets[tokens - 1][1]] if len(offsets) >= tokens else text[:most]
    return short, cut


def _offsets(tokenizer: TextTokenizer, text: str, tokens: int) -> list[tuple[int, int]]:
    """Return where a text's tokens stand, more than `tokens` of them if it has so many."""
    blank = text.rfind(" ", 0, tokens * OFTEN_ENOUGH) if len(text) > tokens * OFTEN_ENOUGH else 0
    for end in (blank, tokens * CHARACTERS_PER_TOKEN):  # a word cut in two might be other tokens
        found: list[tuple[int, int]] = tokenizer.tokenizer.encode(text[: max(end, 0)], add_special_tokens=False).offsets
        if len(found) > tokens:
            break
    return found
