"""The models of a bundle as files: weights as safetensors, configuration in the manifest."""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ranking.items import ItemTable
from ranking.manifest import MANIFEST, ModelEntry, Role
from ranking.models import RANKERS
from ranking.ranker import AnyRanker
from recsys.config import parse
from recsys.errors import BundleError
from recsys.files import sha256_file


@dataclass(frozen=True)
class NamedModel:
    """A trained model with the name and the config dataclass that build it again."""

    name: str
    config: Any
    model: AnyRanker


def write_models(directory: Path, named: Sequence[tuple[Role, NamedModel]]) -> dict[Role, ModelEntry]:
    """Write the weights of each role; one model in two roles is written, and later loaded, once."""
    (directory / "models").mkdir()
    entries: dict[Role, ModelEntry] = {}
    for role, model in named:
        weights = directory / "models" / f"{role}.safetensors"
        state = cast(nn.Module, model.model).state_dict()
        save_file({key: tensor.detach().cpu().clone().contiguous() for key, tensor in state.items()}, weights)
        config = json.loads(json.dumps(dataclasses.asdict(model.config)))
        entry = ModelEntry(name=model.name, config=config, weights=f"models/{role}.safetensors")
        for other in entries.values():
            same = other.model_copy(update={"weights": entry.weights}) == entry
            if same and sha256_file(directory / other.weights) == sha256_file(weights):
                weights.unlink()
                entry = other
        entries[role] = entry
    return entries


def load_model(entry: ModelEntry, weights: Path, items: ItemTable, device: torch.device) -> AnyRanker:
    """Build a model anew and give it its weights; raises `BundleError` if they do not fit."""
    if entry.name not in RANKERS:
        raise BundleError(f"model {entry.name!r} is not one of {', '.join(sorted(RANKERS))}; publish with this version")
    config_class, model_class = RANKERS[entry.name]
    config = parse(config_class, entry.config, f"{MANIFEST} [{entry.name}]")
    with torch.random.fork_rng(devices=[]):  # initial weights are drawn and thrown away; the caller's draws stay put
        model = cast(nn.Module, model_class(config, items))  # type: ignore[call-arg]
    try:
        # assign: the parameters become the memory-mapped pages themselves.
        model.load_state_dict(load_file(weights), assign=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise BundleError(f"{weights.name} does not fit the model {entry.name!r}: {reason}") from None
    return cast(AnyRanker, model.requires_grad_(False).eval().to(device))
