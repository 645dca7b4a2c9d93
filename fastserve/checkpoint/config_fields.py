"""ModelConfig: what every network's config tells, and how its fields are read from a config.json.

Must not know: families, weights, tensors, devices.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastserve.checkpoint.activation import ACTIVATIONS, Activation
from fastserve.settings.option import ConfigError

Values = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """A decoder-only network, as far as all that stands around it must know it."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int  # of an MLP that is no expert
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    sliding_window: int | None
    tie_word_embeddings: bool
    dtype: str  # of the checkpoint

    @property
    def num_positions(self) -> int:
        """The positions that the network can tell apart."""
        return self.max_position_embeddings

    @property
    def has_experts(self) -> bool:
        """Whether some layers send each token to a few of many MLPs."""
        return False

    @property
    def has_rotary_positions(self) -> bool:
        """Whether positions are pairs of a head turned by angles, or rows of a table."""
        return False

    @property
    def max_model_len(self) -> int:
        """The longest context that is computed exactly: full attention, known positions."""
        if self.sliding_window is None:
            return self.num_positions
        return min(self.num_positions, self.sliding_window)


def read_epsilon(values: Values, name: str, source: str) -> float:
    """Return what a norm adds to a variance."""
    return read_real(values, name, source, minimum=0.0, below=1.0)


def read_real(
    values: Values, name: str, source: str, *, minimum: float, below: float = math.inf
) -> float:
    """Return a number of at least `minimum` and less than `below`."""
    value: Any = values.get(name)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not minimum <= value < below:
        limit = "" if below == math.inf else f" and less than {below:g}"
        raise ConfigError(
            f"{source}: {name} must be a number of at least {minimum:g}{limit}, got {value!r}"
        )
    return float(value)


def read_dtype(values: Values, source: str) -> str:
    """Return the dtype of the checkpoint."""
    dtype = values.get("dtype") or values.get("torch_dtype") or "float32"
    dtype = str(dtype).removeprefix("torch.")
    if dtype not in ("float32", "bfloat16", "float16"):
        raise ConfigError(f"{source}: dtype {dtype!r} is not supported")
    return dtype


def read_activation(values: Values, source: str) -> Activation:
    """Return the activation of a plain MLP."""
    name = values["activation_function"]
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
