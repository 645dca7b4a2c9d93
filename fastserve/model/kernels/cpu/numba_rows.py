"""The row-wise kernels of kernels.py in numba, which installs everywhere without a compiler.

Rules: kernels take the packed arguments that compiled_kernels.py lays out, and share work by
counting up the first, exactly as in kernels.cpp. Loops are written for LLVM's vectorizer: plain
counts from zero over arrays that begin where the loop does. Must not know: tensors, networks.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray

from fastserve.model.kernels.cpu.numba_primitives import (
    LOG2_E,
    exp2,
    fast,
    fast_sum,
    pointer,
    put,
    take,
    widen,
)

SHARE = 8192  # elements that a thread takes at a time


@fast_sum
def _sum_squares(x: Any, width: Any, mean: Any) -> Any:
    total = np.float32(0.0)
    for i in range(width):
        a = widen(x[i]) - mean
        total += a * a
    return total


@fast_sum
def _sum(x: Any, width: Any) -> Any:
    total = np.float32(0.0)
    for i in range(width):
        total += widen(x[i])
    return total


@fast
def _rms_norm_row(x: Any, weight: Any, out: Any, width: Any, eps: Any) -> None:
    mean = _sum_squares(x, width, np.float32(0.0)) / np.float32(width)
    scale = np.float32(1.0) / np.sqrt(mean + eps)
    for i in range(width):
        put(out, i, widen(x[i]) * scale * widen(weight[i]))


@fast
def _share(width: Any) -> Any:
    return max(SHARE // width, 1)


@fast
def rms_norm(args: Any, kind: Any) -> None:
    """NormArgs of kernels.cpp."""
    a = carray(pointer(args), 7, np.int64)
    eps = np.float32(carray(pointer(args + 56), 1, np.float64)[0])
    rows, width, size = a[5], a[6], carray(pointer(a[1]), 1, kind).itemsize
    weight = carray(pointer(a[2]), width, kind)
    step = _share(width)
    while True:
        first = take(args, step)
        if first >= rows:
            return
        for row in range(first, min(first + step, rows)):
            offset = row * width * size
            x = carray(pointer(a[1] + offset), width, kind)
            out = carray(pointer(a[4] + offset), width, kind)
            _rms_norm_row(x, weight, out, width, eps)


@fast
def layer_norm(args: Any, kind: Any) -> None:
    """NormArgs of kernels.cpp."""
    a = carray(pointer(args), 7, np.int64)
    eps = np.float32(carray(pointer(args + 56), 1, np.float64)[0])
    rows, width, size = a[5], a[6], carray(pointer(a[1]), 1, kind).itemsize
    weight, bias = carray(pointer(a[2]), width, kind), carray(pointer(a[3]), width, kind)
    step = _share(width)
    while True:
        first = take(args, step)
        if first >= rows:
            return
        for row in range(first, min(first + step, rows)):
            x = carray(pointer(a[1] + row * width * size), width, kind)
            out = carray(pointer(a[4] + row * width * size), width, kind)
            mean = _sum(x, width) / np.float32(width)
            variance = _sum_squares(x, width, mean) / np.float32(width)
            scale = np.float32(1.0) / np.sqrt(variance + eps)
            for i in range(width):
                normal = (widen(x[i]) - mean) * scale
                put(out, i, normal * widen(weight[i]) + widen(bias[i]))


@fast
def head_rms_norm(args: Any, kind: Any) -> None:
    """HeadNormArgs of kernels.cpp."""
    a = carray(pointer(args), 7, np.int64)
    eps = np.float32(carray(pointer(args + 56), 1, np.float64)[0])
    tokens, stride, heads, dim = a[3], a[4], a[5], a[6]
    size = carray(pointer(a[1]), 1, kind).itemsize
    step = _share(stride)
    while True:
        first = take(args, step)
        if first >= tokens:
            return
        for token in range(first, min(first + step, tokens)):
            for head in range(heads):
                x = carray(pointer(a[1] + (token * stride + head * dim) * size), dim, kind)
                weight = carray(pointer(a[2] + head * dim * size), dim, kind)
                _rms_norm_row(x, weight, x, dim, eps)


@fast
def silu_mul(args: Any, kind: Any) -> None:
    """SiluArgs of kernels.cpp."""
    a = carray(pointer(args), 5, np.int64)
    rows, width, size = a[3], a[4], carray(pointer(a[1]), 1, kind).itemsize
    step = _share(width)
    while True:
        first = take(args, step)
        if first >= rows:
            return
        for row in range(first, min(first + step, rows)):
            gate = carray(pointer(a[1] + row * 2 * width * size), width, kind)
            up = carray(pointer(a[1] + (row * 2 + 1) * width * size), width, kind)
            out = carray(pointer(a[2] + row * width * size), width, kind)
            for i in range(width):
                x = widen(gate[i])
                put(out, i, x / (np.float32(1.0) + exp2(x * -LOG2_E)) * widen(up[i]))


@fast
def rotate_and_write(args: Any, kind: Any) -> None:
    """WriteArgs of kernels.cpp."""
    a = carray(pointer(args), 12, np.int64)
    tokens, heads, kv_heads, dim = a[6], a[7], a[8], a[9]
    size = carray(pointer(a[1]), 1, kind).itemsize
    blocks = carray(pointer(a[4]), tokens, np.int64)
    offsets = carray(pointer(a[5]), tokens, np.int64)
    kv_width = kv_heads * dim
    rotated = heads * dim + kv_width
    step = _share(rotated)
    while True:
        first = take(args, step)
        if first >= tokens:
            return
        for token in range(first, min(first + step, tokens)):
            qkv = a[1] + token * (rotated + kv_width) * size
            if a[2] != 0:
                rotation = carray(pointer(a[2] + token * dim * 4), dim, np.float32)
                for head in range(heads + kv_heads):
                    row = carray(pointer(qkv + head * dim * size), dim, kind)
                    for i in range(dim // 2):
                        x, y = widen(row[2 * i]), widen(row[2 * i + 1])
                        cosine, sine = rotation[2 * i], rotation[2 * i + 1]
                        put(row, 2 * i, x * cosine - y * sine)
                        put(row, 2 * i + 1, x * sine + y * cosine)
            slot = a[3] + (blocks[token] * a[10] + offsets[token] * kv_width) * size
            _copy(qkv + (rotated - kv_width) * size, slot, kv_width, kind)
            _copy(qkv + rotated * size, slot + a[11] * size, kv_width, kind)


@fast
def _copy(source: Any, target: Any, width: Any, kind: Any) -> None:
    old, new = carray(pointer(source), width, kind), carray(pointer(target), width, kind)
    for i in range(width):
        new[i] = old[i]
