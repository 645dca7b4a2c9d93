"""DeviceModel: a network fed from the host, whose next ids may still be on the device.

Rules: fits Network, for batches that lie on the host. A negative id ~i stands for the i-th id drawn
last: it is put in on the device, so that a step can be launched before the one it continues is
over. Pure decodes replay a captured graph where there is one.
Must not know: requests, sampling.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastserve.executor.cuda_graphs import DecodeGraphs
from fastserve.model.attention.interfaces import PagedKV
from fastserve.model.families.architectures import Network
from fastserve.model.input_batch import InputBatch
from fastserve.model.staged_batch import stage


class DeviceModel:
    """Fits `Network`."""

    def __init__(self, network: Network, samples: Tensor, graphs: DecodeGraphs | None) -> None:
        self.network = network
        self.samples = samples  # [max_num_seqs] int32
        self.graphs = graphs

    @property
    def dtype(self) -> torch.dtype:
        return self.network.dtype

    def __call__(self, batch: InputBatch, kv: PagedKV) -> Tensor:
        """Fit `Network`; the logits hold until the next call."""
        if self.graphs is not None and self.graphs.can_run(batch):
            return self.graphs.run(batch)
        has_late_ids = bool((batch.token_ids < 0).any())
        on_device = stage(batch, self.samples.device)
        if has_late_ids:
            put_in_samples(on_device.token_ids, self.samples)
        return self.network(on_device, kv)

    def remember(self, drawn: Tensor) -> None:
        """Keep the ids that a next step may begin with."""
        self.samples[: len(drawn)].copy_(drawn)


def put_in_samples(token_ids: Tensor, samples: Tensor) -> None:
    """Replace every negative id ~i by samples[i], in place."""
    places = token_ids.bitwise_not().clamp_(min=0)
    late = samples.index_select(0, places)
    token_ids.copy_(torch.where(token_ids < 0, late, token_ids))
