"""ModelConfig: what every network's config tells, and how its fields are read from a config.json.

Must not know: families, weights, tensors, devices.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastserve.config import ConfigError
from fastserve.model.activation import ACTIVATIONS, Activation

Values = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """A decoder-only network, as far as all that stands around it must know it."""

    architecture: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    sliding_window: int | None
    tie_word_embeddings: bool
    dtype: str  # of the checkpoint

    @property
    def max_model_len(self) -> int:
        """The longest context that is computed exactly: full attention, trained positions."""
        return min(
            self.max_position_embeddings, self.sliding_window or self.max_position_embeddings
        )


def read_dtype(values: Values, source: str) -> str:
    """Return the dtype of the checkpoint."""
    dtype = values.get("dtype") or values.get("torch_dtype") or "float32"
    if dtype not in ("float32", "bfloat16", "float16"):
        raise ConfigError(f"{source}: dtype {dtype!r} is not supported")
    return str(dtype)


def read_activation(values: Values, source: str, default: str) -> Activation:
    """Return the activation of a plain MLP."""
    name = values.get("activation_function", default)
    if name not in ACTIVATIONS:
        raise ConfigError(
            f"{source}: activation_function {name!r} is not supported "
            f"(only {', '.join(ACTIVATIONS)})"
        )
    return ACTIVATIONS[name]


def divide_heads(hidden_size: int, num_heads: int, source: str) -> int:
    """Return the width of a head where all heads together are as wide as the stream."""
    if num_heads < 1 or hidden_size % num_heads:
        raise ConfigError(
            f"{source}: a hidden size of {hidden_size} cannot be divided among {num_heads} heads"
        )
    return hidden_size // num_heads
