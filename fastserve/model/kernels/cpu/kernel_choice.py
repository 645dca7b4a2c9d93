"""Chooses the kernels of a process: compiled here, or none (plain torch).

Must not know: networks.
"""

from __future__ import annotations

import ctypes
import logging
from typing import Literal

import torch

from fastserve.model.kernels.cpu.kernels import ENTRIES, CpuKernels
from fastserve.model.kernels.cpu.native import BuildError, load_native

logger = logging.getLogger(__name__)

KernelChoice = Literal["auto", "native", "torch"]

DTYPE_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
"""Dtypes that have kernels, and how their entries are called."""


def choose_kernels(choice: KernelChoice, dtype: torch.dtype) -> CpuKernels | None:
    """Return kernels for weights and KV of `dtype`; None: use plain torch.

    `auto` is native where it can be built. `native` where it cannot is a BuildError.
    """
    if choice == "torch" or dtype not in DTYPE_NAMES:
        return None
    try:
        library = load_native()
    except BuildError as error:
        if choice == "native":
            raise
        logger.warning("no fused CPU kernels, plain torch is slower: %s", error)
        return None
    name = DTYPE_NAMES[dtype]
    addresses = {
        entry: ctypes.cast(getattr(library, f"{entry}_{name}"), ctypes.c_void_p).value or 0
        for entry in ENTRIES
    }
    return CpuKernels(dtype, addresses)
