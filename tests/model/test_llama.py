"""Logits of every architecture against transformers', in float32, to 1e-4."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastserve.model.attention import PagedKV, ReferenceAttention
from fastserve.model.config import read_model_config
from fastserve.model.input_batch import build_input_batch
from fastserve.model.layers import RMSNorm
from fastserve.model.llama import LlamaModel
from fastserve.model.loader import open_weights
from fastserve.model.rotary import Rotary
from fastserve.model.torch_ops import TorchOps
from tests.checkpoints import ARCHITECTURES, VOCAB_SIZE, make_checkpoint, write_old_dialect

CPU = torch.device("cpu")
BLOCK_SIZE = 8
NUM_TOKENS = 150


class ReferenceOps(TorchOps):
    """Plain parts over the definition of attention."""

    def attention(self, *, num_heads, num_kv_heads, head_dim):
        """Fit `Ops`."""
        return ReferenceAttention(num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim)


@torch.inference_mode()
def logits_in_chunks(path, ids, cuts, *, is_reference=False):
    """Run a sequence in chunks that end at `cuts`, over scattered blocks; returns all logits."""
    config = read_model_config(path)
    weights = open_weights(path, "auto", torch.float32, CPU)
    ops = ReferenceOps(torch.float32) if is_reference else TorchOps(torch.float32)
    model = LlamaModel(config, weights, ops, max_len=200, device=CPU)
    num_blocks = -(-len(ids) // BLOCK_SIZE)
    shape = (3 * num_blocks, config.num_layers, 2, BLOCK_SIZE, config.num_kv_heads)
    kv = PagedKV(torch.zeros(*shape, config.head_dim))
    table = np.random.default_rng(0).permutation(3 * num_blocks)[:num_blocks]
    logits = []
    for start, stop in zip([0, *cuts], [*cuts, len(ids)], strict=True):
        batch = build_input_batch(
            token_ids=np.array(ids[start:stop]),
            starts=np.array([start]),
            counts=np.array([stop - start]),
            tables=table[None, : -(-stop // BLOCK_SIZE)],
            scored=None,
            block_size=BLOCK_SIZE,
            device=CPU,
        )
        logits.append(model(batch, kv))
    return torch.cat(logits)


@pytest.mark.parametrize("is_old", [False, True], ids=["new-dialect", "old-dialect"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logits_equal_transformers(name, is_old, tmp_path):
    """Whole, chunked, and token by token: the logits are those of transformers."""
    model = make_checkpoint(tmp_path, name)
    if is_old:
        write_old_dialect(tmp_path)
    ids = np.random.default_rng(1).integers(0, VOCAB_SIZE, NUM_TOKENS).tolist()
    with torch.inference_mode():
        expected = model(torch.tensor([ids])).logits[0]
    for cuts in ([], [37, 64, 65, 90], [100, *range(101, NUM_TOKENS)]):
        torch.testing.assert_close(
            logits_in_chunks(tmp_path, ids, cuts), expected, atol=1e-4, rtol=0
        )


def test_reference_attention_gives_the_same_logits(tmp_path):
    """The network over the reference attention agrees, so an error is in one of the two."""
    make_checkpoint(tmp_path, "llama3")
    ids = np.random.default_rng(2).integers(0, VOCAB_SIZE, 40).tolist()
    torch.testing.assert_close(
        logits_in_chunks(tmp_path, ids, [11, 30], is_reference=True),
        logits_in_chunks(tmp_path, ids, [11, 30]),
        atol=1e-5,
        rtol=1e-5,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm(dtype):
    """Both ways of normalizing equal the definition."""
    x = torch.randn(5, 32).to(dtype) * 3
    norm = RMSNorm(torch.rand(32).to(dtype), 1e-3)
    wide = x.double()
    expected = wide / (wide.square().mean(-1, keepdim=True) + 1e-3).sqrt() * norm.weight.double()
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(norm(x).double(), expected, atol=tolerance, rtol=tolerance)


def test_rotation_in_half_precision():
    """Half types rotate through float32: the result is the rounded exact one."""
    heads = torch.randn(4, 3, 8)
    rotations = torch.polar(torch.ones(4, 1, 4), torch.randn(4, 1, 4))
    half = heads.to(torch.bfloat16)
    exact = half.float().clone()
    Rotary.rotate_(exact, rotations)
    Rotary.rotate_(half, rotations)
    torch.testing.assert_close(half, exact.to(torch.bfloat16))
    assert not torch.allclose(exact, heads, atol=0.1)
