"""A Ray for as long as a piece of work lasts."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def ray_session(workers: int) -> Iterator[None]:
    """Have a Ray: the one this process uses, that of RAY_ADDRESS, else one of `workers` cores until the block ends."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's 15 lets everything else on the machine go first
    import ray

    if ray.is_initialized():
        yield
        return
    address = os.environ.get("RAY_ADDRESS", "local")
    ray.init(
        address=address,
        num_cpus=workers if address == "local" else None,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        runtime_env={"env_vars": {"THP_MEM_ALLOC_ENABLE": "1"}},
    )
    try:
        yield
    finally:
        ray.shutdown()
