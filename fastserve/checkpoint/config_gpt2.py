"""GPT2Config: the shape of a GPT-2 network.

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
    read_epsilon,
)
from fastserve.settings.option import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class GPT2Config(ModelConfig):
    """GPT-2: learned positions, a plain MLP, LayerNorm before each part."""

    activation: Activation
    layer_norm_eps: float


def parse_gpt2(values: Values, source: str, architecture: str) -> GPT2Config:
    """Turn the fields of a config.json, defaults included, into a GPT2Config."""
    for key, expected in (
        ("scale_attn_weights", True),
        ("scale_attn_by_inverse_layer_idx", False),
        ("add_cross_attention", False),
    ):
        if bool(values[key]) != expected:
            raise ConfigError(f"{source}: {key} {values[key]!r} is not supported")
    hidden_size, num_heads = int(values["n_embd"]), int(values["n_head"])
    return GPT2Config(
        architecture=architecture,
        vocab_size=int(values["vocab_size"]),
        hidden_size=hidden_size,
        num_layers=int(values["n_layer"]),
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=divide_heads(hidden_size, num_heads, source),
        max_position_embeddings=int(values["n_positions"]),
        sliding_window=None,
        tie_word_embeddings=bool(values["tie_word_embeddings"]),
        dtype=read_dtype(values, source),
        intermediate_size=4 * hidden_size if values["n_inner"] is None else int(values["n_inner"]),
        activation=read_activation(values, source),
        layer_norm_eps=read_epsilon(values, "layer_norm_epsilon", source),
    )
