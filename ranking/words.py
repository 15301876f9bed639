"""The words of a text for BM25: two letters or more, in lower case, without English stop-words, not stemmed.

Accents count for nothing (`creme` finds `crème`), nor does how a letter is encoded. Chinese and Japanese write no
blanks: each of their signs is a word, and so is each pair of neighbours. Other writing without blanks is not cut.

Codes are also found as one word: `WH-1000XM4` is `wh`, `1000xm4` and `wh1000xm4`. A code is what hyphens join and has a
letter and a digit.
"""

import re
import unicodedata
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

_SIGNS = "\u3041-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
"""kana and ideographs"""
_RUN = re.compile(f"[{_SIGNS}]+")
_ACCENTS = re.compile("[\u0300-\u036f]")
_JOINED = re.compile(r"\b\w+(?:-\w+)+")
_WORD = rf"(?u)\b\w\w+\b|[{_SIGNS}]"


def words_of(texts: Sequence[str]) -> list[list[str]]:
    """Return the words of each text, in their order."""
    import bm25s

    found: list[list[str]] = bm25s.tokenize(
        [_with_codes(folded(text)) for text in texts],
        stopwords="en",
        token_pattern=_WORD,
        show_progress=False,
        return_ids=False,
    )
    return found


def folded(text: str) -> str:
    """Return a text without accents and with blanks between what are words; ASCII is returned as it is."""
    if text.isascii():
        return text
    plain = _ACCENTS.sub("", unicodedata.normalize("NFKD", text))
    return _RUN.sub(_signs, unicodedata.normalize("NFKC", plain))


def codes_of(text: str) -> list[list[str]]:
    """Return the parts of each code in a text."""
    if "-" not in text:
        return []
    found = _JOINED.findall(text)
    return [one.split("-") for one in found if any(map(str.isdecimal, one)) and any(map(str.isalpha, one))]


def _with_codes(text: str) -> str:
    return " ".join([text, *map("".join, codes_of(text))])


def _signs(run: Any) -> str:
    signs: str = run[0]
    return f" {' '.join((*signs, *map(''.join, pairwise(signs))))} "
