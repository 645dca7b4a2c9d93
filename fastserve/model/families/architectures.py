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
from fastserve.model.decoder import Decoder, Stage
from fastserve.model.families.gpt2 import GPT2Loader
from fastserve.model.families.interfaces import FamilyLoader
from fastserve.model.families.llama import LlamaLoader
from fastserve.model.families.opt import OPTLoader
from fastserve.model.input_batch import InputBatch
from fastserve.model.loader import Weights
from fastserve.model.ops.interfaces import Ops


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
) -> Decoder:
    """Build the network of a config for contexts up to `max_len`, or one stage of it.

    Raises ConfigError where the checkpoint lacks a weight, has one of another shape, or has one
    that no stage has a use for.
    """
    stage = stage or Stage(0, config.num_layers, config.num_layers)
    family = _family(config, weights, ops)
    embed = family.embedding() if stage.is_first else None
    layers = [family.layer(index) for index in range(stage.first, stage.stop)]
    head = family.head() if stage.is_last else None
    weights.finish(family.names.outside(stage))
    return Decoder(
        stage,
        layers,
        ops.attention(AttentionShape.of(config)),
        dtype=weights.dtype,
        rotary=family.rotary(max_len, device),
        embed=embed,
        head=head,
    )


def _family(config: ModelConfig, weights: Weights, ops: Ops) -> FamilyLoader:
    match config:
        case LlamaConfig():
            return LlamaLoader(config, weights, ops)
        case OPTConfig():
            return OPTLoader(config, weights, ops)
        case GPT2Config():
            return GPT2Loader(config, weights, ops)
    raise TypeError(f"no network for a {type(config).__name__}")
