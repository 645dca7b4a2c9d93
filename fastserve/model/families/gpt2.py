"""GPT-2: learned positions, LayerNorm, a plain MLP; matrices are stored transposed.

Rules: in the last layer only rows that get logits go through the MLP.
Must not know: requests, sampling, who owns the KV.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastserve.checkpoint.config_gpt2 import GPT2Config
from fastserve.model.attention.interfaces import LayerAttention, LayerKV, PagedKV
from fastserve.model.attention.shape import AttentionShape
from fastserve.model.input_batch import InputBatch
from fastserve.model.loader import Weights
from fastserve.model.ops.interfaces import LinearOp, NormOp, Ops


class GPT2Layer:
    """One decoder layer: attention and MLP, each behind a norm and added to the stream."""

    def __init__(self, config: GPT2Config, weights: Weights, ops: Ops, prefix: str) -> None:
        hidden, inner = config.hidden_size, config.intermediate_size
        self.head_dim = config.head_dim
        self.attention_norm = _load_norm(config, weights, ops, f"{prefix}.ln_1")
        self.qkv = _load_linear(weights, ops, f"{prefix}.attn.c_attn", 3 * hidden, hidden)
        self.output = _load_linear(weights, ops, f"{prefix}.attn.c_proj", hidden, hidden)
        self.mlp_norm = _load_norm(config, weights, ops, f"{prefix}.ln_2")
        self.mlp = ops.mlp(
            _load_linear(weights, ops, f"{prefix}.mlp.c_fc", inner, hidden),
            config.activation,
            _load_linear(weights, ops, f"{prefix}.mlp.c_proj", hidden, inner),
        )

    def attend(
        self,
        hidden: Tensor,  # [num_tokens, hidden]
        layer_kv: LayerKV,
        attention: LayerAttention,
    ) -> Tensor:
        """Return the mixed values of the step's tokens, before the output projection."""
        qkv = self.qkv(self.attention_norm(hidden))
        return attention(qkv.view(len(qkv), -1, self.head_dim), None, layer_kv)

    def add_outputs(self, hidden: Tensor, mixed: Tensor) -> None:
        """Add attention's output and the MLP's to the stream, in place."""
        self.output.add_to(hidden, mixed)
        self.mlp.add_to(hidden, self.mlp_norm(hidden))


class GPT2Model:
    """Token ids and paged KV in, logits of the scored rows out."""

    def __init__(self, config: GPT2Config, weights: Weights, ops: Ops) -> None:
        self.config = config
        self.attention = ops.attention(AttentionShape.of(config))
        # The original checkpoints were saved from the network without its head.
        root = "transformer." if weights.has("transformer.wte.weight") else ""
        shape = (config.vocab_size, config.hidden_size)
        self.embedding = weights.get(f"{root}wte.weight", *shape)
        self.positions = weights.get(
            f"{root}wpe.weight", config.max_position_embeddings, config.hidden_size
        )
        self.layers = tuple(
            GPT2Layer(config, weights, ops, f"{root}h.{index}")
            for index in range(config.num_layers)
        )
        self.norm = _load_norm(config, weights, ops, f"{root}ln_f")
        is_tied = config.tie_word_embeddings
        self.head = ops.linear(self.embedding if is_tied else weights.get("lm_head.weight", *shape))
        weights.finish()

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of weights and KV."""
        return self.embedding.dtype

    def __call__(self, batch: InputBatch, kv: PagedKV) -> Tensor:
        """Run one step; returns float32 logits [num_scored, vocab]."""
        hidden = F.embedding(batch.token_ids, self.embedding)  # [num_tokens, hidden]
        hidden += F.embedding(batch.positions, self.positions)
        attention = self.attention.plan(batch)
        last = len(self.layers) - 1
        for index, layer in enumerate(self.layers):
            mixed = layer.attend(hidden, kv.layers[index], attention)
            if index == last and batch.scored is not None:
                hidden, mixed = hidden[batch.scored], mixed[batch.scored]
            layer.add_outputs(hidden, mixed)
        return self.head(self.norm(hidden)).float()


def _load_linear(weights: Weights, ops: Ops, name: str, out_width: int, in_width: int) -> LinearOp:
    weight = weights.get(f"{name}.weight", in_width, out_width)
    return ops.linear(weight.t().contiguous(), weights.get(f"{name}.bias", out_width))


def _load_norm(config: GPT2Config, weights: Weights, ops: Ops, name: str) -> NormOp:
    weight = weights.get(f"{name}.weight", config.hidden_size)
    bias = weights.get(f"{name}.bias", config.hidden_size)
    return ops.layer_norm(weight, bias, config.layer_norm_eps)
