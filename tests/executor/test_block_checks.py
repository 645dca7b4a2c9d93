"""Checksums of blocks that move: what is changed on the way is counted."""

from __future__ import annotations

import torch

from fastserve.core.messages import Copy, CopyDirection
from fastserve.executor.block_checks import BlockChecks
from fastserve.executor.facts import BlockCounts
from fastserve.executor.kv_store import KVShape, KVStore

OUT, IN = CopyDirection.SWAP_OUT, CopyDirection.SWAP_IN


def test_only_what_came_back_otherwise_is_a_mismatch() -> None:
    """A block changed on the way, and one from a place where none went."""
    kv = KVStore(
        KVShape(1, 1, 4),
        BlockCounts(8, 8),
        block_size=2,
        dtype=torch.bfloat16,
        device=torch.device("cpu"),
    )
    kv.device.tensor.normal_()
    checks = BlockChecks(kv)
    out = Copy(0, OUT, (0, 1, 2), (5, 6, 7))
    checks.leaving(out)
    checks.arrived(out)
    assert (checks.num_moves, checks.num_mismatches) == (3, 0)
    kv.device.tensor[3:5] = kv.device.tensor[0:2]
    back = Copy(1, IN, (5, 6), (3, 4))
    checks.leaving(back)
    checks.arrived(back)
    assert (checks.num_moves, checks.num_mismatches) == (5, 0)
    kv.device.tensor[4, 0, 0, 0, 0, 0] += 1.0
    checks.arrived(back)
    assert checks.num_mismatches == 1
    checks.arrived(Copy(2, IN, (0,), (3,)))
    assert (checks.num_moves, checks.num_mismatches) == (8, 2)
