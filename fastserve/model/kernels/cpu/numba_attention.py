"""The attention of kernels.py in numba.

Rules: as numba_rows.py. Keys and values are read in tiles of fixed positions, turned into float32
once for all queries that share them (keys transposed: positions side by side), and the softmax is
carried from tile to tile. Must not know: tensors, networks.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray

from fastserve.model.kernels.cpu.numba_primitives import (
    LOG2_E,
    exp2,
    fast,
    pointer,
    prefetch,
    put,
    take,
    widen,
)

TILE = 32  # positions
STEP = 8  # products that are added up before they meet memory


@fast
def _floats(address: Any, count: Any) -> Any:
    return carray(pointer(address), count, np.float32)


@fast
def _multiply(a: Any, a_width: Any, b: Any, width: Any, rows: Any, depth: Any, out: Any) -> None:
    """Add a · b to `out`, all given by address: [rows, a_width] · [depth, width].

    `depth` is a multiple of STEP.
    """
    for r in range(rows):
        total = _floats(out + r * width * 4, width)
        for k in range(0, depth, STEP):
            x = _floats(a + (r * a_width + k) * 4, STEP)
            base, line = b + k * width * 4, width * 4
            b0, b1 = _floats(base, width), _floats(base + line, width)
            b2, b3 = _floats(base + 2 * line, width), _floats(base + 3 * line, width)
            b4, b5 = _floats(base + 4 * line, width), _floats(base + 5 * line, width)
            b6, b7 = _floats(base + 6 * line, width), _floats(base + 7 * line, width)
            x0, x1, x2, x3, x4, x5, x6, x7 = x[0], x[1], x[2], x[3], x[4], x[5], x[6], x[7]
            for i in range(width):
                low = x0 * b0[i] + x1 * b1[i] + x2 * b2[i] + x3 * b3[i]
                high = x4 * b4[i] + x5 * b5[i] + x6 * b6[i] + x7 * b7[i]
                total[i] += low + high


@fast
def _locate(a: Any, table: Any, first: Any, last: Any, offsets: Any) -> None:
    """Find the elements where positions begin; those past `last` repeat it."""
    size, width = a[12], a[16] * a[17]
    for i in range(TILE):
        position = min(first + i, last)
        offsets[i] = table[position // size] * a[13] + position % size * width


@fast
def _prefetch(first: Any, width: Any) -> None:
    for byte in range(0, width, 64):
        prefetch(first + byte)


@fast
def _pack(kv: Any, a: Any, offsets: Any, ahead: Any, count: Any, tile: Any, kind: Any) -> None:
    """Bring `count` positions of a head, whose first key is at `kv`, into the tile's layout.

    `ahead` are those of the next tile: blocks lie anywhere, so that only we can tell the cache.
    """
    dim, size = a[17], carray(pointer(kv), 1, kind).itemsize
    padded = (dim + TILE - 1) // TILE * TILE
    keys = _floats(tile, padded * TILE)
    values = tile + padded * TILE * 4
    for row in range(count):
        _prefetch(kv + ahead[row] * size, dim * size)
        old = carray(pointer(kv + offsets[row] * size), dim, kind)
        for i in range(dim):
            keys[i * TILE + row] = widen(old[i])
    for row in range(count):
        _prefetch(kv + (ahead[row] + a[14]) * size, dim * size)
        old = carray(pointer(kv + (offsets[row] + a[14]) * size), dim, kind)
        new = _floats(values + row * padded * 4, padded)
        for i in range(dim):
            new[i] = widen(old[i])


@fast
def _weigh(score: Any, peak: Any, totals: Any, reach: Any, scale: Any, buffer: Any) -> Any:
    """Turn scores into weights, in place; return the new peak and the factor of older sums."""
    for i in range(TILE):
        score[i] = score[i] * scale if i <= reach else np.float32(-np.inf)
    for i in range(TILE):
        buffer[i] = score[i]
    half = TILE // 2
    while half:
        for i in range(half):
            other = buffer[half + i]
            buffer[i] = other if other > buffer[i] else buffer[i]
        half //= 2
    top = buffer[0] if buffer[0] > peak else peak
    factor = exp2(peak - top)
    for i in range(TILE):
        score[i] = exp2(score[i] - top)
        totals[i] = totals[i] * factor + score[i]
    return top, factor


@fast
def _tile(a: Any, scratch: Any, state: Any, span: Any, scale: Any) -> None:
    """One packed tile for the queries [start, rows) of one head, which reach into it."""
    group, padded = a[15] // a[16], (a[17] + TILE - 1) // TILE * TILE
    keys, scores, buffer = scratch
    values = keys + padded * TILE * 4
    queries, sums, peaks, totals = state
    start, rows, first, position, count = span
    peak = _floats(peaks, rows)
    work = _floats(buffer, TILE)
    mine = _floats(scores, (rows - start) * TILE)
    for i in range((rows - start) * TILE):
        mine[i] = np.float32(0.0)
    _multiply(queries + start * padded * 4, padded, keys, TILE, rows - start, padded, scores)
    for r in range(start, rows):
        score = _floats(scores + (r - start) * TILE * 4, TILE)
        total = _floats(totals + r * TILE * 4, TILE)
        reach = position + r // group - first
        peak[r], factor = _weigh(score, peak[r], total, reach, scale, work)
        old = _floats(sums + r * padded * 4, padded)
        for i in range(padded):
            old[i] *= factor
    into = sums + start * padded * 4
    _multiply(scores, TILE, values, padded, rows - start, count, into)


@fast
def _begin(a: Any, piece: Any, head: Any, state: Any, kind: Any) -> None:
    heads, kv_heads, dim = a[15], a[16], a[17]
    group, padded = heads // kv_heads, (dim + TILE - 1) // TILE * TILE
    rows, size = piece[1] * group, carray(pointer(a[2]), 1, kind).itemsize
    queries, sums, peaks, totals = state
    peak = _floats(peaks, rows)
    for r in range(rows):
        index = (piece[0] + r // group) * (heads + 2 * kv_heads) + head * group + r % group
        old = carray(pointer(a[2] + index * dim * size), dim, kind)
        new = _floats(queries + r * padded * 4, padded)
        total = _floats(sums + r * padded * 4, padded)
        for i in range(padded):
            new[i] = np.float32(0.0)
            total[i] = np.float32(0.0)
        for i in range(dim):
            new[i] = widen(old[i])
        weights = _floats(totals + r * TILE * 4, TILE)
        for i in range(TILE):
            weights[i] = np.float32(0.0)
        peak[r] = np.float32(-np.inf)


@fast
def _finish(a: Any, piece: Any, head: Any, state: Any, kind: Any) -> None:
    heads, kv_heads, dim = a[15], a[16], a[17]
    group, padded = heads // kv_heads, (dim + TILE - 1) // TILE * TILE
    size = carray(pointer(a[3]), 1, kind).itemsize
    _, sums, _, totals = state
    for r in range(piece[1] * group):
        index = (piece[0] + r // group) * heads + head * group + r % group
        out = carray(pointer(a[3] + index * dim * size), dim, kind)
        total = _floats(sums + r * padded * 4, padded)
        weights = _floats(totals + r * TILE * 4, TILE)
        weight = np.float32(0.0)
        for i in range(TILE):
            weight += weights[i]
        inverse = np.float32(1.0) / weight
        for i in range(dim):
            put(out, i, total[i] * inverse)


@fast
def _state(memory: Any, rows: Any, padded: Any, head: Any) -> Any:
    """Return where queries, sums, peaks and totals of the n-th head lie."""
    first = memory + head * rows * (2 * padded + TILE + 1) * 4
    sums = first + rows * padded * 4
    totals = sums + rows * padded * 4
    return first, sums, totals + rows * TILE * 4, totals


@fast
def _heads(a: Any, piece: Any, head: Any, num: Any, memory: Any, scale: Any, kind: Any) -> None:
    """Some heads of a piece, side by side, so that what they read is one stream."""
    group, dim = a[15] // a[16], a[17]
    rows, size = piece[1] * group, carray(pointer(a[4]), 1, kind).itemsize
    padded = (dim + TILE - 1) // TILE * TILE
    buffer = memory + 2 * padded * TILE * 4
    scores = buffer + TILE * 4
    states = scores + rows * TILE * 4
    zeros = _floats(memory, 2 * padded * TILE)  # columns past head_dim stay zero
    for i in range(2 * padded * TILE):
        zeros[i] = np.float32(0.0)
    for h in range(num):
        _begin(a, piece, head + h, _state(states, rows, padded, h), kind)
    table = carray(pointer(a[6] + piece[2] * a[11] * 8), a[11], np.int64)
    offsets, ahead = np.empty(TILE, np.int64), np.empty(TILE, np.int64)
    position, last = piece[3], piece[3] + piece[1] - 1
    _locate(a, table, 0, last, ahead)
    for first in range(0, last + 1, TILE):
        offsets, ahead = ahead, offsets
        _locate(a, table, first + TILE, last, ahead)
        count = min((last - first) // STEP * STEP + STEP, TILE)
        span = (max(first - position, 0) * group, rows, first, position, count)
        for h in range(num):
            _pack(a[4] + (head + h) * dim * size, a, offsets, ahead, count, memory, kind)
            _tile(a, (memory, scores, buffer), _state(states, rows, padded, h), span, scale)
    for h in range(num):
        _finish(a, piece, head + h, _state(states, rows, padded, h), kind)


@fast
def attend(args: Any, kind: Any) -> None:
    """AttendArgs of kernels.cpp."""
    a = carray(pointer(args), 18, np.int64)
    scale = np.float32(carray(pointer(args + 144), 1, np.float64)[0]) * LOG2_E
    scratch = a[7] + take(args + 8, 1) * a[8] * 4
    parts = a[10]
    share = a[16] // parts
    while True:
        task = take(args, 1)
        if task >= a[9] * parts:
            return
        piece = carray(pointer(a[5] + task // parts * 32), 4, np.int64)
        head = task % parts * share
        if piece[1] == 1:
            _heads(a, piece, head, share, scratch, scale, kind)
        else:
            for h in range(share):
                _heads(a, piece, head + h, 1, scratch, scale, kind)
