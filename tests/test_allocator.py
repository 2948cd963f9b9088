"""Freed memory stays with the process: the system does not clear the same pages at every step."""

import platform
import subprocess
import sys

import pytest

STEPS = 50
CHILD = f"""
import resource, sys
import torch
from tu_diffuse import allocator

if len(sys.argv) > 1:
    allocator.MMAP_THRESHOLD = allocator.TRIM_THRESHOLD = int(sys.argv[1])
allocator.keep_freed_memory()
torch.set_num_threads(1)

def step():
    return [torch.zeros(1 << 20) for _ in range(8)]  # 4 MB each, as activations come and go

step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range({STEPS}):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(*thresholds: str) -> int:
    return int(subprocess.run([sys.executable, "-c", CHILD, *thresholds], capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_a_step_does_not_fault_in_what_the_one_before_freed() -> None:
    pages = STEPS * (32 << 20) // 4096
    assert page_faults() < pages / 10
    assert page_faults(str(128 << 10)) > pages / 2  # where glibc begins
