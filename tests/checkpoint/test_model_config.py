"""config.json in both dialects, and what is refused in one line."""

from __future__ import annotations

import json
import math

import pytest

from fastserve.checkpoint.config_gpt2 import GPT2Config
from fastserve.checkpoint.config_llama import LlamaConfig
from fastserve.checkpoint.config_opt import OPTConfig
from fastserve.checkpoint.config_rope import RopeConfig
from fastserve.checkpoint.model_config import parse_model_config, read_model_config
from fastserve.settings.option import ConfigError

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def parse(**changes):
    """Parse the Llama config with changes; None drops a key."""
    values = {key: value for key, value in {**LLAMA, **changes}.items() if value is not None}
    config = parse_model_config(values, source="config.json")
    assert isinstance(config, LlamaConfig)
    return config


def test_defaults():
    """What a config leaves out takes the architecture's default."""
    config = parse()
    assert (config.head_dim, config.num_kv_heads, config.dtype) == (8, 2, "float32")
    assert config.rope == RopeConfig()
    assert not config.has_qkv_bias
    assert not config.has_qk_norm
    assert not config.tie_word_embeddings
    assert parse(num_key_value_heads=None).num_kv_heads == 8


def test_both_dialects_mean_the_same():
    """`rope_theta` and `rope_scaling` beside `torch_dtype` equal `rope_parameters` and `dtype`."""
    old = parse(rope_theta=5e5, rope_scaling=LLAMA3_ROPE, torch_dtype="bfloat16")
    new = parse(rope_parameters={**LLAMA3_ROPE, "rope_theta": 5e5}, dtype="bfloat16")
    assert old == new
    assert (old.rope.kind, old.rope.theta, old.rope.factor) == ("llama3", 5e5, 32.0)
    older = parse(rope_scaling={"type": "linear", "factor": 4.0})
    assert (older.rope.kind, older.rope.factor, older.rope.theta) == ("linear", 4.0, 10_000.0)


def test_biases_by_architecture():
    """Qwen2 has biases on query, key and value alone; a Llama with attention_bias on all four."""
    qwen = parse(architectures=["Qwen2ForCausalLM"])
    assert (qwen.has_qkv_bias, qwen.has_output_bias) == (True, False)
    llama = parse(attention_bias=True, mlp_bias=True)
    assert (llama.has_qkv_bias, llama.has_output_bias, llama.has_mlp_bias) == (True, True, True)
    qwen3 = parse(architectures=["Qwen3ForCausalLM"], head_dim=None)
    assert (qwen3.has_qk_norm, qwen3.head_dim) == (True, 128)


def test_sliding_window_limits_the_window():
    """Full attention is exact up to the sliding window; Qwen names one it does not use."""
    assert parse(architectures=["MistralForCausalLM"], sliding_window=200).max_model_len == 200
    qwen = parse(architectures=["Qwen2ForCausalLM"], sliding_window=8, use_sliding_window=False)
    assert qwen.max_model_len == 512


@pytest.mark.parametrize(
    ("changes", "window"),
    [
        ({}, 512),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, 2048),
        ({"rope_parameters": {"rope_type": "linear", "factor": 1.5, "rope_theta": 5e5}}, 768),
        ({"rope_scaling": {**LLAMA3_ROPE, "original_max_position_embeddings": 16}}, 512),
        ({"rope_scaling": {"type": "default"}}, 512),
        (
            {
                "architectures": ["MistralForCausalLM"],
                "rope_scaling": {"type": "linear", "factor": 4.0},
                "sliding_window": 700,
            },
            700,
        ),
    ],
)
def test_linear_scaling_stretches_the_window(changes, window):
    """max_position_embeddings is the window before it; llama3's is given stretched."""
    assert parse(**changes).max_model_len == window


def test_of_two_dialects_in_one_file_rope_scaling_counts():
    """As in transformers, where the new one stands beside it."""
    linear = {"type": "linear", "factor": 4.0}
    both = parse(rope_scaling=linear, rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    assert both == parse(rope_scaling=linear)


def test_llama3_without_its_first_window():
    """It is then max_position_embeddings, as transformers has it."""
    rope = {k: v for k, v in LLAMA3_ROPE.items() if k != "original_max_position_embeddings"}
    assert parse(rope_scaling=rope).rope.original_max_position_embeddings == 512


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_scaling": {"type": "linear"}}, "rope type 'linear' without factor"),
        ({"rope_scaling": {"type": "linear", "factor": 0.5}}, "at least 1, got 0.5"),
        ({"rope_scaling": {"type": "llama3", "factor": 8.0}}, "'llama3' without low_freq_factor"),
        ({"rope_scaling": {"type": "linear", "factor": math.nan}}, "factor must be a number"),
        ({"rope_theta": 0}, "rope_theta must be a number of at least 1, got 0"),
        ({"rope_theta": -1.0}, "rope_theta must be"),
        ({"rope_theta": math.nan}, "rope_theta must be"),
        ({"rope_theta": math.inf}, "rope_theta must be"),
        ({"rope_theta": "1e4"}, "rope_theta must be"),
        ({"rms_norm_eps": math.nan}, "at least 0 and less than 1, got nan"),
        ({"rms_norm_eps": -1e-6}, "rms_norm_eps must be"),
        ({"rms_norm_eps": math.inf}, "rms_norm_eps must be"),
        ({"rms_norm_eps": True}, "rms_norm_eps must be"),
        ({"max_position_embeddings": 10**12}, "a window of 1000000000000 tokens"),
        ({"max_position_embeddings": 10**400}, "a window of"),
        ({"max_position_embeddings": math.inf}, "infinity"),
        ({"max_position_embeddings": True}, "a window of 1 tokens"),
        ({"intermediate_size": 0}, "intermediate_size must be positive"),
        ({"rope_scaling": "linear"}, "rope_scaling must be an object, got 'linear'"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 5.0}}}, "for each kind of layer"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"architectures": ["T5Model"]}, "architecture not supported: T5Model"),
        ({"architectures": None}, "none named"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantized weights"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope type 'yarn'"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"architectures": "LlamaForCausalLM"}, "architectures must be a list"),
        ({"architectures": None, "model_type": ["llama"]}, r"not supported: \['llama'\]"),
        ({"hidden_size": "wide"}, "invalid literal"),
        ({"max_position_embeddings": 0}, "max_position_embeddings must be positive, got 0"),
        ({"head_dim": 0}, "head_dim must be positive, got 0"),
        ({"dtype": "float8"}, "dtype 'float8'"),
        ({"num_key_value_heads": 3}, "cannot share"),
        ({"head_dim": 7}, "odd"),
        ({"num_attention_heads": 0}, "must be positive"),
    ],
)
def test_refused(changes, message):
    """What cannot be computed exactly is a ConfigError that names it, on one line."""
    with pytest.raises(ConfigError, match=message) as caught:
        parse(**changes)
    assert "\n" not in str(caught.value)


OPT = {
    "architectures": ["OPTForCausalLM"],
    "vocab_size": 100,
    "hidden_size": 64,
    "ffn_dim": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "max_position_embeddings": 512,
}
GPT2 = {
    "architectures": ["GPT2LMHeadModel"],
    "vocab_size": 100,
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 8,
    "n_positions": 512,
}
MIXTRAL = {**LLAMA, "architectures": ["MixtralForCausalLM"]}
QWEN3_MOE = {
    **LLAMA,
    "architectures": ["Qwen3MoeForCausalLM"],
    "num_hidden_layers": 6,
    "num_experts": 16,
    "moe_intermediate_size": 32,
}


def read(values, family, **changes):
    """Parse a config, which must be of the family."""
    config = parse_model_config({**values, **changes}, source="config.json")
    assert isinstance(config, family)
    return config


def test_defaults_of_opt():
    """Files of OPT say little; opt-350m's differ in two keys."""
    config = read(OPT, OPTConfig)
    assert (config.num_kv_heads, config.head_dim, config.max_model_len) == (8, 8, 512)
    assert (config.embedding_size, config.activation) == (64, "relu")
    assert config.tie_word_embeddings
    assert config.has_bias
    assert config.has_norm_weights
    assert config.has_final_norm
    last = read(OPT, OPTConfig, do_layer_norm_before=False, word_embed_proj_dim=32)
    assert (last.is_norm_first, last.has_final_norm, last.embedding_size) == (False, False, 32)
    assert not read(OPT, OPTConfig, _remove_final_layer_norm=True).has_final_norm


def test_defaults_of_gpt2():
    """Files of GPT-2 leave out the width of the MLP, or say null."""
    for config in (read(GPT2, GPT2Config), read(GPT2, GPT2Config, n_inner=None)):
        assert (config.intermediate_size, config.activation) == (256, "gelu_tanh")
        assert (config.layer_norm_eps, config.max_model_len) == (1e-5, 512)
        assert config.tie_word_embeddings


def test_experts():
    """Both families' words for the same, and which layers have experts."""
    mixtral = read(MIXTRAL, LlamaConfig).experts
    assert mixtral is not None
    assert (mixtral.num_experts, mixtral.top_k, mixtral.intermediate_size) == (8, 2, 128)
    assert mixtral.is_normalized
    assert mixtral.sparse_layers == (0, 1)
    qwen = read(QWEN3_MOE, LlamaConfig, decoder_sparse_step=2, mlp_only_layers=[3]).experts
    assert qwen is not None
    assert (qwen.num_experts, qwen.top_k, qwen.intermediate_size) == (16, 8, 32)
    assert not qwen.is_normalized
    assert qwen.sparse_layers == (1, 5)
    renamed = {key: value for key, value in QWEN3_MOE.items() if key != "num_experts"}
    assert read(renamed, LlamaConfig, num_local_experts=16) == read(QWEN3_MOE, LlamaConfig)
    assert read(LLAMA, LlamaConfig).experts is None


@pytest.mark.parametrize(
    ("values", "changes", "message"),
    [
        (OPT, {"activation_function": "prelu"}, "activation_function 'prelu'"),
        (OPT, {"num_attention_heads": 7}, "cannot be divided among 7 heads"),
        (OPT, {"num_attention_heads": 0}, "cannot be divided among 0 heads"),
        (OPT, {"ffn_dim": None}, "ffn_dim is null"),
        (GPT2, {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx True"),
        (GPT2, {"scale_attn_weights": False}, "scale_attn_weights False"),
        (GPT2, {"add_cross_attention": True}, "add_cross_attention True"),
        (GPT2, {"quantization_config": {"bits": 4}}, "quantized weights"),
        (MIXTRAL, {"num_experts_per_tok": 9}, "9 of 8 experts"),
        (QWEN3_MOE, {"decoder_sparse_step": 0}, "decoder_sparse_step must be positive"),
    ],
)
def test_refused_of_other_families(values, changes, message):
    """The same for OPT, GPT-2 and networks with experts."""
    with pytest.raises(ConfigError, match=message) as caught:
        parse_model_config({**values, **changes}, source="config.json")
    assert "\n" not in str(caught.value)


def test_files_that_cannot_be_read(tmp_path):
    """A missing, broken or strange config.json is a ConfigError too."""
    with pytest.raises(ConfigError, match=r"no config\.json"):
        read_model_config(tmp_path)
    file = tmp_path / "config.json"
    file.write_text("{", encoding="utf-8")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_model_config(tmp_path)
    file.write_text("[]", encoding="utf-8")
    with pytest.raises(ConfigError, match="JSON object"):
        read_model_config(tmp_path)
    file.write_text(json.dumps(LLAMA), encoding="utf-8")
    assert read_model_config(tmp_path).num_layers == 2
