"""Evaluations whose every number is known, for tests of what is said of them and of what they let through."""

from pipelines.evaluation import (
    ALL_ITEMS,
    INSIDE,
    OUTSIDE,
    CandidateFacts,
    Comparison,
    Cost,
    EvaluateConfig,
    Evaluation,
    length_segments,
)

SAMPLERS = ("uniform", "popularity")
GAUC = {"popularity": 0.75, "personal_frequency": 0.8, "dare": 0.9}


def values(gauc, width):
    """All metrics of one model on one sampler, each with an interval of +- width (none for width 0)."""
    metrics = (
        "gauc",
        "auc",
        "auc_per_request",
        "ndcg_at_10",
        "mrr_at_10",
        "hit_rate_at_10",
        "recall_at_10",
        "recall_at_50",
    )
    segments = [name for name, _, _ in length_segments((50, 200))] + [INSIDE, OUTSIDE]
    found = {f"test/{name}": gauc for name in metrics}
    found |= {f"test/segment/{segment}/{name}": gauc for segment in segments for name in ("auc", "gauc")}
    ends = {"ci_low": -width, "ci_high": width}
    bounds = {
        f"{name}.{end}": value + step if width else None for name, value in found.items() for end, step in ends.items()
    }
    counts = {f"test/segment/{segment}/n_requests": 300.0 for segment in segments}
    return (
        found | bounds | counts | {"test/gauc.skipped": 3.0, "test/auc_per_request.skipped": 0.0, "test/logloss": None}
    )


def comparison(model, other, difference, low, high, sampler="uniform", metric="gauc"):
    return Comparison(sampler, f"test/{metric}", model, other, difference, low, high, 1.0 if difference > 0 else 0.0)


def evaluation(gauc=GAUC, width=0.01, full=True):
    samplers = [*SAMPLERS, *([ALL_ITEMS] if full else [])]
    names = list(gauc)
    pairs = [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]]
    return Evaluation(
        split="test",
        data_digest="d",
        config=EvaluateConfig(history_edges=(50, 200), resamples=1000 if width else 0),
        n_requests=2000,
        n_users=1500,
        candidates={name: CandidateFacts(2000, 1500, 220_000, 10.0, 100.0, 0.41, 0.005) for name in samplers},
        metrics={model: {name: values(value, width) for name in samplers} for model, value in gauc.items()},
        comparisons=[
            comparison(
                a, b, d := gauc[a] - gauc[b], *((d - width, d + width) if width else (None, None)), sampler, metric
            )
            for a, b in pairs
            for sampler in samplers
            for metric in ("gauc", "ndcg_at_10", f"segment/{OUTSIDE}/gauc")
        ],
        run_ids={model: f"run-{model}" for model in gauc},
        cost={model: Cost(1.5, 2000, 440_000, 0.75, "cpu") for model in gauc},
    )
