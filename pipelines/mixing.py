"""A hash of 64-bit words for whole arrays: what must look random, but belong to the thing itself."""

import numpy as np
from numpy.typing import NDArray


def mix(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return well-mixed 64-bit words, one for one (SplitMix64: a golden-ratio step, two multiply-xorshift rounds)."""
    z = words + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
