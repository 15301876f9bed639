"""What the allocator does with memory that is freed: by default much of it goes back to the system at once.

Scoring makes temporaries of a few megabytes, frees them, and needs them again at the next request. If they went back,
every page of them is cleared by the kernel anew: half of the CPU time of SDIM's attention over 200 candidates and 50
events (2.4 ms, 1.4 ms without), more where torch asks for huge pages (`THP_MEM_ALLOC_ENABLE`).
"""

import ctypes

TRIM_THRESHOLD, TOP_PAD, MMAP_THRESHOLD = -1, -2, -3
"""Names of glibc's malloc.h: M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD."""

KEPT = 128 * 2**20
"""Bytes of free memory at the end of the heap above which some goes back."""

MAPPED = 32 * 2**20
"""Bytes of a single piece above which it is mapped apart, and goes back when freed: the most that glibc takes."""


def keep_freed_memory() -> bool:
    """Let this process keep up to `KEPT` freed bytes for the next request; False, changing nothing, without glibc."""
    change = getattr(ctypes.CDLL(None), "mallopt", None)
    if change is None:
        return False
    # All three are named: to set one ends glibc's own way of adapting the others.
    wanted = {MMAP_THRESHOLD: MAPPED, TRIM_THRESHOLD: KEPT, TOP_PAD: KEPT // 8}
    taken = [change(name, value) == 1 for name, value in wanted.items()]
    return all(taken)


def give_back_freed_memory() -> bool:
    """Give freed memory back to the system, as between two steps of a long job; False without glibc."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    return trim is not None and trim(0) == 1
