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
from fastserve.model.loader import Weights
from fastserve.model.ops.interfaces import HeadNormOp, LinearOp, MLPOp, NormOp, Ops


class LlamaLoader:
    """Fits `FamilyLoader`."""

    names = WeightNames(
        embedding=("model.embed_tokens.",),
        layers="model.layers",
        head=("model.norm.", "lm_head."),
    )

    def __init__(self, config: LlamaConfig, weights: Weights, ops: Ops) -> None:
        self.config = config
        self.weights = weights
        self.ops = ops

    def embedding(self) -> Embedding:
        return Embedding(self._token_table)

    def layer(self, index: int) -> PreNormLayer:
        config, weights, ops = self.config, self.weights, self.ops
        prefix = f"{self.names.layers}.{index}"
        width = config.num_heads * config.head_dim
        is_sparse = config.experts is not None and index in config.experts.sparse_layers
        load_mlp = load_mixture if is_sparse else _load_mlp
        return PreNormLayer(
            attention_norm=self._norm(f"{prefix}.input_layernorm"),
            qkv=_load_qkv(config, weights, ops, f"{prefix}.self_attn"),
            head_norm=_load_head_norm(config, weights, ops, f"{prefix}.self_attn"),
            head_dim=config.head_dim,
            output=ops.linear(
                *_load_matrix(
                    weights,
                    f"{prefix}.self_attn.o_proj",
                    config.hidden_size,
                    width,
                    config.has_output_bias,
                )
            ),
            mlp_norm=self._norm(f"{prefix}.post_attention_layernorm"),
            mlp=load_mlp(config, weights, ops, prefix),
        )

    def head(self) -> Head:
        config = self.config
        table = (
            self._token_table
            if config.tie_word_embeddings
            else self.weights.get("lm_head.weight", config.vocab_size, config.hidden_size)
        )
        return Head(self.ops.linear(table), norm=self._norm("model.norm"))

    def rotary(self, max_len: int, device: torch.device) -> Rotary:
        return Rotary(self.config.rope, self.config.head_dim, max_len, device)

    @cached_property
    def _token_table(self) -> Tensor:
        """What the embedding reads, and a head tied to it."""
        shape = (self.config.vocab_size, self.config.hidden_size)
        return self.weights.get("model.embed_tokens.weight", *shape)

    def _norm(self, name: str) -> NormOp:
        weight = self.weights.get(f"{name}.weight", self.config.hidden_size)
        return self.ops.rms_norm(weight, self.config.rms_norm_eps)


def _load_matrix(
    weights: Weights, name: str, out_width: int, in_width: int, has_bias: bool
) -> tuple[Tensor, Tensor | None]:
    weight = weights.get(f"{name}.weight", out_width, in_width)
    return weight, weights.get(f"{name}.bias", out_width) if has_bias else None


def _load_qkv(config: LlamaConfig, weights: Weights, ops: Ops, prefix: str) -> LinearOp:
    """Stack the three projections; rows of queries and keys become rotary pairs."""
    dim = config.head_dim
    matrices, biases = [], []
    for name, heads in (
        ("q_proj", config.num_heads),
        ("k_proj", config.num_kv_heads),
        ("v_proj", config.num_kv_heads),
    ):
        weight, bias = _load_matrix(
            weights, f"{prefix}.{name}", heads * dim, config.hidden_size, config.has_qkv_bias
        )
        is_rotated = name != "v_proj"
        matrices.append(interleave_pairs(weight, dim) if is_rotated else weight)
        if bias is not None:
            biases.append(interleave_pairs(bias, dim) if is_rotated else bias)
    return ops.linear(torch.cat(matrices), torch.cat(biases) if biases else None)


def _load_head_norm(
    config: LlamaConfig, weights: Weights, ops: Ops, prefix: str
) -> HeadNormOp | None:
    """Return Qwen3's query and key norms as one, with a weight row per head."""
    if not config.has_qk_norm:
        return None
    dim = config.head_dim
    query = interleave_pairs(weights.get(f"{prefix}.q_norm.weight", dim), dim)
    key = interleave_pairs(weights.get(f"{prefix}.k_norm.weight", dim), dim)
    rows = torch.cat((query.expand(config.num_heads, dim), key.expand(config.num_kv_heads, dim)))
    return ops.head_rms_norm(rows, config.rms_norm_eps)


def _load_mlp(config: LlamaConfig, weights: Weights, ops: Ops, layer: str) -> MLPOp:
    prefix = f"{layer}.mlp"
    width, hidden, has_bias = config.intermediate_size, config.hidden_size, config.has_mlp_bias
    gate, gate_bias = _load_matrix(weights, f"{prefix}.gate_proj", width, hidden, has_bias)
    up, up_bias = _load_matrix(weights, f"{prefix}.up_proj", width, hidden, has_bias)
    bias = None if gate_bias is None or up_bias is None else torch.cat((gate_bias, up_bias))
    down = ops.linear(*_load_matrix(weights, f"{prefix}.down_proj", hidden, width, has_bias))
    return ops.gated_mlp(ops.linear(torch.cat((gate, up)), bias), down)
