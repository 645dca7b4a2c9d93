"""What the tests of CPU kernels share: the kernels of a dtype, and forced threads."""

from __future__ import annotations

import math
from contextlib import contextmanager
from functools import cache

import pytest
import torch

from fastserve.model.kernels.cpu import kernels
from fastserve.model.kernels.cpu.kernel_choice import choose_kernels
from fastserve.model.kernels.cpu.onednn import can_pack

DTYPES = (torch.float32, torch.bfloat16)
TOLERANCES = {torch.float32: 2e-5, torch.bfloat16: 2e-2}

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@cache
def kernels_of(dtype):
    """Return kernels, made once per run."""
    made = choose_kernels("native", dtype)
    assert made is not None
    return made


def own_products(dtype):
    """Return new kernels that compute every product too, in threads of their own."""
    kernels = choose_kernels("native", dtype, max_rows=math.inf)
    assert kernels is not None
    return kernels


needs_shared_memory = pytest.mark.skipif(
    not can_pack(torch.zeros(64, 64, dtype=torch.bfloat16))
    or own_products(torch.bfloat16).per_lane == 1,
    reason="oneDNN packs no bfloat16 weights here, or our panels are of single numbers",
)


needs_int8 = pytest.mark.skipif(
    own_products(torch.bfloat16).per_lane == 1,
    reason="--quantization int8 is refused without AVX-512's products of bfloat16",
)


@contextmanager
def threads(count):
    """Run kernels in `count` threads, however small the work is."""
    old = torch.get_num_threads(), kernels.PARALLEL_ELEMENTS
    positions, products = kernels.PARALLEL_POSITIONS, kernels.PARALLEL_PRODUCTS
    torch.set_num_threads(count)
    kernels.PARALLEL_ELEMENTS = kernels.PARALLEL_POSITIONS = kernels.PARALLEL_PRODUCTS = 0
    try:
        yield
    finally:
        torch.set_num_threads(old[0])
        kernels.PARALLEL_ELEMENTS = old[1]
        kernels.PARALLEL_POSITIONS = positions
        kernels.PARALLEL_PRODUCTS = products
