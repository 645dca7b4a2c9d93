"""What the worker chooses where flags say `auto`, and the flags it refuses."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from fastserve.config import ConfigError
from fastserve.executor.choices import choose_capture, choose_cpu_kernels, choose_dtype
from fastserve.model.config import read_model_config
from tests.checkpoints import make_checkpoint

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


@pytest.mark.parametrize("name", ["native", "numba"])
def test_kernels_are_what_was_asked_for_or_refused(name):
    """Where there are none of that kind, plain torch is not taken for them."""
    kernels = choose_cpu_kernels(name, torch.float32, CPU)
    assert kernels is not None
    assert kernels.name == name
    with pytest.raises(ConfigError, match=f"--cpu-kernels {name}: there are none for float16"):
        choose_cpu_kernels(name, torch.float16, CPU)


@pytest.mark.parametrize("name", ["native", "numba", "torch"])
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
    """Elsewhere there are none, and doing without is no choice."""
    make_checkpoint(tmp_path, "llama")
    config = read_model_config(tmp_path)
    assert not choose_capture(False, config, CPU)
    assert not choose_capture(True, config, CUDA)
    with pytest.raises(ConfigError, match=r"--enforce-eager: .* the device is cpu"):
        choose_capture(True, config, CPU)
