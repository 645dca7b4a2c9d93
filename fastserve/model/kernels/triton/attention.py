"""Attention over paged KV: single tokens with the context split, and tiles of a chunk.

Rules: scores and sums are float32, in powers of two; matrix products take DOT, the dtype of queries
and KV. A program reads only positions that its tokens attend to: the rest may be of no request.
Must not know: rotation, how rows were chosen.
"""

import triton
import triton.language as tl


@triton.jit
def slots_of(positions, table, stride_block, stride_slot, BLOCK_SIZE: tl.constexpr, is_seen):
    """Return the offsets of positions in a layer's keys (and values), by the row's block table."""
    blocks = tl.load(table + positions // BLOCK_SIZE, mask=is_seen, other=0).to(tl.int64)
    return blocks * stride_block + (positions % BLOCK_SIZE) * stride_slot


@triton.jit
def attend(
    acc,  # [rows, dim]
    total,  # [rows]
    best,  # [rows]
    query,  # [rows, dim] in DOT
    keys,  # at the first element of the head
    values,
    slots,  # [positions] offsets
    dims,
    is_seen,  # [positions] may be read
    visible,  # [rows, positions]
    scale,
    HEAD_DIM: tl.constexpr,
    IS_MASKED: tl.constexpr,
    DOT: tl.constexpr,
):
    """Take one more tile of positions into a running softmax."""
    has_dim = dims < HEAD_DIM
    key = tl.load(
        keys + slots[None, :] + dims[:, None], mask=is_seen[None, :] & has_dim[:, None], other=0.0
    ).to(DOT)  # [dim, positions]
    scores = tl.dot(query, key, input_precision="ieee") * scale
    if IS_MASKED:
        scores = tl.where(visible, scores, float("-inf"))
    new_best = tl.maximum(best, tl.max(scores, axis=1))
    shrink = tl.exp2(best - new_best)
    weights = tl.exp2(scores - new_best[:, None])
    total = total * shrink + tl.sum(weights, axis=1)
    value = tl.load(
        values + slots[:, None] + dims[None, :], mask=is_seen[:, None] & has_dim[None, :], other=0.0
    )
    # Rounded as the KV is: the product runs in its dtype.
    weights = weights.to(value.dtype).to(DOT)
    acc = tl.dot(weights, value.to(DOT), acc * shrink[:, None], input_precision="ieee")
    return acc, total, new_best


@triton.jit
def split_of(context, NUM_SPLITS: tl.constexpr, SPLIT_TOKENS: tl.constexpr, BLOCK_N: tl.constexpr):
    """Return how many positions one split of a context covers."""
    if SPLIT_TOKENS:
        return SPLIT_TOKENS
    share = (context + NUM_SPLITS - 1) // NUM_SPLITS
    return tl.maximum((share + BLOCK_N - 1) // BLOCK_N, 1) * BLOCK_N


@triton.jit
def decode_kernel(
    out,  # [tokens, heads * head_dim]
    partial,  # [tokens, heads, NUM_SPLITS, head_dim] float32, where there are splits
    log_totals,  # [tokens, heads, NUM_SPLITS] float32
    qkv,  # [tokens, heads + 2 * kv_heads, head_dim]
    keys,
    values,
    tables,  # [rows, width] block ids
    table_width,  # [1]
    positions,  # [tokens]
    token_rows,  # [tokens] row of the table; negative: padding
    stride_block,
    scale,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_GROUP: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    SPLIT_TOKENS: tl.constexpr,
    DOT: tl.constexpr,
):
    """Attend one token's query heads of one key-value head to one split of its context."""
    token = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    GROUP: tl.constexpr = NUM_HEADS // NUM_KV_HEADS
    row = tl.load(token_rows + token).to(tl.int64)
    context = tl.where(row >= 0, tl.load(positions + token).to(tl.int32) + 1, 0)
    split_tokens = split_of(context, NUM_SPLITS, SPLIT_TOKENS, BLOCK_N)
    begin = split * split_tokens
    end = tl.minimum(begin + split_tokens, context)
    if NUM_SPLITS > 1:  # noqa: SIM102 - the first is settled when it is compiled
        if begin >= end:
            return
    group = tl.arange(0, BLOCK_GROUP)
    heads = kv_head * GROUP + group
    dims = tl.arange(0, BLOCK_DIM)
    is_real = (group < GROUP)[:, None] & (dims < HEAD_DIM)[None, :]
    source = qkv + token * ((NUM_HEADS + 2 * NUM_KV_HEADS) * HEAD_DIM)
    query = tl.load(source + heads[:, None] * HEAD_DIM + dims[None, :], mask=is_real, other=0.0)
    query = query.to(DOT)
    table = tables + row * tl.load(table_width)
    acc = tl.zeros((BLOCK_GROUP, BLOCK_DIM), tl.float32)
    total = tl.zeros((BLOCK_GROUP,), tl.float32)
    best = tl.full((BLOCK_GROUP,), float("-inf"), tl.float32)
    stride_slot: tl.constexpr = NUM_KV_HEADS * HEAD_DIM
    for start in range(begin, end, BLOCK_N):
        place = start + tl.arange(0, BLOCK_N)
        is_seen = place < end
        slots = slots_of(place, table, stride_block, stride_slot, BLOCK_SIZE, is_seen)
        acc, total, best = attend(
            acc, total, best, query,
            keys + kv_head * HEAD_DIM, values + kv_head * HEAD_DIM,
            slots, dims, is_seen, is_seen[None, :], scale, HEAD_DIM, True, DOT,
        )  # fmt: skip
    acc = acc / tl.where(total > 0.0, total, 1.0)[:, None]
    if NUM_SPLITS == 1:
        target = (token * NUM_HEADS + heads)[:, None] * HEAD_DIM + dims[None, :]
        tl.store(out + target, acc.to(out.dtype.element_ty), mask=is_real)
    else:
        place = (token * NUM_HEADS + heads) * NUM_SPLITS + split
        tl.store(partial + place[:, None] * HEAD_DIM + dims[None, :], acc, mask=is_real)
        tl.store(log_totals + place, best + tl.log2(total), mask=group < GROUP)


@triton.jit
def reduce_kernel(
    out,  # [tokens, heads * head_dim]
    partial,
    log_totals,
    positions,
    token_rows,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    SPLIT_TOKENS: tl.constexpr,
):
    """Join the splits of one head of one token, first to last."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    row = tl.load(token_rows + token)
    context = tl.where(row >= 0, tl.load(positions + token).to(tl.int32) + 1, 0)
    split_tokens = split_of(context, NUM_SPLITS, SPLIT_TOKENS, BLOCK_N)
    num_used = (context + split_tokens - 1) // split_tokens
    dims = tl.arange(0, BLOCK_DIM)
    has_dim = dims < HEAD_DIM
    first = (token * NUM_HEADS + head) * NUM_SPLITS
    acc = tl.zeros((BLOCK_DIM,), tl.float32)
    total = tl.full((), 0.0, tl.float32)
    best = tl.full((), float("-inf"), tl.float32)
    for split in range(0, num_used):
        log_total = tl.load(log_totals + first + split)
        new_best = tl.maximum(best, log_total)
        shrink = tl.exp2(best - new_best)
        weight = tl.exp2(log_total - new_best)
        part = tl.load(partial + (first + split) * HEAD_DIM + dims, mask=has_dim, other=0.0)
        acc = acc * shrink + part * weight
        total = total * shrink + weight
        best = new_best
    acc = acc / tl.where(total > 0.0, total, 1.0)
    target = out + (token * NUM_HEADS + head) * HEAD_DIM + dims
    tl.store(target, acc.to(out.dtype.element_ty), mask=has_dim)


@triton.jit
def chunk_kernel(
    out,  # [tokens, heads * head_dim]
    qkv,  # [tokens, heads + 2 * kv_heads, head_dim]
    keys,
    values,
    tables,  # [rows, width] block ids
    table_width,  # [1]
    positions,  # [tokens]
    token_rows,  # [tokens] row of the table
    tile_tokens,  # [tiles] first token of each
    tile_lengths,  # [tiles] tokens in it: consecutive positions of one row
    stride_block,
    scale,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DOT: tl.constexpr,
):
    """Attend one head of a tile of tokens to every position up to their own."""
    # The last tiles of a chunk see the longest context; begun first, they end with the others.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1)
    kv_head = head // (NUM_HEADS // NUM_KV_HEADS)
    first = tl.load(tile_tokens + tile).to(tl.int64)
    length = tl.load(tile_lengths + tile)
    position = tl.load(positions + first).to(tl.int32)
    row = tl.load(token_rows + first).to(tl.int64)
    table = tables + row * tl.load(table_width)
    rows = tl.arange(0, BLOCK_M)
    dims = tl.arange(0, BLOCK_DIM)
    is_real = (rows < length)[:, None] & (dims < HEAD_DIM)[None, :]
    stride_token: tl.constexpr = (NUM_HEADS + 2 * NUM_KV_HEADS) * HEAD_DIM
    source = qkv + (first + rows)[:, None] * stride_token + head * HEAD_DIM + dims[None, :]
    query = tl.load(source, mask=is_real, other=0.0).to(DOT)
    acc = tl.zeros((BLOCK_M, BLOCK_DIM), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    best = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    stride_slot: tl.constexpr = NUM_KV_HEADS * HEAD_DIM
    head_keys, head_values = keys + kv_head * HEAD_DIM, values + kv_head * HEAD_DIM
    # Every token sees the whole tiles before the tile's first position.
    seen_by_all = (position + 1) // BLOCK_N * BLOCK_N
    for start in range(0, seen_by_all, BLOCK_N):
        place = start + tl.arange(0, BLOCK_N)
        is_seen = place < seen_by_all
        slots = slots_of(place, table, stride_block, stride_slot, BLOCK_SIZE, is_seen)
        acc, total, best = attend(
            acc, total, best, query, head_keys, head_values,
            slots, dims, is_seen, is_seen[None, :], scale, HEAD_DIM, False, DOT,
        )  # fmt: skip
    for start in range(seen_by_all, position + length, BLOCK_N):
        place = start + tl.arange(0, BLOCK_N)
        is_seen = place < position + length
        visible = place[None, :] <= (position + rows)[:, None]
        slots = slots_of(place, table, stride_block, stride_slot, BLOCK_SIZE, is_seen)
        acc, total, best = attend(
            acc, total, best, query, head_keys, head_values,
            slots, dims, is_seen, visible, scale, HEAD_DIM, True, DOT,
        )  # fmt: skip
    acc = acc / total[:, None]
    target = (first + rows)[:, None] * (NUM_HEADS * HEAD_DIM) + head * HEAD_DIM + dims[None, :]
    tl.store(out + target, acc.to(out.dtype.element_ty), mask=is_real)
