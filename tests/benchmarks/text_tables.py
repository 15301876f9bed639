"""The tables of the text studies: every cell as lines, each beside its controls."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from text_bridge import SEEDS
from text_cells import cells

from pipelines.text_measures import compare

DIFFERENCE = {"reranked": "against_", "deep": "deep_against_"}


def percent(cell: dict[str, float]) -> str:
    return f"{100 * cell['value']:.1f} [{100 * cell['ci_low']:.1f}, {100 * cell['ci_high']:.1f}]"


def signed(found: dict[str, float]) -> str:
    return f"{100 * found['difference']:+.1f} [{100 * found['ci_low']:+.1f}, {100 * found['ci_high']:+.1f}]"


def control_of(name: str) -> str:
    """Return the pointwise control's cell of the same corpus and seed."""
    cell, corpus, row, seed = name.split("-")
    full = "_full" if row.startswith("mvp_full") else ""
    control = "mvp_apart_pointwise" if row.startswith("mvp_apart") else f"cross_encoder{full}"
    return f"{cell}-{corpus}-{control}{'_without_words' if row.endswith('without_words') else ''}-{seed}"


def lines_of(name: str, results: Path) -> list[str]:
    path = results / f"{name}.json"
    if not path.exists():
        return [f"| {name} | not run | | |"]
    found = json.loads(path.read_text())
    if "reranked" in found:
        first = found["first_stage"]["ndcg_at_10"]
        control = results / f"{control_of(name)}.json"
        lines = []
        for part, title in (("reranked", "best 20"), ("deep", "best 100")):
            if part not in found:
                continue
            ours = found[part]
            gain = f"RRF {signed(found[f'{DIFFERENCE[part]}first_stage'])}"
            if f"{DIFFERENCE[part]}hybrid" in found:
                gain += f", hybrid {signed(found[f'{DIFFERENCE[part]}hybrid'])}"
            beside = json.loads(control.read_text()) if control.exists() and control != path else {}
            if part in beside:
                pointwise = np.array(beside[part]["per_query"])
                gain += f", pointwise {signed(compare(np.array(ours['per_query']), pointwise).table())}"
            value = f"{100 * ours['ndcg_at_10']:.1f}, RRF {100 * first:.1f}"
            lines.append(f"| {name} {title} | {value} | {100 * ours['hit_at_1']:.1f} | {gain} |")
        return lines
    if "cpu_milliseconds" in found:
        times = ", ".join(f"{key} {value} ms" for key, value in found["cpu_milliseconds"].items())
        over = ", ".join(
            f"{key[:-19]} {value:.2f}" for key, value in found.items() if key.endswith("_over_cross_encoder")
        )
        return [f"| {name} | {times} | times the cross-encoder: {over} | |"]
    if "head_room" in found:
        return [
            f"| {name} {task} R <= {one['bound']} | own {100 * one['gold']:.1f} | wrong {100 * one['wrong']:.1f} | |"
            for task, values in found["head_room"].items()
            for one in values["bounds"]
        ]
    lines = []
    for task, values in found["tasks"].items():
        for system, measures in values["systems"].items():
            gain = values.get("against_plain", {}).get("hit_at_1") if system == "enhanced" else None
            pair = f"{percent(measures['ndcg_at_10'])} | {percent(measures['hit_at_1'])}"
            lines.append(f"| {name} {task} {system} | {pair} | {signed(gain) if gain else ''} |")
    if "spans" in found:
        ours = found["spans"]
        gain = [
            f"plain {signed(ours['against_plain'])}",
            *(f"{kind} {signed(one)}" for kind, one in controls(name, results)),
        ]
        lines.append(f"| {name} three spans a document | | {100 * ours['hit_at_1']:.1f} | {', '.join(gain)} |")
    return lines


def controls(name: str, results: Path) -> list[tuple[str, dict[str, Any]]]:
    """Compare hit@1 on spans, by document, with the controls of the same training and seed that have run."""
    cell, corpus, kind, how, seed = name.split("-")
    ours = np.array(json.loads((results / f"{name}.json").read_text())["spans"]["per_document"])
    made = []
    for other in ("off", "c_only", "linear_map"):
        path = results / f"{cell}-{corpus}-{other}-{how}-{seed}.json"
        if other != kind and path.exists() and "spans" in (found := json.loads(path.read_text())):
            made.append((other, compare(ours, np.array(found["spans"]["per_document"])).table()))
    return made


def over_seeds(corpus: str, how: str, results: Path) -> list[str]:
    """SLR beside c only, the mean of the seeds by document, where all of them have run."""
    paths = [
        [results / f"lexsembridge-{corpus}-{kind}-{how}-{seed}.json" for seed in SEEDS] for kind in ("slr", "c_only")
    ]
    if not all(path.exists() for kind in paths for path in kind):
        return []
    ours, other = (
        np.mean([json.loads(path.read_text())["spans"]["per_document"] for path in kind], axis=0) for kind in paths
    )
    gain = signed(compare(ours, other).table())
    return [f"| {corpus} slr {how}, mean of {len(SEEDS)} seeds | | {100 * ours.mean():.1f} | c_only {gain} |"]


def tables(results: Path) -> str:
    """Every cell as lines; those that have not run say so."""
    more = [line for how in ("among_all", "passages") for line in over_seeds("cranfield", how, results)]
    head = ["| cell | nDCG@10 | hit@1 | difference |", "|---|---|---|---|"]
    return "\n".join([*head, *(line for name in cells() for line in lines_of(name, results)), *more])
