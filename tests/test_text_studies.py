"""The text studies: what is measured has a cell, cells that share a run stay together, a failed one is named."""

import sys
from pathlib import Path

BENCHMARKS = Path(__file__).parent / "benchmarks"
sys.path.append(str(BENCHMARKS))

from text_cells import ORDER, cells, chains, corpora_of  # noqa: E402
from text_jobs import run_chains  # noqa: E402
from text_place import Place  # noqa: E402
from text_studies import chosen  # noqa: E402
from text_tables import tables  # noqa: E402

RESULTS = BENCHMARKS / "results" / "text"
OTHERS = {"runtime", "search_latency"}
"""results of other scripts"""


def test_every_result_has_a_cell_and_every_cell_a_line():
    known = list(cells())
    assert {path.stem for path in RESULTS.glob("*.json")} - OTHERS <= set(known)
    lines = tables(RESULTS)
    assert all(f"| {name}" in lines for name in known)


def test_cells_run_in_order_and_stay_with_what_they_share(tmp_path):
    known = list(cells())
    made = chains(known)
    assert sorted(name for chain in made for name in chain) == sorted(known)
    assert made[0] == ["reranking-cranfield-cross_encoder_full-0"]
    run = ["lexsembridge-cranfield-slr-passages-1", "lexsembridge-med-slr-passages-1"]
    assert [*run, "lexsembridge-scifact-slr-passages-1"] in made
    together = next(chain for chain in made if "reranking-scifact-cross_encoder-0" in chain)
    assert "reranking-scifact-mvp_4_views-0" in together
    assert not any("full" in name for name in together)
    assert len(ORDER) == len(set(ORDER))
    (tmp_path / f"{run[0]}.json").write_text("{}")
    assert chosen(["*-slr-passages-1"], tmp_path) == [[run[1], "lexsembridge-scifact-slr-passages-1"]]
    assert corpora_of(["head_room-med", "lexsembridge-catalogue-slr-fusion-0"]) == {"med", "catalogue"}


def test_a_cell_that_fails_is_named_and_the_others_go_on(tmp_path, capfd):
    place = Place(tmp_path / "no data", tmp_path / "work", tmp_path / "results", "cpu")
    wanted = [["head_room-med"], ["head_room-cranfield"]]
    assert run_chains(wanted, place, jobs=1, minutes=5, threads=1) == ["head_room-med", "head_room-cranfield"]
    said = capfd.readouterr()
    assert "head_room-med: FAILED, DataError" in said.out
    assert run_chains(wanted, place, jobs=2, minutes=0, threads=1) == []
    assert "no minutes left for: head_room-" in capfd.readouterr().out
