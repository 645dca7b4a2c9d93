"""The Llama family: Llama 2 and 3, Mistral, Mixtral, Qwen2, Qwen3, Qwen3-MoE.

Rules: one class, no subclass per model: flags of LlamaConfig tell them apart. Query, key and value
are one product, gate and up another. In the last layer only rows that get logits go through the
MLP.
Must not know: requests, sampling, who owns the KV.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastserve.checkpoint.config_llama import LlamaConfig
from fastserve.model.attention.interfaces import LayerAttention, LayerKV, PagedKV
from fastserve.model.attention.rotary import Rotary, interleave_pairs
from fastserve.model.attention.shape import AttentionShape
from fastserve.model.families.mixture import load_mixture
from fastserve.model.input_batch import InputBatch
from fastserve.model.loader import Weights
from fastserve.model.ops.interfaces import HeadNormOp, LinearOp, MLPOp, Ops


class LlamaLayer:
    """One decoder layer: attention and MLP, each behind a norm and added to the stream."""

    def __init__(self, config: LlamaConfig, weights: Weights, ops: Ops, index: int) -> None:
        prefix = f"model.layers.{index}"
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.num_heads = config.num_heads
        self.num_kv_heads = config.num_kv_heads
        self.head_dim = config.head_dim
        self.input_norm = ops.rms_norm(weights.get(f"{prefix}.input_layernorm.weight", hidden), eps)
        self.qkv = _load_qkv(config, weights, ops, f"{prefix}.self_attn")
        self.head_norm = _load_head_norm(config, weights, ops, f"{prefix}.self_attn")
        width = config.num_heads * config.head_dim
        self.output = ops.linear(
            *_load_matrix(
                weights, f"{prefix}.self_attn.o_proj", hidden, width, config.has_output_bias
            )
        )
        self.mlp_norm = ops.rms_norm(
            weights.get(f"{prefix}.post_attention_layernorm.weight", hidden), eps
        )
        is_sparse = config.experts is not None and index in config.experts.sparse_layers
        load_mlp = load_mixture if is_sparse else _load_mlp
        self.mlp = load_mlp(config, weights, ops, prefix)

    def attend(
        self,
        hidden: Tensor,  # [num_tokens, hidden]
        rotations: Tensor,
        layer_kv: LayerKV,
        attention: LayerAttention,
    ) -> Tensor:
        """Return the mixed values of the step's tokens, before the output projection."""
        qkv = self.qkv(self.input_norm(hidden))
        qkv = qkv.view(len(qkv), self.num_heads + 2 * self.num_kv_heads, self.head_dim)
        if self.head_norm is not None:
            self.head_norm(qkv)
        return attention(qkv, rotations, layer_kv)

    def add_outputs(self, hidden: Tensor, mixed: Tensor) -> None:
        """Add attention's output and the MLP's to the stream, in place."""
        self.output.add_to(hidden, mixed)
        self.mlp.add_to(hidden, self.mlp_norm(hidden))


class LlamaModel:
    """Token ids and paged KV in, logits of the scored rows out."""

    def __init__(
        self,
        config: LlamaConfig,
        weights: Weights,
        ops: Ops,
        *,
        max_len: int,
        device: torch.device,
    ) -> None:
        self.config = config
        self.attention = ops.attention(AttentionShape.of(config))
        shape = (config.vocab_size, config.hidden_size)
        self.embedding = weights.get("model.embed_tokens.weight", *shape)
        self.layers = tuple(
            LlamaLayer(config, weights, ops, index) for index in range(config.num_layers)
        )
        norm = weights.get("model.norm.weight", config.hidden_size)
        self.norm = ops.rms_norm(norm, config.rms_norm_eps)
        is_tied = config.tie_word_embeddings
        self.head = ops.linear(self.embedding if is_tied else weights.get("lm_head.weight", *shape))
        weights.finish()
        self.rotary = Rotary(config.rope, config.head_dim, max_len, device)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of weights and KV."""
        return self.embedding.dtype

    def __call__(self, batch: InputBatch, kv: PagedKV) -> Tensor:
        """Run one step; returns float32 logits [num_scored, vocab]."""
        hidden = F.embedding(batch.token_ids, self.embedding)  # [num_tokens, hidden]
        rotations = self.rotary.at(batch.positions)
        attention = self.attention.plan(batch)
        last = len(self.layers) - 1
        for index, layer in enumerate(self.layers):
            mixed = layer.attend(hidden, rotations, kv.layers[index], attention)
            if index == last and batch.scored is not None:
                hidden, mixed = hidden[batch.scored], mixed[batch.scored]
            layer.add_outputs(hidden, mixed)
        return self.head(self.norm(hidden)).float()


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
