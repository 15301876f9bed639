"""Tiny random text models with a vocabulary of their own: oracles run on them in milliseconds, nothing is installed."""

import dataclasses
import json
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing

from ranking.cross_encoder import CrossEncoder
from ranking.dense_encoder import DenseConfig, DenseEncoder
from ranking.lexsembridge import LexSemBridge
from ranking.mvp import Mvp
from ranking.mvp_apart import MvpApart
from ranking.text_backbone import TextTokenizer

WORDS = tuple("wing flow heat shock layer plate cone speed mach drag lift jet skin wall tube gas".split())  # noqa: SIM905
SPECIAL = ["[PAD]", *(f"[unused{k}]" for k in range(6)), "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
T5_SPECIAL = ["<pad>", "</s>", "<unk>", *(f"<extra_id_{k}>" for k in range(6)), "Query", "Context", ":", "|"]


def tokenizer(t5: bool = False) -> TextTokenizer:
    names = (T5_SPECIAL if t5 else SPECIAL) + list(WORDS)
    vocabulary = {name: place for place, name in enumerate(names)}
    made = Tokenizer(WordLevel(vocabulary, unk_token="<unk>" if t5 else "[UNK]"))
    made.pre_tokenizer = Whitespace()
    if t5:
        made.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", vocabulary["</s>"])])
    else:
        marks = [(name, vocabulary[name]) for name in ("[CLS]", "[SEP]")]
        made.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=marks)
    return TextTokenizer.wrap(made)


def bert(mlm: bool = False, width: int = 24, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.nn.Module:
    from transformers import BertConfig, BertForMaskedLM, BertModel

    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(SPECIAL) + len(WORDS),
        hidden_size=width,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=2 * width,
        max_position_embeddings=64,
        initializer_range=0.4,
    )
    return (BertForMaskedLM(config) if mlm else BertModel(config)).eval().to(dtype)


def t5(dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.nn.Module:
    from transformers import T5Config, T5Model

    torch.manual_seed(seed)
    config = T5Config(
        vocab_size=len(T5_SPECIAL) + len(WORDS),
        d_model=64,
        d_kv=16,
        d_ff=128,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=0,
    )
    return T5Model(config).eval().to(dtype)


def dense(**options) -> DenseEncoder:
    """A dense encoder on the tiny BERT, by the default settings but for `options`."""
    return DenseEncoder(DenseConfig(**options), bert(), tokenizer())


def model_of(config):
    """A tiny model of a text training config."""
    torch.manual_seed(config.seed)
    words, transformer, options = tokenizer(), bert(), config.model
    if config.name == "lexsembridge":
        return LexSemBridge(options, transformer, words)
    if config.name == "mvp":
        model = Mvp(dataclasses.replace(options, decoder_heads=4, max_len=48), transformer, words)
        model.begin()
        return model
    if config.name == "mvp_apart":
        return MvpApart(dataclasses.replace(options, max_len=48), transformer, words)
    return CrossEncoder(dataclasses.replace(options, max_len=48), transformer, words)


def beir(directory: Path, documents: int = 40, queries: int = 12) -> Path:
    """A small corpus in BEIR's layout: each query names three words of its document."""
    generator = torch.Generator().manual_seed(0)
    directory.mkdir(parents=True, exist_ok=True)
    texts = [
        " ".join(WORDS[i] for i in torch.randint(len(WORDS), (12,), generator=generator)) for _ in range(documents)
    ]
    lines = [json.dumps({"_id": f"d{n}", "title": "", "text": text}) for n, text in enumerate(texts)]
    (directory / "corpus.jsonl").write_text("\n".join(lines) + "\n")
    asked = [json.dumps({"_id": f"q{n}", "text": " ".join(texts[n].split()[2:6])}) for n in range(queries)]
    (directory / "queries.jsonl").write_text("\n".join(asked) + "\n")
    (directory / "qrels").mkdir(exist_ok=True)
    for split in ("train", "test"):
        judged = "".join(f"q{n}\td{n}\t1\n" for n in range(queries) if (n % 2 == 0) == (split == "train"))
        (directory / "qrels" / f"{split}.tsv").write_text("query-id\tcorpus-id\tscore\n" + judged)
    return directory
