"""Mixture: the MLP of a sparse layer, which sends each token to a few of many experts.

Rules: made of other parts, so that it runs wherever they do. Routing is float32 in every dtype, and
so is the sum over experts. Only experts that some token chose are run; a token's experts are added
in their order, whatever else is in the batch. Of several ranks each has some columns of every
expert, so that all have as much to do wherever tokens are sent, and they add up once a layer.
Checkpoints hold experts one by one (under Mixtral's names or Qwen3's) or stacked (as transformers 5
keeps them in memory); both are read.
Must not know: attention, batches, devices.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fastserve.checkpoint.config_llama import ExpertsConfig, LlamaConfig
from fastserve.model.families.projections import ProjectionReader, shifted
from fastserve.model.loader import Slice
from fastserve.model.ops.interfaces import LinearOp, MLPOp
from fastserve.model.parallel import ALONE, TensorGroup


class Mixture:
    """Σ share · expert(x) over the `top_k` experts that the router scores highest."""

    def __init__(
        self,
        router: LinearOp,
        experts: Sequence[MLPOp],
        *,
        top_k: int,
        is_normalized: bool,
        group: TensorGroup = ALONE,
    ) -> None:
        self.router = router  # of float32 weights
        self.experts = tuple(experts)
        self.top_k = top_k
        self.is_normalized = is_normalized
        self.group = group

    def add_to(self, residual: Tensor, x: Tensor) -> Tensor:
        """Add the layer's output to `residual` in place."""
        shares, chosen = self.router(x.float()).softmax(-1).topk(self.top_k)  # [num_tokens, top_k]
        if self.is_normalized:
            shares = shares / shares.sum(-1, keepdim=True)
        by_expert = chosen.flatten().argsort(stable=True)  # [num_tokens * top_k]
        rows = by_expert // self.top_k
        shares = shares.flatten()[by_expert].unsqueeze(1)
        counts = chosen.flatten().bincount(minlength=len(self.experts)).tolist()
        mixed = torch.zeros(residual.shape, dtype=torch.float32, device=residual.device)
        start = 0
        for expert, count in zip(self.experts, counts, strict=True):
            if count == 0:
                continue
            stop = start + count
            mine = rows[start:stop]
            output = expert.add_to(residual.new_zeros(count, residual.shape[1]), x[mine])
            mixed.index_add_(0, mine, output * shares[start:stop])
            start = stop
        return residual.add_(self.group.all_reduce(mixed))


def load_mixture(config: LlamaConfig, matrices: ProjectionReader, layer: str) -> Mixture:
    """Read the experts and the router of one layer."""
    experts, weights, ops = config.experts, matrices.weights, matrices.ops
    if experts is None:
        raise ValueError(f"{layer}: a network without experts")
    prefix = f"{layer}.block_sparse_moe"
    if not weights.has(f"{prefix}.gate.weight"):
        prefix = f"{layer}.mlp"
    router = weights.get(f"{prefix}.gate.weight", experts.num_experts, config.hidden_size)
    is_stacked = weights.has(f"{prefix}.experts.gate_up_proj")
    read = _stacked_experts if is_stacked else _single_experts
    return Mixture(
        ops.linear(router.float()),
        [
            ops.gated_mlp(ops.linear(gate_up), ops.linear(down))
            for gate_up, down in read(matrices, f"{prefix}.experts", experts, config.hidden_size)
        ],
        top_k=experts.top_k,
        is_normalized=experts.is_normalized,
        group=matrices.group,
    )


def _stacked_experts(
    matrices: ProjectionReader, prefix: str, experts: ExpertsConfig, hidden: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield each expert's gate and up in one matrix, and its down."""
    weights, count, width = matrices.weights, experts.num_experts, experts.intermediate_size
    part = matrices.shard.columns(width)
    gate, up = Slice.of(part, dim=1), Slice.of(shifted(part, width), dim=1)
    for index in range(count):
        one = Slice(index, index + 1)
        pair = [
            weights.get(f"{prefix}.gate_up_proj", count, 2 * width, hidden, part=(one, rows))[0]
            for rows in (gate, up)
        ]
        columns = Slice.of(part, dim=2)
        down = weights.get(f"{prefix}.down_proj", count, hidden, width, part=(one, columns))
        yield torch.cat(pair), down[0]


def _single_experts(
    matrices: ProjectionReader, prefix: str, experts: ExpertsConfig, hidden: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the same, of a checkpoint that has a tensor for each."""
    width = experts.intermediate_size
    part = matrices.shard.columns(width)
    has_short_names = matrices.weights.has(f"{prefix}.0.w1.weight")
    names = ("w1", "w3", "w2") if has_short_names else ("gate_proj", "up_proj", "down_proj")
    for index in range(experts.num_experts):
        gate, up, down = (f"{prefix}.{index}.{name}" for name in names)
        pair = [matrices.weight(name, width, hidden, Slice.of(part)) for name in (gate, up)]
        yield torch.cat(pair), matrices.weight(down, hidden, width, Slice.of(part, dim=1))
