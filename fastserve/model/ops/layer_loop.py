"""LayerLoop: the layers of a network one after another, as they are made of parts.

Rules: in the last layer only the rows that get logits go through the output projection and the MLP.
Must not know: families, devices.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fastserve.model.attention.interfaces import Attention, PagedKV
from fastserve.model.input_batch import InputBatch
from fastserve.model.ops.interfaces import DecoderLayer


class LayerLoop:
    """Fits `Layers`."""

    __slots__ = ("attention", "layers")

    def __init__(self, layers: Sequence[DecoderLayer], attention: Attention) -> None:
        self.layers = tuple(layers)
        self.attention = attention

    def __call__(
        self,
        hidden: Tensor,
        rotations: Tensor | None,
        batch: InputBatch,
        kv: PagedKV,
        scored: Tensor | None,
    ) -> Tensor:
        attention = self.attention.plan(batch)
        last = len(self.layers) - 1
        for index, (layer, layer_kv) in enumerate(zip(self.layers, kv.layers, strict=True)):
            mixed = layer.attend(hidden, rotations, layer_kv, attention)
            if index == last and scored is not None:
                hidden, mixed = hidden[scored], mixed[scored]
            hidden = layer.add_outputs(hidden, mixed)
        return hidden
