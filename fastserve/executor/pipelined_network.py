"""PipelinedNetwork: one stage of a network, which exchanges hidden state with its neighbours.

Must not know: requests, which ranks the neighbours are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastserve.executor.collectives import Peers
from fastserve.model.attention.interfaces import PagedKV
from fastserve.model.decoder import Decoder
from fastserve.model.input_batch import InputBatch


class PipelinedNetwork:
    """Fits `Network`; the hidden state of a step is expected from when the step is known."""

    def __init__(self, decoder: Decoder, peers: Peers) -> None:
        self._decoder = decoder
        self._peers = peers

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of weights, KV and hidden state."""
        return self._decoder.dtype

    def __call__(self, batch: InputBatch, kv: PagedKV) -> Tensor:
        """Run this stage of a step; returns logits in the last stage, no rows in others."""
        upstream, downstream = self._peers.upstream, self._peers.downstream
        hidden = None if upstream is None else upstream.take()
        computed = self._decoder(batch, kv, hidden)
        if downstream is None:
            return computed
        downstream.send(computed)
        return computed[:0]
