"""OPT: learned positions, LayerNorm, a plain MLP; opt-350m has norms last and narrow embeddings.

Rules: query, key and value are one product. In the last layer only rows that get logits go through
the MLP. Must not know: requests, sampling, who owns the KV.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastserve.checkpoint.config_opt import OPTConfig
from fastserve.model.attention.interfaces import LayerAttention, LayerKV, PagedKV
from fastserve.model.attention.shape import AttentionShape
from fastserve.model.input_batch import InputBatch
from fastserve.model.loader import Weights
from fastserve.model.ops.interfaces import LinearOp, NormOp, Ops

POSITION_OFFSET = 2
"""Rows of the position table that stand before position 0."""

NORM_EPS = 1e-5


class OPTLayer:
    """One decoder layer: attention and MLP, each with a norm before or after it."""

    def __init__(self, config: OPTConfig, weights: Weights, ops: Ops, prefix: str) -> None:
        hidden, inner = config.hidden_size, config.intermediate_size
        self.is_norm_first = config.is_norm_first
        self.head_dim = config.head_dim
        attention = f"{prefix}.self_attn"
        parts = [
            _load_matrix(config, weights, f"{attention}.{name}", hidden, hidden)
            for name in ("q_proj", "k_proj", "v_proj")
        ]
        biases = [bias for _, bias in parts if bias is not None]
        self.qkv = ops.linear(
            torch.cat([weight for weight, _ in parts]), torch.cat(biases) if biases else None
        )
        self.output = ops.linear(
            *_load_matrix(config, weights, f"{attention}.out_proj", hidden, hidden)
        )
        self.attention_norm = _load_norm(config, weights, ops, f"{prefix}.self_attn_layer_norm")
        self.mlp_norm = _load_norm(config, weights, ops, f"{prefix}.final_layer_norm")
        self.mlp = ops.mlp(
            ops.linear(*_load_matrix(config, weights, f"{prefix}.fc1", inner, hidden)),
            config.activation,
            ops.linear(*_load_matrix(config, weights, f"{prefix}.fc2", hidden, inner)),
        )

    def attend(
        self,
        hidden: Tensor,  # [num_tokens, hidden]
        layer_kv: LayerKV,
        attention: LayerAttention,
    ) -> Tensor:
        """Return the mixed values of the step's tokens, before the output projection."""
        qkv = self.qkv(self.attention_norm(hidden) if self.is_norm_first else hidden)
        return attention(qkv.view(len(qkv), -1, self.head_dim), None, layer_kv)

    def add_outputs(self, hidden: Tensor, mixed: Tensor) -> Tensor:
        """Add attention's output and the MLP's to the stream, which may be overwritten."""
        hidden = self.output.add_to(hidden, mixed)
        if self.is_norm_first:
            return self.mlp.add_to(hidden, self.mlp_norm(hidden))
        hidden = self.attention_norm(hidden)
        # The sum is written over its first operand, so the input is a copy.
        return self.mlp_norm(self.mlp.add_to(hidden.clone(), hidden))


class OPTModel:
    """Token ids and paged KV in, logits of the scored rows out."""

    def __init__(self, config: OPTConfig, weights: Weights, ops: Ops) -> None:
        self.config = config
        self.attention = ops.attention(AttentionShape.of(config))
        # The first OPT checkpoints were saved from the network without its head.
        root = "model.decoder" if weights.has("model.decoder.embed_tokens.weight") else "decoder"
        hidden, narrow = config.hidden_size, config.embedding_size
        shape = (config.vocab_size, narrow)
        self.embedding = weights.get(f"{root}.embed_tokens.weight", *shape)
        num_positions = config.max_position_embeddings + POSITION_OFFSET
        table = weights.get(f"{root}.embed_positions.weight", num_positions, hidden)
        self.positions = table[POSITION_OFFSET:]
        self.project_in: LinearOp | None = None
        self.project_out: LinearOp | None = None
        if narrow != hidden:
            self.project_in = ops.linear(weights.get(f"{root}.project_in.weight", hidden, narrow))
            self.project_out = ops.linear(weights.get(f"{root}.project_out.weight", narrow, hidden))
        self.layers = tuple(
            OPTLayer(config, weights, ops, f"{root}.layers.{index}")
            for index in range(config.num_layers)
        )
        self.norm: NormOp | None = None
        if config.has_final_norm:
            self.norm = _load_norm(config, weights, ops, f"{root}.final_layer_norm")
        is_tied = config.tie_word_embeddings
        self.head = ops.linear(self.embedding if is_tied else weights.get("lm_head.weight", *shape))
        weights.finish()

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of weights and KV."""
        return self.embedding.dtype

    def __call__(self, batch: InputBatch, kv: PagedKV) -> Tensor:
        """Run one step; returns float32 logits [num_scored, vocab]."""
        hidden = F.embedding(batch.positions, self.positions)  # [num_tokens, hidden]
        tokens = F.embedding(batch.token_ids, self.embedding)  # [num_tokens, embedding_size]
        if self.project_in is not None:
            hidden = self.project_in.add_to(hidden, tokens)
        else:
            hidden += tokens
        attention = self.attention.plan(batch)
        last = len(self.layers) - 1
        for index, layer in enumerate(self.layers):
            mixed = layer.attend(hidden, kv.layers[index], attention)
            if index == last and batch.scored is not None:
                hidden, mixed = hidden[batch.scored], mixed[batch.scored]
            hidden = layer.add_outputs(hidden, mixed)
        if self.norm is not None:
            hidden = self.norm(hidden)
        if self.project_out is not None:
            hidden = self.project_out(hidden)
        return self.head(hidden).float()


def _load_matrix(
    config: OPTConfig, weights: Weights, name: str, out_width: int, in_width: int
) -> tuple[Tensor, Tensor | None]:
    weight = weights.get(f"{name}.weight", out_width, in_width)
    return weight, weights.get(f"{name}.bias", out_width) if config.has_bias else None


def _load_norm(config: OPTConfig, weights: Weights, ops: Ops, name: str) -> NormOp:
    if not config.has_norm_weights:
        return ops.layer_norm(None, None, NORM_EPS)
    weight = weights.get(f"{name}.weight", config.hidden_size)
    return ops.layer_norm(weight, weights.get(f"{name}.bias", config.hidden_size), NORM_EPS)
