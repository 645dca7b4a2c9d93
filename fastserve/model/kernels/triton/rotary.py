"""Rotation of queries and keys, and the write of keys and values to their slots, in one pass.

Must not know: attention.
"""

import triton
import triton.language as tl


@triton.jit
def rotate_and_write_kernel(
    qkv,  # [num_tokens, heads + 2 * kv_heads, head_dim], contiguous
    rotations,  # [num_tokens, head_dim / 2, 2] float32: cosine, sine
    keys,  # [num_blocks, block_size * kv_heads * head_dim], strided by block
    values,
    write_blocks,  # [num_tokens]; negative: nothing is written
    write_offsets,  # [num_tokens]
    stride_block,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HAS_ROTATIONS: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_PAIRS: tl.constexpr,
):
    """Take one token's next BLOCK_HEADS heads: queries in place, keys and values to the KV."""
    token = tl.program_id(0).to(tl.int64)
    TOTAL_HEADS: tl.constexpr = NUM_HEADS + 2 * NUM_KV_HEADS
    heads = tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    pairs = tl.arange(0, BLOCK_PAIRS)
    is_real = (heads[:, None] < TOTAL_HEADS) & (2 * pairs[None, :] < HEAD_DIM)
    is_odd_real = (heads[:, None] < TOTAL_HEADS) & (2 * pairs[None, :] + 1 < HEAD_DIM)
    offsets = heads[:, None] * HEAD_DIM + 2 * pairs[None, :]
    source = qkv + token * (TOTAL_HEADS * HEAD_DIM)
    x = tl.load(source + offsets, mask=is_real, other=0.0).to(tl.float32)
    y = tl.load(source + offsets + 1, mask=is_odd_real, other=0.0).to(tl.float32)
    if HAS_ROTATIONS:
        angles = rotations + token * HEAD_DIM + 2 * pairs
        has_angle = 2 * pairs < HEAD_DIM
        cosine = tl.load(angles, mask=has_angle, other=0.0)[None, :]
        sine = tl.load(angles + 1, mask=has_angle, other=0.0)[None, :]
        is_rotated = (heads < NUM_HEADS + NUM_KV_HEADS)[:, None]
        rotated_x = tl.where(is_rotated, x * cosine - y * sine, x)
        y = tl.where(is_rotated, x * sine + y * cosine, y)
        x = rotated_x
        is_query = (heads < NUM_HEADS)[:, None]
        element = qkv.dtype.element_ty
        tl.store(source + offsets, x.to(element), mask=is_real & is_query)
        tl.store(source + offsets + 1, y.to(element), mask=is_odd_real & is_query)
    block = tl.load(write_blocks + token).to(tl.int64)
    slot = tl.load(write_offsets + token).to(tl.int64)
    target = block * stride_block + slot * (NUM_KV_HEADS * HEAD_DIM)
    element = keys.dtype.element_ty
    is_key = ((heads >= NUM_HEADS) & (heads < NUM_HEADS + NUM_KV_HEADS))[:, None] & (block >= 0)
    to_key = keys + target + offsets - NUM_HEADS * HEAD_DIM
    tl.store(to_key, x.to(element), mask=is_real & is_key)
    tl.store(to_key + 1, y.to(element), mask=is_odd_real & is_key)
    is_value = (heads >= NUM_HEADS + NUM_KV_HEADS)[:, None] & (block >= 0)
    to_value = values + target + offsets - (NUM_HEADS + NUM_KV_HEADS) * HEAD_DIM
    tl.store(to_value, x.to(element), mask=is_real & is_value)
    tl.store(to_value + 1, y.to(element), mask=is_odd_real & is_value)
