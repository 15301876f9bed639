"""Embedding tables, and the item | category | position | action fields that the target-attention models share.

An item reads the row `items.embedding_row` names: its own if it had training events, else row 1, "unknown". Its
category is read whether it was trained or not, so a new item is an unknown item of a known category. What an event was
(a view, a purchase) is a field of its own, that no paper here has: with a width of 0 all actions are alike.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ranking.batch import PAD, UNKNOWN, Padded
from ranking.items import ItemTable
from ranking.rows import fetch
from recsys.errors import ConfigError

INIT_STD = 0.01
ACTIONS = 256
"""Codes that an action can have; 0 is none, or one that no bundle knew."""

PositionMode = Literal["slot", "group"]
"""`slot`: every event has its own position. `group`: events of one moment (a basket) share a position."""


@dataclass(frozen=True)
class FieldWidths:
    """Columns of each field of a representation; a width of 0 leaves the field out.

    Attributes:
        item: learned vector of the item itself.
        category: learned vector of its category, the mean of them where an item has several.
        position: learned vector of how far back an event lies.
        action: learned vector of what the user did; for logs of several actions.
    """

    item: int = 16
    category: int = 16
    position: int = 16
    action: int = 0

    def __post_init__(self) -> None:
        if min(self.item, self.category, self.position, self.action) < 0 or self.item + self.category == 0:
            raise ConfigError(
                f"field widths item={self.item}, category={self.category}, position={self.position}, "
                f"action={self.action}: expected none negative, and item or category above 0"
            )


class ItemEmbedding(nn.Module):
    """One table float32 [rows, width], N(0, 0.01); row 0 is zero and is never trained.

    Gradients are sparse, so that an optimiser touches only the rows a batch has read: dense ones would cost a pass over
    the whole table at every step.

    Args:
        rows: number of rows, counting padding.
        width: number of columns.
    """

    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        weight = torch.randn(rows, width) * INIT_STD
        weight[PAD] = 0.0
        self.weight = nn.Parameter(weight)

    def forward(self, row: Tensor) -> Tensor:
        """Return float32 [..., width] for integer rows [...]."""
        return self.each(row)[0]

    def each(self, *rows: Tensor) -> tuple[Tensor, ...]:
        """Return the same for several tensors of rows, whose gradients are summed in one go."""
        if self.weight.device.type == "cpu":
            return fetch(self.weight, *rows)
        return tuple(F.embedding(row, self.weight, padding_idx=PAD, sparse=True) for row in rows)

    def mean(self, row: Tensor, start: Tensor) -> Tensor:
        """Return float32 [n, width], means of runs of rows: run i is row[start[i]] .. row[start[i + 1]], both int64.

        Padding is left out of a mean; a run of nothing else gives zero.
        """
        return F.embedding_bag(row, self.weight, start, mode="mean", sparse=True, padding_idx=PAD)


class EventTable(nn.Module):
    """One table float32 [kinds + 1, width], N(0, 0.01), of what events have and items have not.

    Row 0 is the candidate; an event reads row 1 ..: its position, the newest being 1, or its action's code plus 1.
    """

    def __init__(self, kinds: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(kinds + 1, width) * INIT_STD)

    def forward(self, row: Tensor) -> Tensor:
        """Return float32 [..., width] for rows [...] in 0..kinds."""
        return F.embedding(row, self.weight)

    def to_candidate(self) -> Tensor:
        """Return the inner product of every row with the candidate's, [kinds + 1]."""
        return (self.weight * self.weight[0]).sum(1)


class ActionTable(EventTable):
    """The table of actions. They start at zero, so one without training events says nothing."""

    def __init__(self, width: int) -> None:
        super().__init__(ACTIONS, width)
        with torch.no_grad():
            self.weight[1:] = 0.0


def sparse_parameters(module: nn.Module) -> list[nn.Parameter]:
    """Return the parameters of a model whose gradients are sparse: they need an optimiser that takes such gradients."""
    return [part.weight for part in module.modules() if isinstance(part, ItemEmbedding)]


def network_weights(module: nn.Module) -> Iterator[nn.Parameter]:
    """Yield the parameters that are neither embeddings nor biases: those that a weight penalty is for."""
    tables = {id(part.weight) for part in module.modules() if isinstance(part, ItemEmbedding | EventTable)}
    for name, parameter in module.named_parameters():
        if id(parameter) not in tables and not name.endswith("bias"):
            yield parameter


def hide_items(items: ItemTable, rate: float, generator: torch.Generator) -> Tensor:
    """Return an `embedding_row` int32 [V] in which a random share of all items reads the unknown row.

    An item is hidden from history and candidates alike, as an item first seen after training would be: the unknown row
    learns what such items have in common, and a repeat of an unknown item still looks like a repeat.
    """
    if rate == 0:
        return items.embedding_row
    draw = torch.rand(len(items), generator=generator, device=generator.device).to(items.embedding_row.device)
    hidden = draw < rate
    hidden[PAD] = False
    return items.embedding_row.masked_fill(hidden, UNKNOWN)


def take(table: Tensor, row: Tensor) -> Tensor:
    """Return table[row], shaped as row, for a table [V]; several times faster than indexing with brackets."""
    return table.index_select(0, row.reshape(-1)).view(row.shape)


def positions(time: Tensor, mask: Tensor, mode: PositionMode) -> Tensor:
    """Return how far back each slot lies, int64 [B, T]: the newest event is 1 whatever the padding, padding is 0.

    In group mode the position is 1 + the number of distinct newer times, so that the order inside a basket, which
    carries nothing, has no effect.

    Args:
        time: int64 [B, T], ascending among the real events.
        mask: bool [B, T], True at real events.
        mode: what counts as one step back.
    """
    batch, length = mask.shape
    if mode == "slot":
        back = torch.arange(length, 0, -1, device=mask.device).expand(batch, length)
    else:
        newer = (time[:, 1:] != time[:, :-1]).long()  # [B, T-1] a new moment starts after this slot
        back = F.pad(newer.flip(1).cumsum(1).flip(1), (0, 1)) + 1
    return back.masked_fill(~mask, 0)


class Fields(nn.Module):
    """The concatenation item | category | position | action of an event or a candidate, float32 [..., D].

    Args:
        items: attributes by item row.
        widths: columns of each field.
        category: name of the categorical or multi-valued item column, or None for no category field.
        window: most positions a history can have.
    """

    def __init__(self, items: ItemTable, widths: FieldWidths, category: str | None, window: int) -> None:
        super().__init__()
        self.items = items
        self.category_name = category
        self.semantic_width = widths.item + (widths.category if category is not None else 0)
        self.width = self.semantic_width + widths.position + widths.action
        if self.semantic_width == 0:
            raise ConfigError("field widths: item is 0 and there is no category column; give item a width above 0")
        self.item = ItemEmbedding(len(items), widths.item) if widths.item else None
        self.category = (
            ItemEmbedding(items.codes(category), widths.category) if category is not None and widths.category else None
        )
        self.position = EventTable(window, widths.position) if widths.position else None
        self.action = ActionTable(widths.action) if widths.action else None

    def semantic(self, item: Tensor, row_of: Tensor) -> Tensor:
        """Return item | category, float32 [..., Di + Dc], for item rows [...].

        Args:
            item: int32 [...] item rows.
            row_of: int32 [V], the row that stands for each item: `items.embedding_row`, or that with some hidden.
        """
        return self.semantic_of(row_of, item)[0]

    def semantic_of(self, row_of: Tensor, *items: Tensor) -> tuple[Tensor, ...]:
        """Return the same for several tensors of item rows, as of history and candidates: one gradient for all."""
        parts = [] if self.item is None else [self.item.each(*(take(row_of, item) for item in items))]
        if self.category is not None:
            parts.append(self.categories(*items))
        return tuple(torch.cat(each, -1) for each in zip(*parts, strict=True)) if len(parts) > 1 else parts[0]

    def categories(self, *items: Tensor) -> tuple[Tensor, ...]:
        """Return the vectors of the items' categories, float32 [..., Dc]; the mean where a column holds several."""
        if self.category is None or self.category_name is None:
            raise ConfigError("these fields have no category; give one a name and a width")
        if self.category_name not in self.items.multi_columns:
            column = self.items.column(self.category_name)
            return self.category.each(*(take(column, item) for item in items))
        column_of = self.items.multi(self.category_name)
        means = (self.category.mean(*column_of.of(item.reshape(-1))) for item in items)
        return tuple(mean.view(*item.shape, mean.shape[1]) for mean, item in zip(means, items, strict=True))

    def history(self, padded: Padded, position: Tensor | None, row_of: Tensor) -> Tensor:
        """Return all fields of the events, float32 [B, T, D], exactly zero at padding."""
        return self.events(self.semantic(padded.item, row_of), position, padded.action, padded.mask)

    def events(self, semantic: Tensor, position: Tensor | None, action: Tensor, mask: Tensor) -> Tensor:
        """Join item | category [B, T, Di + Dc] with the vectors of positions and actions [B, T]; zero at padding."""
        parts = [semantic]
        if self.position is not None and position is not None:
            parts.append(self.position(position))
        if self.action is not None:
            parts.append(self.action(action.int() + 1))
        joined = torch.cat(parts, -1) if len(parts) > 1 else semantic
        return joined.masked_fill(~mask.unsqueeze(-1), 0.0)

    def candidate(self, item: Tensor, row_of: Tensor) -> Tensor:
        """Return all fields of the candidates, float32 [B, C, D]; the candidate's own rows stand for an event's."""
        semantic = self.semantic(item, row_of)
        first = torch.zeros(1, dtype=torch.int64, device=item.device)
        own = [table(first).expand(*item.shape, -1) for table in (self.position, self.action) if table is not None]
        return torch.cat([semantic, *own], -1) if own else semantic
