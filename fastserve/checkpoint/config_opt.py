"""OPTConfig: the shape of an OPT network (Galactica too is one).

Must not know: weights, tensors, devices.
"""

from __future__ import annotations

from dataclasses import dataclass

from fastserve.checkpoint.activation import Activation
from fastserve.checkpoint.config_fields import (
    ModelConfig,
    Values,
    divide_heads,
    read_activation,
    read_dtype,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class OPTConfig(ModelConfig):
    """OPT: learned positions, a plain MLP, LayerNorm before or after each part."""

    embedding_size: int  # narrower than the stream in opt-350m
    activation: Activation
    is_norm_first: bool
    has_final_norm: bool
    has_norm_weights: bool
    has_bias: bool


def parse_opt(values: Values, source: str, architecture: str) -> OPTConfig:
    """Turn the fields of a config.json, defaults included, into an OPTConfig."""
    hidden_size, num_heads = int(values["hidden_size"]), int(values["num_attention_heads"])
    narrow = values["word_embed_proj_dim"]
    is_norm_first = bool(values["do_layer_norm_before"])
    return OPTConfig(
        architecture=architecture,
        vocab_size=int(values["vocab_size"]),
        hidden_size=hidden_size,
        num_layers=int(values["num_hidden_layers"]),
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=divide_heads(hidden_size, num_heads, source),
        max_position_embeddings=int(values["max_position_embeddings"]),
        sliding_window=None,
        tie_word_embeddings=bool(values["tie_word_embeddings"]),
        dtype=read_dtype(values, source),
        embedding_size=hidden_size if narrow is None else int(narrow),
        intermediate_size=int(values["ffn_dim"]),
        activation=read_activation(values, source),
        is_norm_first=is_norm_first,
        has_final_norm=is_norm_first and not values["_remove_final_layer_norm"],
        has_norm_weights=bool(values["layer_norm_elementwise_affine"]),
        has_bias=bool(values["enable_bias"]),
    )
