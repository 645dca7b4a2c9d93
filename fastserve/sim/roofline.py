"""Roofline: the time of a step from first principles, scaled by what kernels were seen to reach.

A layer is matrix products (bound by reading weights or by arithmetic, whichever takes longer),
attention (arithmetic in prefill, reading KV in decode), and two all-reduces where several devices
share it. Rules: datasheet rates times fitted efficiencies, nothing else; the processor that drives
the devices costs nothing here. Must not know: names of models and hardware, where fits come from.
"""

from __future__ import annotations

from dataclasses import dataclass

from fastserve.core.cost_model import CostModel
from fastserve.sim.models import ModelShape

COPY_EFFICIENCY = 0.8
"""Share of PCIe's rate that pinned copies reach. An assumption: no public table here has it."""
COPY_LATENCY_S = 20e-6
"""Time to start a copy. An assumption as well."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """One device, by its datasheet: bytes, bytes a second (a link: in one direction), FLOP/s."""

    name: str
    chip: str  # devices of one chip share their efficiencies
    memory_bytes: float
    bandwidth: float
    flops: float  # dense, 16 bit
    nvlink: float
    pcie: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Efficiency:
    """What kernels reach of the datasheet's rates (shares), and what they cost at least (seconds).

    `activation_passes`: how often the operators between the matrix products move a hidden state.
    """

    layer_s: float
    weight_bandwidth: float
    matmul_flops: float
    activation_passes: float
    attention_s: float
    attention_flops: float
    kv_bandwidth: float
    all_reduce_s: float
    all_reduce_bandwidth: float
    send_recv_s: float
    send_recv_bandwidth: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Roofline:
    """A model cut over `tensor_parallel_size` devices; `dtype_bytes` of a weight and of KV."""

    shape: ModelShape
    hardware: Hardware
    efficiency: Efficiency
    dtype_bytes: int = 2
    tensor_parallel_size: int = 1

    @property
    def flops(self) -> float:
        """FLOP/s of the tensor cores: half as many where operands are twice as wide."""
        return self.hardware.flops * 2 / self.dtype_bytes

    @property
    def layer_weights_s(self) -> float:
        """Seconds to read one layer's weights."""
        rate = self.hardware.bandwidth * self.efficiency.weight_bandwidth
        return self.shape.layer_params * self.dtype_bytes / self.tensor_parallel_size / rate

    @property
    def layer_token_s(self) -> float:
        """Seconds that one token adds to a layer that is bound by arithmetic."""
        products = self.products_s(self.shape.active_layer_params)
        moved = self.efficiency.activation_passes * self.shape.hidden_size * self.dtype_bytes
        return products + moved / self.hardware.bandwidth

    @property
    def layer_pair_s(self) -> float:
        """Seconds of attention for one prompt token and one token that it attends to."""
        work = 4 * self.shape.num_heads * self.shape.head_dim / self.tensor_parallel_size
        return work / (self.flops * self.efficiency.attention_flops)

    @property
    def layer_context_s(self) -> float:
        """Seconds of attention for one token that a decode attends to."""
        rate = self.hardware.bandwidth * self.efficiency.kv_bandwidth
        return self.layer_kv_bytes / rate

    @property
    def layer_kv_bytes(self) -> int:
        """Bytes of one token's keys and values in one layer, on one device.

        Devices beyond the number of KV heads each hold a copy of one.
        """
        num_heads = -(-self.shape.num_kv_heads // self.tensor_parallel_size)
        return 2 * num_heads * self.shape.head_dim * self.dtype_bytes

    def products_s(self, num_params: float) -> float:
        """Return the seconds to multiply one token by so many weights."""
        num_flops = 2 * num_params / self.tensor_parallel_size
        return num_flops / (self.flops * self.efficiency.matmul_flops)

    def all_reduce_s(self, num_tokens: float) -> float:
        """Return the seconds of one all-reduce of hidden states, its start not included."""
        num_ranks = self.tensor_parallel_size
        moved = num_tokens * self.hidden_bytes * 2 * (num_ranks - 1) / num_ranks
        return moved / (self.hardware.nvlink * self.efficiency.all_reduce_bandwidth)

    @property
    def hidden_bytes(self) -> int:
        """Bytes of one token's hidden state."""
        return self.shape.hidden_size * self.dtype_bytes

    def hand_over_s(self, pipeline_parallel_size: int) -> tuple[float, float]:
        """Return what passing hidden states between stages takes: of a step, and of a token."""
        num_borders = pipeline_parallel_size - 1
        rate = self.hardware.nvlink * self.efficiency.send_recv_bandwidth
        return num_borders * self.efficiency.send_recv_s, num_borders * self.hidden_bytes / rate

    def shard_bytes(self, block_size: int, pipeline_parallel_size: int) -> int:
        """Return the bytes of a block that one device holds: its shard of the longest stage."""
        num_layers = -(-self.shape.num_layers // pipeline_parallel_size)
        return block_size * num_layers * self.layer_kv_bytes

    def copy_block_s(self, block_size: int, pipeline_parallel_size: int) -> float:
        """Return the seconds to move a block to or from the host: every device has its own link."""
        rate = self.hardware.pcie * COPY_EFFICIENCY
        return self.shard_bytes(block_size, pipeline_parallel_size) / rate

    def cost_model(self, block_size: int, pipeline_parallel_size: int) -> CostModel:
        """Return the cost of a step through the whole model, its stages one after the other."""
        shape, fit = self.shape, self.efficiency
        num_layers = shape.num_layers
        num_all_reduces = 2 * num_layers if self.tensor_parallel_size > 1 else 0
        hand_over_s, hand_over_token_s = self.hand_over_s(pipeline_parallel_size)
        head_read_s = self.layer_weights_s * shape.head_params / shape.layer_params
        token_s = (
            num_layers * self.layer_token_s
            + num_all_reduces * self.all_reduce_s(1)
            + hand_over_token_s
        )
        return CostModel(
            base_s=(
                num_layers * (fit.layer_s + fit.attention_s)
                + num_all_reduces * fit.all_reduce_s
                + hand_over_s
            ),
            prefill_token_s=token_s,
            prefill_pair_s=num_layers * self.layer_pair_s,
            # Only the last token of a prompt goes through the head, every decode does.
            decode_seq_s=token_s + self.products_s(shape.head_params),
            decode_context_s=num_layers * self.layer_context_s,
            floor_s=num_layers * self.layer_weights_s + head_read_s,
            copy_base_s=COPY_LATENCY_S,
            copy_block_s=self.copy_block_s(block_size, pipeline_parallel_size),
        )
