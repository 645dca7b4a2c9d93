"""Shards made of CUDA's parts: kernels that see fewer heads; in Triton's interpreter on a CPU."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from fastserve.model.ops.cuda_ops import CudaOps
from fastserve.model.ops.torch_ops import TorchOps
from fastserve.model.parallel import ALONE
from tests import triton_device
from tests.model.sharded import make_wide_checkpoint, run, run_sharded

DEVICE = triton_device.device()


@pytest.mark.parametrize(
    ("name", "size"), [("llama3", 2), pytest.param("qwen3", 4, marks=pytest.mark.slow)]
)
def test_shards_of_cuda_ops(name, size, tmp_path):
    """Norms of heads, groups of queries and shared keys: the logits of one rank in plain torch."""
    make_wide_checkpoint(tmp_path, name, num_hidden_layers=1)
    plain = TorchOps(torch.float32)
    whole = run(tmp_path, ALONE, plain)
    make_ops = partial(CudaOps, torch.float32, plain)
    ranks = run_sharded(size, tmp_path, make_ops, device=DEVICE, cuts=(20, 42, 43))
    torch.testing.assert_close(ranks[0].logits, whole.logits, atol=1e-3, rtol=0)
