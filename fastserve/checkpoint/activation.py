"""Activation: what stands between the two products of a plain MLP, and its names in config.json."""

from __future__ import annotations

from typing import Literal

Activation = Literal["gelu", "gelu_tanh", "relu", "silu"]
"""`gelu` is the exact one."""

ACTIVATIONS: dict[str, Activation] = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}
