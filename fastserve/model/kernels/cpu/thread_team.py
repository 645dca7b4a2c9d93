"""ThreadTeam: the threads that kernels run in, as many as torch's operations have.

Rules: two pools take cores from each other, each spinning for a while after its work. So kernels
run in threads of their own where they compute a step's products too; where oneDNN does, they run in
torch's OpenMP threads, by the entry point `GOMP_parallel` that all OpenMP runtimes on Linux export.
Where there is none, work runs in the calling thread. Threads end with their team, not with the
process, in which some may still be at work. Must not know: kernels.
"""

from __future__ import annotations

import ctypes
import weakref
from pathlib import Path

import torch


class ThreadTeam:
    """Hands out the addresses of `Threads` (team.h), which it opens when first asked."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        self._opened: dict[tuple[str, int], int] = {}
        self.alone = self._open("alone")

    @property
    def size(self) -> int:
        """How many threads there are."""
        return torch.get_num_threads()

    def own(self) -> int:
        """Return threads of our own."""
        return self._find("own_team")

    def shared(self) -> int:
        """Return torch's threads."""
        return self._find("openmp_team")

    def _find(self, kind: str) -> int:
        size = self.size
        if size == 1:
            return self.alone
        threads = self._opened.get((kind, size))
        if threads is None:
            threads = self._opened[kind, size] = self._open(kind)
        return threads

    def _open(self, kind: str) -> int:
        library = self._library
        parallel = _find_parallel() if kind == "openmp_team" else None
        if kind == "own_team":
            address: int = _opener(library.own_team, ctypes.c_int64)(self.size)
        elif parallel is not None:
            opener = _opener(library.openmp_team, ctypes.c_void_p, ctypes.c_int64)
            address = opener(parallel, self.size)
        else:
            address = _opener(library.alone)()
        close = library.close_threads
        close.argtypes, close.restype = (ctypes.c_void_p,), None
        weakref.finalize(self, close, address).atexit = False
        return address


def _opener(function: ctypes._NamedFuncPointer, *arguments: type) -> ctypes._NamedFuncPointer:
    function.argtypes, function.restype = arguments, ctypes.c_void_p
    return function


def _find_parallel() -> int | None:
    """Return the address of torch's GOMP_parallel."""
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    if not library.exists():
        return None
    try:
        parallel = ctypes.CDLL(str(library)).GOMP_parallel
    except AttributeError:  # torch was built without OpenMP
        return None
    return ctypes.cast(parallel, ctypes.c_void_p).value
