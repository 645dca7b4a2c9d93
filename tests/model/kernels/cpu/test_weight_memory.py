"""WeightMemory: weights keep what they say, lie side by side, and none in another."""

from __future__ import annotations

import torch

from fastserve.model.kernels.cpu.weight_memory import ALIGNMENT, SLAB_BYTES, WeightMemory


def test_tensors_lie_side_by_side():
    """Of any size and dtype, each on a line of its own; one larger than a slab has its own."""
    memory = WeightMemory()
    larger = SLAB_BYTES + 4
    drawn = [
        torch.arange(7, dtype=torch.float32),
        torch.arange(600, dtype=torch.bfloat16).view(3, 200),
        torch.zeros(0),
        torch.ones(larger, dtype=torch.uint8),
        torch.arange(5, dtype=torch.int8),
    ]
    kept = [memory.keep(tensor) for tensor in drawn]
    for before, after in zip(drawn, kept, strict=True):
        assert torch.equal(before, after)
        assert after.dtype is before.dtype
        assert after.data_ptr() % ALIGNMENT == 0
    assert kept[1].data_ptr() - kept[0].data_ptr() == ALIGNMENT
    assert kept[0].untyped_storage().data_ptr() == kept[1].untyped_storage().data_ptr()
    assert kept[4].untyped_storage().nbytes() >= SLAB_BYTES
    kept[0].zero_()
    assert torch.equal(kept[1], drawn[1])


def test_a_strided_tensor_becomes_contiguous():
    """As `Project` reads it."""
    tensor = torch.arange(12, dtype=torch.float32).view(3, 4).T
    kept = WeightMemory().keep(tensor)
    assert kept.is_contiguous()
    assert torch.equal(kept, tensor)
