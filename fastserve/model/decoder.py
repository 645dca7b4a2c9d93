"""Decoder: what all decoder-only networks do in a step, with all their layers or a run of them.

Rules: embed, run the layers, norm and head. Of the last layer's output only the rows that get
logits are wanted. The first stage of a network takes token ids, any other takes the hidden state of
the one before it; the last returns logits, any other its hidden state. A network in stages computes
the bits of the whole one.
Must not know: families, checkpoints, requests, how hidden state travels.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastserve.model.attention.interfaces import PagedKV
from fastserve.model.attention.rotary import Rotary
from fastserve.model.input_batch import InputBatch
from fastserve.model.ops.interfaces import Layers
from fastserve.model.stages import Stage


class Decoder:
    """Fits `Network` where it is whole, and is one stage of it otherwise."""

    def __init__(
        self,
        stage: Stage,
        layers: Layers,
        *,
        dtype: torch.dtype,
        rotary: Rotary | None,
        embed: Callable[[InputBatch], Tensor] | None,
        head: Callable[[Tensor], Tensor] | None,
    ) -> None:
        """Join the parts of a stage: `embed` belongs to the first one, `head` to the last."""
        if (embed is None) == stage.is_first or (head is None) == stage.is_last:
            raise ValueError(f"an end of {stage} lacks its part, or another has one")
        self.stage = stage
        self.layers = layers
        self.dtype = dtype
        self.rotary = rotary
        self.embed = embed
        self.head = head

    def __call__(self, batch: InputBatch, kv: PagedKV, hidden: Tensor | None = None) -> Tensor:
        """Run one step over the KV of these layers.

        hidden: [num_tokens, hidden], what the stage before this one returned; may be overwritten.
        Returns float32 logits [num_scored, vocab], or hidden state of the same shape. Where several
        ranks share a stage, all have its hidden state, and of logits only the first has rows.
        """
        if self.embed is not None:
            hidden = self.embed(batch)
        if hidden is None:
            raise ValueError(f"{self.stage} takes hidden state")
        rotations = None if self.rotary is None else self.rotary.at(batch.positions)
        scored = None if self.head is None else batch.scored
        hidden = self.layers(hidden, rotations, batch, kv, scored)
        return hidden if self.head is None else self.head(hidden)
