"""Chooses the kernels of a process: compiled here, by numba, or none (plain torch).

Must not know: networks.
"""

from __future__ import annotations

import ctypes
import logging
from typing import Literal

import torch

from fastserve.model.kernels.cpu.compiled_kernels import ENTRIES, CompiledKernels
from fastserve.model.kernels.cpu.kernels import CpuKernels
from fastserve.model.kernels.cpu.native import BuildError, load_native

logger = logging.getLogger(__name__)

KernelChoice = Literal["auto", "native", "numba", "torch"]

DTYPE_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
"""Dtypes that have kernels, and how their entries are called."""


def choose_kernels(choice: KernelChoice, dtype: torch.dtype) -> CpuKernels | None:
    """Return kernels for weights and KV of `dtype`; None: use plain torch.

    `auto` is native where it can be built, or else numba. `native` where it cannot is a BuildError.
    """
    name = DTYPE_NAMES.get(dtype)
    if choice == "torch" or name is None:
        return None
    if choice != "numba":
        try:
            return native_kernels(dtype)
        except BuildError as error:
            if choice == "native":
                raise
            logger.warning("CPU kernels are numba's: %s", error)
    return numba_kernels(dtype)


def native_kernels(dtype: torch.dtype) -> CpuKernels:
    """Return the kernels of kernels.cpp."""
    library = load_native()
    addresses = {
        entry: ctypes.cast(getattr(library, f"{entry}_{DTYPE_NAMES[dtype]}"), ctypes.c_void_p).value
        or 0
        for entry in ENTRIES
    }
    return CompiledKernels("native", dtype, addresses)


def numba_kernels(dtype: torch.dtype) -> CpuKernels:
    """Return the kernels of numba."""
    # Here, since importing numba takes most of a second that nobody else should wait for.
    from fastserve.model.kernels.cpu.numba_kernels import numba_addresses

    return CompiledKernels("numba", dtype, numba_addresses(DTYPE_NAMES[dtype]))
