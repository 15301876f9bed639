"""Small logs with impressions, and how they are prepared and evaluated, for tests of what was shown."""

from dataclasses import replace
from pathlib import Path

import polars as pl
from logs import Line, raw

from pipelines.evaluation import EvaluateConfig
from pipelines.ingest import ingest
from pipelines.prepare import PrepareConfig
from pipelines.prepared import IMPRESSIONS
from pipelines.splits import SplitConfig

CONFIG = PrepareConfig(split=SplitConfig(valid_days=10, test_days=30), negatives=3, workers=1)
EVALUATE = EvaluateConfig(split=IMPRESSIONS, samplers=(IMPRESSIONS,), resamples=20, full_ranking_requests=5)
SCHEMA = {
    "request_id": pl.String,
    "user_id": pl.String,
    "item_id": pl.String,
    "timestamp": pl.Int64,
    "label": pl.UInt8,
}


def ingested(lines: list[Line], rows: list[tuple[str, str, str, int, int]], folder: Path) -> Path:
    ingest(replace(raw(lines, folder.name), impressions=pl.LazyFrame(rows, SCHEMA, orient="row")), folder)
    return folder
