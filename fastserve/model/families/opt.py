"""OPT: learned positions, LayerNorm, a plain MLP; opt-350m has norms last and narrow embeddings.

Rules: query, key and value are one product.
Must not know: requests, sampling.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from fastserve.checkpoint.config_opt import OPTConfig
from fastserve.model.attention.interfaces import LayerAttention, LayerKV
from fastserve.model.decoder_parts import Embedding, Head, PreNormLayer
from fastserve.model.families.interfaces import WeightNames
from fastserve.model.families.projections import Matrix, ProjectionReader, stack, times
from fastserve.model.loader import Slice, Weights
from fastserve.model.ops.interfaces import LinearOp, MLPOp, NormOp, Ops
from fastserve.model.parallel import TensorGroup

POSITION_OFFSET = 2
"""Rows of the position table that stand before position 0."""

NORM_EPS = 1e-5


class PostNormLayer(PreNormLayer):
    """Fits `DecoderLayer`: the norms come after attention and after the MLP, over the sums."""

    def attend(
        self,
        hidden: Tensor,
        rotations: Tensor | None,
        layer_kv: LayerKV,
        attention: LayerAttention,
    ) -> Tensor:
        qkv = self.qkv(hidden)
        return attention(qkv.view(len(qkv), -1, self.head_dim), rotations, layer_kv)

    def add_outputs(self, hidden: Tensor, mixed: Tensor) -> Tensor:
        hidden = self.attention_norm(self.output.add_to(hidden, mixed))
        # The sum is written over its first operand, so the input is a copy.
        return self.mlp_norm(self.mlp.add_to(hidden.clone(), hidden))


class OPTLoader:
    """Fits `FamilyLoader`."""

    def __init__(self, config: OPTConfig, weights: Weights, ops: Ops, group: TensorGroup) -> None:
        self.config = config
        self.weights = weights
        self.ops = ops
        self.group = group
        self.matrices = ProjectionReader(weights, ops, group)
        # The first OPT checkpoints were saved from the network without its head.
        is_whole = weights.has("model.decoder.embed_tokens.weight")
        self.root = "model.decoder" if is_whole else "decoder"
        self.names = WeightNames(
            embedding=tuple(
                f"{self.root}.{part}." for part in ("embed_tokens", "embed_positions", "project_in")
            ),
            layers=f"{self.root}.layers",
            head=(f"{self.root}.final_layer_norm.", f"{self.root}.project_out.", "lm_head."),
        )

    def embedding(self) -> Embedding:
        config, root = self.config, self.root
        num_rows = config.max_position_embeddings + POSITION_OFFSET
        positions = self.weights.get(
            f"{root}.embed_positions.weight",
            num_rows,
            config.hidden_size,
            part=Slice(POSITION_OFFSET, num_rows),
        )
        return Embedding(
            self._token_table,
            positions,
            self._projection("project_in", config.hidden_size, config.embedding_size),
            self.group,
        )

    def layer(self, index: int) -> PreNormLayer:
        config, hidden = self.config, self.config.hidden_size
        prefix = f"{self.names.layers}.{index}"
        mixed = times(self.matrices.shard.heads(config), config.head_dim)
        make_layer = PreNormLayer if config.is_norm_first else PostNormLayer
        return make_layer(
            attention_norm=self._norm(f"{prefix}.self_attn_layer_norm"),
            qkv=self.ops.linear(*self._qkv(f"{prefix}.self_attn", mixed)),
            head_dim=config.head_dim,
            output=self.matrices.row_parallel(
                f"{prefix}.self_attn.out_proj", hidden, hidden, mixed, has_bias=config.has_bias
            ),
            mlp_norm=self._norm(f"{prefix}.final_layer_norm"),
            mlp=self._mlp(prefix),
        )

    def head(self) -> Head:
        config = self.config
        table = (
            self._token_table
            if config.tie_word_embeddings
            else self.matrices.vocabulary(
                "lm_head.weight", config.vocab_size, config.embedding_size
            )
        )
        return Head(
            self.ops.linear(table),
            config.vocab_size,
            norm=self._norm(f"{self.root}.final_layer_norm") if config.has_final_norm else None,
            project=self._projection("project_out", config.embedding_size, config.hidden_size),
            group=self.group,
        )

    def rotary(self, max_len: int, device: torch.device) -> None:
        """Fit `FamilyLoader`."""

    @cached_property
    def _token_table(self) -> Tensor:
        """What the embedding reads, and a head tied to it."""
        shape = (self.config.vocab_size, self.config.embedding_size)
        return self.matrices.vocabulary(f"{self.root}.embed_tokens.weight", *shape)

    def _projection(self, name: str, out_width: int, in_width: int) -> LinearOp | None:
        """Load what stands between the stream and a narrower table; None: they are as wide."""
        if out_width == in_width:
            return None
        return self.ops.linear(self.weights.get(f"{self.root}.{name}.weight", out_width, in_width))

    def _qkv(self, prefix: str, mixed: range) -> Matrix:
        hidden, has_bias = self.config.hidden_size, self.config.has_bias
        return stack(
            [
                self.matrices.column_parallel(
                    f"{prefix}.{name}", hidden, hidden, mixed, has_bias=has_bias
                )
                for name in ("q_proj", "k_proj", "v_proj")
            ]
        )

    def _mlp(self, prefix: str) -> MLPOp:
        config, matrices = self.config, self.matrices
        hidden, inner, has_bias = config.hidden_size, config.intermediate_size, config.has_bias
        part = matrices.shard.columns(inner)
        up = matrices.column_parallel(f"{prefix}.fc1", inner, hidden, part, has_bias=has_bias)
        down = matrices.row_parallel(f"{prefix}.fc2", hidden, inner, part, has_bias=has_bias)
        return self.ops.mlp(self.ops.linear(*up), config.activation, down)

    def _norm(self, name: str) -> NormOp:
        if not self.config.has_norm_weights:
            return self.ops.layer_norm(None, None, NORM_EPS)
        weight = self.weights.get(f"{name}.weight", self.config.hidden_size)
        bias = self.weights.get(f"{name}.bias", self.config.hidden_size)
        return self.ops.layer_norm(weight, bias, NORM_EPS)
