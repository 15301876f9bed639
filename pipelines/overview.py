"""What a person should see of a prepared set at once: how it is divided, and what makes figures on it say little."""

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from pipelines.just_before import caution, share_just_before
from pipelines.prepared import PreparedSet

FEWEST = 20
"""Requests of a period below which no figure on it says anything."""
NAMED = 6
"""Most actions that are named."""
LOOKED_AT = 2_000
"""Test requests whose positives are looked up in the moments before them."""


def overview(manifest: Mapping[str, Any]) -> dict[str, str]:
    """Return how many requests each period has and when the periods begin, in words, by what they are about."""
    counts = manifest["counts"]
    requests = ", ".join(f"{counts['requests'][split]:,} {split}" for split in ("train", "valid", "test"))
    cuts = manifest.get("cuts") or {}
    begin = {split: _day(cuts[split]) for split in ("valid", "test") if split in cuts}
    periods = f"validation from {begin['valid']}, test from {begin['test']} (UTC)" if begin else "each user's last two"
    return {"users": f"{counts['users']:,}", "items": f"{counts['items']:,}", "requests": requests, "periods": periods}


def warnings(manifest: Mapping[str, Any]) -> list[str]:
    """Return what will make figures on this set say little, each with what to do about it."""
    counts, config = manifest["counts"], manifest["config"]
    mend = "every user gives one to each, so it takes more users"
    if manifest.get("cuts"):
        mend = (
            "the periods count back from the newest event; give --set split.valid_days and --set split.test_days, or "
            "--set split.kind=last_request"
        )
    told = []
    for split, words in (("valid", "validation"), ("test", "test")):
        number = counts["requests"][split]
        if number < FEWEST:
            told.append(f"Only {number} {words} requests, on which figures say little: {mend}")
    if counts["trained_items"] < 2 * config["negatives"]:
        told.append(
            f"{config['negatives']} negatives a request out of {counts['trained_items']} items that were trained on: "
            "they repeat, so metrics with a cutoff say little; give --set negatives, a tenth of the items or less"
        )
    actions = manifest["actions"]
    if len(actions) > 1 and not config["positive"]:
        more = f" and {len(actions) - NAMED} more" if len(actions) > NAMED else ""
        told.append(
            f"Events of any action may be positives ({', '.join(actions[:NAMED])}{more}), and models learn to predict "
            'them all; positive.actions = ["purchase"] in [requests] of the mapping, say, names those to predict, or '
            "all where that is meant"
        )
    return told


def doubts(prepared: PreparedSet) -> list[str]:
    """Return what a look into the set finds: positives given away just before their request, items in no catalogue."""
    found = caution("test", share_just_before(prepared, "test", LOOKED_AT, seed=0))
    told = [] if found is None else [found]
    items = prepared.items
    if count := int((items.unlisted & items.trained).sum()):
        told.append(
            f"{count:,} of {int(items.trained.sum()):,} trained items are in no catalogue; [recommender] "
            "in_catalogue_only = true leaves them out of answers"
        )
    return told


def _day(moment: int) -> str:
    return datetime.fromtimestamp(moment / 1e6, UTC).date().isoformat()
