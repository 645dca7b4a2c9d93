"""FamilyLoader: how a family of checkpoints yields the parts of a Decoder.

Must not know: any one family, how parts are joined, requests.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fastserve.model.attention.rotary import Rotary
from fastserve.model.input_batch import InputBatch
from fastserve.model.ops.interfaces import DecoderLayer
from fastserve.model.stages import Stage


@dataclass(frozen=True, slots=True)
class WeightNames:
    """What the names of a checkpoint's tensors begin with, part by part."""

    embedding: tuple[str, ...]
    layers: str  # followed by the number of a layer
    head: tuple[str, ...]

    def outside(self, stage: Stage) -> tuple[str, ...]:
        """Return the beginnings of the names that belong to other stages."""
        here = range(stage.first, stage.stop)
        layers = (f"{self.layers}.{i}." for i in range(stage.num_layers) if i not in here)
        embedding = () if stage.is_first else self.embedding
        return (*layers, *embedding, *(() if stage.is_last else self.head))


class FamilyLoader(Protocol):
    """Reads the parts of one checkpoint, or one rank's share of them, each when it is asked for."""

    names: WeightNames

    def embedding(self) -> Callable[[InputBatch], Tensor]:
        """Make what turns the ids of a step into hidden state [num_tokens, hidden]."""

    def layer(self, index: int) -> DecoderLayer:
        """Make one layer."""

    def head(self) -> Callable[[Tensor], Tensor]:
        """Make what turns hidden state into float32 logits, row by row, on the first rank."""

    def rotary(self, max_len: int, device: torch.device) -> Rotary | None:
        """Make the rotations of `max_len` positions; None where positions are not rotary."""
