"""What a training of a text model is told: corpus, steps, rates, and what each kind of model reads of them."""

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any, Literal

from recsys.errors import ConfigError

SHORTEST_WINDOW = 8
RERANKERS = ("mvp", "mvp_apart", "cross_encoder")
TEXT_MODELS = ("lexsembridge", *RERANKERS)
"""names; `pipelines.text_models` has the classes, and torch with them"""


@dataclass(frozen=True)
class TextStop:
    """How long to train, how often to look."""

    steps: int = 1000
    validate_every: int = 200
    patience: int = 5
    """validations without a gain before the run stops"""
    checkpoint_every: int = 100

    def __post_init__(self) -> None:
        for name in ("steps", "validate_every", "patience", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"[stop] {name} must be at least 1, found {getattr(self, name)}")


@dataclass(frozen=True)
class TextOptimiser:
    """AdamW with warm-up and linear decay."""

    learning_rate: float = 2e-5
    """of the backbone"""
    learning_rate_fresh: float = 1e-3
    """of what training starts from nothing: fusion, decoder, heads"""
    weight_decay: float = 0.01
    warmup: float = 0.1
    """share of the steps"""
    clip: float = 1.0
    dropout: bool = True
    """the backbone's own; without it a step takes half the time on a processor, whose fused attention drops nothing"""

    def __post_init__(self) -> None:
        for name in ("learning_rate", "learning_rate_fresh", "clip"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"[optimiser] {name} must be above 0, found {getattr(self, name)}")
        if self.weight_decay < 0 or not 0 <= self.warmup <= 1:
            raise ConfigError(
                f"[optimiser] weight_decay = {self.weight_decay}, warmup = {self.warmup}: expected a decay of 0 or "
                "more and a share of the steps"
            )


@dataclass(frozen=True)
class CorpusConfig:
    """What a text model trains on."""

    path: str = "catalogue"
    """a folder in BEIR's layout, or "catalogue" for the item texts of the workspace's log"""
    natural: str = ""
    """split of the judged queries to train on, e.g. "train"; empty for none"""
    keyword: bool = True
    """train on keyword queries cut from the training documents"""
    part_of_passage: tuple[int, ...] = (16, 32)
    """and on spans of these lengths"""
    unit: Literal["token", "word", "char"] = "token"
    dev_queries: int = 200
    """most dev queries of a kind"""
    terms: int = 5
    """of a keyword query"""
    also: tuple[str, ...] = ()
    """folders of more corpora to learn from, with `batches = "passages"`; dev spans and keywords are those of `path`"""

    @property
    def cut(self) -> bool:
        """Whether queries are cut from documents: those of dev and test are then held out of training."""
        return self.keyword or bool(self.part_of_passage)


@dataclass(frozen=True)
class TextTrainConfig:
    """A text training run as its TOML states it."""

    name: str
    model: Any
    seed: int = 0
    device: str = "auto"
    """auto: cuda where there is one; not part of what identifies a run"""
    rows: int = 64
    """queries or lists of a step"""
    group: int = 2
    """passages of a query: its positive and hard negatives (BM25 ranks 2 to 50), or the length of a list"""
    depth: int = 100
    """places of the first stage that a reranker's negatives are drawn from"""
    train: Literal["fusion", "full"] = "fusion"
    """fusion freezes the backbone: passages, and pairs of a reranker, are encoded once, and an index stays valid"""
    batches: Literal["queries", "passages"] = "queries"
    """of LexSemBridge: queries with a positive and hard negatives each, as in the paper, or `rows` neighbouring
    passages with `cuts` queries each (`pipelines.neighbour_task`)"""
    cuts: int = 3
    """queries cut from a passage of a step; this and the next three only with `batches = "passages"`"""
    layers: int = 0
    """top layers of the backbone that learn; 0 for all of it"""
    train_tokens: int = 128
    """of a training passage's window, special tokens included"""
    bfloat16: bool = False
    """run the backbone in bfloat16 while training: faster where the processor multiplies it, far slower elsewhere"""
    temperature: float = 0.02
    """of the contrastive loss; see `tau`"""
    orthogonal: float = 1.0
    """weight of MVP's orthogonal term"""
    teacher: Literal["qrels", "silver", "mixed"] = "mixed"
    """order inside a training list: grades, the first stage (reciprocal ranks of BM25 and dense, without SPLADE, which
    takes minutes a corpus), or the first stage inside a grade"""
    positives: int = 2
    """at most so many relevant passages in a training list"""
    force_positive_first: bool = False
    """with `teacher = "silver"`: relevant passages lead a training list, wherever the first stage has them"""
    loss_variant: Literal["single", "released"] = "single"
    """of the listwise loss; released takes the softmax of a softmax, as the authors' code does: for parity only"""
    rank_tau: float = 0.8
    """temperature of a training list's scores and of its targets (0.8: the authors' code)"""
    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    optimiser: TextOptimiser = field(default_factory=TextOptimiser)
    stop: TextStop = field(default_factory=TextStop)

    def __post_init__(self) -> None:
        if self.group < 2 or self.rows < 1 or self.depth < 2:
            raise ConfigError(
                f"rows is {self.rows}, group {self.group}, depth {self.depth}; expected at least 1, 2 and 2"
            )
        if self.batches == "passages" and self.name != "lexsembridge":
            raise ConfigError(f"batches = 'passages' is for lexsembridge, found {self.name}")
        if self.corpus.also and self.batches != "passages":
            raise ConfigError("[corpus] also would do nothing with batches = 'queries'; leave it out")
        if self.cuts < 1 or self.layers < 0 or self.train_tokens < SHORTEST_WINDOW:
            raise ConfigError(
                f"cuts is {self.cuts}, layers {self.layers}, train_tokens {self.train_tokens}; "
                f"expected at least 1, 0 and {SHORTEST_WINDOW}"
            )
        if self.force_positive_first and self.teacher != "silver":
            raise ConfigError(
                f"force_positive_first = true would do nothing with teacher = {self.teacher!r}, whose grades lead "
                "already; set teacher = 'silver', or leave it out"
            )
        if self.positives < 1 or self.rank_tau <= 0:
            raise ConfigError(
                f"positives is {self.positives}, rank_tau {self.rank_tau}; expected at least 1 and above 0"
            )

    @property
    def tau(self) -> float:
        """Temperature of LexSemBridge's loss; 1 where its vectors keep their lengths, as the authors' code has it."""
        return self.temperature if self.model.normalized else 1.0

    def table(self) -> dict[str, Any]:
        """Return the config as nested values of JSON."""
        table: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        return table
