"""What the tests of CPU kernels share: both implementations, and forced threads."""

from __future__ import annotations

from contextlib import contextmanager
from functools import cache

import pytest
import torch

from fastserve.model.kernels.cpu import compiled_kernels
from fastserve.model.kernels.cpu.kernel_choice import choose_kernels

NAMES = ("native", "numba")
DTYPES = (torch.float32, torch.bfloat16)
TOLERANCES = {torch.float32: 2e-5, torch.bfloat16: 2e-2}

every_kernel = pytest.mark.parametrize("name", NAMES)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@cache
def kernels_of(name, dtype):
    """Return kernels, made once per run."""
    kernels = choose_kernels(name, dtype)
    assert kernels is not None
    assert kernels.name == name
    return kernels


@contextmanager
def threads(count):
    """Run kernels in `count` threads, however small the work is."""
    old = torch.get_num_threads(), compiled_kernels.PARALLEL_ELEMENTS
    positions = compiled_kernels.PARALLEL_POSITIONS
    torch.set_num_threads(count)
    compiled_kernels.PARALLEL_ELEMENTS = compiled_kernels.PARALLEL_POSITIONS = 0
    try:
        yield
    finally:
        torch.set_num_threads(old[0])
        compiled_kernels.PARALLEL_ELEMENTS = old[1]
        compiled_kernels.PARALLEL_POSITIONS = positions
