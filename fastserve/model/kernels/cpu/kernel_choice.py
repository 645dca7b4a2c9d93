"""Chooses the kernels of a process: compiled here, or none (plain torch).

Must not know: networks.
"""

from __future__ import annotations

import ctypes
import logging
import math
from functools import partial
from typing import Literal

import torch

from fastserve.model.kernels.cpu.kernels import ENTRIES, CpuKernels, Entry
from fastserve.model.kernels.cpu.native import BuildError, load_native
from fastserve.model.kernels.cpu.product_trial import AMX_ROWS, try_onednn, try_tiles
from fastserve.model.kernels.cpu.thread_team import ThreadTeam

logger = logging.getLogger(__name__)

KernelChoice = Literal["auto", "native", "torch"]

DTYPE_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
"""Dtypes that have kernels, and how their entries are called."""


def choose_kernels(
    choice: KernelChoice,
    dtype: torch.dtype,
    *,
    max_rows: float | None = None,
    is_rowwise: bool = False,
) -> CpuKernels | None:
    """Return kernels for weights and KV of `dtype`; None: use plain torch.

    `auto` is native where it can be built. `native` where it cannot is a BuildError. Their
    projection is used up to `max_rows` rows; None: as is best on this processor. `is_rowwise`: the
    bits of a row may not depend on how many there are.
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
    entries = {entry: _entry(library, f"{entry}_{name}") for entry in ENTRIES}
    per_lane = getattr(library, f"per_lane_{name}")()
    make = partial(CpuKernels, dtype, entries, ThreadTeam(library), per_lane=per_lane)
    if per_lane == 1 or not _opens_tiles(library):
        return make(max_rows=own_product_rows(per_lane) if max_rows is None else max_rows)
    vectors, tiles = make(max_rows=math.inf), make(max_rows=math.inf, tile_rows=1)
    if is_rowwise:
        return tiles
    tile_rows = try_tiles(vectors, tiles)
    if max_rows is None:
        max_rows = try_onednn(tiles)
    kernels = make(max_rows=max_rows, tile_rows=tile_rows)
    logger.info("products of a CPU with AMX: %s", kernels.name)
    return kernels


def _opens_tiles(library: ctypes.CDLL) -> bool:
    """Whether the kernels have AMX's tiles, for which the system is asked."""
    if not library.knows_tiles():
        return False
    is_granted = bool(library.has_tiles())
    if not is_granted:
        logger.warning("this processor has AMX, but the system grants no tiles of it")
    return is_granted


def own_product_rows(per_lane: int) -> float:
    """Return up to how many rows our own projection in vectors is used on this processor; 0: none.

    It pays where one instruction adds up several products.
    """
    if per_lane == 1:
        return 0
    return AMX_ROWS if torch.cpu._is_amx_tile_supported() else math.inf


def _entry(library: ctypes.CDLL, name: str) -> Entry:
    entry = getattr(library, name)
    entry.argtypes, entry.restype = (ctypes.c_void_p, ctypes.c_void_p), None
    function: Entry = entry
    return function
