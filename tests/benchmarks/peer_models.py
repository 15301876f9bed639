"""Third-party models beside which ours are timed, with adapters that make SDIM the same function on the same weights.

They stay out of the project's dependencies. FuxiCTR's wheel carries LongCTR's models; RecBole's own requirements are
old, so that nothing is installed but what its model files import:

    pip install --no-deps --target peers fuxictr==2.3.10 recbole==1.2.1 h5py absl-py colorama colorlog tabulate \
        tensorboard texttable thop

Nothing of them is copied here; they are imported from the folder that `--peers` names.
"""

import sys
import tempfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ranking.batch import Batch
from ranking.mqsa_ted import MqsaTedConfig
from ranking.sdim import Sdim

RATE = 1e-3
"""Adam's learning rate, on both sides."""


def import_from(folder: Path) -> None:
    """Let the peers' modules be imported; raises `SystemExit` if they are not there."""
    sys.path.append(str(folder))
    for name, kind in {"float": np.float64, "bool": np.bool_, "int": np.int64, "object": object}.items():
        if name not in np.__dict__:  # names that RecBole reads and numpy 2 no longer has
            setattr(np, name, kind)
    try:
        import fuxictr.pytorch  # noqa: F401
        import recbole.model.sequential_recommender  # noqa: F401
    except ImportError as error:
        raise SystemExit(f"--peers {folder}: {error}; install them as the head of this file says") from error
    torch.autograd.set_detect_anomaly(False)  # importing a peer turns it on, for both sides


def longctr(name: str, rows: int, width: int, **settings: Any) -> Any:
    """Return LongCTR's model of this name over one item field of `rows` rows, with its own Adam.

    Args:
        name: `SDIM`, `DIN` or `TWIN`.
        rows: of the item table.
        width: of an item's vector.
        settings: of the model, by its own names.
    """
    from fuxictr.features import FeatureMap

    folder = tempfile.gettempdir()
    features = FeatureMap("benchmark", folder)
    spec = {"source": "item", "type": "categorical", "vocab_size": rows, "padding_idx": 0, "embedding_dim": width}
    features.features, features.labels = OrderedDict(item=spec), ["label"]
    module = __import__(f"model_zoo.LongCTR.{name}.{name}", fromlist=[name])
    model = getattr(module, name)(
        features,
        embedding_dim=width,
        learning_rate=RATE,
        optimizer="adam",
        loss="binary_cross_entropy",
        metrics=["AUC"],
        verbose=0,
        model_root=folder,
        **settings,
    )
    model._batch_index, model._max_gradient_norm = 0, 10.0
    return model


def rows_for_longctr(batch: Batch, length: int) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
    """Return what a LongCTR model reads: a row per candidate, the history and behind it the target."""
    candidates = batch.candidates.item
    history = batch.history.padded(length)
    each = candidates.shape[1]
    past = history.item.repeat_interleave(each, 0)
    item = torch.cat([past, candidates.reshape(-1, 1)], 1).long()
    return {"label": batch.label.flatten()}, {"item": item.flatten()}, history.mask.repeat_interleave(each, 0).float()


class _Short(nn.Module):
    """Our short attention where LongCTR has its own."""

    def __init__(self, ours: Sdim) -> None:
        super().__init__()
        self.attention = ours.attention

    def forward(self, target: Tensor, events: Tensor, mask: Tensor) -> Tensor:
        weight = self.attention(target[:, None], events) * mask[:, None]
        return (weight @ events).squeeze(1)


class _Head(nn.Module):
    """Our head where LongCTR has its own: gives probabilities [B, 1] of [target, long, short]."""

    def __init__(self, ours: Sdim) -> None:
        super().__init__()
        self.head = ours.head

    def forward(self, features: Tensor) -> Tensor:
        q, long, short = features.chunk(3, -1)
        probability: Tensor = self.head(torch.cat([q, long, q * long, short, q * short], -1)).sigmoid()
        return probability.unsqueeze(-1)


def same_sdim(ours: Sdim) -> Any:
    """Return LongCTR's SDIM as the same function as ours: a copy of our weights, planes, short attention and head.

    Its embedding, hashing, pooling, gradients and optimiser stay its own. It reads the events before the newest but
    one's slot as short history, which is why `short_seq_len` is one more than our `recent`.
    """
    import copy

    config, table = ours.config, ours.fields.item
    if table is None or ours.fields.category is not None or config.norm != "l2":
        raise ValueError("expected an SDIM of items alone, read out by l2")
    peer = longctr(
        "SDIM",
        len(table.weight),
        config.item_width,
        num_hashes=config.groups,
        hash_bits=config.bits,
        short_seq_len=config.recent + 1,
        l2_norm=True,
    )
    own = copy.deepcopy(ours)
    peer.short_attention, peer.dnn = _Short(own), _Head(own)
    with torch.no_grad():
        peer.embedding_layer.embedding_layer.embedding_layers["item"].weight.copy_(table.weight)
        peer.random_rotations.copy_(ours.planes.permute(2, 0, 1)[None])  # [1, D, G, tau]
    peer.compile("adam", "binary_cross_entropy", RATE)
    return peer


def recbole_sasrec(items: int, length: int, config: MqsaTedConfig) -> Any:
    """Return RecBole's SASRec with full softmax: as many blocks as both our branches have together, equally wide."""
    from recbole.model.sequential_recommender.sasrec import SASRec

    settings = {
        "USER_ID_FIELD": "user",
        "ITEM_ID_FIELD": "item",
        "LIST_SUFFIX": "_list",
        "ITEM_LIST_LENGTH_FIELD": "length",
        "NEG_PREFIX": "neg_",
        "MAX_ITEM_LIST_LENGTH": length,
        "device": torch.device("cpu"),
        "n_layers": 2 * config.blocks,
        "n_heads": config.heads,
        "hidden_size": config.width,
        "inner_size": config.width,
        "hidden_dropout_prob": config.dropout,
        "attn_dropout_prob": config.dropout,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-12,
        "initializer_range": 0.02,
        "loss_type": "CE",
    }

    class Catalogue:
        def num(self, _field: str) -> int:
            return items + 1

    return SASRec(settings, Catalogue())
