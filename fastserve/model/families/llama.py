"""The Llama family: Llama 2 and 3, Mistral, Mixtral, Qwen2, Qwen3, Qwen3-MoE.

Rules: one loader, no subclass per model: flags of LlamaConfig tell them apart. Query, key and value
are one product, gate and up another.
Must not know: requests, sampling.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from fastserve.checkpoint.config_llama import LlamaConfig
from fastserve.model.attention.rotary import Rotary, interleave_pairs
from fastserve.model.decoder_parts import Embedding, Head, PreNormLayer
from fastserve.model.families.interfaces import WeightNames
from fastserve.model.families.mixture import load_mixture
from fastserve.model.families.projections import Matrix, ProjectionReader, stack, times
from fastserve.model.loader import Weights
from fastserve.model.ops.interfaces import HeadNormOp, MLPOp, NormOp, Ops
from fastserve.model.parallel import TensorGroup


class LlamaLoader:
    """Fits `FamilyLoader`."""

    names = WeightNames(
        embedding=("model.embed_tokens.",),
        layers="model.layers",
        head=("model.norm.", "lm_head."),
    )

    def __init__(self, config: LlamaConfig, weights: Weights, ops: Ops, group: TensorGroup) -> None:
        self.config = config
        self.weights = weights
        self.ops = ops
        self.group = group
        self.matrices = ProjectionReader(weights, ops, group)

    def embedding(self) -> Embedding:
        return Embedding(self._token_table, group=self.group)

    def layer(self, index: int) -> PreNormLayer:
        config = self.config
        prefix = f"{self.names.layers}.{index}"
        is_sparse = config.experts is not None and index in config.experts.sparse_layers
        load_mlp = load_mixture if is_sparse else _load_mlp
        return PreNormLayer(
            attention_norm=self._norm(f"{prefix}.input_layernorm"),
            qkv=self.ops.linear(*_read_qkv(config, self.matrices, f"{prefix}.self_attn")),
            head_norm=self._head_norm(f"{prefix}.self_attn"),
            head_dim=config.head_dim,
            output=self.matrices.row_parallel(
                f"{prefix}.self_attn.o_proj",
                config.hidden_size,
                config.num_heads * config.head_dim,
                times(self.matrices.shard.heads(config), config.head_dim),
                has_bias=config.has_output_bias,
            ),
            mlp_norm=self._norm(f"{prefix}.post_attention_layernorm"),
            mlp=load_mlp(config, self.matrices, prefix),
        )

    def head(self) -> Head:
        config = self.config
        table = (
            self._token_table
            if config.tie_word_embeddings
            else self.matrices.vocabulary("lm_head.weight", config.vocab_size, config.hidden_size)
        )
        return Head(
            self.ops.linear(table),
            config.vocab_size,
            norm=self._norm("model.norm"),
            group=self.group,
        )

    def rotary(self, max_len: int, device: torch.device) -> Rotary:
        return Rotary(self.config.rope, self.config.head_dim, max_len, device)

    @cached_property
    def _token_table(self) -> Tensor:
        """What the embedding reads, and a head tied to it."""
        shape = (self.config.vocab_size, self.config.hidden_size)
        return self.matrices.vocabulary("model.embed_tokens.weight", *shape)

    def _norm(self, name: str) -> NormOp:
        weight = self.weights.get(f"{name}.weight", self.config.hidden_size)
        return self.ops.rms_norm(weight, self.config.rms_norm_eps)

    def _head_norm(self, prefix: str) -> HeadNormOp | None:
        """Return Qwen3's query and key norms as one, with a weight row per head."""
        config, shard, dim = self.config, self.matrices.shard, self.config.head_dim
        if not config.has_qk_norm:
            return None
        query = interleave_pairs(self.weights.get(f"{prefix}.q_norm.weight", dim), dim)
        key = interleave_pairs(self.weights.get(f"{prefix}.k_norm.weight", dim), dim)
        num_heads, num_kv_heads = len(shard.heads(config)), len(shard.kv_heads(config))
        rows = torch.cat((query.expand(num_heads, dim), key.expand(num_kv_heads, dim)))
        return self.ops.head_rms_norm(rows, config.rms_norm_eps)


def _read_qkv(config: LlamaConfig, matrices: ProjectionReader, prefix: str) -> Matrix:
    """Stack the three projections; rows of queries and keys become rotary pairs."""
    dim = config.head_dim
    heads, kv_heads = matrices.shard.heads(config), matrices.shard.kv_heads(config)
    parts = []
    for name, num_heads, here in (
        ("q_proj", config.num_heads, heads),
        ("k_proj", config.num_kv_heads, kv_heads),
        ("v_proj", config.num_kv_heads, kv_heads),
    ):
        weight, bias = matrices.column_parallel(
            f"{prefix}.{name}",
            num_heads * dim,
            config.hidden_size,
            times(here, dim),
            has_bias=config.has_qkv_bias,
        )
        if name != "v_proj":
            weight = interleave_pairs(weight, dim)
            bias = None if bias is None else interleave_pairs(bias, dim)
        parts.append((weight, bias))
    return stack(parts)


def _load_mlp(config: LlamaConfig, matrices: ProjectionReader, layer: str) -> MLPOp:
    prefix, ops = f"{layer}.mlp", matrices.ops
    width, hidden, has_bias = config.intermediate_size, config.hidden_size, config.has_mlp_bias
    part = matrices.shard.columns(width)
    gate_up = [
        matrices.column_parallel(f"{prefix}.{name}", width, hidden, part, has_bias=has_bias)
        for name in ("gate_proj", "up_proj")
    ]
    down = matrices.row_parallel(f"{prefix}.down_proj", hidden, width, part, has_bias=has_bias)
    return ops.gated_mlp(ops.linear(*stack(gate_up)), down)
