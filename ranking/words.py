"""The words of a text for BM25: two letters or more, or a digit, in lower case, without stop-words, not stemmed.

Accents count for nothing (`creme` finds `crème`, `strasse` finds `straße`, `lodz` finds `łódź`), nor do the points of
Hebrew and Arabic, nor what nobody sees (soft hyphens, joiners, marks of direction), nor how a letter is encoded. Marks
of other scripts are parts of words: vowel signs and viramas of Hindi, Bengali or Tamil, vowels and tones of Thai.
Chinese and Japanese write no blanks: each of their signs is a word, and so is each pair of neighbours. Other writing
without blanks is not cut.

Codes are also found as one word: `WH-1000XM4` is `wh`, `1000xm4` and `wh1000xm4`. A code is what hyphens join and has a
letter and a digit.
"""

import re
import unicodedata
from collections.abc import Sequence
from functools import cache
from itertools import groupby, pairwise
from typing import Any

UNSPELT, RULES = 1, 2
"""Versions of these rules: an index is asked by those it was made by. The first kept the letters of `_SPELT`."""

_SPELT = str.maketrans({"æ": "ae", "œ": "oe", "þ": "th"} | dict(zip("øłđðħı", "olddhi", strict=True)))
"""letters that Unicode does not take apart; `casefold` does ß"""
_SIGNS = "\u3041-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
"""kana and ideographs"""
_RUN = re.compile(f"[{_SIGNS}]+")
_ACCENTS = "\u0300-\u036f\u1ab0-\u1aff\u1dc0-\u1dff\u20d0-\u20ff\ufe20-\ufe2f"
_POINTS = "\u0591-\u05bd\u05bf\u05c1\u05c2\u05c4\u05c5\u05c7\u064b-\u065f\u0670"
"""of Hebrew, but for its hyphen and stops, and of Arabic"""
_UNSEEN = (
    "\u00ad\u0600-\u0605\u061c\u06dd\u070f\u0890\u0891\u08e2\u180e\u200c-\u200f\u202a-\u202e\u2060-\u2064\u2066-\u206f"
    "\ufe00-\ufe0f\ufeff\ufff9-\ufffb\U000110bd\U000110cd\U00013430-\U0001343f\U0001bca0-\U0001bca3"
    "\U0001d173-\U0001d17a\U000e0001\U000e0020-\U000e007f\U000e0100-\U000e01ef"
)
"""format characters (Cf) and variation selectors, but for U+200B: it stands where a line may break, as a blank"""
_DROPPED = re.compile(f"[{_ACCENTS}{_POINTS}{_UNSEEN}]")
_MARKED = re.compile("[\u0483-\u1cff\u2cef-\u302f\ua66f-\uabff\ufb1e\U00010000-\U0001efff]")
"""where the marks of other scripts are, among letters"""
_JOINED = re.compile(r"\b\w+(?:-\w+)+")
_LETTER = re.compile(rf"(?<![\w'\u2019-])[^\W\d_{_SIGNS}](?:\+\+|#)?(?![\w'\u2019-])")
_SMALL = frozenset("ai")
"""letters that are English words and say nothing"""
_WORD = rf"(?u)\b\w\w+\b|\b\d\b|[{_SIGNS}]"


def words_of(texts: Sequence[str], rules: int = RULES) -> list[list[str]]:
    """Return the words of each text, in their order, by the rules of an index."""
    written = [_with_codes(folded(text, rules)) for text in texts]
    found = _cut(written, _WORD)
    marked = [place for place, text in enumerate(written) if _has_marks(text)]
    for place, words in zip(marked, _cut([written[place] for place in marked], _marked_word()), strict=True):
        found[place] = words
    return found


def folded(text: str, rules: int = RULES) -> str:
    """Return a text without accents and with blanks between what are words; ASCII is returned as it is."""
    if text.isascii():
        return text
    plain = _DROPPED.sub("", unicodedata.normalize("NFKD", text)).replace("\u2010", "-")  # which U+2011 is by now
    if rules > UNSPELT:
        plain = plain.casefold().translate(_SPELT)
    return _RUN.sub(_signs, unicodedata.normalize("NFKC", plain))


def letters_of(text: str) -> set[str]:
    """Return the letters that stand alone, as in vitamin C or C++, which are no words; none of scripts with marks."""
    plain = folded(text).lower()
    return set() if _has_marks(plain) else set(_LETTER.findall(plain)) - _SMALL


def codes_of(text: str) -> list[list[str]]:
    """Return the parts of each code in a text."""
    if "-" not in text:
        return []
    found = (_marked_joined() if _has_marks(text) else _JOINED).findall(text)
    return [one.split("-") for one in found if any(map(str.isdecimal, one)) and any(map(str.isalpha, one))]


def _cut(texts: Sequence[str], pattern: str) -> list[list[str]]:
    if not texts:
        return []
    import bm25s

    found: list[list[str]] = bm25s.tokenize(
        texts, stopwords="en", token_pattern=pattern, show_progress=False, return_ids=False
    )
    return found


@cache
def _marks() -> str:
    """Return the marks (Mn, Mc) that `folded` leaves, those of kana aside, as ranges of a regex."""
    points = [ord(sign) for sign in map(chr, range(0x370, 0x20000)) if unicodedata.category(sign) in ("Mn", "Mc")]
    kept = [point for point in points if not 0x3041 <= point <= 0x30FF]
    runs = [list(run) for _, run in groupby(enumerate(kept), lambda numbered: numbered[1] - numbered[0])]
    return "".join(f"{chr(run[0][1])}-{chr(run[-1][1])}" for run in runs)


def _has_marks(text: str) -> bool:
    """Whether a text may need the patterns with marks, which take up to five times as long."""
    return not text.isascii() and _MARKED.search(text) is not None


@cache
def _marked_word() -> str:
    return rf"\w[\w{_marks()}]+|\b\d\b|[{_SIGNS}]"


@cache
def _marked_joined() -> re.Pattern[str]:
    part = rf"\w[\w{_marks()}]*"
    return re.compile(rf"\b(?<![{_marks()}]){part}(?:-{part})+")


def _with_codes(text: str) -> str:
    return " ".join([text, *map("".join, codes_of(text))])


def _signs(run: Any) -> str:
    signs: str = run[0]
    return f" {' '.join((*signs, *map(''.join, pairwise(signs))))} "
