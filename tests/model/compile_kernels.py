"""Compiles every kernel to machine code for the architectures named; no device is needed.

Prints the shared memory that each takes.
"""

from __future__ import annotations

import sys

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastserve.model.attention.triton import Tiling
from fastserve.model.kernels.triton.attention import chunk_kernel, decode_kernel, reduce_kernel
from fastserve.model.kernels.triton.rotary import rotate_and_write_kernel
from fastserve.model.kernels.triton.rowwise import rms_norm_kernel, silu_mul_kernel
from fastserve.model.staged_batch import CHUNK_TILE

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
DOTS = {"fp32": tl.float32, "fp16": tl.float16, "bf16": tl.bfloat16}
TYPED_AS_KV = ("out", "qkv", "keys", "values", "x", "weight", "gate_up")
FLOATS = ("partial", "log_totals", "rotations")
SCALARS = {"scale": "fp32", "eps": "fp32", "stride_block": "i64", "stride_token": "i32"}


def compile_kernel(kernel, dtype: str, capability: int, constants, num_warps, num_stages):
    """Compile one kernel as a launch with aligned pointers would."""
    signature = {}
    for name in kernel.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        elif name in SCALARS:
            signature[name] = SCALARS[name]
        elif name in TYPED_AS_KV:
            signature[name] = f"*{dtype}"
        else:
            signature[name] = "*fp32" if name in FLOATS else "*i32"
    pointers = [i for i, name in enumerate(kernel.arg_names) if signature[name].startswith("*")]
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs=constants,
        attrs={(index,): [["tt.divisibility", 16]] for index in pointers},
    )
    compiled = triton.compile(
        source,
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": num_warps, "num_stages": num_stages},
    )
    if not compiled.asm["cubin"]:
        raise RuntimeError(f"{kernel.__name__}: no machine code")
    sys.stdout.write(f"{capability} {dtype} {kernel.__name__} {compiled.metadata.shared}\n")


def compile_attention(
    capability: int, dtype: str, heads: int, kv_heads: int, head_dim: int, split_tokens: int
) -> None:
    """Compile what a step with decodes and chunks launches."""
    tiling = Tiling.fitting(head_dim, DTYPES[dtype])
    dim = max(16, triton.next_power_of_2(head_dim))
    shape = {"NUM_HEADS": heads, "HEAD_DIM": head_dim}
    paged = {**shape, "NUM_KV_HEADS": kv_heads, "BLOCK_SIZE": 16, "DOT": DOTS[dtype]}
    splits = {
        "BLOCK_DIM": dim,
        "BLOCK_N": tiling.decode_positions,
        "NUM_SPLITS": 8,
        "SPLIT_TOKENS": split_tokens,
    }
    tile = {"BLOCK_DIM": dim, "BLOCK_N": tiling.chunk_positions, "BLOCK_M": CHUNK_TILE}
    pairs = triton.next_power_of_2(-(-head_dim // 2))
    rotary = {
        **shape,
        "NUM_KV_HEADS": kv_heads,
        "HAS_ROTATIONS": True,
        "BLOCK_HEADS": max(1, 512 // pairs),
        "BLOCK_PAIRS": pairs,
    }
    group = max(16, triton.next_power_of_2(heads // kv_heads))
    for kernel, constants in (
        (decode_kernel, {**paged, **splits, "BLOCK_GROUP": group}),
        (reduce_kernel, {**shape, **splits}),
        (chunk_kernel, {**paged, **tile}),
        (rotate_and_write_kernel, rotary),
    ):
        compile_kernel(kernel, dtype, capability, constants, tiling.num_warps, tiling.num_stages)


def main() -> None:
    """Compile for the capabilities given, such as 80 and 90."""
    for capability in map(int, sys.argv[1:]):
        compile_attention(capability, "bf16", 32, 8, 128, 0)
        compile_attention(capability, "fp16", 40, 40, 80, 512)
        norm = {"HEADS": 1, "WIDTH": 4096, "BLOCK": 4096}
        compile_kernel(rms_norm_kernel, "bf16", capability, norm, 8, 1)
        gate = {"WIDTH": 14336, "BLOCK": 1024}
        compile_kernel(silu_mul_kernel, "bf16", capability, gate, 4, 1)


if __name__ == "__main__":
    main()
