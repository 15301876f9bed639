"""Words of scripts with marks of their own, and of texts with signs that nobody sees."""

import re
import sys
import unicodedata
from itertools import pairwise

import bm25s
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ranking.words import folded, words_of


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("हिन्दी में खोज करें दिल्ली विश्वविद्यालय", "हिन्दी में खोज करें दिल्ली विश्वविद्यालय"),
        ("বাংলা ভাষা, ঘি", "বাংলা ভাষা ঘি"),
        ("தமிழ் மொழி", "தமிழ் மொழி"),
        ("ภาษาไทย", "ภาษาไทย"),
        ("العَرَبِيَّة", "العربية"),
        ("שָׁלוֹם", "שלום"),
        ("בית־ספר", "בית ספר"),  # its hyphen joins no word
        ("می\u200cخواهم", "میخواهم"),
        ("co\u00adoperation\ufeff", "cooperation"),
        ("green\u200btea", "green tea"),  # a line may break there
        ("WH\u20111000XM4", "wh 1000xm4 wh1000xm4"),
        ("মডেল-2", "মডেল 2 মডেল2"),
        ("❤\ufe0ftea 1\ufe0f\u20e3", "tea 1"),
        ("\u093fa \u093fx-1", "1"),  # a mark after no letter is of no word
        ("फ़ोन 6", "फ़ोन 6"),
        ("Straße STRASSE", "strasse strasse"),
        ("Smørrebrød Łódź ŒUVRE Æble", "smorrebrod lodz oeuvre aeble"),
        ("Đà Þór fríð Ħal ılık", "da thor frid hal ilik"),
        ("Οδυσσεύς ΟΔΥΣΣΕΥΣ", "οδυσσευσ οδυσσευσ"),
        ("デジタルカメラ", "デ ジ タ ル カ メ ラ デジ ジタ タル ルカ カメ メラ"),
    ],
)
def test_marks_are_parts_of_words_and_what_nobody_sees_is_not(text, words):
    assert sorted(words_of([text])[0]) == sorted(words.split())


SPELT = str.maketrans({"æ": "ae", "œ": "oe", "þ": "th", "ø": "o", "ł": "l", "đ": "d", "ð": "d", "ħ": "h", "ı": "i"})
LATIN = st.characters(min_codepoint=0, max_codepoint=0x36F, exclude_characters="\u00ad")


@given(
    st.text(alphabet=LATIN | st.characters(min_codepoint=0x1E00, max_codepoint=0x1EFF) | st.sampled_from("-茶カあ "))
)
def test_latin_chinese_and_japanese_words_do_not_hang_on_marks(text):
    """As they were before there were patterns with marks, written out once more."""
    signs = "\u3041-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
    plain = unicodedata.normalize("NFKC", re.sub("[\u0300-\u036f]", "", unicodedata.normalize("NFKD", text)))
    plain = unicodedata.normalize("NFKC", plain.casefold().translate(SPELT))
    cut = re.sub(f"[{signs}]+", lambda run: f" {' '.join((*run[0], *map(''.join, pairwise(run[0]))))} ", plain)
    words = cut if not text.isascii() else text
    joined = re.findall(r"\b\w+(?:-\w+)+", words)
    codes = [one for one in joined if any(map(str.isdecimal, one)) and any(map(str.isalpha, one))]
    expected = bm25s.tokenize(
        [" ".join([words, *(code.replace("-", "") for code in codes)])],
        stopwords="en",
        token_pattern=rf"\b\w\w+\b|\b\d\b|[{signs}]",
        show_progress=False,
        return_ids=False,
    )
    assert words_of([text]) == expected


def test_every_mark_and_every_format_character_is_seen_to():
    for sign in map(chr, range(0x370, sys.maxunicode + 1)):
        kind = unicodedata.category(sign)
        if kind in ("Mn", "Mc") and sign not in "\u3099\u309a":  # of kana, which are signs
            word = f"क{sign}त"
            assert words_of([word]) == [[folded(word).lower()]], hex(ord(sign))
        if kind == "Cf":
            assert len(words_of([f"ab{sign}cd"])[0]) == 1 + (sign == "\u200b"), hex(ord(sign))


def test_a_long_run_of_marks_is_read_in_one_go():
    for piece in ("कि-", "कि1-", "\u093fक", "\u093f", "क\u093f", "-\u093f1"):
        assert len(words_of([piece * 100_000])[0]) <= 100_001
