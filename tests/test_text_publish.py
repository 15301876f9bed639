"""`recsys publish` of a bundle that only searches text, from a BEIR folder to an answer, and what it refuses."""

import json

import numpy as np
import pytest
import tiny_text
from typer.testing import CliRunner

from pipelines.first_stages import FirstStages
from pipelines.shipped import CONFIGS
from pipelines.text_corpus import read_corpus, read_queries
from pipelines.text_measures import measure
from pipelines.text_models import load_text_config, plain_encoder
from pipelines.text_publish import chosen_mix, corpus_passages, mix_of, split_learned_from
from ranking.bundle import Bundle
from ranking.dense_encoder import DenseConfig, DenseEncoder, described
from ranking.fusion import Mix
from ranking.searcher import Searcher
from ranking.snapshot import SnapshotReader
from recsys.cli import app
from recsys.errors import ConfigError, DataError


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
    passages, blank = corpus_passages(corpus, {"d3": 7, "x": 8})
    assert (passages.items.tolist(), blank) == ([0, 0, 7], 0)


def test_documents_without_text_are_left_out_and_counted(corpus):
    with (corpus / "corpus.jsonl").open("a") as file:
        file.write(
            '\n{"_id": "e1", "text": ""}\n{"_id": "e2", "title": "  ", "text": " \\n"}\n{"_id": "e3", "title": "Jam"}\n'
        )
    passages, blank = corpus_passages(corpus, {"e1": 7, "e3": 8})
    assert (list(passages.texts), passages.items.tolist(), blank) == (
        ["Tea green and hot", "rye bread", "Jam"],
        [0, 0, 0, 8],
        2,
    )
    (corpus / "corpus.jsonl").write_text('{"_id": "e1", "text": " "}')
    with pytest.raises(DataError, match=r"corpus.jsonl: none of 1 documents has a text"):
        corpus_passages(corpus)


def test_queries_that_choose_the_weight_are_checked_before_anything_is_encoded(tmp_path):
    folder = tiny_text.beir(tmp_path / "tiny")
    with (folder / "qrels" / "train.tsv").open("a") as file:
        file.write("q0\tnowhere\t1\n")
    with pytest.raises(DataError, match=r"train.tsv: 1 judgements of documents that are not in corpus.jsonl"):
        corpus_passages(folder, tuned=True)
    assert len(corpus_passages(folder)[0].texts) == 40  # where --fusion says the weight they are not asked


def test_queries_that_no_weight_tells_apart_leave_the_shipped_one(tmp_path):
    folder = tiny_text.beir(tmp_path / "tiny", documents=60, queries=60)
    encoder = tiny_text.dense()
    text = {json.loads(line)["_id"]: json.loads(line)["text"] for line in (folder / "corpus.jsonl").open()}
    whole = [json.dumps({"_id": f"q{n}", "text": text[f"d{n}"]}) for n in range(60)]  # covered: words decide anyway
    (folder / "queries.jsonl").write_text("\n".join(whole))
    assert chosen_mix(folder, encoder, tmp_path / "cache") == Mix()


def test_the_weight_of_words_is_chosen_on_judged_queries_that_are_no_test(tmp_path):
    folder = tiny_text.beir(tmp_path / "tiny")
    encoder = tiny_text.dense()
    chosen = chosen_mix(folder, encoder, tmp_path / "cache")
    stages = FirstStages(read_corpus(folder), encoder, tmp_path / "cache")
    queries = read_queries(folder, stages.corpus, "train")
    found = {
        w: measure(stages.hybrid(queries.texts, w), queries)["ndcg_at_10"].mean() for w in (0.1, chosen.weight, 0.9)
    }
    assert max(found, key=lambda weight: found[weight]) == chosen.weight or len(set(found.values())) < 3
    assert chosen_mix(folder, encoder, tmp_path / "cache", but="train") == Mix()
    learned = {"path": str(folder), "also": [], "natural": "train"}
    (tmp_path / "runs/mine").mkdir(parents=True)
    (tmp_path / "runs/mine/run.json").write_text(json.dumps({"config": {"corpus": learned}}))
    assert split_learned_from("mine", tmp_path / "runs", folder) == "train"
    assert split_learned_from("mine", tmp_path / "runs", tmp_path) == ""
    assert split_learned_from("minilm", tmp_path / "runs", folder) == ""
    (folder / "qrels" / "train.tsv").unlink()
    assert chosen_mix(folder, encoder, tmp_path / "cache") == Mix()


def test_what_cannot_be_meant_is_refused(corpus):
    assert (mix_of("0.3"), mix_of("rrf").weight, mix_of("by-query")) == (Mix(0.3), None, Mix())
    for wrong in ("1.1", "words", "nan"):
        with pytest.raises(ConfigError, match="rrf"):
            mix_of(wrong)
    for arguments in (["publish"], ["publish", "--corpus", str(corpus)], ["publish", "--text-encoder", "none"]):
        done = CliRunner().invoke(app, arguments)
        assert isinstance(done.exception, ConfigError), done.output


@pytest.fixture
def folder(tmp_path):
    """A backbone with the files that sentence-transformers writes beside it."""
    place = tmp_path / "backbone"
    tiny_text.bert().save_pretrained(place)
    tiny_text.tokenizer().save(place)

    def write(name: str, content) -> None:
        (place / name).parent.mkdir(exist_ok=True)
        (place / name).write_text(json.dumps(content))

    return place, write


def test_an_encoder_is_pooled_and_prompted_as_its_folder_says(folder):
    place, write = folder
    assert described(str(place)) == DenseConfig(str(place))
    assert described("minilm") == DenseConfig("minilm")
    write("modules.json", [{"type": f"sentence_transformers.models.{one}"} for one in ("Transformer", "Pooling")])
    write("1_Pooling/config.json", {"word_embedding_dimension": 8, "pooling_mode_cls_token": True})
    write("config_sentence_transformers.json", {"prompts": {"query": "heat ", "passage": "wing "}})
    write("sentence_bert_config.json", {"max_seq_length": 12})
    config = described(str(place))
    assert config == DenseConfig(str(place), "cls", 12, 12, "heat ", "wing ")
    encoder, plain = (DenseEncoder(one, tiny_text.bert(), tiny_text.tokenizer()) for one in (config, DenseConfig()))
    texts = ["flow jet", "shock"]
    same = tiny_text.dense(pool="cls")
    assert np.allclose(encoder.encode_queries(texts), same.encode_queries([f"heat {text}" for text in texts]))
    assert np.allclose(encoder.encode_passages(texts), same.encode_passages([f"wing {text}" for text in texts]))
    assert not np.allclose(encoder.encode_queries(texts), plain.encode_queries(texts))
    asked = load_text_config(CONFIGS / "lexsembridge.toml", [f"model.backbone={place}", "model.pool=cls"])
    assert plain_encoder(asked).config.pool == "cls"
    with pytest.raises(ConfigError, match=r"pool is 'mean', and .* was trained with 'cls'; set model.pool=cls"):
        plain_encoder(load_text_config(CONFIGS / "lexsembridge.toml", [f"model.backbone={place}"]))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("1_Pooling/config.json", {"pooling_mode_max_tokens": True}, "pools by max_tokens; expected"),
        (
            "1_Pooling/config.json",
            {"pooling_mode_max_tokens": True, "pooling_mode_mean_tokens": True},
            "max_tokens and",
        ),
        ("modules.json", [{"type": "sentence_transformers.models.Dense"}], "has a step Dense; expected Transformer"),
    ],
)
def test_an_encoder_that_goes_on_otherwise_is_refused(folder, name, content, words):
    place, write = folder
    write(name, content)
    with pytest.raises(ConfigError, match=words):
        described(str(place))
