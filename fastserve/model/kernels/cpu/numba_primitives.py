"""What numba lacks for kernels over raw memory: pointers, shared counters, bfloat16, exp2.

Rules: bfloat16 is uint16 here. Must not know: what is computed with it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic, overload

LOG2_E = np.float32(1.4426950408889634)
ROUND = np.float32(12582912.0)  # 1.5 · 2²³: adding it rounds to an integer


Function = TypeVar("Function", bound=Callable[..., Any])


def fast(function: Function) -> Function:
    """Compile: a product and a sum may become one operation; sums keep their order."""
    compiled: Function = njit(error_model="numpy", fastmath={"contract"})(function)
    return compiled


def fast_sum(function: Function) -> Function:
    """Compile: sums may take another order, which for one length is always the same."""
    compiled: Function = njit(error_model="numpy", fastmath={"contract", "reassoc"})(function)
    return compiled


@intrinsic
def pointer(typing: Any, address: Any) -> Any:
    """Make a pointer of an address."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], cgutils.voidptr_t)

    return types.voidptr(types.intp), build


@intrinsic
def take(typing: Any, address: Any, count: Any) -> Any:
    """Add `count` to the shared number at `address`; return what it was."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = builder.inttoptr(args[0], ir.IntType(64).as_pointer())
        return builder.atomic_rmw("add", pointer, args[1], "monotonic")

    return types.int64(types.intp, types.int64), build


@intrinsic
def prefetch(typing: Any, address: Any) -> Any:
    """Ask for the cache line at `address`."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        number = ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), (cgutils.voidptr_t, number, number, number))
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        line = builder.inttoptr(args[0], cgutils.voidptr_t)
        builder.call(function, (line, number(0), number(2), number(1)))  # read, second level, data
        return context.get_dummy_value()

    return types.void(types.intp), build


@intrinsic
def as_float(typing: Any, bits: Any) -> Any:
    """Read the bits of an int32 as a float32."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.int32), build


@intrinsic
def as_bits(typing: Any, number: Any) -> Any:
    """Read the bits of a float32 as an int32."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.IntType(32))

    return types.int32(types.float32), build


def widen(x: Any) -> Any:
    """Turn an element into a float32."""


@overload(widen, inline="always")
def _overload_widen(x: Any) -> Any:
    if x != types.uint16:

        def same(x: Any) -> Any:
            return x

        return same

    def widen_half(x: Any) -> Any:
        return as_float(np.int32(x) << np.int32(16))

    return widen_half


def put(to: Any, i: Any, x: Any) -> Any:
    """Store a float32 as an element: round to nearest, ties to even."""


@overload(put)
def _overload_put(to: Any, i: Any, x: Any) -> Any:
    if to.dtype != types.uint16:

        def put(to: Any, i: Any, x: Any) -> None:
            to[i] = x

        return put

    def put_half(to: Any, i: Any, x: Any) -> None:
        bits = np.uint32(as_bits(x))
        last = (bits >> np.uint32(16)) & np.uint32(1)
        rounded = (bits + np.uint32(0x7FFF) + last) >> np.uint32(16)
        to[i] = np.uint16(rounded) if x == x else np.uint16(0x7FC0)

    return put_half


@fast
def exp2(x: Any) -> Any:
    """2^x; 0 below the smallest normal number, infinity where it overflows."""
    shifted = x + ROUND
    fraction = x - (shifted - ROUND)
    p = np.float32(1.535336188319500e-4)
    p = p * fraction + np.float32(1.339887440266574e-3)
    p = p * fraction + np.float32(9.618437357674640e-3)
    p = p * fraction + np.float32(5.550332471162809e-2)
    p = p * fraction + np.float32(2.402264791363012e-1)
    p = p * fraction + np.float32(6.931472028550421e-1)
    p = p * fraction + np.float32(1.0)
    power = np.int32(as_bits(shifted) - np.int32(0x4B400000)) << np.int32(23)
    scaled = as_float(np.int32(as_bits(p) + power))
    scaled = np.float32(0.0) if x < np.float32(-126.0) else scaled
    return np.float32(np.inf) if x >= np.float32(128.0) else scaled
