"""Runs one prompt in many ways over a network, to compare the bits; imports no oracle."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastserve.checkpoint.model_config import read_model_config
from fastserve.executor.choices import choose_cpu_kernels, choose_ops
from fastserve.model.attention.interfaces import PagedKV
from fastserve.model.attention.shape import AttentionShape
from fastserve.model.decoder import Decoder
from fastserve.model.families.architectures import load_network
from fastserve.model.input_batch import build_input_batch, order_rows
from fastserve.model.loader import open_weights

torch.set_num_threads(1)  # models this small lose by a second thread

CPU = torch.device("cpu")
BLOCK_SIZE = 16
NUM_TOKENS = 200
NUM_BLOCKS = -(-NUM_TOKENS // BLOCK_SIZE)


class Case(NamedTuple):
    """A way to compute the prompt."""

    chunk: int  # tokens a step
    batch_size: int
    place: int  # among the sequences of the batch


def load(
    path: Path,
    dtype: torch.dtype,
    *,
    kernels: str,
    is_deterministic: bool = True,
    quantization: str | None = None,
) -> Decoder:
    """Load a checkpoint with the parts that the worker chooses."""
    cpu_kernels = choose_cpu_kernels(
        kernels, dtype, CPU, quantization, is_deterministic=is_deterministic
    )
    return load_network(
        read_model_config(path),
        open_weights(path, "auto", dtype, CPU),
        choose_ops(dtype, CPU, cpu_kernels, is_deterministic, quantization),
        max_len=NUM_TOKENS,
        device=CPU,
    )


def compute(network: Decoder, case: Case) -> tuple[Tensor, Tensor]:
    """Run one prompt among strangers in chunks of its own; returns its logits and its KV.

    The strangers' prompts and chunks are others every time, and so are the blocks of everybody.
    """
    rng, batch_size, place = np.random.default_rng(case), case.batch_size, case.place
    heads: AttentionShape = network.layers.attention.shape  # type: ignore[attr-defined]
    vocab_size = network.head.vocabulary.out_width  # type: ignore[union-attr]
    shape = (NUM_BLOCKS * batch_size, network.stage.num_layers, 2, BLOCK_SIZE, heads.num_kv_heads)
    kv = PagedKV(torch.full((*shape, heads.head_dim), torch.nan, dtype=network.dtype))
    tables = rng.permutation(len(kv.tensor)).reshape(batch_size, NUM_BLOCKS)
    ids = rng.integers(0, vocab_size, (batch_size, NUM_TOKENS))
    ids[place] = np.random.default_rng(0).integers(0, vocab_size, NUM_TOKENS)
    chunks = rng.integers(1, 40, batch_size)
    chunks[place] = case.chunk
    done = np.zeros(batch_size, np.int64)
    logits = []
    while done[place] < NUM_TOKENS:
        counts = np.minimum(chunks, NUM_TOKENS - done)
        live = np.flatnonzero(counts)
        live = live[order_rows(done[live], counts[live])]
        batch = build_input_batch(
            token_ids=np.concatenate([ids[i, done[i] : done[i] + counts[i]] for i in live]),
            starts=done[live],
            counts=counts[live],
            tables=tables[live],
            scored=None,
            block_size=BLOCK_SIZE,
            device=CPU,
        )
        first = int(counts[live][: live.tolist().index(place)].sum())
        logits.append(network(batch, kv)[first : first + counts[place]])
        done += counts
    own = kv.tensor[torch.from_numpy(tables[place])].transpose(0, 1)  # [layers, blocks, 2, ...]
    own = own.transpose(1, 2).flatten(2, 3)[:, :, :NUM_TOKENS]  # [layers, 2, tokens, ...]
    return torch.cat(logits), own.contiguous()


@torch.inference_mode()
def differing(network: Decoder, cases: Iterable[Case]) -> list[Case]:
    """Return the cases whose bits are not those of the prompt alone in one chunk."""
    logits, kv = compute(network, Case(NUM_TOKENS, 1, 0))
    assert logits.isfinite().all()
    assert kv.isfinite().all()
    different = []
    for case in cases:
        found = compute(network, case)
        is_equal = torch.equal(found[0], logits)
        if not (is_equal and torch.equal(found[1].view(torch.uint8), kv.view(torch.uint8))):
            different.append(case)
    return different


def digest(path: str) -> str:
    """Return a hash of the bits of a prompt's logits and KV."""
    with torch.inference_mode():
        network = load(Path(path), torch.bfloat16, kernels="auto")
        logits, kv = compute(network, Case(64, 3, 1))
    return hashlib.sha256(logits.numpy().tobytes() + kv.float().numpy().tobytes()).hexdigest()
