"""Where models run: on the GPU where there is one, unless a configuration says otherwise."""

from typing import Literal

import torch

from recsys.errors import ConfigError

Device = Literal["auto", "cpu", "cuda"]
"""`auto` is the first CUDA device that this process sees, else the processor."""


def pick_device(name: str) -> torch.device:
    """Return the device of a name, `auto` or one of torch's own; raises `ConfigError` for one that is not here."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f'device = "{name}": no such device; expected "auto", "cpu" or "cuda"') from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError('device = "cuda": this process sees no CUDA device; set device = "auto" or "cpu"')
    return device
