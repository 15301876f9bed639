"""The sizing guide's bytes, held against real files and objects."""

import re
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from serving_world import LATER

from ranking.batch import FIRST_ITEM
from ranking.bundle import Bundle, Contents, write_bundle
from ranking.bundle_models import NamedModel
from ranking.dare import Dare, DareConfig
from ranking.items import ItemTable, Transitions
from ranking.mqsa_ted import MqsaTed, MqsaTedConfig
from ranking.snapshot import SnapshotReader, write_snapshot
from recsys.history import Events, Histories
from recsys.stores import Encoder, Event
from serving.event_log import SegmentLog
from serving.history_store import LmdbHistoryStore
from serving.lineup import NoRanker, Served
from worlds import PROVENANCE

GUIDE = Path(__file__).parent.parent / "serving/deploy/README.md"
SMALL, LARGE = 1_000, 4_000
COLUMNS, PAIRS = 2, 3
ID, NAME = 9, 14  # letters of each item's id and name below


def told(what: str, **values: int) -> int:
    """Return the bytes that the guide's row for `what` says."""
    [row] = [line for line in GUIDE.read_text().splitlines() if line.startswith(f"| {what} |")]
    formula = re.search("`([^`]*)`", row)
    assert formula, row
    return eval(formula.group(1), {"__builtins__": {}}, values)


def publish(directory: Path, items: int) -> Path:
    rows = items + FIRST_ITEM
    generator = torch.Generator().manual_seed(0)
    count = torch.ones(rows, dtype=torch.int64)
    count[:FIRST_ITEM] = 0
    target = torch.randint(FIRST_ITEM, rows, (items * PAIRS,), generator=generator, dtype=torch.int32)
    offsets = torch.cat([torch.zeros(FIRST_ITEM, dtype=torch.int64), torch.arange(items + 1) * PAIRS])
    codes = torch.full((rows, COLUMNS), 2, dtype=torch.int32)
    transitions = Transitions(offsets, target, torch.ones(len(target)))
    table = ItemTable(("category", "brand"), codes, (3, 3), count, transitions)
    torch.manual_seed(0)
    ranker, retriever = DareConfig(), MqsaTedConfig(width=64)
    contents = Contents(
        items=table,
        item_ids=["", "", *(f"item-{number:04d}" for number in range(items))],
        names=["", "", *(f"some name {number:04d}" for number in range(items))],
        key_to_row=np.arange(FIRST_ITEM, rows, dtype=np.int32),
        vocabulary={},
        actions=["", "purchase"],
        ranker=NamedModel("dare", ranker, Dare(ranker, table)),
        retriever=NamedModel("mqsa_ted", retriever, MqsaTed(retriever, table)),
    )
    write_bundle(directory, contents, PROVENANCE)
    return directory


@pytest.fixture(scope="module")
def bundles(tmp_path_factory) -> tuple[Path, Path]:
    place = tmp_path_factory.mktemp("sizes")
    return publish(place / "small", SMALL), publish(place / "large", LARGE)


@pytest.mark.parametrize(
    ("what", "values", "files"),
    [
        ("vectors in the index", {"D": 64}, ["index/shard_000.faiss"]),
        ("weights of a model", {"W": 64}, ["models/retriever.safetensors"]),
        ("weights of a model", {"W": 32}, ["models/ranker.safetensors"]),
        ("ids and names, on disk", {"I": ID, "L": NAME}, ["strings.safetensors"]),
    ],
)
def test_what_an_item_more_takes_in_a_bundle(bundles, what, values, files):
    assert per_item(bundles, files) == pytest.approx(told(what, **values), rel=0.01)


def test_what_an_item_more_takes_in_the_catalogue(bundles):
    expected = told("category codes, counts, key to row", C=COLUMNS) + PAIRS * told("transitions kept")
    assert per_item(bundles, ["items.safetensors", "key_to_row.npy"]) == pytest.approx(expected, rel=0.01)


def per_item(bundles: tuple[Path, Path], files: list[str]) -> float:
    small, large = (sum((bundle / file).stat().st_size for file in files) for bundle in bundles)
    return (large - small) / (LARGE - SMALL)


def test_what_ids_and_names_take_in_a_process(bundles):
    def taken(directory: Path) -> int:
        tracemalloc.start()
        bundle = Bundle.load(directory, golden=False)
        served = Served(bundle, NoRanker(bundle.version))
        kept = bundle.row_of, served.names
        total = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        assert kept
        return total

    taken(bundles[0])  # what a first load imports
    more = (taken(bundles[1]) - taken(bundles[0])) / (LARGE - SMALL)
    assert more == pytest.approx(told("ids and names, in Python", I=ID, L=NAME), rel=0.25)


def test_what_users_and_events_take(tmp_path):
    users, per_user = 200, 300
    ids = [f"user-{number:04d}" for number in range(users)]
    count = users * per_user
    empty, full = (
        Histories(
            Events(np.zeros(n, np.uint32), np.zeros(n, np.uint8), np.zeros(n, np.int64)),
            np.linspace(0, n, users + 1).astype(np.int64),
        )
        for n in (0, count)
    )
    write_snapshot(tmp_path / "empty", ids, empty, "digest")
    write_snapshot(tmp_path / "full", ids, full, "digest")
    overhead = 128 * 4 + 500  # headers of four npy files, and the JSON's
    assert size(tmp_path / "empty") == pytest.approx(users * told("users of the snapshot", I=9) + overhead, rel=0.1)
    assert size(tmp_path / "full") - size(tmp_path / "empty") == pytest.approx(
        count * told("histories of the snapshot"), rel=0.01
    )

    log = SegmentLog(tmp_path / "log", "os")
    store = LmdbHistoryStore(tmp_path / "view", SnapshotReader(tmp_path / "empty"))
    for first in range(0, per_user, 50):
        posted = range(first, first + 50)
        for user in ids:
            log.append([Event(f"{user} {number:04d}", user, "item-0001", LATER, "buy") for number in posted])
        store.follow(log, Encoder(lambda _: 1, len))
    assert size(tmp_path / "log") / count == pytest.approx(told("event log", I=9, K=14), rel=0.1)
    assert 13 <= size(tmp_path / "view") / count <= told("live histories, LMDB")
    store.close()
    log.close()


def size(directory: Path) -> int:
    """Return the bytes on the disk of all files; those of LMDB have holes."""
    return sum(min(file.stat().st_size, file.stat().st_blocks * 512) for file in directory.rglob("*") if file.is_file())


def test_the_guides_example_is_its_formula():
    million = 1_000_000
    for what, values, shown in [
        ("vectors in the index", {"D": 64}, "264 MB"),
        ("category codes, counts, key to row", {"C": 1}, "24 MB"),
        ("ids and names, on disk", {"I": 10, "L": 20}, "46 MB"),
        ("ids and names, in Python", {"I": 10, "L": 20}, "250 MB"),
        ("users of the snapshot", {"I": 8}, "40 MB"),
        ("event log", {"I": 10, "K": 16}, "121 MB"),
    ]:
        assert f"{told(what, **values) * million // 10**6} MB" == shown
        [row] = [line for line in GUIDE.read_text().splitlines() if line.startswith(f"| {what} |")]
        assert shown in row
