"""What a training run depends on beside its data and config: recorded with it, compared when it is reproduced."""

import platform
from importlib.metadata import PackageNotFoundError, version

from pipelines.tracking import git_commit

PACKAGES = (
    "torch",
    "numpy",
    "polars",
    "xxhash",
    "safetensors",
    "lightgbm",
    "scikit-learn",
    "transformers",
    "faiss-cpu",
    "faiss-gpu",
)


def environment(device: str) -> dict[str, str]:
    """Return facts by name: `code`, `package <name>`, `hardware <what>`; packages not installed are left out."""
    import torch

    facts = {"code": git_commit(), "package python": platform.python_version()}
    for name in PACKAGES:
        try:
            facts[f"package {name}"] = version(name)
        except PackageNotFoundError:
            continue
    facts["hardware machine"] = f"{platform.system()} {platform.machine()}"
    facts["hardware instructions"] = torch.backends.cpu.get_cpu_capability()
    facts["hardware threads"] = str(torch.get_num_threads())
    facts["hardware device"] = torch.cuda.get_device_name() if device.startswith("cuda") else device
    return facts
