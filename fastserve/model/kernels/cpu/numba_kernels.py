"""The entries of the numba kernels, compiled for a dtype and kept on disk.

Rules: numba's own cache looks at the date of one source file only, so ours lies in a directory
named by all of them. Must not know: what the kernels compute.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
import numpy as np
from numba import cfunc, types

from fastserve.host.cache_dir import cache_dir
from fastserve.model.kernels.cpu import numba_attention, numba_primitives, numba_rows

SOURCES = (numba_attention, numba_primitives, numba_rows)


def _rms_norm_float32(args: int) -> None:
    numba_rows.rms_norm(args, np.float32)


def _rms_norm_bfloat16(args: int) -> None:
    numba_rows.rms_norm(args, np.uint16)


def _layer_norm_float32(args: int) -> None:
    numba_rows.layer_norm(args, np.float32)


def _layer_norm_bfloat16(args: int) -> None:
    numba_rows.layer_norm(args, np.uint16)


def _head_rms_norm_float32(args: int) -> None:
    numba_rows.head_rms_norm(args, np.float32)


def _head_rms_norm_bfloat16(args: int) -> None:
    numba_rows.head_rms_norm(args, np.uint16)


def _silu_mul_float32(args: int) -> None:
    numba_rows.silu_mul(args, np.float32)


def _silu_mul_bfloat16(args: int) -> None:
    numba_rows.silu_mul(args, np.uint16)


def _rotate_and_write_float32(args: int) -> None:
    numba_rows.rotate_and_write(args, np.float32)


def _rotate_and_write_bfloat16(args: int) -> None:
    numba_rows.rotate_and_write(args, np.uint16)


def _attend_float32(args: int) -> None:
    numba_attention.attend(args, np.float32)


def _attend_bfloat16(args: int) -> None:
    numba_attention.attend(args, np.uint16)


FUNCTIONS: dict[str, dict[str, Callable[[int], None]]] = {
    "float32": {
        "rms_norm": _rms_norm_float32,
        "layer_norm": _layer_norm_float32,
        "head_rms_norm": _head_rms_norm_float32,
        "silu_mul": _silu_mul_float32,
        "rotate_and_write": _rotate_and_write_float32,
        "attend": _attend_float32,
    },
    "bfloat16": {
        "rms_norm": _rms_norm_bfloat16,
        "layer_norm": _layer_norm_bfloat16,
        "head_rms_norm": _head_rms_norm_bfloat16,
        "silu_mul": _silu_mul_bfloat16,
        "rotate_and_write": _rotate_and_write_bfloat16,
        "attend": _attend_bfloat16,
    },
}

_compiled: dict[str, dict[str, Any]] = {}  # they live as long as their addresses are known


def numba_addresses(dtype_name: str) -> dict[str, int]:
    """Return the addresses of the entries for a dtype; compiles them where none are kept."""
    if dtype_name not in _compiled:
        before = numba.config.CACHE_DIR
        directory = _kept_in()
        numba.config.CACHE_DIR = str(directory) if directory else before
        try:
            compile_entry = cfunc(types.void(types.intp), cache=directory is not None)
            functions = FUNCTIONS[dtype_name]
            _compiled[dtype_name] = {name: compile_entry(f) for name, f in functions.items()}
        finally:
            numba.config.CACHE_DIR = before
    return {name: entry.address for name, entry in _compiled[dtype_name].items()}


def _kept_in() -> Path | None:
    """Return the directory of this version's compiled code; None: it cannot be written."""
    digest = hashlib.sha256(numba.__version__.encode())
    for module in SOURCES:
        digest.update(Path(str(module.__file__)).read_bytes())
    directory = cache_dir() / f"numba-{digest.hexdigest()[:20]}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    return directory
