"""LlamaConfig: the shape of a network of the Llama family, with or without experts.

Rules: a key counts only where transformers' class of the family reads it.
Must not know: weights, tensors, devices.
"""

from __future__ import annotations

from dataclasses import dataclass

from fastserve.checkpoint.config_fields import ModelConfig, Values, read_dtype, read_epsilon
from fastserve.checkpoint.config_rope import RopeConfig, read_rope
from fastserve.settings.option import ConfigError


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

    rms_norm_eps: float
    rope: RopeConfig
    has_qkv_bias: bool
    has_output_bias: bool
    has_mlp_bias: bool
    has_qk_norm: bool
    experts: ExpertsConfig | None

    @property
    def num_positions(self) -> int:
        """The positions that the network can tell apart."""
        return self.rope.num_positions(self.max_position_embeddings)

    @property
    def has_experts(self) -> bool:
        """Whether some layers send each token to a few of many MLPs."""
        return self.experts is not None

    @property
    def has_rotary_positions(self) -> bool:
        """All of the family turn pairs by angles."""
        return True


def parse_llama(values: Values, source: str, architecture: str) -> LlamaConfig:
    """Turn the fields of a config.json, defaults included, into a LlamaConfig."""
    activation = values["hidden_act"]
    if activation not in ("silu", "swish"):
        raise ConfigError(f"{source}: hidden_act {activation!r} is not supported (only silu)")
    num_heads, hidden_size = int(values["num_attention_heads"]), int(values["hidden_size"])
    num_kv_heads, head_dim = values["num_key_value_heads"], values["head_dim"]
    has_attention_bias = bool(values.get("attention_bias", False)) and architecture in (
        "LlamaForCausalLM",
        "Qwen3ForCausalLM",
        "Qwen3MoeForCausalLM",
    )
    return LlamaConfig(
        architecture=architecture,
        vocab_size=int(values["vocab_size"]),
        hidden_size=hidden_size,
        intermediate_size=int(values["intermediate_size"]),
        num_layers=int(values["num_hidden_layers"]),
        num_heads=num_heads,
        num_kv_heads=num_heads if num_kv_heads is None else int(num_kv_heads),
        head_dim=hidden_size // max(num_heads, 1) if head_dim is None else int(head_dim),
        rms_norm_eps=read_epsilon(values, "rms_norm_eps", source),
        max_position_embeddings=int(values["max_position_embeddings"]),
        rope=read_rope(values, source),
        tie_word_embeddings=bool(values["tie_word_embeddings"]),
        has_qkv_bias=architecture == "Qwen2ForCausalLM" or has_attention_bias,
        has_output_bias=has_attention_bias,
        has_mlp_bias=architecture == "LlamaForCausalLM" and bool(values["mlp_bias"]),
        has_qk_norm=architecture in ("Qwen3ForCausalLM", "Qwen3MoeForCausalLM"),
        experts=_experts(values, source, architecture),
        sliding_window=_sliding_window(values, source, architecture),
        dtype=read_dtype(values, source),
    )


def _experts(values: Values, source: str, architecture: str) -> ExpertsConfig | None:
    layers = range(int(values["num_hidden_layers"]))
    if architecture == "MixtralForCausalLM":
        experts = ExpertsConfig(
            num_experts=int(values["num_local_experts"]),
            top_k=int(values["num_experts_per_tok"]),
            intermediate_size=int(values["intermediate_size"]),
            is_normalized=True,
            sparse_layers=tuple(layers),
        )
    elif architecture == "Qwen3MoeForCausalLM":
        dense = frozenset(values["mlp_only_layers"] or ())
        period = int(values["decoder_sparse_step"])
        if period < 1:
            raise ConfigError(f"{source}: decoder_sparse_step must be positive, got {period}")
        experts = ExpertsConfig(
            num_experts=int(values["num_local_experts"]),
            top_k=int(values["num_experts_per_tok"]),
            intermediate_size=int(values["moe_intermediate_size"]),
            is_normalized=bool(values["norm_topk_prob"]),
            sparse_layers=tuple(i for i in layers if i not in dense and (i + 1) % period == 0),
        )
    else:
        return None
    if not 1 <= experts.top_k <= experts.num_experts:
        raise ConfigError(
            f"{source}: {experts.top_k} of {experts.num_experts} experts per token is not possible"
        )
    return experts


def _sliding_window(values: Values, source: str, architecture: str) -> int | None:
    """Return the window of the layers that have one; None where all layers see everything."""
    if architecture == "LlamaForCausalLM":
        return None
    window = values["sliding_window"] if values.get("use_sliding_window", True) else None
    if architecture in ("Qwen2ForCausalLM", "Qwen3ForCausalLM"):  # layers may differ
        kinds = values["layer_types"]
        slides = window is not None and values["max_window_layers"] < values["num_hidden_layers"]
        if kinds is not None:
            if unknown := set(kinds) - {"full_attention", "sliding_attention"}:
                raise ConfigError(f"{source}: layer_types: {min(unknown)!r} is not supported")
            slides = "sliding_attention" in kinds
        if not slides:
            return None
        if window is None:
            raise ConfigError(f"{source}: layer_types asks for a sliding_window, which is not set")
    if window is not None and int(window) < 1:
        raise ConfigError(f"{source}: sliding_window must be positive, got {window}")
    return None if window is None else int(window)
