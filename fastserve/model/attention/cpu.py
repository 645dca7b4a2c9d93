"""CpuAttention: paged attention by compiled CPU kernels.

Rules: keys and values are read in place, by block table; a token's result has the same bits in any
batch and any chunking wherever the kernels are rowwise. Must not know: requests, weights.
"""

from __future__ import annotations

from torch import Tensor

from fastserve.model.attention.interfaces import LayerAttention, LayerKV
from fastserve.model.attention.shape import AttentionShape
from fastserve.model.input_batch import InputBatch
from fastserve.model.kernels.cpu.attention_work import attention_work
from fastserve.model.kernels.cpu.kernels import CpuKernels


class CpuAttention:
    """Fits `Attention`."""

    def __init__(self, kernels: CpuKernels, shape: AttentionShape) -> None:
        self.kernels = kernels
        self.shape = shape

    def plan(self, batch: InputBatch) -> LayerAttention:
        work = attention_work(batch.rows, self.shape.group_size)
        kernels, shape = self.kernels, self.shape
        blocks, offsets = batch.write_blocks, batch.write_offsets

        def run(qkv: Tensor, rotations: Tensor | None, layer: LayerKV) -> Tensor:
            kernels.rotate_and_write(qkv, rotations, layer, blocks, offsets, shape.num_heads)
            out = qkv.new_empty((qkv.shape[0], shape.width))
            kernels.attend(qkv, layer, work, out, shape)
            return out

        return run
