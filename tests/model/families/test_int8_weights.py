"""Logits with weights of int8 against transformers', which is given the weights that are kept."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from fastserve.checkpoint.model_config import read_model_config
from fastserve.model.families.architectures import load_network
from fastserve.model.loader import open_weights
from fastserve.model.ops.cpu_ops import CpuOps
from fastserve.model.ops.int8_linear import quantize
from fastserve.model.ops.torch_ops import TorchOps
from tests.bitwise import CPU, NUM_TOKENS, Case, compute, load
from tests.checkpoints import VOCAB_SIZE, make_checkpoint
from tests.model.kernels.cpu.kernel_cases import needs_int8, own_products

FAMILIES = ("llama", "llama3", "qwen3", "opt", "gpt2")
CASE = Case(chunk=64, batch_size=3, place=1)


def keep_int8(model, dtype):
    """Replace the weights of all products by what is kept of them, and the rest by `dtype`."""

    def keep(weight):
        numbers, scales = quantize(weight.to(dtype))
        weight.copy_(numbers * scales[:, None])

    for parameter in model.parameters():
        parameter.copy_(parameter.to(dtype))
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.clone())  # no longer the embedding's
    for module in model.modules():
        if isinstance(module, nn.Linear):
            keep(module.weight)
        elif isinstance(module, Conv1D):
            keep(module.weight.T)
    for parameter in model.parameters():
        if parameter.ndim == 3:  # experts; their router is not quantized
            keep(parameter.flatten(0, 1))


@torch.inference_mode()
def expected_logits(model, dtype):
    """Return transformers' logits for the prompt of `compute`."""
    keep_int8(model, dtype)
    ids = np.random.default_rng(0).integers(0, VOCAB_SIZE, NUM_TOKENS)
    return model(torch.tensor(ids)[None]).logits[0]


@pytest.mark.parametrize("name", FAMILIES)
def test_float32_logits_are_the_reference_s(name, tmp_path):
    """Where nothing else is rounded they are equal: the head is quantized, embeddings are not.

    Without experts: their router would be quantized too, of whose dtype all weights are here.
    """
    model = make_checkpoint(tmp_path, name)
    ops = CpuOps(own_products(torch.float32), TorchOps(torch.float32), has_int8_weights=True)
    weights = open_weights(tmp_path, "auto", torch.float32, CPU)
    config = read_model_config(tmp_path)
    network = load_network(config, weights, ops, max_len=NUM_TOKENS, device=CPU)
    with torch.inference_mode():
        logits, _ = compute(network, CASE)
    exact = expected_logits(model, torch.float32)
    torch.testing.assert_close(logits, exact, atol=1e-4, rtol=0)


@needs_int8
@pytest.mark.parametrize("name", [*FAMILIES, "mixtral"])
def test_logits_come_near(name, tmp_path):
    """As served, in bfloat16: as near as bfloat16 is without quantization."""
    small = {"init_std" if "opt" in name else "initializer_range": 0.05}
    model = make_checkpoint(tmp_path, name, **small)
    network = load(tmp_path, torch.bfloat16, kernels="auto", quantization="int8")
    with torch.inference_mode():
        logits, _ = compute(network, CASE)
    exact = expected_logits(model, torch.bfloat16)
    error = (logits - exact).square().mean().sqrt() / exact.square().mean().sqrt()
    assert 0 < error < 0.04
