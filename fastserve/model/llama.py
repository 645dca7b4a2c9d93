"""The Llama family: Llama 2 and 3, Mistral, Qwen2, Qwen3, told apart by flags of ModelConfig.

Rules: one class, no subclass per model. Query, key and value are one product, gate and up another.
In the last layer only rows that get logits go through the MLP.
Must not know: requests, sampling, who owns the KV.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastserve.model.attention import Attention, FastAttention, LayerKV, PagedKV
from fastserve.model.config import ModelConfig
from fastserve.model.input_batch import InputBatch
from fastserve.model.layers import GatedMLP, Linear, RMSNorm, Rotary, interleave_pairs
from fastserve.model.loader import Weights


class LlamaLayer:
    """One decoder layer: attention and MLP, each behind a norm and added to the stream."""

    def __init__(self, config: ModelConfig, weights: Weights, index: int) -> None:
        prefix = f"model.layers.{index}"
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.num_heads = config.num_heads
        self.num_kv_heads = config.num_kv_heads
        self.head_dim = config.head_dim
        self.input_norm = RMSNorm(weights.get(f"{prefix}.input_layernorm.weight", hidden), eps)
        self.qkv = _load_qkv(config, weights, f"{prefix}.self_attn")
        self.head_norm = _load_head_norm(config, weights, f"{prefix}.self_attn")
        width = config.num_heads * config.head_dim
        self.output = _load_linear(
            weights, f"{prefix}.self_attn.o_proj", hidden, width, config.has_output_bias
        )
        self.mlp_norm = RMSNorm(
            weights.get(f"{prefix}.post_attention_layernorm.weight", hidden), eps
        )
        self.mlp = _load_mlp(config, weights, f"{prefix}.mlp")

    def attend(
        self,
        hidden: Tensor,  # [num_tokens, hidden]
        rotations: Tensor,
        layer_kv: LayerKV,
        attention: Attention,
        batch: InputBatch,
    ) -> Tensor:
        """Return the mixed values of the step's tokens, before the output projection."""
        rotated = self.num_heads + self.num_kv_heads
        qkv = self.qkv(self.input_norm(hidden))
        qkv = qkv.view(len(qkv), rotated + self.num_kv_heads, self.head_dim)
        heads = qkv[:, :rotated]
        if self.head_norm is not None:
            heads.copy_(self.head_norm(heads))
        Rotary.rotate_(heads, rotations)
        return attention(qkv, layer_kv, batch)

    def add_outputs(self, hidden: Tensor, mixed: Tensor) -> None:
        """Add attention's output and the MLP's to the stream, in place."""
        self.output.add_to(hidden, mixed)
        self.mlp.add_to(hidden, self.mlp_norm(hidden))


class LlamaModel:
    """Token ids and paged KV in, logits of the scored rows out."""

    def __init__(
        self,
        config: ModelConfig,
        weights: Weights,
        *,
        max_len: int,
        device: torch.device,
        attention: Attention | None = None,
    ) -> None:
        self.config = config
        self.attention = attention or FastAttention(
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
        )
        shape = (config.vocab_size, config.hidden_size)
        self.embedding = weights.get("model.embed_tokens.weight", *shape)
        self.layers = tuple(
            LlamaLayer(config, weights, index) for index in range(config.num_layers)
        )
        norm = weights.get("model.norm.weight", config.hidden_size)
        self.norm = RMSNorm(norm, config.rms_norm_eps)
        is_tied = config.tie_word_embeddings
        self.head = Linear(self.embedding if is_tied else weights.get("lm_head.weight", *shape))
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
        last = len(self.layers) - 1
        for index, layer in enumerate(self.layers):
            mixed = layer.attend(hidden, rotations, kv.layers[index], self.attention, batch)
            if index == last and batch.scored is not None:
                hidden, mixed = hidden[batch.scored], mixed[batch.scored]
            layer.add_outputs(hidden, mixed)
        return self.head(self.norm(hidden)).float()


def _load_linear(
    weights: Weights, name: str, out_width: int, in_width: int, has_bias: bool
) -> Linear:
    weight = weights.get(f"{name}.weight", out_width, in_width)
    return Linear(weight, weights.get(f"{name}.bias", out_width) if has_bias else None)


def _load_qkv(config: ModelConfig, weights: Weights, prefix: str) -> Linear:
    """Stack the three projections; rows of queries and keys become rotary pairs."""
    dim = config.head_dim
    matrices, biases = [], []
    for name, heads in (
        ("q_proj", config.num_heads),
        ("k_proj", config.num_kv_heads),
        ("v_proj", config.num_kv_heads),
    ):
        part = _load_linear(
            weights, f"{prefix}.{name}", heads * dim, config.hidden_size, config.has_qkv_bias
        )
        is_rotated = name != "v_proj"
        matrices.append(interleave_pairs(part.weight, dim) if is_rotated else part.weight)
        if part.bias is not None:
            biases.append(interleave_pairs(part.bias, dim) if is_rotated else part.bias)
    return Linear(torch.cat(matrices), torch.cat(biases) if biases else None)


def _load_head_norm(config: ModelConfig, weights: Weights, prefix: str) -> RMSNorm | None:
    """Return Qwen3's query and key norms as one, with a weight row per head."""
    if not config.has_qk_norm:
        return None
    dim = config.head_dim
    query = interleave_pairs(weights.get(f"{prefix}.q_norm.weight", dim), dim)
    key = interleave_pairs(weights.get(f"{prefix}.k_norm.weight", dim), dim)
    rows = torch.cat((query.expand(config.num_heads, dim), key.expand(config.num_kv_heads, dim)))
    return RMSNorm(rows, config.rms_norm_eps)  # [heads + kv_heads, head_dim]


def _load_mlp(config: ModelConfig, weights: Weights, prefix: str) -> GatedMLP:
    width, hidden, has_bias = config.intermediate_size, config.hidden_size, config.has_mlp_bias
    gate = _load_linear(weights, f"{prefix}.gate_proj", width, hidden, has_bias)
    up = _load_linear(weights, f"{prefix}.up_proj", width, hidden, has_bias)
    bias = None if gate.bias is None or up.bias is None else torch.cat((gate.bias, up.bias))
    down = _load_linear(weights, f"{prefix}.down_proj", hidden, width, has_bias)
    return GatedMLP(Linear(torch.cat((gate.weight, up.weight)), bias), down)
