"""Absent keys and nulls of a config.json: they mean what transformers' class makes of them."""

from __future__ import annotations

import pytest
import transformers

from fastserve.checkpoint.config_defaults import ARCHITECTURES, DEFAULTS
from fastserve.checkpoint.model_config import parse_model_config
from fastserve.settings.option import ConfigError

CLASSES = {
    "llama": transformers.LlamaConfig,
    "mistral": transformers.MistralConfig,
    "mixtral": transformers.MixtralConfig,
    "qwen2": transformers.Qwen2Config,
    "qwen3": transformers.Qwen3Config,
    "qwen3_moe": transformers.Qwen3MoeConfig,
    "opt": transformers.OPTConfig,
    "gpt2": transformers.GPT2Config,
}
# Values that differ from every default, so that an ignored key shows.
SHAPE = {
    "vocab_size": 320,
    "hidden_size": 128,
    "intermediate_size": 96,
    "num_hidden_layers": 30,
    "num_attention_heads": 64,
    "num_key_value_heads": 2,
    "max_position_embeddings": 9000,
    "rms_norm_eps": 1e-3,
    "head_dim": 24,
    "rope_theta": 500.0,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
}
EXPERTS = {"num_experts_per_tok": 3, "num_local_experts": 10}
QWEN = {**SHAPE, "use_sliding_window": True, "sliding_window": 700, "max_window_layers": 2}
VALUES = {
    "llama": {**SHAPE, "attention_bias": True, "mlp_bias": True},
    "mistral": {**SHAPE, "sliding_window": 700},
    "mixtral": {**SHAPE, **EXPERTS, "sliding_window": 700},
    "qwen2": QWEN,
    "qwen3": {**QWEN, "attention_bias": True},
    "qwen3_moe": {
        **QWEN,
        **EXPERTS,
        "attention_bias": True,
        "moe_intermediate_size": 40,
        "norm_topk_prob": True,
        "decoder_sparse_step": 2,
        "mlp_only_layers": [1],
    },
    "opt": {
        "vocab_size": 320,
        "hidden_size": 48,
        "ffn_dim": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 900,
        "word_embed_proj_dim": 32,
        "activation_function": "gelu",
        "enable_bias": False,
        "layer_norm_elementwise_affine": False,
        "tie_word_embeddings": False,
    },
    "gpt2": {
        "vocab_size": 320,
        "n_embd": 48,
        "n_layer": 3,
        "n_head": 4,
        "n_inner": 96,
        "n_positions": 900,
        "activation_function": "relu",
        "layer_norm_epsilon": 1e-3,
        "tie_word_embeddings": False,
    },
}
NETWORK_KEYS = {
    family: [key for key in defaults if key not in ("eos_token_id", "partial_rotary_factor")]
    for family, defaults in DEFAULTS.items()
}
CASES = [(family, key) for family, keys in NETWORK_KEYS.items() for key in keys]
# transformers 4 gives these nulls a meaning that transformers 5 no longer lets them have.
OLD_NULLS = {(family, "num_key_value_heads") for family in ("mistral", "mixtral", "qwen3_moe")}


def parse(family, values):
    """Parse a config.json of the family, which need not name an architecture."""
    return parse_model_config({**values, "model_type": family}, source="config.json")


def written_out(family, values):
    """Return the config.json that transformers writes for what it read: all keys explicit."""
    values = CLASSES[family].from_dict(dict(values)).to_dict()
    if family in ("mixtral", "qwen2", "qwen3_moe") and values.get("head_dim", 0) is None:
        del values["head_dim"]  # the network derives it
    return values


@pytest.mark.parametrize("family", DEFAULTS)
def test_the_table_is_that_of_the_classes(family):
    """Every default that stands in the table is the one of transformers' class."""
    own = CLASSES[family]()
    rope = getattr(own, "rope_parameters", None) or {}
    for key, default in DEFAULTS[family].items():
        if key in ("rope_parameters", "rope_scaling", "partial_rotary_factor"):
            continue  # transformers keeps one of the dialects in memory
        theirs = rope["rope_theta"] if key == "rope_theta" else getattr(own, key, None)
        if default is None and key != "eos_token_id" and key != "sliding_window":
            continue  # derived from other keys as soon as the class is made
        if key == "sliding_window" and family.startswith("qwen"):
            theirs = CLASSES[family](use_sliding_window=True).sliding_window
        assert default == theirs, key


@pytest.mark.parametrize(("family", "key"), CASES)
def test_an_absent_key_is_the_default_of_the_class(family, key):
    """The same ModelConfig as of the file where transformers has written its default out."""
    values = {name: value for name, value in VALUES[family].items() if name != key}
    if key in ("hidden_size", "num_attention_heads", "n_embd", "n_head"):
        values["word_embed_proj_dim"] = None
    assert parse(family, values) == parse(family, written_out(family, values))


@pytest.mark.parametrize(("family", "key"), CASES)
def test_null_is_what_the_class_makes_of_it(family, key):
    """Another case than an absent key: no window, as many heads; or refused, as there."""
    values = {**VALUES[family], key: None}
    if (family, key) in OLD_NULLS:
        expected = {**VALUES[family], key: values["num_attention_heads"]}
        assert parse(family, values) == parse(family, expected)
        return
    try:
        expected = written_out(family, values)
        assert key not in ("rope_theta", "num_local_experts")  # the network cannot be built
    except Exception:  # a class of huggingface_hub's
        with pytest.raises(ConfigError, match=f"{key} is null"):
            parse(family, values)
        return
    assert parse(family, values) == parse(family, expected)


@pytest.mark.parametrize("family", DEFAULTS)
def test_a_config_that_says_nothing(family):
    """It is the class as it comes."""
    assert parse(family, {}) == parse(family, written_out(family, {}))


@pytest.mark.parametrize(
    ("family", "changes", "window"),
    [
        ("mistral", {}, 4096),
        ("mistral", {"sliding_window": None}, 9000),
        ("mistral", {"sliding_window": 700}, 700),
        ("mixtral", {}, 9000),
        ("mixtral", {"sliding_window": 700}, 700),
        ("llama", {"sliding_window": 700}, 9000),
        ("qwen2", {"sliding_window": 700}, 9000),
        ("qwen2", {"use_sliding_window": True}, 4096),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": 30}, 9000),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": 29}, 4096),
        ("qwen2", {"use_sliding_window": True, "sliding_window": None}, 9000),
        ("qwen2", {"use_sliding_window": True, "layer_types": ["full_attention"] * 30}, 9000),
        (
            "qwen3",
            {"use_sliding_window": True, "layer_types": ["sliding_attention"] * 30},
            4096,
        ),
        ("qwen3_moe", {"use_sliding_window": True}, 4096),
        ("qwen3_moe", {"use_sliding_window": True, "max_window_layers": 30}, 4096),
        ("qwen3_moe", {"sliding_window": 700}, 9000),
    ],
)
def test_the_window_is_bounded_where_attention_slides(family, changes, window):
    """Full attention is exact up to the sliding window, and not beyond."""
    values = {**SHAPE, **changes}
    assert parse(family, values).max_model_len == window
    assert parse(family, written_out(family, values)).max_model_len == window


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("mistral", {"sliding_window": 0}, "sliding_window must be positive, got 0"),
        ("qwen2", {"layer_types": ["sliding_attention"]}, "sliding_window, which is not set"),
        ("qwen2", {"layer_types": ["chunked_attention"]}, "'chunked_attention' is not supported"),
    ],
)
def test_windows_that_cannot_be_honoured(family, changes, message):
    """They are refused, not taken for none."""
    with pytest.raises(ConfigError, match=message):
        parse(family, {**SHAPE, **changes})


def test_names_that_transformers_takes_for_others():
    """GPT-2 by the words of other families, and both names of the number of experts."""
    own = VALUES["gpt2"]
    names = {
        "n_embd": "hidden_size",
        "n_layer": "num_hidden_layers",
        "n_head": "num_attention_heads",
        "n_positions": "max_position_embeddings",
    }
    other = {names.get(key, key): value for key, value in own.items()}
    assert parse("gpt2", other) == parse("gpt2", own) == parse("gpt2", written_out("gpt2", other))
    for family in ("mixtral", "qwen3_moe"):
        own = VALUES[family]
        other = {key: value for key, value in own.items() if key != "num_local_experts"}
        assert parse(family, {**other, "num_experts": 10}) == parse(family, own)


@pytest.mark.parametrize(("name", "family"), ARCHITECTURES.items())
def test_an_architecture_is_known_by_its_model_type(name, family):
    """Where `architectures` is absent or empty."""
    assert parse(family, VALUES[family]).architecture == name
    for nothing in (None, ""):
        values = {**VALUES[family], "architectures": nothing}
        assert parse(family, values).architecture == name
