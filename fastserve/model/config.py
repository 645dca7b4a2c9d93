"""ModelConfig: the shape of a network, read from a Hugging Face config.json.

Rules: both dialects are read (`rope_theta`/`rope_scaling`/`torch_dtype`, and transformers 5's
`rope_parameters`/`dtype`). What the layers cannot compute exactly is refused here, in one line.
Must not know: weights, tensors, devices.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastserve.config import ConfigError

ARCHITECTURES = (
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """Rotary embedding: base and, for `linear` and `llama3`, how its frequencies are stretched."""

    theta: float = 10_000.0
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """A decoder-only network of the Llama family."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    rope: RopeConfig
    tie_word_embeddings: bool
    has_qkv_bias: bool
    has_output_bias: bool
    has_mlp_bias: bool
    has_qk_norm: bool
    sliding_window: int | None
    dtype: str  # of the checkpoint

    @property
    def max_model_len(self) -> int:
        """The longest context that is computed exactly: full attention, trained positions."""
        return min(
            self.max_position_embeddings, self.sliding_window or self.max_position_embeddings
        )


def read_model_config(model_dir: Path) -> ModelConfig:
    """Read `config.json`; raises ConfigError with one line when the model cannot be served."""
    path = model_dir / "config.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{model_dir}: no config.json; not a Hugging Face model") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: must hold a JSON object")
    return parse_model_config(values, source=str(path))


def parse_model_config(values: Mapping[str, Any], *, source: str) -> ModelConfig:
    """Turn the fields of a config.json into a ModelConfig."""
    architecture = _architecture(values, source)
    _refuse_unsupported(values, source)
    try:
        num_heads = int(values["num_attention_heads"])
        hidden_size = int(values["hidden_size"])
        is_qwen2 = architecture == "Qwen2ForCausalLM"
        is_qwen3 = architecture == "Qwen3ForCausalLM"
        default_head_dim = 128 if is_qwen3 else hidden_size // max(num_heads, 1)
        has_attention_bias = bool(values.get("attention_bias", False)) and not is_qwen2
        config = ModelConfig(
            architecture=architecture,
            vocab_size=int(values["vocab_size"]),
            hidden_size=hidden_size,
            intermediate_size=int(values["intermediate_size"]),
            num_layers=int(values["num_hidden_layers"]),
            num_heads=num_heads,
            num_kv_heads=int(values.get("num_key_value_heads") or num_heads),
            head_dim=int(values.get("head_dim") or default_head_dim),
            rms_norm_eps=float(values.get("rms_norm_eps", 1e-6)),
            max_position_embeddings=int(values.get("max_position_embeddings", 2048)),
            rope=_rope(values, source),
            tie_word_embeddings=bool(values.get("tie_word_embeddings", False)),
            has_qkv_bias=is_qwen2 or has_attention_bias,
            has_output_bias=has_attention_bias,
            has_mlp_bias=bool(values.get("mlp_bias", False)),
            has_qk_norm=is_qwen3,
            sliding_window=_sliding_window(values, architecture),
            dtype=_dtype(values, source),
        )
    except KeyError as error:
        raise ConfigError(f"{source}: {error.args[0]!r} is missing") from None
    except (TypeError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{source}: {error}") from None
    _check_shapes(config, source)
    return config


def _architecture(values: Mapping[str, Any], source: str) -> str:
    names = values.get("architectures") or ()
    for name in names:
        if name in ARCHITECTURES:
            return str(name)
    asked = ", ".join(map(str, names)) or "none named"
    raise ConfigError(
        f"{source}: architecture not supported: {asked} (supported: {', '.join(ARCHITECTURES)})"
    )


def _refuse_unsupported(values: Mapping[str, Any], source: str) -> None:
    if values.get("quantization_config"):
        raise ConfigError(f"{source}: quantized weights (quantization_config) are not supported")
    activation = values.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise ConfigError(f"{source}: hidden_act {activation!r} is not supported (only silu)")


def _rope(values: Mapping[str, Any], source: str) -> RopeConfig:
    parameters = values.get("rope_parameters")
    if not isinstance(parameters, dict):
        parameters = dict(values.get("rope_scaling") or {})
        parameters.setdefault("rope_theta", values.get("rope_theta", 10_000.0))
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind not in ("default", "linear", "llama3"):
        raise ConfigError(
            f"{source}: rope type {kind!r} is not supported (only default, linear, llama3)"
        )
    if float(parameters.get("partial_rotary_factor", 1.0)) != 1.0:
        raise ConfigError(f"{source}: partial_rotary_factor is not supported")
    return RopeConfig(
        theta=float(parameters.get("rope_theta", values.get("rope_theta", 10_000.0))),
        kind=kind,
        factor=float(parameters.get("factor", 1.0)),
        low_freq_factor=float(parameters.get("low_freq_factor", 1.0)),
        high_freq_factor=float(parameters.get("high_freq_factor", 4.0)),
        original_max_position_embeddings=int(
            parameters.get("original_max_position_embeddings", 8192)
        ),
    )


def _sliding_window(values: Mapping[str, Any], architecture: str) -> int | None:
    window = values.get("sliding_window")
    is_qwen = architecture.startswith("Qwen")
    if window is None or (is_qwen and not values.get("use_sliding_window", False)):
        return None
    return int(window)


def _dtype(values: Mapping[str, Any], source: str) -> str:
    dtype = values.get("dtype") or values.get("torch_dtype") or "float32"
    if dtype not in ("float32", "bfloat16", "float16"):
        raise ConfigError(f"{source}: dtype {dtype!r} is not supported")
    return str(dtype)


def _check_shapes(config: ModelConfig, source: str) -> None:
    for name in ("vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads"):
        if getattr(config, name) < 1:
            raise ConfigError(f"{source}: {name} must be positive, got {getattr(config, name)}")
    if config.num_heads % config.num_kv_heads:
        raise ConfigError(
            f"{source}: {config.num_heads} attention heads cannot share "
            f"{config.num_kv_heads} key-value heads"
        )
    if config.head_dim % 2:
        raise ConfigError(
            f"{source}: head_dim {config.head_dim} is odd; rotary pairs need an even one"
        )
