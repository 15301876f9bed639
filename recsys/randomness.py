"""Every random draw is a function of (seed, step, purpose).

No generator lives longer than one step, so a run that is killed and resumed draws exactly what it would have drawn.
"""

import numpy as np
import xxhash


def derive(seed: int, step: int, purpose: str) -> int:
    """Return a 63-bit seed for one draw: xxh64 over the three parts, stable across machines and versions."""
    return xxhash.xxh64_intdigest(f"{seed}/{step}/{purpose}".encode()) >> 1


def generator(seed: int, step: int, purpose: str) -> np.random.Generator:
    """Return a fresh numpy generator for one purpose at one step."""
    return np.random.Generator(np.random.PCG64(derive(seed, step, purpose)))
