"""The C library's allocator, told not to give memory back to the system at every step.

A network's activations are taken and freed again at every layer. glibc maps blocks above 128 kB afresh and unmaps them, or trims the top of its heap,
so that the system clears the same pages again and again; that took a third of a run on two cores. It raises both limits by itself, but only to what
the largest freed block suggests (mallopt(3), M_MMAP_THRESHOLD); here they start where it would end. `scripts/bench_batch.py` measures with it.
"""

import ctypes
import platform

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
MMAP_THRESHOLD = 32 << 20  # bytes; glibc's DEFAULT_MMAP_THRESHOLD_MAX on 64 bits
TRIM_THRESHOLD = 2 * MMAP_THRESHOLD


def keep_freed_memory() -> None:
    """Let this process keep up to 64 MB of freed memory at the heap's top, and take blocks below 32 MB from the heap; only with glibc."""
    _set(MMAP_THRESHOLD, TRIM_THRESHOLD)


def give_back_freed_memory() -> None:
    """Let this process give blocks of 1 MB and more back when they are freed: where weights come and go, the heap would grow; only with glibc."""
    _set(1 << 20, 2 << 20)


def _set(mmap_threshold: int, trim_threshold: int) -> None:
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, mmap_threshold)
        libc.mallopt(M_TRIM_THRESHOLD, trim_threshold)
