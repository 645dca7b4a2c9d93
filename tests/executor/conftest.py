"""Triton kernels run in the interpreter where there is no CUDA device."""

from __future__ import annotations

from tests import triton_device

collect_ignore_glob = triton_device.prepare()
