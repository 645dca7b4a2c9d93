"""Checks of the CUDA path that need no test runner: kernels and graphs against plain torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.gpu_network import Capture, build_network, decode_batch, make_graphs, make_kv
from fastserve.model.attention.interfaces import PagedKV, ReferenceAttention
from fastserve.model.attention.shape import AttentionShape
from fastserve.model.attention.triton import FIXED_SPLIT_TOKENS, TritonAttention
from fastserve.model.input_batch import InputBatch, build_input_batch, order_rows
from fastserve.model.ops.cuda_ops import CudaOps
from fastserve.model.ops.torch_ops import TorchOps
from fastserve.model.staged_batch import stage

TOLERANCE = {torch.float32: 2e-4, torch.float16: 5e-3, torch.bfloat16: 4e-2}
SHAPES = ((32, 8, 128), (40, 40, 128), (8, 1, 80), (4, 4, 256), (6, 2, 64))
SHARES = [(1, 0), (1, 700), (1, 129), (70, 0), (33, 200)]
"""(num_tokens, start) of each row: decodes and chunks, of one tile and of several."""

NUM_BLOCKS = 96
TINY = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "torch_dtype": "float32",
    "tie_word_embeddings": False,
}


def run(device: torch.device, capture: Capture | None = None) -> list[dict[str, Any]]:
    """Run every check; one that raises has failed."""
    results = []
    for name, check in all_checks(device, capture):
        try:
            is_ok, detail = check()
        except Exception as error:
            is_ok, detail = False, repr(error)
        results.append({"name": name, "ok": is_ok, "detail": detail})
    return results


def all_checks(
    device: torch.device, capture: Capture | None
) -> Iterator[tuple[str, Callable[[], tuple[bool, str]]]]:
    """Yield each check by name."""
    for heads, kv_heads, head_dim in SHAPES:
        for dtype in TOLERANCE:
            for split in (None, FIXED_SPLIT_TOKENS):
                shape = f"{heads}/{kv_heads} x {head_dim}, {dtype}, fixed split {split}"
                check = partial(check_attention, device, heads, kv_heads, head_dim, dtype, split)
                yield f"attention {shape}", check
    yield "norms and gates", partial(check_rowwise, device)
    yield "network: kernels against plain torch", partial(check_network, device)
    yield "graphs against eager", partial(check_graphs, device, capture)


def make_batch(shares: list[tuple[int, int]], num_blocks: int, block_size: int) -> InputBatch:
    """Build a batch of (num_tokens, start) on randomly placed blocks."""
    starts = np.array([start for _, start in shares])
    counts = np.array([count for count, _ in shares])
    order = order_rows(starts, counts)
    starts, counts = starts[order], counts[order]
    used = -(-(starts + counts) // block_size)
    blocks = np.random.default_rng(0).permutation(num_blocks)
    tables = np.zeros((len(shares), int(used.max())), np.int64)
    first = np.cumsum(used) - used
    for row, count in enumerate(used):
        tables[row, :count] = blocks[first[row] : first[row] + count]
    return build_input_batch(
        token_ids=np.arange(int(counts.sum())) % 500,
        starts=starts,
        counts=counts,
        tables=tables,
        scored=None,
        block_size=block_size,
        device=torch.device("cpu"),
    )


def check_attention(
    device: torch.device,
    heads: int,
    kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    split: int | None,
) -> tuple[bool, str]:
    """Compare values and KV of decodes and chunks with the reference."""
    torch.manual_seed(0)
    tensor = torch.randn(NUM_BLOCKS, 1, 2, 16, kv_heads, head_dim, dtype=dtype)
    num_tokens = sum(count for count, _ in SHARES)
    qkv = torch.randn(num_tokens, heads + 2 * kv_heads, head_dim, dtype=dtype)
    angles = torch.randn(num_tokens, 1, head_dim // 2)
    rotations = torch.polar(torch.ones_like(angles), angles)
    batch = make_batch(SHARES, NUM_BLOCKS, 16)
    shape = AttentionShape.scaled_by_dim(heads, kv_heads, head_dim)
    expected_kv, kv = PagedKV(tensor.clone()), PagedKV(tensor.to(device))
    expected = ReferenceAttention(shape).plan(batch)(qkv.clone(), rotations, expected_kv.layers[0])
    mixed = TritonAttention(shape, dtype, split_tokens=split).plan(stage(batch, device))(
        qkv.to(device), rotations.to(device), kv.layers[0]
    )
    return within(TOLERANCE[dtype], (mixed, expected), (kv.tensor, expected_kv.tensor))


def check_rowwise(device: torch.device) -> tuple[bool, str]:
    """Compare a norm and a gated MLP with the plain layers, in bfloat16."""
    torch.manual_seed(0)
    dtype = torch.bfloat16
    x, weight = torch.randn(7, 4096).to(dtype), torch.randn(4096).to(dtype)
    up, down = torch.randn(512, 4096).to(dtype) / 64, torch.randn(4096, 256).to(dtype) / 16
    pairs = []
    for ops, place in (
        (CudaOps(dtype, TorchOps(dtype)), device),
        (TorchOps(dtype), torch.device("cpu")),
    ):
        normed = ops.rms_norm(weight.to(place), 1e-5)(x.to(place))
        mlp = ops.gated_mlp(ops.linear(up.to(place)), ops.linear(down.to(place)))
        pairs.append((normed, mlp.add_to(torch.zeros_like(normed), x.to(place))))
    return within(4e-2, *zip(*pairs, strict=True))


def check_network(device: torch.device) -> tuple[bool, str]:
    """Compare a tiny network's logits with those of plain torch on the CPU, in float32."""
    batch = make_batch(SHARES, NUM_BLOCKS, 16)
    logits = []
    for ops, place in (
        (CudaOps(torch.float32, TorchOps(torch.float32)), device),
        (TorchOps(torch.float32), torch.device("cpu")),
    ):
        network, config = build_network(TINY, ops, torch.float32, place, on_cpu=True)
        kv = make_kv(config, NUM_BLOCKS, torch.float32, place)
        logits.append(network(stage(batch, place) if place == device else batch, kv))
    return within(1e-3, (logits[0], logits[1]))


def check_graphs(device: torch.device, capture: Capture | None) -> tuple[bool, str]:
    """Compare decodes in graphs, padded and not, with eager ones."""
    network, config = build_network(
        TINY, CudaOps(torch.float32, TorchOps(torch.float32)), torch.float32, device, on_cpu=True
    )
    kv = make_kv(config, 64, torch.float32, device)
    kv.tensor.normal_()
    graphs = make_graphs(network, kv, config, batch_sizes=[1, 4], max_len=256, capture=capture)
    pairs = []
    for size, context in ((1, 40), (3, 200), (4, 7)):
        batch = decode_batch(size, context, num_blocks=64, block_size=16)
        eager = network(stage(batch, device), kv).clone()
        pairs.append((graphs.run(batch).clone(), eager))
    return within(1e-4, *pairs)


def within(tolerance: float, *pairs: tuple[Tensor, Tensor]) -> tuple[bool, str]:
    """Say whether the first of each pair equals the second, and how far they are apart."""
    worst = 0.0
    for found, expected in pairs:
        difference = (found.float().cpu() - expected.float().cpu()).abs()
        worst = max(worst, float((difference / (1 + expected.float().cpu().abs())).max()))
        if not bool(found.isfinite().all()):
            return False, "not finite"
    return worst <= tolerance, f"largest difference {worst:.2e}, allowed {tolerance:.0e}"
