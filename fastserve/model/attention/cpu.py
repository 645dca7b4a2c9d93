"""CpuAttention: paged attention by compiled CPU kernels.

Rules: keys and values are read in place, by block table; a token's result has the same bits in any
batch and any chunking. Must not know: requests, weights, who owns the KV, which kernels run.
"""

from __future__ import annotations

from torch import Tensor

from fastserve.model.attention.interfaces import LayerAttention, LayerKV
from fastserve.model.input_batch import InputBatch
from fastserve.model.kernels.cpu.kernels import CpuKernels, attention_work


class CpuAttention:
    """Fits `Attention`."""

    def __init__(
        self, kernels: CpuKernels, *, num_heads: int, num_kv_heads: int, head_dim: int
    ) -> None:
        self.kernels = kernels
        self.num_heads = num_heads
        self.width = num_heads * head_dim

    def plan(self, batch: InputBatch) -> LayerAttention:
        """Fit `Attention`."""
        work = attention_work(batch.rows)
        kernels, num_heads = self.kernels, self.num_heads
        blocks, offsets = batch.write_blocks, batch.write_offsets

        def run(qkv: Tensor, rotations: Tensor | None, layer: LayerKV) -> Tensor:
            kernels.rotate_and_write(qkv, rotations, layer, blocks, offsets, num_heads)
            out = qkv.new_empty((qkv.shape[0], self.width))
            kernels.attend(qkv, layer, work, out, num_heads)
            return out

        return run
