"""GPT-2: learned positions, LayerNorm, a plain MLP; matrices are stored transposed.

Must not know: requests, sampling.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from fastserve.checkpoint.config_gpt2 import GPT2Config
from fastserve.model.decoder_parts import Embedding, Head, PreNormLayer
from fastserve.model.families.interfaces import WeightNames
from fastserve.model.loader import Weights
from fastserve.model.ops.interfaces import LinearOp, NormOp, Ops


class GPT2Loader:
    """Fits `FamilyLoader`."""

    def __init__(self, config: GPT2Config, weights: Weights, ops: Ops) -> None:
        self.config = config
        self.weights = weights
        self.ops = ops
        # The original checkpoints were saved from the network without its head.
        self.root = "transformer." if weights.has("transformer.wte.weight") else ""
        self.names = WeightNames(
            embedding=(f"{self.root}wte.", f"{self.root}wpe."),
            layers=f"{self.root}h",
            head=(f"{self.root}ln_f.", "lm_head."),
        )

    def embedding(self) -> Embedding:
        config = self.config
        positions = self.weights.get(
            f"{self.root}wpe.weight", config.max_position_embeddings, config.hidden_size
        )
        return Embedding(self._token_table, positions)

    def layer(self, index: int) -> PreNormLayer:
        prefix = f"{self.names.layers}.{index}"
        hidden, inner = self.config.hidden_size, self.config.intermediate_size
        return PreNormLayer(
            attention_norm=self._norm(f"{prefix}.ln_1"),
            qkv=self._linear(f"{prefix}.attn.c_attn", 3 * hidden, hidden),
            head_dim=self.config.head_dim,
            output=self._linear(f"{prefix}.attn.c_proj", hidden, hidden),
            mlp_norm=self._norm(f"{prefix}.ln_2"),
            mlp=self.ops.mlp(
                self._linear(f"{prefix}.mlp.c_fc", inner, hidden),
                self.config.activation,
                self._linear(f"{prefix}.mlp.c_proj", hidden, inner),
            ),
        )

    def head(self) -> Head:
        config = self.config
        table = (
            self._token_table
            if config.tie_word_embeddings
            else self.weights.get("lm_head.weight", config.vocab_size, config.hidden_size)
        )
        return Head(self.ops.linear(table), norm=self._norm(f"{self.root}ln_f"))

    def rotary(self, max_len: int, device: torch.device) -> None:
        """Fit `FamilyLoader`."""

    @cached_property
    def _token_table(self) -> Tensor:
        """What the embedding reads, and a head tied to it."""
        shape = (self.config.vocab_size, self.config.hidden_size)
        return self.weights.get(f"{self.root}wte.weight", *shape)

    def _linear(self, name: str, out_width: int, in_width: int) -> LinearOp:
        weight = self.weights.get(f"{name}.weight", in_width, out_width)
        bias = self.weights.get(f"{name}.bias", out_width)
        return self.ops.linear(weight.t().contiguous(), bias)

    def _norm(self, name: str) -> NormOp:
        weight = self.weights.get(f"{name}.weight", self.config.hidden_size)
        bias = self.weights.get(f"{name}.bias", self.config.hidden_size)
        return self.ops.layer_norm(weight, bias, self.config.layer_norm_eps)
