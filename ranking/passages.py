"""What search finds: distinct texts, each with the documents that have it.

A catalogue of 68,509 grocery items has 17,739 distinct texts, so each is indexed and encoded once.

    N documents    P passages, the distinct texts
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from ranking.strings import StringTable
from recsys.errors import DataError

NO_ITEM = 0
"""Item row of a document that is not an item of the bundle."""


@dataclass(frozen=True)
class Passages:
    """Passages and their documents. Those of passage p lie at offsets[p]..offsets[p + 1], the weightiest first.

    Attributes:
        texts: [P].
        document_ids: [N].
        items: int32 [N], model row of each document, `NO_ITEM` where it is no item of the bundle.
        offsets: int64 [P + 1].
    """

    texts: StringTable
    document_ids: StringTable
    items: NDArray[np.int32]
    offsets: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.texts)

    @staticmethod
    def of(
        document_ids: Sequence[str],
        texts: Sequence[str],
        items: NDArray[np.int32] | None = None,
        weight: NDArray[np.int64] | None = None,
    ) -> "Passages":
        """Collapse documents of the same text.

        Args:
            document_ids: [N], distinct.
            texts: [N].
            items: int32 [N] model rows; none are items if absent.
            weight: int64 [N], which of several documents with the same text comes first; as given if absent.

        Raises:
            DataError: no document at all, or ids and texts of different number.
        """
        count = len(document_ids)
        if not count or len(texts) != count:
            raise DataError(f"{count} document ids and {len(texts)} texts; expected as many, and at least one")
        place: dict[str, int] = {}
        passage = np.array([place.setdefault(text, len(place)) for text in texts], np.int64)
        order = np.lexsort((-(np.zeros(count, np.int64) if weight is None else weight), passage))
        rows = np.zeros(count, np.int32) if items is None else items
        return Passages(
            StringTable.of(list(place)),
            StringTable.of([document_ids[number] for number in order.tolist()]),
            rows[order].astype(np.int32),
            np.concatenate([[0], np.cumsum(np.bincount(passage, minlength=len(place)))]).astype(np.int64),
        )

    def text(self, passage: int) -> str:
        """Return the text of a passage."""
        return self.texts[passage]

    def documents(self, passage: int, most: int, allowed: NDArray[np.bool_] | None = None) -> list[str]:
        """Return the ids of the first documents of a passage; see `allows`."""
        return [self.document_ids[number] for number in self._numbers(passage, allowed)[:most].tolist()]

    def count(self, passage: int, allowed: NDArray[np.bool_] | None = None) -> int:
        """Return how many documents have this text; see `allows`."""
        return len(self._numbers(passage, allowed))

    def allows(self, allowed: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Return bool [P]: which passages have a document that may be shown, as all may that are no items.

        Args:
            allowed: bool [V] by model row.
        """
        documents = (self.items == NO_ITEM) | allowed[self.items]
        shown: NDArray[np.bool_] = np.logical_or.reduceat(documents, self.offsets[:-1])
        return shown

    def _numbers(self, passage: int, allowed: NDArray[np.bool_] | None) -> NDArray[np.int64]:
        numbers = np.arange(self.offsets[passage], self.offsets[passage + 1], dtype=np.int64)
        if allowed is not None:
            items = self.items[numbers]
            numbers = numbers[(items == NO_ITEM) | allowed[items]]
        return numbers

    def items_of(
        self, passages: NDArray[np.int32], most: int | None = None, allowed: NDArray[np.bool_] | None = None
    ) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """Return the items of passages, in the order of the passages and the weightiest of each first.

        Args:
            passages: [n], distinct.
            most: items of one passage; None gives all.
            allowed: bool [V] by model row; None allows all.

        Returns:
            Item rows int32 [C], distinct, and int64 [C] the place in `passages` of each.
        """
        rows, places = [np.empty(0, np.int32)], [np.empty(0, np.int64)]
        for place, passage in enumerate(passages.tolist()):
            found = self.items[self.offsets[passage] : self.offsets[passage + 1]]
            found = found[found != NO_ITEM]
            if allowed is not None:
                found = found[allowed[found]]
            rows.append(found[:most])
            places.append(np.full(len(rows[-1]), place, np.int64))
        return np.concatenate(rows), np.concatenate(places)

    def save(self, path: Path) -> None:
        """Write one safetensors file."""
        tables = self.texts.tensors("text") | self.document_ids.tensors("document_id")
        numbers = {"items": torch.from_numpy(self.items), "offsets": torch.from_numpy(self.offsets)}
        save_file(tables | numbers, path)

    @staticmethod
    def load(path: Path) -> "Passages":
        """Memory-map what `save` wrote; raises `DataError` if its parts do not fit together."""
        tensors = load_file(path)
        texts = StringTable.from_tensors(tensors, "text", str(path))
        document_ids = StringTable.from_tensors(tensors, "document_id", str(path))
        try:
            items, offsets = tensors["items"].numpy(), tensors["offsets"].numpy()
        except KeyError as error:
            raise DataError(f"{path}: no tensor {error}; publish again") from None
        if len(offsets) != len(texts) + 1 or int(offsets[-1]) != len(document_ids) or len(items) != len(document_ids):
            raise DataError(f"{path}: {len(texts)} texts, {len(document_ids)} documents and their offsets do not fit")
        return Passages(texts, document_ids, items, offsets)
