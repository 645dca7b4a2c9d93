"""LlamaConfig: the shape of a network of the Llama family, with or without experts.

Rules: both dialects are read (`rope_theta`/`rope_scaling`, and transformers 5's `rope_parameters`).
Must not know: weights, tensors, devices.
"""

from __future__ import annotations

from dataclasses import dataclass

from fastserve.config import ConfigError
from fastserve.model.config_fields import ModelConfig, Values, read_dtype

LLAMA_ARCHITECTURES = (
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "MixtralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "Qwen3MoeForCausalLM",
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
class ExpertsConfig:
    """The MLP of a sparse layer: `top_k` of `num_experts` gated MLPs for each token."""

    num_experts: int
    top_k: int
    intermediate_size: int
    is_normalized: bool  # the shares of the chosen add up to one
    sparse_layers: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class LlamaConfig(ModelConfig):
    """A decoder-only network of the Llama family."""

    intermediate_size: int
    rms_norm_eps: float
    rope: RopeConfig
    has_qkv_bias: bool
    has_output_bias: bool
    has_mlp_bias: bool
    has_qk_norm: bool
    experts: ExpertsConfig | None


def parse_llama(values: Values, source: str, architecture: str) -> LlamaConfig:
    """Turn the fields of a config.json into a LlamaConfig."""
    activation = values.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise ConfigError(f"{source}: hidden_act {activation!r} is not supported (only silu)")
    num_heads, hidden_size = int(values["num_attention_heads"]), int(values["hidden_size"])
    is_qwen2 = architecture == "Qwen2ForCausalLM"
    is_qwen3 = architecture in ("Qwen3ForCausalLM", "Qwen3MoeForCausalLM")
    is_mixtral = architecture == "MixtralForCausalLM"
    # Of the two Qwen3, only the dense one has a default of its own.
    has_default = architecture == "Qwen3ForCausalLM"
    default_head_dim = 128 if has_default else hidden_size // max(num_heads, 1)
    has_attention_bias = bool(values.get("attention_bias", False)) and not is_qwen2
    return LlamaConfig(
        architecture=architecture,
        vocab_size=int(values["vocab_size"]),
        hidden_size=hidden_size,
        intermediate_size=int(values["intermediate_size"]),
        num_layers=int(values["num_hidden_layers"]),
        num_heads=num_heads,
        num_kv_heads=int(values.get("num_key_value_heads") or num_heads),
        head_dim=int(values.get("head_dim") or default_head_dim),
        rms_norm_eps=float(values.get("rms_norm_eps", 1e-5 if is_mixtral else 1e-6)),
        max_position_embeddings=int(values.get("max_position_embeddings", 2048)),
        rope=_rope(values, source, 1e6 if is_mixtral else 10_000.0),
        tie_word_embeddings=bool(values.get("tie_word_embeddings", False)),
        has_qkv_bias=is_qwen2 or has_attention_bias,
        has_output_bias=has_attention_bias,
        has_mlp_bias=bool(values.get("mlp_bias", False)),
        has_qk_norm=is_qwen3,
        experts=_experts(values, source, architecture),
        sliding_window=_sliding_window(values, architecture),
        dtype=read_dtype(values, source),
    )


def check_llama(config: LlamaConfig, source: str) -> None:
    """Refuse shapes that do not fit together."""
    if config.num_heads % config.num_kv_heads:
        raise ConfigError(
            f"{source}: {config.num_heads} attention heads cannot share "
            f"{config.num_kv_heads} key-value heads"
        )
    if config.head_dim % 2:
        raise ConfigError(
            f"{source}: head_dim {config.head_dim} is odd; rotary pairs need an even one"
        )


def _rope(values: Values, source: str, default_theta: float) -> RopeConfig:
    parameters: Values = values.get("rope_parameters") or values.get("rope_scaling") or {}
    theta = parameters.get("rope_theta") or values.get("rope_theta") or default_theta
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind not in ("default", "linear", "llama3"):
        raise ConfigError(
            f"{source}: rope type {kind!r} is not supported (only default, linear, llama3)"
        )
    if float(parameters.get("partial_rotary_factor", 1.0)) != 1.0:
        raise ConfigError(f"{source}: partial_rotary_factor is not supported")
    return RopeConfig(
        theta=float(theta),
        kind=kind,
        factor=float(parameters.get("factor", 1.0)),
        low_freq_factor=float(parameters.get("low_freq_factor", 1.0)),
        high_freq_factor=float(parameters.get("high_freq_factor", 4.0)),
        original_max_position_embeddings=int(
            parameters.get("original_max_position_embeddings", 8192)
        ),
    )


def _experts(values: Values, source: str, architecture: str) -> ExpertsConfig | None:
    layers = range(int(values["num_hidden_layers"]))
    if architecture == "MixtralForCausalLM":
        experts = ExpertsConfig(
            num_experts=int(values.get("num_local_experts", 8)),
            top_k=int(values.get("num_experts_per_tok", 2)),
            intermediate_size=int(values["intermediate_size"]),
            is_normalized=True,
            sparse_layers=tuple(layers),
        )
    elif architecture == "Qwen3MoeForCausalLM":
        dense = frozenset(values.get("mlp_only_layers") or ())
        period = int(values.get("decoder_sparse_step", 1))
        if period < 1:
            raise ConfigError(f"{source}: decoder_sparse_step must be positive, got {period}")
        experts = ExpertsConfig(
            num_experts=int(values.get("num_experts") or values["num_local_experts"]),
            top_k=int(values.get("num_experts_per_tok", 8)),
            intermediate_size=int(values["moe_intermediate_size"]),
            is_normalized=bool(values.get("norm_topk_prob", False)),
            sparse_layers=tuple(i for i in layers if i not in dense and (i + 1) % period == 0),
        )
    else:
        return None
    if not 1 <= experts.top_k <= experts.num_experts:
        raise ConfigError(
            f"{source}: {experts.top_k} of {experts.num_experts} experts per token is not possible"
        )
    return experts


def _sliding_window(values: Values, architecture: str) -> int | None:
    window = values.get("sliding_window")
    is_qwen = architecture.startswith("Qwen")
    if window is None or (is_qwen and not values.get("use_sliding_window", False)):
        return None
    return int(window)
