"""Corpora of passages with queries and judgements: any folder in BEIR's layout, or the catalogue of a log.

corpus.jsonl      {"_id", "title", "text"} per line
queries.jsonl     {"_id", "text"} per line
qrels/SPLIT.tsv   query-id, corpus-id, score, with a header
"""

import csv
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from recsys.columns import ITEM_ID, TEXT
from recsys.errors import DataError

FIELDS = 3
"""Of a line of judgements."""
ITSELF = -(2**31)
"""Grade of the document that a query is: it stands in no ranking (`pipelines.text_measures.measure`)."""

_HEADER = re.compile(r"\s*(query|q)[-_ ]?id\b|\s*(query|topic)\s*$", re.IGNORECASE)


@dataclass(frozen=True)
class Corpus:
    """Passages in a fixed order; a passage's row is its place in it."""

    name: str
    ids: list[str]
    passages: list[str]  # title + " " + text, stripped
    items: list[list[str]] | None = None  # of a catalogue: the items that have this very text

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Queries:
    """Queries with their judged passages.

    Attributes:
        ids: of the queries.
        texts: of the queries.
        grades: per query, passage row -> grade; a passage without a grade counts 0, `ITSELF` not at all.
    """

    ids: list[str]
    texts: list[str]
    grades: list[dict[int, int]]

    def __len__(self) -> int:
        return len(self.ids)

    def only(self, places: Sequence[int]) -> "Queries":
        """Return the queries at some places."""
        return Queries(*([part[place] for place in places] for part in (self.ids, self.texts, self.grades)))  # type: ignore[arg-type]

    def with_positive(self) -> "Queries":
        """Return the queries that have a passage of a grade above 0."""
        return self.only([place for place, known in enumerate(self.grades) if max(known.values(), default=0) > 0])

    def __add__(self, other: "Queries") -> "Queries":
        return Queries(self.ids + other.ids, self.texts + other.texts, self.grades + other.grades)


def read_corpus(directory: Path) -> Corpus:
    """Read `corpus.jsonl` of a BEIR folder; raises `DataError` naming the line that is not as it should be."""
    path = directory / "corpus.jsonl"
    ids: list[str] = []
    passages: list[str] = []
    first_line: dict[str, int] = {}
    for number, record in _lines(path):
        key = _string(path, number, record, "_id")
        if key in first_line:
            raise DataError(f"{path}:{number}: _id {key!r} was on line {first_line[key]} already; ids must be unique")
        first_line[key] = number
        title = _string(path, number, record, "title", "")
        text = _string(path, number, record, "text", "" if title else None)
        ids.append(key)
        passages.append(f"{title} {text}".strip())
    if not ids:
        raise DataError(f"{path}: 0 documents; expected one JSON object per line")
    return Corpus(directory.resolve().name, ids, passages)  # part of the hold-out hash: "." has the folder's name


def read_queries(directory: Path, corpus: Corpus, split: str) -> Queries:
    """Read the queries of `qrels/SPLIT.tsv`; raises `DataError` for judgements of unknown queries or documents.

    A query that is a document of the corpus, by its id and its words (ArguAna, Quora), has that document graded
    `ITSELF` unless it is judged relevant.
    """
    path = directory / "queries.jsonl"
    texts: dict[str, str] = {}
    for number, record in _lines(path):
        key = _string(path, number, record, "_id")
        if key in texts:
            raise DataError(f"{path}:{number}: _id {key!r} was there before; ids must be unique")
        texts[key] = _string(path, number, record, "text")
    judgements = directory / "qrels" / f"{split}.tsv"
    row = {key: place for place, key in enumerate(corpus.ids)}
    grades: dict[str, dict[int, int]] = {}
    unknown: list[str] = []
    for query, document, grade in _judgements(judgements):
        if query not in texts:
            raise DataError(f"{judgements}: query {query!r} is not in {path}")
        if document not in row:
            unknown.append(document)
            continue
        known = grades.setdefault(query, {}).setdefault(row[document], grade)
        if known != grade:
            raise DataError(
                f"{judgements}: query {query!r} and document {document!r} have grades {known} and {grade}; expected one"
            )
    if unknown:
        raise DataError(
            f"{judgements}: {len(unknown)} judgements of documents that are not in corpus.jsonl, first five: "
            f"{', '.join(unknown[:5])}; mend the file or use the corpus it was made for"
        )
    for key, known_grades in grades.items():
        own = row.get(key)
        if own is None or known_grades.get(own, 0) > 0:
            continue
        asked = normalised(texts[key])
        if asked and asked in normalised(corpus.passages[own]):  # Cranfield and MED number both from 1: other texts
            known_grades[own] = ITSELF
    return Queries(list(grades), [texts[key] for key in grades], list(grades.values()))


def normalised(text: str) -> str:
    """Return a text in lower case with single blanks: passages of equal normalised text are one passage."""
    return " ".join(text.lower().split())


def catalogue_corpus(items: Path, name: str = "catalogue") -> Corpus:
    """Return the catalogue of a log as passages: every distinct item text once, with the items that have it.

    Args:
        items: `items.parquet` of a canonical log.
        name: of the corpus, part of the hold-out hash.
    """
    try:
        table = pl.read_parquet(items, columns=[ITEM_ID, TEXT])
    except (OSError, pl.exceptions.PolarsError) as error:
        raise DataError(f"{items}: no catalogue with columns {ITEM_ID} and {TEXT}: {error}") from None
    grouped = (
        table.with_columns(pl.col(TEXT).str.strip_chars())
        .filter(pl.col(TEXT).is_not_null() & (pl.col(TEXT) != "") & (pl.col(TEXT) != pl.col(ITEM_ID)))
        .group_by(TEXT, maintain_order=True)
        .agg(ITEM_ID)
    )
    if grouped.is_empty():
        raise DataError(f"{items}: no item has a text; map a text column (`recsys init`) to search the catalogue")
    texts, members = grouped[TEXT].to_list(), grouped[ITEM_ID].to_list()
    return Corpus(name, [str(group[0]) for group in members], texts, members)


def _lines(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    record = json.loads(line)
                except json.JSONDecodeError as error:
                    raise DataError(f"{path}:{number}: not JSON, {error.msg} at column {error.colno}") from None
                except RecursionError:
                    raise DataError(f"{path}:{number}: JSON nested too deep; expected an object of strings") from None
                if not isinstance(record, dict):
                    raise DataError(f"{path}:{number}: expected a JSON object, found {type(record).__name__}")
                yield number, record
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; a corpus folder has corpus.jsonl, queries.jsonl and qrels/") from None
    except NotADirectoryError:
        raise DataError(f"{path.parent}: a file; expected the folder that holds corpus.jsonl") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 ({error.reason} at byte {error.start})") from None


def _string(path: Path, number: int, record: Mapping[str, Any], key: str, default: str | None = None) -> str:
    value = record.get(key, default)
    if value is None and default is not None:
        return default
    if key == "_id" and type(value) is int:
        return str(value)
    if not isinstance(value, str):
        found = "nothing" if value is None else f"{type(value).__name__} {value!r:.40}"
        raise DataError(f"{path}:{number}: {key} must be a string, found {found}")
    if key == "_id" and not value:
        raise DataError(f"{path}:{number}: _id is empty; expected the name of a document or query")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise DataError(f"{path}:{number}: {key} has half of a surrogate pair, as of an emoji cut in two") from None
    return value


def _judgements(path: Path) -> Iterator[tuple[str, str, int]]:
    """Yield query, document and grade of every line but a header, which begins as `query-id` or the like."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            for number, fields in enumerate(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE), 1):
                if not any(field.strip() for field in fields) or (number == 1 and _HEADER.match(fields[0])):
                    continue
                if len(fields) != FIELDS or not _is_grade(fields[2]):
                    raise DataError(f"{path}:{number}: expected query-id, corpus-id and a whole number, found {fields}")
                yield fields[0], fields[1], int(float(fields[2]))
    except FileNotFoundError:
        known = sorted(other.stem for other in path.parent.glob("*.tsv"))
        raise DataError(f"{path}: no such split; there are {', '.join(known) or 'none'}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 ({error.reason} at byte {error.start})") from None


def _is_grade(text: str) -> bool:
    try:
        return float(text).is_integer()
    except ValueError:
        return False
