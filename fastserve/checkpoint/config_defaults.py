"""What a config.json means by what it leaves out: the defaults of transformers' config classes.

Rules: every key that a parser reads stands here, for each family, with the value that transformers'
class gives it. An absent key is that value; null is a value of its own, and allowed only where the
class gives it a meaning. The simulator reads them too.
Must not know: what the keys mean, torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastserve.settings.option import ConfigError

_ROTARY: dict[str, Any] = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "rope_parameters": None,
    "rope_scaling": None,
    "rope_theta": 10_000.0,
    "partial_rotary_factor": 1.0,
    "head_dim": None,
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
}
_LLAMA: dict[str, Any] = {
    **_ROTARY,
    "vocab_size": 32000,
    "intermediate_size": 11008,
    "num_key_value_heads": None,
    "max_position_embeddings": 2048,
    "attention_bias": False,
    "mlp_bias": False,
    "eos_token_id": 2,
}
_MISTRAL: dict[str, Any] = {
    **_ROTARY,
    "vocab_size": 32000,
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131_072,
    "sliding_window": 4096,
    "eos_token_id": 2,
}
_MIXTRAL: dict[str, Any] = {
    **_MISTRAL,
    "sliding_window": None,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1_000_000.0,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
}
_QWEN: dict[str, Any] = {
    **_ROTARY,
    "vocab_size": 151_936,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "eos_token_id": None,
}
_QWEN2: dict[str, Any] = {
    **_QWEN,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_window_layers": 28,
    "layer_types": None,
}
_QWEN3: dict[str, Any] = {**_QWEN2, "head_dim": 128, "attention_bias": False}
_QWEN3_MOE: dict[str, Any] = {
    **_QWEN,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 24,
    "num_key_value_heads": 4,
    "attention_bias": False,
    "num_local_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "norm_topk_prob": False,
    "decoder_sparse_step": 1,
    "mlp_only_layers": None,
}
_OPT: dict[str, Any] = {
    "vocab_size": 50272,
    "hidden_size": 768,
    "ffn_dim": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 2048,
    "word_embed_proj_dim": None,
    "activation_function": "relu",
    "do_layer_norm_before": True,
    "_remove_final_layer_norm": False,
    "layer_norm_elementwise_affine": True,
    "enable_bias": True,
    "tie_word_embeddings": True,
    "eos_token_id": 2,
}
_GPT2: dict[str, Any] = {
    "vocab_size": 50257,
    "n_embd": 768,
    "n_layer": 12,
    "n_head": 12,
    "n_inner": None,
    "n_positions": 1024,
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
    "tie_word_embeddings": True,
    "eos_token_id": 50256,
}
DEFAULTS: dict[str, Mapping[str, Any]] = {
    "llama": _LLAMA,
    "mistral": _MISTRAL,
    "mixtral": _MIXTRAL,
    "qwen2": _QWEN2,
    "qwen3": _QWEN3,
    "qwen3_moe": _QWEN3_MOE,
    "opt": _OPT,
    "gpt2": _GPT2,
}
"""By model_type."""

ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "MixtralForCausalLM": "mixtral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Qwen3MoeForCausalLM": "qwen3_moe",
    "OPTForCausalLM": "opt",
    "GPT2LMHeadModel": "gpt2",
}
"""The model_type of each class that can be served."""

# Names that transformers' classes take for another (their attribute_map).
_ALIASES: dict[str, Mapping[str, str]] = {
    "gpt2": {
        "hidden_size": "n_embd",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "max_position_embeddings": "n_positions",
    },
    "mixtral": {"num_experts": "num_local_experts"},
    "qwen3_moe": {"num_experts": "num_local_experts"},
}
# null means as many as there are query heads, and no window, whatever an absent key means.
_NULLABLE = frozenset({"num_key_value_heads", "sliding_window", "eos_token_id"})


def with_defaults(values: Mapping[str, Any], model_type: str, source: str) -> dict[str, Any]:
    """Return the values of a config.json with the family's defaults for what it leaves out.

    Raises ConfigError for a null that has no meaning.
    """
    defaults = DEFAULTS[model_type]
    aliases = _ALIASES.get(model_type, {})
    named = {
        own: values[other]
        for other, own in aliases.items()
        if own not in values and values.get(other) is not None
    }
    for key, default in defaults.items():
        if values.get(key, default) is None and default is not None and key not in _NULLABLE:
            raise ConfigError(f"{source}: {key} is null, which means nothing there")
    return {**defaults, **values, **named}
