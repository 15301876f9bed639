"""Where models run: on the GPU where there is one, unless a configuration says otherwise."""

from typing import Literal

import torch

Device = Literal["auto", "cpu", "cuda"]
"""`auto` is the first CUDA device that this process sees, else the processor."""


def pick_device(name: str) -> torch.device:
    """Give the device of a name, `auto` or one of torch's own; raises `RuntimeError` for what torch does not know."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(name)
