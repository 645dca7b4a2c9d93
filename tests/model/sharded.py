"""Runs one sequence over a network of several ranks and stages; the ranks are threads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastserve.checkpoint.model_config import read_model_config
from fastserve.model.attention.interfaces import PagedKV
from fastserve.model.attention.shape import AttentionShape
from fastserve.model.decoder import Decoder
from fastserve.model.families.architectures import load_network
from fastserve.model.input_batch import build_input_batch
from fastserve.model.loader import open_weights
from fastserve.model.ops.interfaces import Ops
from fastserve.model.parallel import TensorGroup
from fastserve.model.staged_batch import stage as put_on
from fastserve.model.stages import split_layers
from tests.checkpoints import VOCAB_SIZE, make_checkpoint
from tests.model.thread_group import run_ranks

CPU = torch.device("cpu")
BLOCK_SIZE = 8
NUM_TOKENS = 44
CUTS = (17, 36, *range(37, NUM_TOKENS))  # two chunks of prefill, then decode steps


class Run(NamedTuple):
    """What one rank computed."""

    logits: Tensor  # [NUM_TOKENS, vocab]; of other ranks than the first: none
    kv: Tensor  # [blocks, layers, 2, block_size, kv_heads, head_dim]


def make_wide_checkpoint(path, name, *, inner_width=82, **changes):
    """Make a checkpoint for up to eight ranks: fewer key-value heads, uneven widths and rows."""
    heads = {"n_head": 8} if name == "gpt2" else {"num_attention_heads": 8}
    if name == "llama-mha-biased":
        heads["num_key_value_heads"] = 8
    width = {"gpt2": "n_inner"}.get(name, "ffn_dim" if "opt" in name else "intermediate_size")
    experts = {"moe_intermediate_size": 41} if "moe" in name else {}
    return make_checkpoint(path, name, **{**heads, width: inner_width, **experts, **changes})


@torch.inference_mode()
def run(
    path,
    group: TensorGroup,
    ops: Ops,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device = CPU,
    num_stages: int = 1,
    cuts: Sequence[int] = CUTS,
) -> Run:
    """Run the sequence in chunks that end at `cuts`, through all stages of this rank."""
    config, num_blocks = read_model_config(path), -(-NUM_TOKENS // BLOCK_SIZE)
    stages = [
        load_network(
            config,
            open_weights(path, "auto", dtype, device),
            ops,
            max_len=64,
            device=device,
            stage=part,
            group=group,
        )
        for part in split_layers(config, num_stages)
    ]
    kv_of = [make_kv(stage, config.head_dim, 2 * num_blocks, device) for stage in stages]
    table = np.random.default_rng(0).permutation(2 * num_blocks)[:num_blocks]
    ids, logits = np.random.default_rng(1).integers(0, VOCAB_SIZE, NUM_TOKENS), []
    for start, stop in zip((0, *cuts), (*cuts, NUM_TOKENS), strict=True):
        batch = build_input_batch(
            token_ids=ids[start:stop],
            starts=np.array([start]),
            counts=np.array([stop - start]),
            tables=table[None, : -(-stop // BLOCK_SIZE)],
            scored=None,
            block_size=BLOCK_SIZE,
            device=CPU,
        )
        hidden: Tensor | None = None
        for stage, kv in zip(stages, kv_of, strict=True):
            on_device = batch if device == CPU else put_on(batch, device)
            hidden = stage(on_device, kv, hidden)
        assert hidden is not None
        logits.append(hidden)
    own = [kv.tensor.cpu()[torch.from_numpy(table)] for kv in kv_of]
    return Run(torch.cat(logits).cpu(), torch.cat(own, dim=1))


def run_sharded(size: int, path, make_ops: Callable[[], Ops], **how) -> list[Run]:
    """Run it on several ranks; returns what each has."""
    return run_ranks(size, lambda group: run(path, group, make_ops(), **how))


def make_kv(stage: Decoder, head_dim: int, num_blocks: int, device: torch.device) -> PagedKV:
    """Make the KV of this rank's layers and heads."""
    heads: AttentionShape = stage.layers.attention.shape  # type: ignore[attr-defined]
    num_layers = stage.stage.stop - stage.stage.first
    shape = (num_blocks, num_layers, 2, BLOCK_SIZE, heads.num_kv_heads, head_dim)
    return PagedKV(torch.zeros(shape, dtype=stage.dtype, device=device))
