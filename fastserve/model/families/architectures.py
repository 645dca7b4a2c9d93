"""Network: what every architecture fits, and how the one of a config is put together.

Must not know: requests, KV, devices' tricks.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from fastserve.checkpoint.config_fields import ModelConfig
from fastserve.checkpoint.config_gpt2 import GPT2Config
from fastserve.checkpoint.config_llama import LlamaConfig
from fastserve.checkpoint.config_opt import OPTConfig
from fastserve.model.attention.interfaces import PagedKV
from fastserve.model.attention.shape import AttentionShape
from fastserve.model.decoder import Decoder
from fastserve.model.families.gpt2 import GPT2Loader
from fastserve.model.families.interfaces import FamilyLoader
from fastserve.model.families.llama import LlamaLoader
from fastserve.model.families.opt import OPTLoader
from fastserve.model.input_batch import InputBatch
from fastserve.model.loader import Weights
from fastserve.model.ops.interfaces import Ops
from fastserve.model.parallel import ALONE, Parts, TensorGroup
from fastserve.model.stages import Stage


class Network(Protocol):
    """Token ids and paged KV in, logits of the scored rows out."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of weights and KV."""

    def __call__(self, batch: InputBatch, kv: PagedKV) -> Tensor:
        """Run one step; returns float32 logits [num_scored, vocab]."""


def load_network(
    config: ModelConfig,
    weights: Weights,
    ops: Ops,
    *,
    max_len: int,
    device: torch.device,
    stage: Stage | None = None,
    group: TensorGroup = ALONE,
) -> Decoder:
    """Build the network of a config for contexts up to `max_len`, or one stage of it.

    Of a group of several ranks each reads its shard, and all compute a step together. Raises
    ConfigError where the checkpoint lacks a weight, has one of another shape, or has one that no
    stage has a use for, and where the network cannot be divided among the group.
    """
    Parts.of(config).check(group.size)
    stage = stage or Stage(0, config.num_layers, config.num_layers)
    family = _family(config, weights, ops, group)
    embed = family.embedding() if stage.is_first else None
    layers = [family.layer(index) for index in range(stage.first, stage.stop)]
    head = family.head() if stage.is_last else None
    weights.finish(family.names.outside(stage))
    attention = ops.attention(AttentionShape.of(config, group.size))
    return Decoder(
        stage,
        ops.layers(layers, attention),
        dtype=weights.dtype,
        rotary=family.rotary(max_len, device),
        embed=embed,
        head=head,
    )


def _family(config: ModelConfig, weights: Weights, ops: Ops, group: TensorGroup) -> FamilyLoader:
    match config:
        case LlamaConfig():
            return LlamaLoader(config, weights, ops, group)
        case OPTConfig():
            return OPTLoader(config, weights, ops, group)
        case GPT2Config():
            return GPT2Loader(config, weights, ops, group)
    raise TypeError(f"no network for a {type(config).__name__}")
