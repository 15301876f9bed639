"""Answers that were shown, as requests whose candidates and labels are real.

The split `impressions` holds those of the test period, `valid_impressions` those of the validation period.

A request is one answer: its moment, the user's history strictly before it, the items that were shown, and whether each
was taken. Nothing is sampled, so a model's scores can be held against the rate at which items were taken.

Left out are users without any event and items that the catalogue lacks. Only under the split `time`: there the periods
are the same for all, and what was shown in these two no model has trained on.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray

from pipelines.buckets import FIRST_ROW, USER_ROW
from pipelines.candidates import request_keys
from pipelines.mixing import mix
from pipelines.parts import Part
from pipelines.prepared import IMPRESSIONS, VALID_IMPRESSIONS, CandidateSets, Requests, Split
from pipelines.splits import NEVER, Cuts
from recsys.columns import ITEM_ID, ITEM_KEY, LABEL, REQUEST_ID, TIMESTAMP, USER_ID
from recsys.history import Histories
from recsys.randomness import derive

COLUMNS = (REQUEST_ID, USER_ID, ITEM_ID, TIMESTAMP, LABEL)


def shown_in(parts: Sequence[Part], before: Path | None = None) -> pl.DataFrame | None:
    """Return the impressions of the parts, after those kept in `before`; None if there are none.

    Those of users who asked to be forgotten are left out, as their events are.
    """
    frames = [pl.read_parquet(before)] if before is not None and before.exists() else []
    for part in parts:
        path = part.directory / f"{IMPRESSIONS}.parquet"
        if path.exists():
            frames.append(pl.read_parquet(path, columns=list(COLUMNS)).filter(~pl.col(USER_ID).is_in(part.hidden)))
    return pl.concat(frames, rechunk=True) if frames else None


def write_shown(
    out: Path,
    shown: pl.DataFrame,
    people: pl.DataFrame,
    items: pl.DataFrame,
    histories: Histories,
    cuts: Cuts,
    at_most: int | None,
    hashes: NDArray[np.uint64],
    seed: int,
) -> dict[Split, dict[str, int]]:
    """Write the requests and candidates of the answers of each period; give the counts of those that have any.

    Args:
        out: the prepared set.
        shown: what `shown_in` gave.
        people: user_id, user_row.
        items: item_id, item_key.
        histories: of all users.
        cuts: of the split.
        at_most: requests kept, chosen by hash as other evaluated requests; None keeps all.
        hashes: of each history row.
        seed: of the choice.
    """
    if cuts.kind != "time":
        return {}
    rows = _numbered(shown, people, items)
    periods: tuple[tuple[Split, int, int], ...] = (
        (VALID_IMPRESSIONS, cuts.valid, cuts.test),
        (IMPRESSIONS, cuts.test, NEVER),
    )
    found = {split: rows.filter(pl.col("at").is_between(start, end, closed="left")) for split, start, end in periods}
    return {
        split: _write(out, split, part, histories, at_most, hashes, seed)
        for split, part in found.items()
        if part.height
    }


def _write(
    out: Path,
    split: Split,
    rows: pl.DataFrame,
    histories: Histories,
    at_most: int | None,
    hashes: NDArray[np.uint64],
    seed: int,
) -> dict[str, int]:
    """Write the answers of one period; give their counts."""
    starts = np.flatnonzero(rows["first"].to_numpy())
    requests = _requests(rows, starts, histories)
    sets = CandidateSets(
        np.append(starts, rows.height), rows["row"].to_numpy().astype(np.int32), rows[LABEL].to_numpy().astype(np.uint8)
    )
    if at_most is not None and len(requests) > at_most:
        words = mix(request_keys(requests, hashes) ^ np.uint64(derive(seed, 0, "evaluated requests")))
        kept = np.sort(np.argsort(words, kind="stable")[:at_most])
        requests, sets = requests.take(kept), sets.take(kept)
    requests.save(out / "requests" / f"{split}.safetensors")
    sets.save(out / "candidates" / f"{split}_{IMPRESSIONS}.safetensors")
    return {"requests": len(requests), "shown": len(sets.item), "taken": int(sets.label.sum())}


def _numbered(shown: pl.DataFrame, people: pl.DataFrame, items: pl.DataFrame) -> pl.DataFrame:
    """Return user_row, at, row, label by request (at, user), what was taken first; `first` marks a request's first row.

    An item shown twice in one answer is one candidate.
    """
    answer = (USER_ROW, REQUEST_ID)
    return (
        shown.lazy()
        .join(people.lazy().select(USER_ID, USER_ROW), on=USER_ID)
        .join(items.lazy().select(ITEM_ID, ITEM_KEY), on=ITEM_ID)
        .group_by(*answer, (pl.col(ITEM_KEY).cast(pl.Int32) + FIRST_ROW).alias("row"))
        .agg(pl.col(TIMESTAMP).min(), pl.col(LABEL).max())
        .with_columns(pl.col(TIMESTAMP).min().over(answer).alias("at"))
        .sort("at", *answer, LABEL, "row", descending=[False, False, False, True, False])
        .with_columns(first=(pl.struct(answer) != pl.struct(answer).shift(1)).fill_null(True))
        .collect()
    )


def _requests(rows: pl.DataFrame, starts: NDArray[np.int64], histories: Histories) -> Requests:
    """Return the requests that begin at `starts`; what was taken are their positives."""
    user = rows[USER_ROW].to_numpy()[starts].astype(np.int64)
    at = rows["at"].to_numpy()[starts]
    offsets, time = np.asarray(histories.offsets), np.asarray(histories.events.time)
    end = [
        offsets[one] + np.searchsorted(time[offsets[one] : offsets[one + 1]], moment)
        for one, moment in zip(user, at, strict=True)
    ]
    taken = rows[LABEL].to_numpy() > 0
    sizes = np.add.reduceat(taken.astype(np.int64), starts)
    return Requests(
        user,
        at,
        np.array(end, np.int64),
        np.concatenate([[0], np.cumsum(sizes)]),
        rows["row"].to_numpy()[taken].astype(np.int32),
    )
