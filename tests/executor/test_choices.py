"""What the worker chooses where flags say `auto`, and the flags it refuses."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch

from fastserve.checkpoint.model_config import read_model_config
from fastserve.executor.choices import (
    choose_capture,
    choose_cpu_kernels,
    choose_dtype,
    choose_max_model_len,
)
from fastserve.launch.engine import open_engine
from fastserve.model.kernels.cpu import kernel_choice
from fastserve.model.kernels.cpu.native import BuildError, load_native
from fastserve.settings.engine import EngineConfig
from fastserve.settings.option import ConfigError
from tests.checkpoints import make_checkpoint
from tests.model.kernels.cpu.kernel_cases import needs_int8

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_dtype_auto_keeps_bfloat16_where_it_pays(tmp_path):
    """On a CPU by hidden size, and float32 of anything else; on CUDA always the checkpoint's."""
    make_checkpoint(tmp_path, "llama")
    config = read_model_config(tmp_path)
    small, large = (
        dataclasses.replace(config, dtype="bfloat16", hidden_size=size) for size in (256, 1024)
    )
    assert choose_dtype("auto", small, CPU) == torch.float32
    assert choose_dtype("auto", large, CPU) == torch.bfloat16
    assert choose_dtype("auto", small, CUDA) == torch.bfloat16
    half = dataclasses.replace(large, dtype="float16")
    assert choose_dtype("auto", half, CPU) == torch.float32
    assert choose_dtype("auto", dataclasses.replace(large, dtype="float32"), CPU) == torch.float32
    assert choose_dtype("float16", large, CPU) == torch.float16
    assert choose_dtype("half", large, CPU) == torch.float16
    assert choose_dtype("float", large, CPU) == torch.float32


def test_kernels_are_what_was_asked_for_or_refused():
    """Where there are none, plain torch is not taken for them."""
    kernels = choose_cpu_kernels("native", torch.float32, CPU)
    assert kernels is not None
    assert kernels.name == "native"
    with pytest.raises(ConfigError, match="--cpu-kernels native: there are none for float16"):
        choose_cpu_kernels("native", torch.float16, CPU)


@pytest.mark.parametrize("name", ["native", "torch"])
def test_kernels_for_a_cpu_are_refused_elsewhere(name):
    """On CUDA the flag would change nothing."""
    with pytest.raises(ConfigError, match=f"--cpu-kernels {name}: the device is cuda"):
        choose_cpu_kernels(name, torch.float32, CUDA)


def test_plain_torch_where_it_is_meant():
    """By name, for a dtype without kernels, and where there is no CPU."""
    assert choose_cpu_kernels("torch", torch.float16, CPU) is None
    assert choose_cpu_kernels("auto", torch.float16, CPU) is None
    assert choose_cpu_kernels("auto", torch.float32, CUDA) is None


def test_graphs_are_a_matter_of_cuda(tmp_path):
    """Elsewhere there are none, whether that was asked for or not."""
    make_checkpoint(tmp_path, "llama")
    config = read_model_config(tmp_path)
    assert not choose_capture(False, config, CPU)
    assert not choose_capture(True, config, CUDA)
    assert not choose_capture(True, config, CPU)


def test_what_asks_the_host_is_not_captured(tmp_path):
    """Experts are routed by the host, and so is attention where the kernels do not go."""
    pytest.importorskip("triton")
    make_checkpoint(tmp_path / "llama", "llama")
    make_checkpoint(tmp_path / "mixtral", "mixtral")
    config = read_model_config(tmp_path / "llama")
    assert choose_capture(False, config, CUDA)
    assert not choose_capture(False, read_model_config(tmp_path / "mixtral"), CUDA)
    assert not choose_capture(False, dataclasses.replace(config, head_dim=512), CUDA)


def test_a_sliding_window_bounds_the_context_and_says_so(tmp_path, caplog):
    """Beyond it, full attention would be another network: bounded by default, refused if asked."""
    make_checkpoint(tmp_path, "mistral", sliding_window=64)
    config = read_model_config(tmp_path)
    assert choose_max_model_len(None, config) == 64
    assert "sliding window of 64 tokens (of 256)" in caplog.text
    assert choose_max_model_len(32, config) == 32
    with pytest.raises(ConfigError, match=r"65 is too long: .* sliding window of 64 tokens"):
        choose_max_model_len(65, config)


def test_a_stretched_window_may_be_asked_for(tmp_path):
    """Linear scaling by four makes four times the positions."""
    rope = {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0}
    make_checkpoint(tmp_path, "llama-linear-rope", rope_parameters=rope)
    config = read_model_config(tmp_path)
    assert choose_max_model_len(1024, config) == choose_max_model_len(None, config) == 1024
    with pytest.raises(ConfigError, match="1025 is too long: the model's window is 1024"):
        choose_max_model_len(1025, config)


@needs_int8
def test_weights_of_int8_are_multiplied_as_bfloat16(tmp_path):
    """Whatever the checkpoint's dtype and size, by kernels that compute every product."""
    make_checkpoint(tmp_path, "llama")
    config = read_model_config(tmp_path)
    for name in ("auto", "bfloat16"):
        assert choose_dtype(name, config, CPU, "int8") == torch.bfloat16
    for name in ("auto", "native"):
        kernels = choose_cpu_kernels(name, torch.bfloat16, CPU, "int8")
        assert kernels is not None
        assert kernels.max_rows == math.inf


@pytest.mark.parametrize("name", ["float32", "float", "float16", "half"])
def test_weights_of_int8_are_refused_in_another_dtype(name, tmp_path):
    """The flag names what it computes in."""
    make_checkpoint(tmp_path, "llama")
    with pytest.raises(
        ConfigError, match=f"--quantization int8: .* bfloat16, not in --dtype {name}$"
    ):
        choose_dtype(name, read_model_config(tmp_path), CPU, "int8")


@pytest.mark.parametrize(
    ("name", "device", "reason"),
    [("auto", CUDA, "the device is cuda"), ("torch", CPU, "needs compiled kernels, not --cpu-k")],
)
def test_weights_of_int8_are_refused_without_kernels(name, device, reason):
    """On another device, and where plain torch is asked for."""
    with pytest.raises(ConfigError, match=f"--quantization int8: {reason}"):
        choose_cpu_kernels(name, torch.bfloat16, device, "int8")


def test_weights_of_int8_are_refused_where_there_is_no_compiler(monkeypatch):
    """`auto` does not fall back to plain torch then."""

    def fail():
        raise BuildError("no C++ compiler")

    monkeypatch.setattr(kernel_choice, "load_native", fail)
    with pytest.raises(ConfigError, match=r"--quantization int8: .* no C\+\+ compiler$"):
        choose_cpu_kernels("auto", torch.bfloat16, CPU, "int8")


def test_weights_of_int8_are_refused_on_other_processors(monkeypatch):
    """Where an instruction adds up one product, and not two of bfloat16."""
    library = load_native()
    monkeypatch.setattr(library, "per_lane_bfloat16", lambda: 1)
    monkeypatch.setattr(kernel_choice, "load_native", lambda: library)
    with pytest.raises(ConfigError, match="--quantization int8: this processor has no AVX-512"):
        choose_cpu_kernels("auto", torch.bfloat16, CPU, "int8")


def test_weights_that_are_quantized_already_are_refused(tmp_path):
    """As without the flag: they are not read."""
    make_checkpoint(tmp_path, "llama")
    path = tmp_path / "config.json"
    values = json.loads(path.read_text()) | {"quantization_config": {"quant_method": "gptq"}}
    path.write_text(json.dumps(values))
    config = EngineConfig(model=str(tmp_path), quantization="int8", num_threads=1)
    with pytest.raises(ConfigError, match=r"quantized weights \(gptq\) are not supported$"):
        open_engine(config)
