"""Routes of the live table of unavailable items."""

from collections.abc import Callable, Iterable, Sequence
from typing import Annotated, Any

from fastapi import FastAPI, Query, Response
from pydantic import BeforeValidator, Field

from ranking.availability import AvailabilityFile
from recsys.errors import DataError, RequestError
from recsys.messages import Id, Message, Told

MAX_CHANGES = 100_000
"""Most items of one change."""
TOLD = 100
"""Most unknown items of a change that are named."""


def _sound(value: Any) -> Any:
    """Refuse at the first wrong entry, and more than there may be at once: to list all errors takes seconds."""
    if isinstance(value, dict):
        if len(value) > MAX_CHANGES:
            raise ValueError(f"{len(value)} items; one change may carry up to {MAX_CHANGES}")
        for item, can in value.items():
            if not isinstance(can, bool):
                raise ValueError(f"{item}: expected true or false, found {can!r:.100}")  # noqa: TRY004 - no 422 of others
    return value


class AvailabilityChange(Message):
    """Which items can be had from now on, and which cannot."""

    available: Annotated[dict[Id, bool], BeforeValidator(_sound)] = Field(
        min_length=1, max_length=MAX_CHANGES, description="item id -> whether it can be had; others stay as they are"
    )


class AvailabilityResponse(Message):
    """The items that are unavailable now."""

    unavailable: int = Field(description="how many items")
    item_ids: list[str] = Field(description="the first of them, in the order of their ids")
    unknown_item_ids: Told = Field(
        default=[], description="the first ids of the change that the bundle does not know; absent if none"
    )


def add_availability(
    app: FastAPI,
    table: AvailabilityFile,
    respond: Callable[..., Response],
    unknown: Callable[[Iterable[str]], Sequence[str]],
) -> None:
    """Add the routes that read and change a table.

    Args:
        app: the application.
        table: what the routes read and change.
        respond: makes a response of a message and its timings.
        unknown: gives those of some ids that the bundle does not know.
    """

    def answer(limit: int, unknown_item_ids: Sequence[str] = ()) -> Response:
        items, told = sorted(table.unavailable().item_ids), list(unknown_item_ids[:TOLD])
        return respond(AvailabilityResponse(unavailable=len(items), item_ids=items[:limit], unknown_item_ids=told), {})

    @app.put("/v1/availability", response_model=AvailabilityResponse, tags=["recommend"])
    def put(change: AvailabilityChange) -> Response:
        """Say which items can be had. Every replica of the machine keeps to it from its next request on.

        Ids that the bundle does not know are kept too, and named: a later bundle may know them.
        """
        try:
            table.put(change.available)
        except DataError as error:
            raise RequestError(409, "damaged_table", f"{error}; mend or remove the file, then say it again") from None
        except OSError as error:
            reason = f"the table cannot be written ({error.strerror}), so nothing is changed; send it again"
            raise RequestError(503, "table_unavailable", reason) from error
        return answer(0, unknown(change.available))

    @app.get("/v1/availability", response_model=AvailabilityResponse, tags=["look up"])
    def get(limit: Annotated[int, Query(ge=0, le=10_000)] = 100) -> Response:
        """Return the items that are unavailable now."""
        return answer(limit)
