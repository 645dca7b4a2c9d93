"""ThreadTeam: runs a compiled function in torch's own OpenMP threads.

Rules: a second pool would spin beside torch's and take its cores, so the one that libtorch is
linked with is asked for by its entry point, `GOMP_parallel`, which all OpenMP runtimes on Linux
export. Where there is none, work runs in the calling thread. Must not know: kernels.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch


def find_parallel() -> ctypes._NamedFuncPointer | None:
    """Return GOMP_parallel(function, argument, threads, flags) of torch's OpenMP runtime."""
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    if not library.exists():
        return None
    try:
        parallel = ctypes.CDLL(str(library)).GOMP_parallel
    except AttributeError:  # torch was built without OpenMP
        return None
    parallel.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    parallel.restype = None
    return parallel
