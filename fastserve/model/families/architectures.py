"""Network: what every architecture fits, and which class is built for a config.

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
from fastserve.model.families.gpt2 import GPT2Model
from fastserve.model.families.llama import LlamaModel
from fastserve.model.families.opt import OPTModel
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
    config: ModelConfig, weights: Weights, ops: Ops, *, max_len: int, device: torch.device
) -> Network:
    """Build the network of a config from its weights, for contexts up to `max_len`."""
    match config:
        case LlamaConfig():
            return LlamaModel(config, weights, ops, max_len=max_len, device=device)
        case OPTConfig():
            return OPTModel(config, weights, ops)
        case GPT2Config():
            return GPT2Model(config, weights, ops)
    raise TypeError(f"no network for a {type(config).__name__}")
