"""What an evaluation found, in sentences computed from its numbers.

The words follow three rules. A model beats another only where the interval of their paired difference leaves out zero;
otherwise "no difference was found". The model named best is the one with the highest value, chosen after the fact, and
the text says so. Nothing is claimed beyond the users that were resampled.
"""

from pipelines.evaluation import ALL_ITEMS, OUTSIDE, CandidateFacts, Comparison, Evaluation
from pipelines.prepared import IMPRESSIONS

REFERENCES = ("personal_frequency", "popularity")
"""Models that learn nothing from a loss: what every other model has to beat."""
PRIMARY = "gauc"
NAMES = {"gauc": "GAUC", "auc": "AUC", "ndcg_at_10": "NDCG@10", "recall_at_50": "recall@50"}


def verdict(evaluation: Evaluation) -> str:
    """Say in one sentence which model is best and how surely; `backticks` mark names."""
    if not evaluation.models:
        return "No model was evaluated."
    sampler = evaluation.config.samplers[0]
    name = best(evaluation, sampler, PRIMARY)
    if name is None:
        requests = evaluation.candidates[sampler].requests
        return f"GAUC is not defined on any of the {requests:,} requests: every user has candidates of one class."
    text = f"`{name}` has the highest GAUC, {_estimate(evaluation, name, sampler, PRIMARY)}"
    if len(evaluation.models) == 1:
        return f"{text}; it was evaluated alone."
    text += f", {_standing(evaluation, sampler, PRIMARY, name)}"
    if name in REFERENCES:
        text += "; it learns nothing from a loss, and no trained model came out above it"
    return f"{text}."


def points(evaluation: Evaluation) -> list[str]:
    """Return at most four short findings behind the verdict."""
    if not evaluation.models:
        return []
    first = evaluation.config.samplers[0]
    found = [_measured(evaluation, first), _again(evaluation), _outside(evaluation, first), _full_ranking(evaluation)]
    return [text for text in found if text]


def best(evaluation: Evaluation, sampler: str, metric: str) -> str | None:
    """Return the model with the highest value, the first of equals; None where no model has one."""
    values = {name: evaluation.metric(name, sampler, metric) for name in evaluation.models}
    known = {name: value for name, value in values.items() if value is not None}
    return max(known, key=lambda name: known[name]) if known else None


def conditions(facts: CandidateFacts, sampler: str, split: str) -> str:
    """Return what stands beside every AUC: the split, the source of the candidates, how many are in the history."""
    source = "all known items" if sampler == ALL_ITEMS else f"sampler `{sampler}`"
    return (
        f"Split `{split}`, {source}: {facts.requests:,} requests of {facts.users:,} users, "
        f"{facts.negatives_per_request:,.0f} negatives and {facts.positives_per_request:.1f} positives per request. "
        f"Found in the user's history: {percent(facts.positives_in_history)} of the positives, "
        f"{percent(facts.negatives_in_history)} of the negatives."
    )


def number(value: float | None) -> str:
    """Return four decimals, or a dash for what is not defined."""
    return "–" if value is None else f"{value:.4f}"


def interval(bounds: tuple[float, float] | None) -> str:
    """Return `low–high`, or nothing where there is no interval."""
    return "" if bounds is None else f"{bounds[0]:.4f}–{bounds[1]:.4f}"


def signed(value: float) -> str:
    """Return four decimals with a sign, a true minus; no sign on what rounds to nothing."""
    text = f"{value:+.4f}".replace("-", "−")
    return "0.0000" if text[1:] == "0.0000" else text


def percent(share: float) -> str:
    """Return a share in percent, with as many digits as it needs to be told from none and from all."""
    for digits in (1, 2):
        text = f"{100 * share:.{digits}f}"
        if share in (0, 1) or 0 < float(text) < 100:
            return f"{text} %"
    return "under 0.01 %" if share < 0.5 else "over 99.99 %"


def difference(found: Comparison) -> str:
    """Return a paired difference with its interval."""
    if found.ci_low is None or found.ci_high is None:
        return signed(found.difference)
    return f"{signed(found.difference)} [{signed(found.ci_low)} to {signed(found.ci_high)}]"


def against(evaluation: Evaluation, sampler: str, metric: str, model: str, other: str) -> str:
    """Say how a model stands against another, and how surely."""
    found = evaluation.compare(sampler, metric, model, other)
    if found is None:
        return f"It was not compared with `{other}`."
    if found.ci_low is None:
        return f"It differs from `{other}` by {signed(found.difference)}; no interval was computed."
    if not found.certain:
        return f"No difference from `{other}` was found: {difference(found)}."
    verb = "beats" if found.difference > 0 else "loses to"
    return f"It {verb} `{other}` by {_margin(found)}, {_resamples(evaluation, found)}."


def _measured(evaluation: Evaluation, sampler: str) -> str:
    """Say on what the verdict rests, and how far the best is from the best of what learns nothing."""
    facts, name = evaluation.candidates[sampler], best(evaluation, sampler, PRIMARY)
    text = (
        f"Measured on {facts.requests:,} `{evaluation.split}` requests of {facts.users:,} users, against "
        f"{facts.negatives_per_request:,.0f} `{sampler}` negatives each."
    )
    known = {other: evaluation.metric(other, sampler, PRIMARY) for other in REFERENCES if other in evaluation.models}
    rivals = {other: value for other, value in known.items() if value is not None and other != name}
    if name is None or not rivals:
        return text
    rival = max(rivals, key=lambda other: rivals[other])
    return f"{text} {against(evaluation, sampler, PRIMARY, name, rival).replace('It', f'`{name}`', 1)}"


def _again(evaluation: Evaluation) -> str:
    """Say which model is highest against the other samplers' negatives."""
    first, *others = evaluation.config.samplers
    champion, parts = best(evaluation, first, PRIMARY), []
    for sampler in others:
        name = best(evaluation, sampler, PRIMARY)
        if name is not None:
            again = "again " if name == champion else ""
            value = _estimate(evaluation, name, sampler, PRIMARY)
            parts.append(f"against `{sampler}` negatives `{name}` is {again}highest, {value}")
    text = "; ".join(parts)
    return f"{text[0].upper()}{text[1:]}." if text else ""


def _outside(evaluation: Evaluation, sampler: str) -> str:
    metric = f"segment/{OUTSIDE}/{PRIMARY}"
    name = best(evaluation, sampler, metric)
    if name is None:
        return ""
    text = (
        f"Outside the history, where repeating a choice plays no part, `{name}` is highest, "
        f"{_estimate(evaluation, name, sampler, metric)}"
    )
    return f"{text}, {_standing(evaluation, sampler, metric, name)}." if len(evaluation.models) > 1 else f"{text}."


def _full_ranking(evaluation: Evaluation) -> str:
    facts = evaluation.candidates.get(ALL_ITEMS)
    name = best(evaluation, ALL_ITEMS, "ndcg_at_10")
    if facts is None or name is None:
        return ""
    found = percent(evaluation.metric(name, ALL_ITEMS, "recall_at_50") or 0.0)
    return (
        f"Ranking all {facts.candidates // facts.requests:,} items for {facts.requests:,} of these requests, `{name}` "
        f"has the highest NDCG@10, {_estimate(evaluation, name, ALL_ITEMS, 'ndcg_at_10')}; its first 50 hold {found} "
        "of a request's positives."
    )


def _standing(evaluation: Evaluation, sampler: str, metric: str, name: str) -> str:
    """Say which models the highest beats and which it cannot be told from, as the end of a sentence."""
    near: list[str] = []
    beaten: list[str] = []
    for other in evaluation.models:
        found = evaluation.compare(sampler, metric, name, other)
        if found is not None and found.ci_low is not None:
            (beaten if found.certain else near).append(f"`{other}`")
    if not near and not beaten:
        return "but no interval was computed: how sure that is is not known"
    if not near:
        return f"and beats {listed(beaten)}"
    return f"but cannot be told from {listed(near)}" + (f"; it beats {listed(beaten)}" if beaten else "")


def caution(evaluation: Evaluation) -> str:
    """Say what the numbers do not mean."""
    text = (
        "Labels are observed items against sampled ones, so these values are not comparable with click data or papers."
        if evaluation.split != IMPRESSIONS
        else "Labels say which of the items that were shown were taken: of what was never shown, and of the place an "
        "item was shown at, these values know nothing."
    )
    if evaluation.config.resamples:
        text += (
            f" Brackets are {100 * evaluation.config.level:g} % intervals over resampled users; they do not cover the "
            "luck of a training seed."
        )
    if len(evaluation.models) > 1:
        text += " The highest of several values on the same requests is a little flattered."
    return text


def _estimate(evaluation: Evaluation, name: str, sampler: str, metric: str) -> str:
    bounds = evaluation.interval(name, sampler, metric)
    value = number(evaluation.metric(name, sampler, metric))
    if bounds is None:
        return value
    return f"{value} [{bounds[0]:.4f} to {bounds[1]:.4f}]"


def _margin(found: Comparison) -> str:
    """Return how far the better is ahead, without a sign, with its interval."""
    ends = sorted((abs(found.ci_low or 0.0), abs(found.ci_high or 0.0)))
    return f"{abs(found.difference):.4f} [{ends[0]:.4f} to {ends[1]:.4f}]"


def _resamples(evaluation: Evaluation, found: Comparison) -> str:
    total = evaluation.config.resamples
    share = (found.share_better if found.difference > 0 else 1 - (found.share_better or 0.0)) or 0.0
    word = "ahead" if found.difference > 0 else "behind"
    if share == 1:
        return f"{word} in every one of {total:,} resamples of the users"
    return f"{word} in {percent(share)} of {total:,} resamples of the users"


def listed(words: list[str]) -> str:
    """Join names; more than four are counted."""
    if len(words) > 4:
        words = [*words[:3], f"{len(words) - 3} others"]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
