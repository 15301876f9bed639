"""`recsys publish` of a bundle that only searches text, from a BEIR folder to an answer, and what it refuses."""

import json

import pytest
from typer.testing import CliRunner

from pipelines.text_publish import corpus_passages, mix_of
from ranking.bundle import Bundle
from ranking.fusion import Mix
from ranking.searcher import Searcher
from ranking.snapshot import SnapshotReader
from recsys.cli import app
from recsys.errors import ConfigError


@pytest.fixture
def corpus(tmp_path):
    directory = tmp_path / "corpus"
    directory.mkdir()
    documents = [("d1", "Tea", "green and hot"), ("d2", "", "rye bread"), ("d3", "", "rye bread")]
    lines = [json.dumps({"_id": id_, "title": title, "text": text}) for id_, title, text in documents]
    (directory / "corpus.jsonl").write_text("\n".join(lines))
    return directory


def test_a_corpus_becomes_a_bundle_that_answers(corpus, tmp_path):
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    place = tmp_path / "workspace"
    arguments = ["publish", "--text-encoder", "none", "--corpus", corpus, "--workspace", place, "--mlflow", uri]
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert done.exit_code == 0, done.output
    bundle = Bundle.load(place / "bundle")
    found = Searcher(bundle.text).search("rye")
    assert bundle.text.passages.documents(int(found.rows[0]), 9) == ["d2", "d3"]
    assert bundle.version in done.output
    assert SnapshotReader(place / "snapshot").users(9) == []


def test_documents_named_like_items_are_items(corpus):
    passages = corpus_passages(corpus, {"d3": 7, "x": 8})
    assert passages.items.tolist() == [0, 0, 7]


def test_what_cannot_be_meant_is_refused(corpus):
    assert (mix_of("0.3"), mix_of("rrf").weight, mix_of("by-query")) == (Mix(0.3), None, Mix())
    for wrong in ("1.1", "words", "nan"):
        with pytest.raises(ConfigError, match="rrf"):
            mix_of(wrong)
    for arguments in (["publish"], ["publish", "--corpus", str(corpus)], ["publish", "--text-encoder", "none"]):
        done = CliRunner().invoke(app, arguments)
        assert isinstance(done.exception, ConfigError), done.output
