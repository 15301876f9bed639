"""What is published is what was prepared and trained, and the batch job answers as the service would."""

from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import pipelines.recommend as batch_job
import worlds
from pipelines.prepared import PreparedSet
from pipelines.publish import publish, register
from pipelines.recommend import RECOMMENDATIONS, BatchRequest, recommend_users
from pipelines.reference import score_reference
from pipelines.tracking import git_commit, run, tracking_client
from pipelines.train import Trained
from pipelines.train_config import TrainConfig
from ranking.bundle import Bundle
from ranking.models import RANKERS
from ranking.recommender import Recommender
from ranking.snapshot import SnapshotReader, write_snapshot
from recsys.errors import DataError
from recsys.files import write_json
from recsys.history import Events, Histories
from recsys.messages import RecommendRequest

WORLD = worlds.make_world(users=25, length=12, known=30)
USERS = [f"usér-{number}" for number in range(25)]
NOW = worlds.START + 100 * worlds.DAY


def prepare_by_hand(directory: Path) -> PreparedSet:
    items = len(WORLD.key_to_row)
    text = [None if key == 3 else f"Item {key}" + "\nof many words" * (key % 2) for key in range(items)]
    directory.mkdir()
    pl.DataFrame(
        {"item_key": range(items), "item_id": [f"i{key}" for key in range(items)], "text": text}
    ).write_parquet(directory / "catalogue.parquet")
    pl.DataFrame({"user_key": range(len(USERS)), "user_id": USERS}).write_parquet(directory / "users.parquet")
    WORLD.items.save(directory / "items.safetensors")
    np.save(directory / "key_to_row.npy", WORLD.key_to_row)
    (directory / "histories").mkdir()
    WORLD.histories.save(directory / "histories")
    write_json(directory / "vocabulary.json", {"category": ["a", "b"]})
    write_json(directory / "manifest.json", {"format": 1, "digest": "d" * 64, "actions": ["view", "purchase"]})
    return PreparedSet(directory)


def trained(name: str, **options: int) -> Trained:
    config = RANKERS[name][0](**options)
    torch.manual_seed(1)
    model = RANKERS[name][1](config, WORLD.items)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return Trained(model, TrainConfig(name, config), None, "run")


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> tuple[Path, Path, PreparedSet]:
    root = tmp_path_factory.mktemp("published")
    prepared = prepare_by_hand(root / "prepared")
    bundle, snapshot = root / "bundle", root / "snapshot"
    metrics = {"gauc": 0.75, "device": "cpu", "curve": [1], "finished": True, "worst": float("-inf")}
    retriever = trained("mqsa_ted", width=8, window=10)
    publish(prepared, trained("dare"), retriever, bundle, snapshot, metrics, ())
    return bundle, snapshot, prepared


def test_the_bundle_holds_the_prepared_set(published):
    bundle, prepared = Bundle.load(published[0]), published[2]
    assert bundle.item_ids == ["", "", *prepared.catalogue["item_id"]]
    assert bundle.names[2:5] == ["Item 0", "Item 1", "Item 2"]
    assert bundle.names[5] == "i3"  # an item without a text is called by its id
    assert bundle.vocabulary == {"category": ["a", "b"]}
    assert [bundle.action_of(name) for name in ("", "view", "purchase", "dance")] == [0, 1, 2, 0]
    provenance = bundle.manifest.provenance
    assert provenance.metrics == {"gauc": 0.75}
    assert (provenance.commit, provenance.data_digest) == (git_commit(), prepared.digest)
    for name, value in prepared.items.state_dict().items():
        assert torch.equal(bundle.items.state_dict()[name], value)


def test_a_catalogue_that_does_not_fit_is_refused(tmp_path):
    prepared = prepare_by_hand(tmp_path / "prepared")
    np.save(tmp_path / "prepared" / "key_to_row.npy", WORLD.key_to_row[:-1])
    with pytest.raises(DataError, match="32 catalogue rows, 31 keys"):
        publish(prepared, trained("popularity"), None, tmp_path / "bundle", tmp_path / "snapshot", {}, ())
    assert not (tmp_path / "bundle").exists()


def test_the_snapshot_reads_every_history(published):
    reader = SnapshotReader(published[1])
    assert len(reader) == len(USERS)
    assert reader.users(3) == USERS[:3]
    assert sorted(reader.users(10**6)) == sorted(USERS)
    for number, user in enumerate(USERS):
        read, expected = reader.read(user), WORLD.histories.of(number)
        for name in ("item", "action", "time"):
            np.testing.assert_array_equal(getattr(read, name), getattr(expected, name))
    assert reader.read("nobody") is None
    assert reader.read("") is None


@settings(max_examples=40, deadline=None)
@given(
    users=st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs"]), max_size=6),
        st.lists(st.integers(0, 9), max_size=5),
        min_size=1,
        max_size=12,
    ),
    collide=st.booleans(),
)
def test_a_snapshot_of_any_users(tmp_path_factory, users, collide):
    """Also where all ids hash alike: an id is compared, not only its hash."""
    directory = tmp_path_factory.mktemp("snapshot") / "snapshot"
    lengths = [len(items) for items in users.values()]
    items = np.array([item for taken in users.values() for item in taken], np.uint32)
    events = Events(items, np.zeros(len(items), np.uint8), np.arange(len(items), dtype=np.int64))
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    with pytest.MonkeyPatch.context() as patch:
        if collide:
            patch.setattr("ranking.snapshot._hash", lambda user_id: 7)
        write_snapshot(directory, list(users), Histories(events, offsets), "digest")
        reader = SnapshotReader(directory)
        for user, taken in users.items():
            assert reader.read(user).item.tolist() == taken
        assert reader.read("not one of them") is None


def test_not_a_snapshot(tmp_path):
    with pytest.raises(DataError, match=r"snapshot.json: no such file"):
        SnapshotReader(tmp_path)
    write_json(tmp_path / "snapshot.json", {"format": 9})
    with pytest.raises(DataError, match="snapshot of format 9, this version reads 2"):
        SnapshotReader(tmp_path)
    with pytest.raises(DataError, match="1 user ids, but 25 histories"):
        write_snapshot(tmp_path / "other", ["one"], WORLD.histories, "digest")


@pytest.mark.parametrize("chunk", [4, 2_000])
def test_the_batch_job_answers_as_the_service(published, tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(batch_job, "CHUNK", chunk)
    bundle, reader = Bundle.load(published[0]), SnapshotReader(published[1])
    recommender = Recommender(bundle, reader)
    asked, seen = [*USERS, "nobody"], []
    out = tmp_path / "deep" / "recommendations.parquet"
    rows = recommend_users(
        bundle, reader, asked, BatchRequest(7, NOW), out, lambda done, total: seen.append((done, total))
    )
    table = pl.read_parquet(out)
    assert table.schema == RECOMMENDATIONS
    assert len(table) == rows == 7 * len(asked)
    assert seen[-1] == (26, 26)
    assert len(seen) == -(-26 // chunk)
    expected = []
    for user in asked:
        answer = recommender.recommend(RecommendRequest(user_id=user, k=7, at=NOW), 0)
        expected += [
            (user, item.item_id, rank, item.score, item.sources, user != "nobody")
            for rank, item in enumerate(answer.items, 1)
        ]
    assert table.rows() == expected
    assert [path.name for path in out.parent.iterdir()] == [out.name]


def test_a_batch_job_over_nobody_is_an_empty_table(published, tmp_path):
    bundle, reader = Bundle.load(published[0]), SnapshotReader(published[1])
    assert recommend_users(bundle, reader, [], BatchRequest(7, NOW), tmp_path / "none.parquet") == 0
    assert pl.read_parquet(tmp_path / "none.parquet").schema == RECOMMENDATIONS


@pytest.mark.slow
def test_registering_gives_a_version_that_can_be_loaded(published, tmp_path):
    """The alias moves, registering twice adds nothing, and both bundles of one run come back from MLflow and load."""
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    with run(uri, "training") as tracked:
        first = register(published[0], tracked.run_id, uri)
        assert register(published[0], tracked.run_id, uri, alias="shadow") == first
        publish(published[2], trained("popularity"), None, tmp_path / "other", tmp_path / "snapshot", {}, ())
        second = register(tmp_path / "other", tracked.run_id, uri)
    client = tracking_client(uri)
    assert (first, second) == ("1", "2")
    for alias, number, ranker in (("champion", second, "popularity"), ("shadow", first, "dare")):
        version = client.get_model_version_by_alias("recsys", alias)
        assert str(version.version) == number
        assert version.tags["ranker"] == ranker
        path = version.source.removeprefix(f"runs:/{tracked.run_id}/")
        fetched = Bundle.load(Path(client.download_artifacts(tracked.run_id, path, str(tmp_path))))
        assert fetched.manifest.models["ranker"].name == ranker
        assert fetched.version == version.tags["bundle"]


def test_a_bundle_tells_how_its_scores_lay_and_the_same_answers_have_no_drift(published):
    bundle = Bundle.load(published[0], golden=False)
    assert bundle.reference is not None
    assert "reference.json" in bundle.manifest.files
    assert score_reference(published[2])(bundle) == bundle.reference
    assert sum(bundle.reference.shares) == pytest.approx(1)
    assert bundle.reference.scores > 0
