"""How a log becomes requests: the settings of `prepare`."""

from dataclasses import dataclass, field
from typing import Annotated

from pydantic import Field

from pipelines.splits import SplitConfig

MAX_BUCKETS = 4096


@dataclass(frozen=True)
class PrepareConfig:
    """How a log becomes requests.

    Attributes:
        split: which requests train, validate and test.
        positive: names of the actions that are positives; empty means all. Histories keep every action.
        min_value: an event is a positive only if its `value` is at least this (a rating, say); None asks for none.
        columns: categorical columns of the item table; None codes every text column the catalogue has.
        multi: columns of several values per item; None takes every list the catalogue has.
        numeric: columns of the item table's dense part; None takes every column of numbers not named in `columns`.
        samplers: fixed candidates are drawn once by each of these (`pipelines.samplers.SAMPLERS`).
        negatives: sampled negatives per validation or test request.
        max_eval_requests: validation requests kept, and test requests likewise, chosen by hash: always the same, and
            those of a smaller number are among those of a larger one. None keeps all.
        transitions_top_n: heaviest transitions kept per item; 0 keeps all. 200 of the grocery set's keep 73 % of the
            weight in 39 MB; all are 99 MB.
        appendable: keep what `append` needs beside the set: 8 bytes per pair of items bought one after the other.
        seed: of the choice of evaluation requests and of the candidates.
        buckets: user buckets; None makes one per 250,000 events. Changes memory and time, never the result.
        workers: processes; None takes one per core, one alone for a small log. Never changes the result.
    """

    split: SplitConfig = field(default_factory=SplitConfig)
    positive: tuple[str, ...] = ()
    min_value: float | None = None
    columns: tuple[str, ...] | None = None
    multi: tuple[str, ...] | None = None
    numeric: tuple[str, ...] | None = None
    samplers: tuple[str, ...] = ("uniform", "popularity")
    negatives: Annotated[int, Field(ge=1)] = 100
    max_eval_requests: Annotated[int, Field(ge=1)] | None = None
    transitions_top_n: Annotated[int, Field(ge=0)] = 200
    appendable: bool = True
    seed: int = 0
    buckets: Annotated[int, Field(ge=1, le=MAX_BUCKETS)] | None = None
    workers: Annotated[int, Field(ge=1)] | None = None
