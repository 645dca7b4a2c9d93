"""Where Triton kernels are tested: on the CUDA device, or in Triton's interpreter on the CPU.

Rules: to be prepared before a kernel is imported, which the conftest of a directory does.
"""

from __future__ import annotations

import importlib.util
import os


def prepare() -> list[str]:
    """Choose the interpreter where there is no CUDA; returns the test files to leave out."""
    if importlib.util.find_spec("triton") is None:
        return ["test_triton_*.py"]
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # the interpreter's products are tiny
    import torch

    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"
    return []


def device():
    """Return the device that kernels run on."""
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
