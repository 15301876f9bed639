"""What is to be run: data sets, cells and the order in which they matter. Nothing here trains or reads data.

A cell is one training run and its one reading of the test split. Cells of one table share the data, the budget and the
evaluated requests, so that their differences are paired. Settings were chosen on validation only.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

SEEDS = (2023, 2024, 2025)
MORE_SEEDS = (2026, 2027)
"""For the pairs a paper makes a claim about: five seeds in all."""


@dataclass(frozen=True)
class Dataset:
    """A log and how it is prepared; the prepared set is made once, in the workspace of this name."""

    source: str  # of pipelines.datasets.DATASETS
    newest: int | None = None  # events kept of each user
    users: int | None = None  # sample of so many users
    prepare: dict[str, Any] = field(default_factory=dict)


LEAVE_ONE_OUT = {"split": {"kind": "last_request"}, "negatives": 1, "transitions_top_n": 0, "appendable": False}
DATASETS = {
    # The newest 28 days test, the 14 before them validate; 4,000 requests of each are kept, 2,000 of them are read.
    "completejourney": Dataset("completejourney", prepare={"max_eval_requests": 4000}),
    # Training sequences of the newest 50, as the paper has it, and the two targets.
    **{name: Dataset(name, newest=52, prepare=LEAVE_ONE_OUT) for name in ("beauty", "sports", "toys", "yelp")},
    "ml-1m": Dataset("ml-1m", prepare=LEAVE_ONE_OUT),
    # The same films as a table of candidates: 100 sampled negatives for each user's last film.
    "ml-1m-candidates": Dataset("ml-1m", prepare={"split": {"kind": "last_request"}}),
}
USERS = {"beauty": 22_363, "sports": 35_598, "toys": 19_412, "yelp": 30_431, "ml-1m": 6_040}


@dataclass(frozen=True)
class Cell:
    """One run: `config` is a shipped training config, `settings` what is laid over it, as of `--set`."""

    study: str
    dataset: str
    model: str  # the row of the table
    config: str
    seed: int
    settings: tuple[str, ...] = ()
    protocol: Literal["candidates", "leave_one_out"] = "candidates"
    evaluate: dict[str, Any] = field(default_factory=dict)  # over EvaluateConfig's defaults, protocol "candidates" only

    @property
    def name(self) -> str:
        """Of its files: words and numbers with hyphens between them."""
        return "-".join(re.findall(r"[a-z0-9]+", f"{self.dataset} {self.model} {self.seed}".lower().replace("_", "")))


@dataclass(frozen=True)
class Claim:
    """A difference the text speaks of: model minus other, in one metric."""

    model: str
    other: str
    metric: str
    says: str  # who expects it, in words


@dataclass(frozen=True)
class Study:
    """One table: its rows in order, what is claimed of them."""

    title: str
    dataset: str
    rows: tuple[str, ...]
    claims: tuple[Claim, ...]
    about: str  # budget, negatives, tie rule: what a reader must know beside the figures
    segments: tuple[str, ...] = ()  # told apart in a table of their own, GAUC against uniform negatives


# --- 1 and 2: leave-one-out, all items ranked ---------------------------------------------------------------------

PAPER_ROWS = ("POP", "TRANS", "MQSA-TED", "alpha = 1", "lambda = 0", "SASRec", "L = 1", "L = 2", "L = 5")
PAPER_PARTS = {
    "MQSA-TED": (),
    "alpha = 1": ("model.alpha=1.0",),
    "lambda = 0": ("model.lambda_kd=0.0",),
    "SASRec": ("model.alpha=1.0", "model.lambda_kd=0.0"),
    "L = 1": ("model.averaged=1",),
    "L = 2": ("model.averaged=2",),
    "L = 5": ("model.averaged=5",),
}
FILMS_CHOSEN = ("model.width=128",)
"""By both models, of four trials each on validation (`results/films_tuning.json`)."""
FILMS_BUDGET = ("stop.max_steps=1645",)
"""35 epochs of both, the best validation of which is kept: one to two hours of a core."""
FILMS_PARTS = {
    # 4,096 of a step's 19,000 tokens teach, which spares the cost of a second softmax
    "MQSA-TED": ("model.lambda_kd=0.1", "model.kd_heads=4096", *FILMS_CHOSEN),
    "SASRec": ("model.alpha=1.0", "model.lambda_kd=0.0", *FILMS_CHOSEN),
}
LOOKED_AT = ("stop.protocol=leave_one_out", "stop.metric=ndcg_at_20", "stop.requests=1000000")


def _paper(dataset: str, model: str, seed: int, study: str = "paper") -> Cell:
    if model == "POP":
        return Cell(study, dataset, model, "popularity", 0, LOOKED_AT, "leave_one_out")
    if model == "TRANS":  # a large prior leaves the order as it is and the tie break above float32's rounding
        return Cell(study, dataset, model, "transitions", 0, (*LOOKED_AT, "model.prior=0.1"), "leave_one_out")
    if study == "films":
        settings = (*FILMS_PARTS[model], *FILMS_BUDGET)
        return Cell(study, dataset, model, "mqsa_ted_films", seed, settings, "leave_one_out")
    epoch = USERS[dataset] // 256
    # The paper trains 200 epochs and reports the best on validation; 30 epochs without a gain end a run here.
    settings = (f"stop.validate_every={epoch}", f"stop.checkpoint_every={epoch}", "stop.patience=30")
    return Cell(study, dataset, model, "mqsa_ted_paper", seed, (*settings, *PAPER_PARTS[model]), "leave_one_out")


# --- 3 and 4: sampled candidates on grocery purchases -------------------------------------------------------------

BUDGET = ("stop.epochs=1.0", "stop.max_steps=400", "stop.validate_every=100", "stop.requests=500")
"""102,400 of the training requests, each seen once; the best of four validations is kept."""
READ = {"max_requests": 2000, "full_ranking_requests": 200, "cold_requests": 0}
CTR_ROWS = {  # row -> config
    "popularity": "popularity",
    "personal_frequency": "personal_frequency",
    "lightgbm": "lightgbm",
    "mean_pooling": "mean_pooling",
    "din_50": "din_50",
    "din": "din",
    "sim_hard": "sim_hard",
    "eta": "eta",
    "twin": "twin",
    "sdim": "sdim",
    "sdim_sum": "sdim_sum",
    "dare": "dare",
    "aw_moe": "aw_moe",
    "mqsa_ted": "mqsa_ted",
    "dare_own_counts_alike": "dare_own_counts",  # on the negatives that all others have
    "dare_own_counts": "dare_own_counts",
}
UNTRAINED = ("popularity", "personal_frequency")
CTR_FIRST = (  # cheapest and most telling first
    "popularity",
    "personal_frequency",
    "dare_own_counts",
    "lightgbm",
    "mean_pooling",
    "din_50",
    "dare",
    "twin",
    "mqsa_ted",
    "sdim",
    "sdim_sum",
    "din",
    "sim_hard",
    "aw_moe",
    "eta",
    "dare_own_counts_alike",
)


def _ctr(model: str, seed: int, dataset: str = "completejourney", study: str = "ctr") -> Cell:
    settings = BUDGET
    if model in UNTRAINED:
        seed, settings = 0, ("stop.requests=500",)
    elif model == "aw_moe":
        settings = (*BUDGET, "model.window=200")
    elif model == "dare_own_counts_alike":
        settings = (*BUDGET, "batches.own_negatives=0")
    elif model == "mqsa_ted":  # trains on whole sequences, one row per user: its own 16 passes over the users
        settings = ("stop.requests=500",)
    if dataset == "ml-1m-candidates":
        settings = (*settings, *_no_category(model))
    read = READ | {"full_ranking_requests": 2000} if study == "all_items" else READ
    return Cell(study, dataset, model, CTR_ROWS[model], seed, settings, evaluate=read)


def _no_category(model: str) -> tuple[str, ...]:
    """The films have no one-valued category, and single events instead of baskets."""
    if model in ("din", "din_50", "dare", "dare_own_counts", "dare_own_counts_alike", "twin", "eta", "mean_pooling"):
        return ('model.pos_mode="slot"',)
    return ()


LENGTHS = {"50": (50,), "200": (200,), "1000": (1000,), "all": (5000,)}
LENGTH_MODELS = ("din", "twin", "sdim_sum", "dare")


def _length(model: str, length: str, seed: int = SEEDS[0]) -> Cell:
    (window,) = LENGTHS[length]
    row = f"{model}, T = {length}"
    return Cell(
        "length", "completejourney", row, CTR_ROWS[model], seed, (*BUDGET, f"model.window={window}"), evaluate=READ
    )


AW_MOE = {
    "DNN": ("model.gate=fixed", "model.experts=1", "model.pooling=mean", "model.contrast=0.0"),
    "DIN": ("model.gate=fixed", "model.experts=1", "model.contrast=0.0"),
    "MoE": ("model.gate=mixture", "model.contrast=0.0"),
    "AW-MoE": ("model.contrast=0.0",),
    "AW-MoE + masking alone": ("model.contrast=0.0", "model.masking_alone=true"),
    "AW-MoE + contrastive": (),
}
DARE_PARTS = {
    "DARE, attention 16": (),
    "DARE, attention 8": ("model.attention.item=8", "model.attention.category=8", "model.attention.position=8"),
    "DARE, attention 4": ("model.attention.item=4", "model.attention.category=4", "model.attention.position=4"),
    "TWIN, 16": ("model.tied=true",),
    "TWIN, 32 (equal parameters)": (
        "model.tied=true",
        *(
            f"model.{table}.{name}=32"
            for table in ("attention", "representation")
            for name in ("item", "category", "position")
        ),
    ),
}
SDIM_PARTS = {
    **{f"SDIM, tau = {bits}": (f"model.bits={bits}",) for bits in (1, 2, 3, 4, 5)},
    "SDIM, tau = 3, newest not in the table": ("model.long_includes_short=false",),
}


def _parts(study: str, config: str, parts: dict[str, tuple[str, ...]], seed: int = SEEDS[0]) -> tuple[Cell, ...]:
    return tuple(
        Cell(study, "completejourney", row, config, seed, (*BUDGET, *settings), evaluate=READ)
        for row, settings in parts.items()
    )


def cells() -> Iterator[Cell]:
    """Yield every cell of the grid once, in order of priority."""
    papers = ("beauty", "sports", "toys", "yelp")
    yield from (_paper(name, model, 0) for name in papers for model in ("POP", "TRANS"))
    yield from (_ctr(model, SEEDS[0]) for model in CTR_FIRST)
    yield _paper("beauty", "MQSA-TED", SEEDS[0])
    yield from (_paper("ml-1m", model, SEEDS[0], "films") for model in ("POP", "SASRec", "MQSA-TED"))
    yield from (_ctr(model, SEEDS[0], study="all_items") for model in CTR_FIRST)
    yield from (_ctr(model, seed) for seed in SEEDS[1:] for model in CTR_FIRST if model not in UNTRAINED)
    yield from (_ctr("dare_own_counts", seed, study="all_items") for seed in SEEDS[1:])
    yield from (_paper("beauty", "MQSA-TED", seed) for seed in SEEDS[1:])
    yield from (_paper("ml-1m", model, seed, "films") for seed in SEEDS[1:] for model in ("SASRec", "MQSA-TED"))
    yield from _parts("aw_moe", "aw_moe", AW_MOE)
    yield from _parts("dare", "dare", DARE_PARTS)
    yield from _parts("sdim", "sdim_sum", SDIM_PARTS)
    yield from (_length(model, length) for length in LENGTHS for model in LENGTH_MODELS)
    yield from (_paper("beauty", model, SEEDS[0]) for model in PAPER_ROWS[3:])
    yield from (_paper(name, "MQSA-TED", SEEDS[0]) for name in papers[1:])
    yield from (_ctr(model, seed) for seed in MORE_SEEDS for model in ("dare", "twin", "din", "sdim"))
    yield from (_ctr(model, SEEDS[0], "ml-1m-candidates", "ctr_films") for model in CTR_FIRST)


GAUC = ("uniform/gauc", "popularity/gauc")
OUTSIDE = "popularity/segment/target_outside_history/gauc"
FULL = "all_items/ndcg_at_10"
RANKED = (FULL, "all_items/recall_at_50")
"""Told beside every difference on sampled candidates: the two need not agree."""
STUDIES = {
    "paper": Study(
        "MQSA-TED by its paper's protocol",
        "beauty",
        PAPER_ROWS,
        (
            Claim("MQSA-TED", "TRANS", "ndcg_at_5", "a converged run"),
            Claim("MQSA-TED", "alpha = 1", "ndcg_at_5", "the paper"),
            Claim("MQSA-TED", "lambda = 0", "ndcg_at_5", "the paper"),
            Claim("MQSA-TED", "SASRec", "ndcg_at_5", "the paper"),
        ),
        "All items ranked, what the user has had masked, ties to the lowest id; the weights of the best validation "
        "NDCG@20, after at most 200 epochs or 30 without a gain (the paper: best of 200). Paper, beauty: HR@5 .0752, "
        "NDCG@5 .0534; sports NDCG@5 .0320; yelp NDCG@5 .0205.",
    ),
    "films": Study(
        "ml-1m, leave-one-out, all items ranked",
        "ml-1m",
        ("POP", "SASRec", "MQSA-TED"),
        (Claim("MQSA-TED", "SASRec", "ndcg_at_10", "us"),),
        "Same rules; full softmax for both, the same size, optimiser and epochs (35, the best of them by validation). "
        "Published on this file, full ranking: SASRec .1259, gSASRec .1726 NDCG@10 (asash/gSASRec-pytorch README).",
    ),
    "ctr": Study(
        "Grocery purchases, sampled candidates",
        "completejourney",
        tuple(CTR_ROWS),
        (
            *(
                Claim("dare_own_counts", other, metric, "us")
                for other in ("lightgbm", "personal_frequency")
                for metric in GAUC
            ),
            *(Claim("dare_own_counts", "dare_own_counts_alike", metric, "own negatives") for metric in (*GAUC, FULL)),
            *(Claim("dare", "twin", metric, "DARE") for metric in (*GAUC, OUTSIDE, *RANKED)),
            *(Claim("dare", "din", metric, "DARE") for metric in (*GAUC, *RANKED)),
            *(Claim("din", "din_50", metric, "long histories") for metric in (*GAUC, *RANKED)),
            *(Claim("sdim", "din", metric, "SDIM: not far below") for metric in (*GAUC, *RANKED)),
            *(Claim("sdim", "sdim_sum", metric, "l2 forgets how often") for metric in GAUC),
            *(Claim("sdim", "eta", metric, "SDIM") for metric in (*GAUC, *RANKED)),
        ),
        "T = 200. Every model but the untrained two sees the same 102,400 training requests once, with half uniform "
        "and half popular negatives, log q taken off the logit (`correct = true`); LightGBM grows on the same rows. "
        "`dare_own_counts` compares each positive with the negatives of its request and has four more per positive, of "
        "the user's own past, corrected likewise; `dare_own_counts_alike` is the same model without these. "
        "MQSA-TED trains on whole sequences instead (16 passes). Test: 2,000 requests, 100 negatives each; scores "
        "against negatives drawn by q are compared as score - log q, for all models alike.",
    ),
    "all_items": Study(
        "Grocery purchases, all 68,509 items ranked for 2,000 requests",
        "completejourney",
        tuple(CTR_ROWS),
        tuple(
            Claim(model, other, metric, says)
            for model, other, says in (
                *(("dare_own_counts", other, "us") for other in ("personal_frequency", "lightgbm", "mqsa_ted")),
                ("dare_own_counts", "dare_own_counts_alike", "own negatives"),
                ("dare", "twin", "DARE"),
                ("din", "din_50", "long histories"),
                ("sdim", "din", "SDIM: not far below"),
                ("sdim", "eta", "SDIM"),
            )
            for metric in RANKED
        ),
        "Models of the table above: of those with several seeds there, all of `dare_own_counts` and the first of the "
        "others. The nine run last were trained again for it, by the same configuration and seed; GAUC against uniform "
        "negatives is as there to some thousandths. It takes minutes to an hour to rank everything for a model.",
    ),
    "aw_moe": Study(
        "AW-MoE (our reading), part by part",
        "completejourney",
        tuple(AW_MOE),
        tuple(
            Claim(model, other, metric, "our reading of the abstract")
            for model, other in (
                ("AW-MoE", "MoE"),
                ("AW-MoE + contrastive", "AW-MoE"),
                ("AW-MoE + contrastive", "AW-MoE + masking alone"),
            )
            for metric in GAUC
        ),
        "Data, budget and negatives as in the table of all models; the 50 newest events are read.",
        ("history_0_49", "history_50_199", "history_1000_up", "popularity_head", "popularity_tail"),
    ),
    "dare": Study(
        "DARE: width of the attention table, TWIN of equal parameters",
        "completejourney",
        tuple(DARE_PARTS),
        tuple(
            Claim("DARE, attention 16", other, metric, "DARE")
            for other in ("TWIN, 16", "TWIN, 32 (equal parameters)")
            for metric in (*GAUC, *RANKED)
        ),
        "Data, budget and negatives as in the table of all models.",
    ),
    "sdim": Study(
        "SDIM: planes per group, and what the table holds",
        "completejourney",
        tuple(SDIM_PARTS),
        (
            *(
                Claim("SDIM, tau = 3", other, metric, "SDIM")
                for other in ("SDIM, tau = 1", "SDIM, tau = 5")
                for metric in GAUC
            ),
            *(Claim("SDIM, tau = 3", "SDIM, tau = 3, newest not in the table", metric, "nobody") for metric in GAUC),
        ),
        "norm = none; data, budget and negatives as in the table of all models.",
    ),
    "length": Study(
        "How much history",
        "completejourney",
        tuple(f"{model}, T = {length}" for model in LENGTH_MODELS for length in LENGTHS),
        tuple(
            Claim(f"{model}, T = {length}", f"{model}, T = 50", metric, "long histories")
            for model in LENGTH_MODELS
            for length in ("200", "1000")
            for metric in (GAUC[0], *RANKED)
        ),
        "One seed; data, budget and negatives as in the table of all models; all: 5,000, more than anybody has.",
    ),
    "ctr_films": Study(
        "ml-1m in the same form",
        "ml-1m-candidates",
        tuple(CTR_ROWS),
        tuple(
            Claim(model, other, metric, says)
            for model, other, says in (
                ("mqsa_ted", "lightgbm", "us"),
                ("dare_own_counts", "lightgbm", "us"),
                ("dare", "twin", "DARE"),
                ("din", "din_50", "long histories"),
                ("sdim", "din", "SDIM: not far below"),
                ("sdim", "eta", "SDIM"),
            )
            for metric in GAUC
        ),
        "Each user's last film against 100 sampled ones; one seed; no time, no repeats.",
    ),
}
