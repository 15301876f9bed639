"""A bundle gives back exactly what was published, and refuses to load when anything in it is not what it was."""

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from bundle_world import PROVENANCE, SMALL, WORLD, contents, named
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

import worlds
from ranking.bundle import Bundle, write_bundle
from ranking.bundle_models import NamedModel
from ranking.index import Index, IndexConfig
from ranking.manifest import MANIFEST
from ranking.models import RANKERS
from ranking.strings import StringTable
from recsys.errors import BundleError, GateError
from recsys.files import sha256_file
from recsys.history import UNKNOWN_KEY


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("published") / "bundle"
    write_bundle(directory, contents(named("dare"), named("mqsa_ted")), PROVENANCE)
    return directory


@pytest.fixture
def copy(published, tmp_path) -> Path:
    return Path(shutil.copytree(published, tmp_path / "bundle"))


def sign_again(directory: Path, change=lambda manifest: None) -> None:
    """Make the digests of a changed bundle right again, as a careful forger would."""
    manifest = json.loads((directory / MANIFEST).read_text())
    for name, entry in manifest["files"].items():
        path = directory / name
        if path.is_file():
            entry |= {"sha256": sha256_file(path), "bytes": path.stat().st_size}
    change(manifest)
    (directory / MANIFEST).write_text(json.dumps(manifest))


@pytest.mark.parametrize("name", sorted(RANKERS))
def test_every_model_comes_back_bit_for_bit(tmp_path, name):
    ranker, retriever = named(name), named("mqsa_ted")
    version = write_bundle(tmp_path / "bundle", contents(ranker, retriever), PROVENANCE)
    bundle = Bundle.load(tmp_path / "bundle")
    assert bundle.version == version
    assert bundle.manifest.models["ranker"].name == name
    assert bundle.device == torch.device("cpu")
    for batch in WORLD.requests("test"):
        assert torch.equal(worlds.scores(bundle.ranker, batch), worlds.scores(ranker.model, batch))
        with torch.no_grad():
            expected = retriever.model.user_vectors(batch.history)
            assert torch.equal(bundle.retriever.user_vectors(batch.history), expected)
            scores, best = (expected @ retriever.model.item_vectors().T)[:, 2 : 2 + WORLD.known].topk(5)
        rows, found = bundle.index.search(expected.numpy(), 5)
        np.testing.assert_allclose(found, scores, rtol=1e-4, atol=1e-6)
        assert (rows == best.numpy() + 2).mean() > 0.99


def test_ids_names_and_keys_come_back(published):
    bundle = Bundle.load(published)
    given_ = contents(named("dare"), None)
    assert bundle.item_ids == given_.item_ids
    assert bundle.names == given_.names
    assert bundle.vocabulary == given_.vocabulary
    assert bundle.manifest.provenance == PROVENANCE
    assert bundle.manifest.counts["indexed_items"] == WORLD.known
    for row, item in enumerate(bundle.item_ids[2:], start=2):
        assert bundle.row_of[item] == row
        assert bundle.key_to_row[bundle.key_of(item)] == row
    assert bundle.key_of("nowhere") == bundle.key_of("") == UNKNOWN_KEY
    assert (bundle.action_of("purchase"), bundle.action_of("dance")) == (1, 0)
    assert not any(parameter.requires_grad for parameter in bundle.ranker.parameters())


def test_the_same_input_gives_the_same_bundle(published, tmp_path):
    version = write_bundle(tmp_path / "again", contents(named("dare"), named("mqsa_ted")), PROVENANCE)
    assert version == Bundle.load(published).version
    other = write_bundle(tmp_path / "other", contents(named("dare", seed=1), named("mqsa_ted")), PROVENANCE)
    assert other != version


def test_one_model_in_two_roles_is_one_file_and_one_object(tmp_path):
    # Two objects with equal weights, as two loads of one checkpoint give them.
    write_bundle(tmp_path / "one", contents(named("mqsa_ted"), named("mqsa_ted")), PROVENANCE)
    bundle = Bundle.load(tmp_path / "one")
    assert bundle.ranker is bundle.retriever
    assert [path.name for path in (tmp_path / "one" / "models").iterdir()] == ["ranker.safetensors"]
    write_bundle(tmp_path / "two", contents(named("mqsa_ted"), named("mqsa_ted", seed=1)), PROVENANCE)
    assert Bundle.load(tmp_path / "two").ranker is not Bundle.load(tmp_path / "two").retriever


def test_without_a_retriever_there_is_no_index(tmp_path):
    write_bundle(tmp_path / "bundle", contents(named("personal_frequency"), None), PROVENANCE)
    bundle = Bundle.load(tmp_path / "bundle")
    assert bundle.retriever is None
    assert bundle.index is None


def test_several_shards(tmp_path):
    config = IndexConfig(rows_per_shard=10)
    write_bundle(tmp_path / "bundle", contents(named("dare"), named("mqsa_ted")), PROVENANCE, config)
    assert len(Bundle.load(tmp_path / "bundle").manifest.index) == 3


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_flipped_bit_anywhere_is_found(published, data):
    """Any single changed bit of any listed file is refused; so is one of the manifest, or it changes the version."""
    version = json_version = Bundle.load(published, golden=False).version
    path = data.draw(st.sampled_from(sorted(path for path in published.rglob("*") if path.is_file())))
    original = path.read_bytes()
    place = data.draw(st.integers(0, len(original) - 1))
    changed = bytearray(original)
    changed[place] ^= 1 << data.draw(st.integers(0, 7))
    try:
        path.write_bytes(changed)
        if path.name == MANIFEST:
            try:
                json_version = Bundle.load(published, golden=False).version
            except BundleError:
                return
            assert json_version != version
        else:
            with pytest.raises(BundleError, match=path.name):
                Bundle.load(published)
    finally:
        path.write_bytes(original)


def test_a_missing_file_is_named(published, tmp_path):
    for name in sorted(json.loads((published / MANIFEST).read_text())["files"]):
        copy = Path(shutil.copytree(published, tmp_path / Path(name).name))
        (copy / name).unlink()
        with pytest.raises(BundleError, match=f"'{name}' is missing"):
            Bundle.load(copy)
        sign_again(copy, lambda manifest, name=name: manifest["files"].pop(name))
        with pytest.raises(BundleError, match=f"needs file '{name}' but does not list it"):
            Bundle.load(copy)


@pytest.mark.parametrize("number", [0, 2, "1", None])
def test_another_format_is_refused(copy, number):
    sign_again(copy, lambda manifest: manifest.update(format=number))
    with pytest.raises(BundleError, match=f"format {number}, this version reads 1"):
        Bundle.load(copy)


def test_no_path_leaves_the_directory(copy, tmp_path):
    secret = tmp_path / "secret.json"
    secret.write_text("{}")
    (copy / "link.json").symlink_to(secret)
    entry = {"sha256": sha256_file(secret), "bytes": 2}
    for name in ("../secret.json", str(secret), "models/../../secret.json", "link.json", "..\\secret.json"):
        sign_again(copy, lambda manifest, name=name: manifest["files"].update({name: entry}))
        with pytest.raises(BundleError, match=r"lies outside the bundle"):
            Bundle.load(copy)
        sign_again(copy, lambda manifest, name=name: manifest["files"].pop(name))
    Bundle.load(copy)


def test_signed_but_changed_weights_do_not_answer_the_golden_requests(copy):
    for role in ("ranker", "retriever"):
        path = copy / "models" / f"{role}.safetensors"
        original = load_file(path)
        save_file({name: tensor * 1.01 for name, tensor in original.items()}, path)
        sign_again(copy)
        with pytest.raises(BundleError, match=r"golden user .* was .* when published and is .* now"):
            Bundle.load(copy)
        Bundle.load(copy, golden=False)
        save_file(original, path)
        sign_again(copy)
    Bundle.load(copy)


def test_signed_but_exchanged_item_ids_do_not_answer_the_golden_requests(copy):
    tensors = load_file(copy / "strings.safetensors")
    ids = list(StringTable.from_tensors(tensors, "item_id", "strings"))
    rotated = StringTable.of(ids[:2] + ids[3:] + ids[2:3])
    save_file(tensors | rotated.tensors("item_id"), copy / "strings.safetensors")
    sign_again(copy)
    with pytest.raises(BundleError, match=r"golden user 0 .*neighbour 1 was"):
        Bundle.load(copy)


def test_models_that_do_not_fit_are_named(copy):
    def config(key, value):
        return lambda manifest: manifest["models"]["ranker"]["config"].update({key: value})

    sign_again(copy, config("witdh", 3))
    with pytest.raises(BundleError, match="unknown key 'witdh'"):
        Bundle.load(copy)
    sign_again(copy, lambda manifest: manifest["models"]["ranker"]["config"].pop("witdh"))
    Bundle.load(copy)
    sign_again(copy, lambda manifest: manifest["models"]["ranker"].update(name="dura"))
    with pytest.raises(BundleError, match=r"'dura' is not one of .*dare, din"):
        Bundle.load(copy)
    sign_again(copy, lambda manifest: manifest["models"]["ranker"].update(name="dare"))
    weights = copy / "models" / "ranker.safetensors"
    tensors = load_file(weights)
    first = sorted(tensors)[0]
    save_file({name: tensor for name, tensor in tensors.items() if name != first}, weights)
    sign_again(copy)
    with pytest.raises(BundleError, match=f"does not fit the model 'dare'.*{first}"):
        Bundle.load(copy)


def test_pickles_are_never_loaded(copy, tmp_path):
    @dataclass
    class Trap:
        path: str

        def __reduce__(self):
            return (Path.touch, (Path(self.path),))

    sprung = tmp_path / "sprung"
    np.save(copy / "key_to_row.npy", np.array([Trap(str(sprung))], dtype=object), allow_pickle=True)
    sign_again(copy)
    with pytest.raises(BundleError, match="cannot be read"):
        Bundle.load(copy)
    torch.save({"x": torch.ones(1)}, copy / "models" / "ranker.safetensors")
    shutil.copy(copy / "models" / "ranker.safetensors", copy / "items.safetensors")
    sign_again(copy)
    with pytest.raises(BundleError, match="cannot be read"):
        Bundle.load(copy)
    assert not sprung.exists()


def test_not_a_bundle(tmp_path):
    with pytest.raises(BundleError, match=r"no manifest.json, so not a bundle"):
        Bundle.load(tmp_path)
    (tmp_path / MANIFEST).write_text("{")
    with pytest.raises(BundleError, match="not valid JSON"):
        Bundle.load(tmp_path)


class Nowhere(nn.Module):
    """An untrained retriever: all its item vectors are zero."""

    window = None

    def item_vectors(self):
        return torch.zeros(len(WORLD.items), 4)


def test_what_cannot_be_published_leaves_nothing(tmp_path):
    dare = named("dare")
    broken = named("dare", seed=1)
    for parameter in broken.model.parameters():
        nn.init.constant_(parameter, float("nan"))
    for what, message in (
        (contents(replace(dare, name="dura"), None), "no model named 'dura'"),
        (contents(broken, None), "expected finite numbers"),
        (contents(dare, NamedModel("mqsa_ted", named("mqsa_ted").config, Nowhere())), "is it trained"),
    ):
        with pytest.raises(BundleError, match=message):
            write_bundle(tmp_path / "bundle", what, PROVENANCE)
    assert list(tmp_path.iterdir()) == []


@settings(max_examples=50, deadline=None)
@given(strings=st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=8), max_size=20))
def test_string_tables_round_trip(strings):
    table = StringTable.from_tensors(StringTable.of(strings).tensors("s"), "s", "here")
    assert list(table) == strings
    assert [table[i] for i in range(len(table))] == strings


def test_an_index_below_its_recall_is_not_written(tmp_path, monkeypatch):
    parts = contents(named("dare"), named("mqsa_ted"))
    users = np.random.default_rng(0).normal(size=(7, SMALL["mqsa_ted"]["width"])).astype(np.float32)
    write_bundle(tmp_path / "bundle", parts, PROVENANCE, queries=users)
    told = Bundle.load(tmp_path / "bundle").manifest.index_recall
    assert (told.value >= 0.99, told.queries, told.of) == (True, 7, "users")
    monkeypatch.setattr(Index, "recall", lambda self, queries: 0.7 if len(queries) == 7 else 1.0)
    with pytest.raises(GateError, match=r"the index finds 0.7000 of the exact best 100 of 7 queries; expected 0.99"):
        write_bundle(tmp_path / "other", parts, PROVENANCE, queries=users)
    assert not (tmp_path / "other").exists()
    write_bundle(tmp_path / "other", parts, PROVENANCE)
    assert Bundle.load(tmp_path / "other").manifest.index_recall.of == "items"
