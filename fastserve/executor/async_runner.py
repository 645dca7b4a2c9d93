"""AsyncModelRunner: launches a step and returns before the device has finished it.

Rules: until a step's ids are known, ~i stands for the i-th of them among a request's ids, and only
the next step may be launched meanwhile: it takes them from the device. A step that needs ids on the
host (penalties, log probabilities) waits for those before it. One transfer brings a step's inputs,
one its ids back. Must not know: scheduling, which request owns a block, threads.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from fastserve.core.messages import Sample, TokenLogprobs, Work
from fastserve.core.request import Handle
from fastserve.executor.cuda_graphs import Capture, DecodeGraphs, ladder
from fastserve.executor.device_model import DeviceModel, put_in_samples
from fastserve.executor.model_runner import ModelRunner
from fastserve.executor.request_table import RequestState, RequestTable
from fastserve.model.attention.interfaces import PagedKV
from fastserve.model.families.architectures import Network

PromptLogprobs = Mapping[Handle, Sequence[TokenLogprobs]]


class StepTimer(Protocol):
    """Begins when it is made; tells the seconds that the device was at a step."""

    def stop(self) -> None:
        """Say that everything of the step has been launched."""

    def wait(self) -> float:
        """Wait until the device has done it; returns the seconds it took."""


class PendingStep:
    """A launched step: `wait` makes its ids known; a second call does nothing new."""

    def __init__(
        self,
        timer: StepTimer,
        drawn: Tensor | None,  # on its way to the host; None: the samples are at hand
        owners: Sequence[tuple[RequestState, int]],  # and the position of each id
        samples: list[Sample],
        prompt_logprobs: PromptLogprobs,
    ) -> None:
        self.samples = samples
        self.prompt_logprobs = prompt_logprobs
        self.device_s = 0.0
        self._timer = timer
        self._drawn = drawn
        self._owners = owners

    def wait(self) -> None:
        """Wait for the device; callable from any thread."""
        self.device_s = self._timer.wait()
        if self._drawn is None:
            return
        token_ids: list[int] = self._drawn.tolist()
        for (state, position), token_id in zip(self._owners, token_ids, strict=True):
            state.token_ids[position] = max(token_id, 0)  # as in ModelRunner._take
        self.samples = [Sample(token_id) for token_id in token_ids]


class AsyncModelRunner(ModelRunner):
    """Runs steps of one model over one KV tensor."""

    def __init__(
        self, model: DeviceModel, kv: PagedKV, table: RequestTable, device: torch.device
    ) -> None:
        super().__init__(model, kv, table, device)
        self.input_device = torch.device("cpu")  # DeviceModel takes it from there
        self._device_model = model
        self._last: PendingStep | None = None
        self._is_waiting = False
        self._late_ids: Tensor | None = None
        self._late_owners: list[tuple[RequestState, int]] = []

    def launch(self, works: Sequence[Work], states: Sequence[RequestState]) -> PendingStep:
        """Begin one step; `states` are those of `works`, already advanced."""
        timer: StepTimer = CudaTimer() if self.device.type == "cuda" else HostTimer()
        self._is_waiting = self._needs_ids(works, states)
        if self._is_waiting and self._last is not None:
            self._last.wait()
        self._late_ids, self._late_owners = None, []
        samples, prompt_logprobs = self.run(works, states)
        timer.stop()
        self._last = PendingStep(timer, self._late_ids, self._late_owners, samples, prompt_logprobs)
        return self._last

    def _needs_ids(self, works: Sequence[Work], states: Sequence[RequestState]) -> bool:
        """Whether a step has more to do than to draw ids from what the device knows."""
        rows = [state.row for state in states]
        return (
            any(work.logits == "all" for work in works)
            or bool(self.table.has_penalty[rows].any())
            or bool((self.table.num_logprobs[rows] >= 0).any())
        )

    def _take(
        self, drawn: Tensor, states: Sequence[RequestState], positions: Sequence[int]
    ) -> list[int]:
        """Leave the ids on the device, and note whose they are."""
        if self._is_waiting:
            return super()._take(drawn, states, positions)
        self._device_model.remember(drawn.clamp(min=0))
        self._late_ids = to_host(drawn)
        self._late_owners = list(zip(states, positions, strict=True))
        places = [~place for place in range(len(states))]
        for state, position, place in zip(states, positions, places, strict=True):
            state.token_ids[position:] = (place,)
        return places


class CudaTimer:
    """Fits `StepTimer`."""

    def __init__(self) -> None:
        self._start = _event()
        self._end = _event()
        self._start.record()

    def stop(self) -> None:
        self._end.record()

    def wait(self) -> float:
        self._end.synchronize()
        milliseconds: float = self._start.elapsed_time(self._end)
        return milliseconds / 1000.0


def _event() -> torch.cuda.Event:
    """Return an event that is waited for without keeping a core busy."""
    return torch.cuda.Event(enable_timing=True, blocking=True)  # type: ignore[no-untyped-call]


class HostTimer:
    """Fits `StepTimer` where a launch is the computation."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._end = self._start

    def stop(self) -> None:
        self._end = time.perf_counter()

    def wait(self) -> float:
        return self._end - self._start


def to_host(ids: Tensor) -> Tensor:
    """Return a copy on its way to the host; an event recorded after it says that it is there."""
    if not ids.is_cuda:
        return ids.clone()
    host = torch.empty(ids.shape, dtype=ids.dtype, pin_memory=True)
    return host.copy_(ids, non_blocking=True)


def make_async_runner(
    network: Network,
    kv: PagedKV,
    table: RequestTable,
    *,
    max_num_seqs: int,
    max_model_len: int,
    vocab_size: int,
    capture: Capture | None,
    on_progress: Callable[[str, float], None],
) -> AsyncModelRunner:
    """Build a runner; with `capture`, decodes are captured now."""
    device = kv.tensor.device
    samples = torch.zeros(max_num_seqs, dtype=torch.int32, device=device)
    graphs = None
    if capture is not None:
        graphs = DecodeGraphs(
            network,
            kv,
            batch_sizes=ladder(max_num_seqs),
            max_model_len=max_model_len,
            vocab_size=vocab_size,
            prepare=lambda token_ids: put_in_samples(token_ids, samples),
            capture=capture,
            on_progress=on_progress,
        )
    return AsyncModelRunner(DeviceModel(network, samples, graphs), kv, table, device)
