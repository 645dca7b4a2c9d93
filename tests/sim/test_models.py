"""Shapes read from config.json, against the networks that are built from the same file."""

from __future__ import annotations

import json

import pytest

from fastserve.checkpoint.config_defaults import ARCHITECTURES as MODEL_TYPES
from fastserve.checkpoint.model_config import parse_model_config, read_model_config
from fastserve.settings.option import ConfigError
from fastserve.sim.hardware import resolve_cost_model
from fastserve.sim.models import resolve_model, shape_of
from tests.checkpoints import ARCHITECTURES, make_checkpoint

MIXTRAL = {
    "model_type": "mixtral",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "vocab_size": 32000,
    "max_position_embeddings": 32768,
}


def parsed(values):
    """Return the shape that a config.json of these values gives."""
    return shape_of(parse_model_config(values, source="config.json"), name="x")


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if "moe" not in name])
def test_agrees_with_what_is_served(name, tmp_path):
    """The simulated shape is that of the network, and its weights are those of its matrices."""
    model = make_checkpoint(tmp_path, name)
    shape, config = resolve_model(str(tmp_path)), read_model_config(tmp_path)
    for field in ("num_layers", "hidden_size", "num_heads", "num_kv_heads", "head_dim"):
        assert getattr(shape, field) == getattr(config, field), field
    assert shape.vocab_size == config.vocab_size
    assert shape.max_model_len == config.max_model_len
    assert shape.is_tied == config.tie_word_embeddings
    if name == "opt-norm-last":  # its embeddings are narrower than its stream
        return
    matrices = {key: value for key, value in model.named_parameters() if value.ndim > 1}
    positions = [key for key in matrices if "embed_positions" in key or "wpe" in key]
    num_params = sum(value.numel() for key, value in matrices.items() if key not in positions)
    assert shape.num_params == num_params


@pytest.mark.parametrize("model_type", ["opt", "gpt2"])
def test_heads_are_tied_where_the_file_does_not_say(model_type, tmp_path):
    """Old files leave the key out, and the family's default is to tie."""
    make_checkpoint(tmp_path, model_type)
    file = tmp_path / "config.json"
    values = json.loads(file.read_text(encoding="utf-8"))
    del values["tie_word_embeddings"]
    file.write_text(json.dumps(values), encoding="utf-8")
    assert resolve_model(str(file)).is_tied
    assert read_model_config(tmp_path).tie_word_embeddings


def test_experts_are_read_by_the_step_and_computed_by_the_few(tmp_path):
    """Mixtral 8x7B reads 47 billion weights and computes with 13: published figures."""
    shape = parsed(MIXTRAL)
    assert shape.num_params / 1e9 == pytest.approx(46.7, rel=0.01)
    active = shape.num_layers * shape.active_layer_params + 2 * shape.head_params
    assert active / 1e9 == pytest.approx(12.9, rel=0.01)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(MIXTRAL), encoding="utf-8")
    sparse_cost = resolve_cost_model(str(path), "h200").cost_model
    dense = {
        **MIXTRAL,
        "num_local_experts": 1,
        "num_experts_per_tok": 1,
        "intermediate_size": 2 * 14336,
    }
    path.write_text(json.dumps(dense), encoding="utf-8")
    dense_cost = resolve_cost_model(str(path), "h200").cost_model
    # Two experts at a time cost a token what one network of twice the width costs it.
    assert sparse_cost.prefill_token_s == pytest.approx(dense_cost.prefill_token_s, rel=0.001)
    assert sparse_cost.floor_s > 3 * dense_cost.floor_s


def test_qwen3_moe(tmp_path):
    """The width of its experts is not that of its dense layers, which may not stand among them."""
    make_checkpoint(tmp_path, "qwen3-moe")
    with pytest.raises(ConfigError, match="layers without experts"):
        resolve_model(str(tmp_path))
    model = make_checkpoint(tmp_path, "qwen3-moe", mlp_only_layers=[])
    shape = resolve_model(str(tmp_path))
    assert (shape.intermediate_size, shape.num_experts, shape.num_experts_per_token) == (40, 6, 3)
    assert shape.num_params == sum(p.numel() for p in model.parameters() if p.ndim > 1)


def test_sliding_windows_bound_the_context():
    """As where the model is served: exact up to the window, which Qwen may name and not use."""
    mistral = {**MIXTRAL, "sliding_window": 4096}
    assert parsed(mistral).max_model_len == 4096
    qwen = {**mistral, "model_type": "qwen3_moe", "use_sliding_window": False}
    assert parsed(qwen).max_model_len == 32768
    # Qwen2 slides in the layers from `max_window_layers` on only, and here there are none.
    few = {"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 28}
    assert parsed({**few, "num_hidden_layers": 28}).max_model_len == 32768
    assert parsed({**few, "num_hidden_layers": 29}).max_model_len == 4096


@pytest.mark.parametrize("architecture", MODEL_TYPES)
@pytest.mark.parametrize("changes", [{}, {"head_dim": 96}, {"num_hidden_layers": 40}])
def test_the_facts_of_a_simulation_are_the_servers(architecture, changes):
    """Of every family, whatever the file leaves out: one reader serves both."""
    model_type = MODEL_TYPES[architecture]
    values = {"model_type": model_type, "architectures": [architecture], **changes}
    if model_type == "qwen3_moe":
        values["intermediate_size"] = values["moe_intermediate_size"] = 512
    shape, config = parsed(values), parse_model_config(values, source="x")
    for field in (
        "num_layers", "hidden_size", "num_heads", "num_kv_heads", "head_dim",
        "intermediate_size", "vocab_size", "max_model_len",
    ):  # fmt: skip
        assert getattr(shape, field) == getattr(config, field), field
    assert shape.is_tied == config.tie_word_embeddings
    assert (shape.num_experts > 1) == config.has_experts


def test_what_cannot_be_served_cannot_be_simulated():
    """Its cost would be a guess by other laws: the refusal is the server's."""
    with pytest.raises(ConfigError, match="architecture not supported: falcon"):
        parsed({"model_type": "falcon", "hidden_size": 64})
