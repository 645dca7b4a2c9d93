"""Builds the kernels as a processor with AVX2 and no AVX-512 would: `pytest -p` this module."""

from __future__ import annotations

from fastserve.model.kernels.cpu import native

native.FLAGS = tuple(  # type: ignore[assignment] # there are as many
    "-march=haswell" if flag == "-march=native" else flag for flag in native.FLAGS
)
