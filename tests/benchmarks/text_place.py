"""Where the text studies find their data, the first stages over it, its tasks, and how a ranking is measured."""

import dataclasses
from functools import cache
from pathlib import Path
from typing import Any

import torch

from pipelines.first_stages import FirstStages
from pipelines.text_corpus import Queries, catalogue_corpus, read_corpus, read_queries
from pipelines.text_measures import mean_of, measure
from pipelines.text_models import CATALOGUE
from pipelines.text_pairs import PairSource, sample
from ranking.dense_encoder import DenseEncoder
from ranking.devices import pick_device
from ranking.fusion import Ranking
from ranking.splade import Splade

CORPORA = ("cranfield", "med", "scifact")
LENGTHS = (16, 32, 64)
MOST = 300  # queries of a cut task


@dataclasses.dataclass(frozen=True)
class Place:
    """Where the data and the intermediate files are, and where models run."""

    data: Path
    work: Path
    results: Path
    device_name: str = "auto"
    changes: tuple[str, ...] = ()
    """assignments over the settings of every training run: shorter ones, to try a cell out"""

    @property
    def device(self) -> torch.device:
        return pick_device(self.device_name)

    @property
    def half(self) -> str:
        """Whether full training reads in bfloat16, as the config says it: where the processor multiplies it."""
        return "true" if self.device.type == "cuda" or torch.ops.mkldnn._is_mkldnn_bf16_supported() else "false"

    @property
    def items(self) -> Path:
        return self.work / "log" / "items.parquet"

    def stages(self, name: str, splade: bool = False) -> FirstStages:
        """First stages over a corpus; cells of one process share them."""
        return opened(self, name, splade)

    def natural_dev(self, stages: FirstStages) -> dict[str, Queries]:
        """Queries that people wrote and that no table is made of: SciFact alone has some."""
        if stages.corpus.name != "scifact":
            return {}
        return {"natural": sample(read_queries(self.data / "scifact", stages.corpus, "train"), MOST, 0)}

    def tasks(self, stages: FirstStages, split: str = "test") -> dict[str, Queries]:
        """Natural queries (test only), and cut ones of one split, all lengths from the same documents."""
        corpus = stages.corpus
        source = PairSource(corpus, stages.encoder.tokenizer)  # type: ignore[attr-defined]
        rows = source.rows(split)  # type: ignore[arg-type]
        if corpus.name == CATALOGUE:
            spans = {f"pop_{n}": source.part_of_passage(rows, n, "word") for n in (2, 4, 8)}
            cut = {"keyword": source.keyword(rows, 3), **spans}
            return {name: sample(queries, MOST, 0) for name, queries in cut.items() if len(queries)}
        long = source.long_enough(rows, max(LENGTHS))
        cut = {"keyword": source.keyword(rows), **{f"pop_{n}": source.part_of_passage(long, n) for n in LENGTHS}}
        cut = {name: sample(queries, MOST, 0) for name, queries in cut.items()}
        return {"natural": read_queries(self.data / corpus.name, corpus, "test"), **cut} if split == "test" else cut


@cache
def opened(place: Place, name: str, splade: bool) -> FirstStages:
    corpus = catalogue_corpus(place.items) if name == CATALOGUE else read_corpus(place.data / name)
    report = lambda done, total: print(f"  {name}: {done}/{total} passages", flush=True)  # noqa: E731
    sparse = Splade.of(device=place.device) if splade else None
    return FirstStages(corpus, DenseEncoder.of().to(place.device), place.work / "cache", sparse, progress=report)


def figures(ranking: Ranking, queries: Queries, corpus: str = "") -> dict[str, Any]:
    """Every measure with its interval; on Cranfield also binary, and with the documents graded 0 taken out."""
    found = {}
    for name, estimate in mean_of(measure(ranking, queries)).items():
        low, high = estimate.interval()
        found[name] = {"value": estimate.value, "ci_low": low, "ci_high": high}
    if corpus == "cranfield":
        binary = measure(ranking, queries, binary=True)["ndcg_at_10"]
        without = measure(ranking, queries, zero_docs="remove", binary=True)
        found["binary"] = {"ndcg_at_10": float(binary.mean())}
        found["zero_docs_removed"] = {name: float(values.mean()) for name, values in without.items()}
    return found
