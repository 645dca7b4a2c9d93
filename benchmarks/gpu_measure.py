"""Decode and prefill of random weights in real shapes, against a copy and a product of this card.

Bytes of a decode are what it must read: every weight but the embedding, once, and the KV of every
row. Floating-point operations are two for each weight and token, and four for each channel of a
head, key and query. What does not fit the card is left out and says so.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from benchmarks.gpu_network import (
    BLOCK_SIZE,
    Capture,
    build_network,
    decode_batch,
    make_graphs,
    make_kv,
    prefill_batch,
)
from fastserve.checkpoint.model_config import ModelConfig
from fastserve.model.attention.interfaces import PagedKV
from fastserve.model.families.architectures import Network
from fastserve.model.ops.cuda_ops import CudaOps
from fastserve.model.ops.torch_ops import TorchOps
from fastserve.model.staged_batch import stage

LLAMA_3_8B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "hidden_act": "silu",
    "torch_dtype": "bfloat16",
    "tie_word_embeddings": False,
}
OPT_13B: dict[str, Any] = {
    "architectures": ["OPTForCausalLM"],
    "model_type": "opt",
    "vocab_size": 50272,
    "hidden_size": 5120,
    "word_embed_proj_dim": 5120,
    "ffn_dim": 20480,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
    "max_position_embeddings": 2048,
    "activation_function": "relu",
    "do_layer_norm_before": True,
    "torch_dtype": "bfloat16",
    "tie_word_embeddings": True,
}
MODELS = {"Llama-3-8B": LLAMA_3_8B, "OPT-13B": OPT_13B}
BATCH_SIZES = (1, 8, 32, 128)
PREFILL_SIZES = (1, 2, 8)
CONTEXT = 1024
REPEATS = 20
SPARE_BYTES = 6 * 2**30
"""Left for activations, logits and graphs."""


def run(device: torch.device) -> dict[str, Any]:
    """Measure the card, then every model on it."""
    roof = measure_roof(device, size=8192, copy_bytes=2**30)
    print(f"copy {roof['copy_gb_per_s']:.0f} GB/s, matmul {roof['matmul_tflops']:.0f} TFLOP/s")
    rows = []
    for name, values in MODELS.items():
        rows += measure_model(name, values, device, roof)
        gc.collect()
        torch.cuda.empty_cache()
    return {"roof": roof, "context": CONTEXT, "dtype": "bfloat16", "results": rows}


def measure_roof(device: torch.device, *, size: int, copy_bytes: int) -> dict[str, float]:
    """Return what a plain copy and a plain bfloat16 product reach."""
    source = torch.zeros(copy_bytes // 2, dtype=torch.bfloat16, device=device)
    target = torch.empty_like(source)
    copy_s = median_seconds(lambda: target.copy_(source), device)
    a = torch.randn(size, size, device=device).bfloat16()
    b = torch.randn(size, size, device=device).bfloat16()
    matmul_s = median_seconds(lambda: a @ b, device)
    return {
        "copy_gb_per_s": 2 * copy_bytes / copy_s / 1e9,
        "matmul_tflops": 2 * size**3 / matmul_s / 1e12,
    }


@torch.inference_mode()
def measure_model(
    name: str,
    values: dict[str, Any],
    device: torch.device,
    roof: dict[str, float],
    *,
    batch_sizes: tuple[int, ...] = BATCH_SIZES,
    prefill_sizes: tuple[int, ...] = PREFILL_SIZES,
    context: int = CONTEXT,
    memory_bytes: int | None = None,
    capture: Capture | None = None,
) -> list[dict[str, Any]]:
    """Measure decodes and prefills of one model."""
    limit = memory_bytes or torch.cuda.get_device_properties(device).total_memory
    weight_bytes = 2 * num_weights(values)
    if weight_bytes + SPARE_BYTES > limit:
        return [skipped(name, "model", 0, f"weights of {weight_bytes} bytes do not fit")]
    ops = CudaOps(torch.bfloat16, TorchOps(torch.bfloat16))
    network, config = build_network(
        values, ops, torch.bfloat16, device, max_len=min(2048, values["max_position_embeddings"])
    )
    blocks_each = -(-context // BLOCK_SIZE)
    block_bytes = BLOCK_SIZE * token_bytes(config)
    room = (limit - weight_bytes - SPARE_BYTES) // block_bytes // blocks_each
    wanted = max(*batch_sizes, *prefill_sizes)
    kv = make_kv(config, int(min(room, wanted)) * blocks_each, torch.bfloat16, device)
    rows = []
    for kind, sizes in (("decode", batch_sizes), ("prefill", prefill_sizes)):
        for size in sizes:
            if size > room:
                rows.append(skipped(name, kind, size, "its KV does not fit beside the weights"))
                continue
            step = (
                decode_step(network, kv, config, size, context, capture)
                if kind == "decode"
                else prefill_step(network, kv, size, context)
            )
            seconds = median_seconds(step, device)
            rows.append(describe(name, kind, size, context, seconds, values, config, roof))
            print(rows[-1], flush=True)
    return rows


def decode_step(
    network: Network,
    kv: PagedKV,
    config: ModelConfig,
    size: int,
    context: int,
    capture: Capture | None,
) -> Callable[[], object]:
    """Return one decode as the engine runs it: a transfer of inputs, and a graph."""
    max_len = 2 * context  # graphs are captured for more than they meet
    graphs = make_graphs(network, kv, config, batch_sizes=[size], max_len=max_len, capture=capture)
    num_blocks = kv.tensor.shape[0]
    batch = decode_batch(size, context, num_blocks=num_blocks, block_size=BLOCK_SIZE)
    return lambda: graphs.run(batch)


def prefill_step(network: Network, kv: PagedKV, size: int, length: int) -> Callable[[], object]:
    """Return one prefill of whole prompts as the engine runs it."""
    num_blocks = kv.tensor.shape[0]
    batch = prefill_batch(size, length, num_blocks=num_blocks, block_size=BLOCK_SIZE)
    return lambda: network(stage(batch, kv.tensor.device), kv)


def describe(
    name: str,
    kind: str,
    size: int,
    context: int,
    seconds: float,
    values: dict[str, Any],
    config: ModelConfig,
    roof: dict[str, float],
) -> dict[str, Any]:
    """Return one measured row, with its shares of what the card can do."""
    weights = num_weights(values)
    tokens = size if kind == "decode" else size * context
    pairs = size * context if kind == "decode" else size * context * (context + 1) // 2
    head = config.vocab_size * config.hidden_size
    products = 2 * (weights - head) * tokens + 2 * head * size
    operations = products + 4 * pairs * config.num_layers * config.num_heads * config.head_dim
    moved = 2 * weights + size * context * token_bytes(config)
    gb_per_s, tflops = moved / seconds / 1e9, operations / seconds / 1e12
    return {
        "model": name,
        "kind": kind,
        "batch_size": size,
        "context": context,
        "step_ms": seconds * 1e3,
        "tokens_per_s": tokens / seconds,
        "gb_per_s": gb_per_s,
        "share_of_copy": gb_per_s / roof["copy_gb_per_s"],
        "tflops": tflops,
        "share_of_matmul": tflops / roof["matmul_tflops"],
    }


def skipped(name: str, kind: str, size: int, reason: str) -> dict[str, Any]:
    """Return a row of what was not measured."""
    row = {"model": name, "kind": kind, "batch_size": size, "skipped": reason}
    print(row, flush=True)
    return row


def num_weights(values: dict[str, Any]) -> int:
    """Return the weights that one token is multiplied by, the head's included."""
    hidden, heads = values["hidden_size"], values["num_attention_heads"]
    kv_heads = values.get("num_key_value_heads", heads)
    attention = hidden * hidden * 2 + 2 * hidden * (hidden // heads) * kv_heads
    is_gated = "intermediate_size" in values
    inner = values["intermediate_size"] if is_gated else values["ffn_dim"]
    mlp = (3 if is_gated else 2) * hidden * inner
    per_layer: int = attention + mlp
    total: int = values["num_hidden_layers"] * per_layer + values["vocab_size"] * hidden
    return total


def token_bytes(config: ModelConfig) -> int:
    """Return the bfloat16 bytes of one token's KV in all layers."""
    return 2 * 2 * config.num_layers * config.num_kv_heads * config.head_dim


def median_seconds(step: Callable[[], object], device: torch.device) -> float:
    """Return the median time of a step on the device, after three to warm up."""
    for _ in range(3):
        step()
    times = []
    for _ in range(REPEATS):
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            step()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / 1e3)
        else:
            begun = time.perf_counter()
            step()
            times.append(time.perf_counter() - begun)
    return float(np.median(times))
