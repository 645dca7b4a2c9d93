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
from fastserve.model.families.projections import Matrix, ProjectionReader, shifted, stack, times
from fastserve.model.loader import Weights
from fastserve.model.ops.interfaces import MLPOp, NormOp, Ops
from fastserve.model.parallel import TensorGroup


class GPT2Loader:
    """Fits `FamilyLoader`."""

    def __init__(self, config: GPT2Config, weights: Weights, ops: Ops, group: TensorGroup) -> None:
        self.config = config
        self.weights = weights
        self.ops = ops
        self.group = group
        self.matrices = ProjectionReader(weights, ops, group, is_transposed=True)
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
        return Embedding(self._token_table, positions, group=self.group)

    def layer(self, index: int) -> PreNormLayer:
        prefix = f"{self.names.layers}.{index}"
        hidden, head_dim = self.config.hidden_size, self.config.head_dim
        mixed = times(self.matrices.shard.heads(self.config), head_dim)
        return PreNormLayer(
            attention_norm=self._norm(f"{prefix}.ln_1"),
            qkv=self.ops.linear(*self._qkv(f"{prefix}.attn.c_attn", mixed)),
            head_dim=head_dim,
            output=self.matrices.row_parallel(
                f"{prefix}.attn.c_proj", hidden, hidden, mixed, has_bias=True
            ),
            mlp_norm=self._norm(f"{prefix}.ln_2"),
            mlp=self._mlp(f"{prefix}.mlp"),
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
            norm=self._norm(f"{self.root}ln_f"),
            group=self.group,
        )

    def rotary(self, max_len: int, device: torch.device) -> None:
        """Fit `FamilyLoader`."""

    @cached_property
    def _token_table(self) -> Tensor:
        """What the embedding reads, and a head tied to it."""
        shape = (self.config.vocab_size, self.config.hidden_size)
        return self.matrices.vocabulary(f"{self.root}wte.weight", *shape)

    def _qkv(self, name: str, mixed: range) -> Matrix:
        """Read this rank's heads of queries, keys and values, which lie one after the other."""
        hidden = self.config.hidden_size
        return stack(
            [
                self.matrices.column_parallel(
                    name, 3 * hidden, hidden, shifted(mixed, first), has_bias=True
                )
                for first in (0, hidden, 2 * hidden)
            ]
        )

    def _mlp(self, prefix: str) -> MLPOp:
        hidden, inner = self.config.hidden_size, self.config.intermediate_size
        part = self.matrices.shard.columns(inner)
        up = self.matrices.column_parallel(f"{prefix}.c_fc", inner, hidden, part, has_bias=True)
        down = self.matrices.row_parallel(f"{prefix}.c_proj", hidden, inner, part, has_bias=True)
        return self.ops.mlp(self.ops.linear(*up), self.config.activation, down)

    def _norm(self, name: str) -> NormOp:
        weight = self.weights.get(f"{name}.weight", self.config.hidden_size)
        bias = self.weights.get(f"{name}.bias", self.config.hidden_size)
        return self.ops.layer_norm(weight, bias, self.config.layer_norm_eps)
