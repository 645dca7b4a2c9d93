"""Worker: one rank. `execute(plan)` is its only entry point.

Rules: owns the model, the KV and the state per request; all of it is used from one thread. What
makes or runs the network is in inference mode, which a thread is in only where it says so.
Sizes are measured here once and handed out as ExecutorFacts.
Must not know: scheduling, sockets, which thread runs it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from fastserve.checkpoint.model_config import read_model_config
from fastserve.core.messages import Sample, SchedulerOutput, StepDone, TokenLogprobs, Work
from fastserve.executor.async_runner import AsyncModelRunner, PendingStep, make_async_runner
from fastserve.executor.choices import (
    choose_capture,
    choose_cpu_kernels,
    choose_device,
    choose_dtype,
    choose_max_model_len,
    choose_ops,
)
from fastserve.executor.cuda_graphs import CudaCapture
from fastserve.executor.kv_store import KVStore, block_bytes, count_blocks
from fastserve.executor.model_runner import ModelRunner
from fastserve.executor.request_table import RequestTable
from fastserve.model.families.architectures import Network, load_network
from fastserve.model.loader import open_weights
from fastserve.model.ops.interfaces import Ops
from fastserve.settings.engine import EngineConfig
from fastserve.settings.scheduler import StepLimits


@dataclass(frozen=True, slots=True, kw_only=True)
class ExecutorFacts:
    """What was found out about the model and the machine."""

    max_model_len: int
    limits: StepLimits
    vocab_size: int
    num_device_blocks: int
    block_bytes: int
    dtype: str
    device: str


class Worker:
    """Carries out plans with one model on one device."""

    def __init__(
        self,
        config: EngineConfig,
        model_dir: Path,
        *,
        eos_token_ids: frozenset[int],
        on_progress: Callable[[str, float], None],
        is_poisoned: bool = False,
        is_async: bool | None = None,  # whether `launch` returns before the end; None: on CUDA
    ) -> None:
        self.config = config
        self.model_config = read_model_config(model_dir)
        self.device = choose_device(config.device)
        dtype = choose_dtype(config.dtype, self.model_config, self.device)
        max_model_len = choose_max_model_len(config.max_model_len, self.model_config)
        self.limits = StepLimits.resolve(config, max_model_len, is_cpu=self.device.type == "cpu")
        self.is_captured = choose_capture(config.enforce_eager, self.model_config, self.device)
        on_progress("loading weights", 0.0)
        kernels = choose_cpu_kernels(config.cpu_kernels, dtype, self.device)
        self.cpu_kernels = "torch" if kernels is None else kernels.name
        ops = choose_ops(dtype, self.device, kernels, config.deterministic)
        self.model = self._load_network(model_dir, dtype, ops, max_model_len)
        on_progress("loading weights", 1.0)
        bytes_per_block = block_bytes(self.model_config, config.block_size, dtype)
        num_blocks = count_blocks(
            config,
            bytes_per_block=bytes_per_block,
            max_num_seqs=self.limits.max_num_seqs,
            max_model_len=max_model_len,
            device=self.device,
        )
        self.kv = KVStore(
            self.model_config,
            num_blocks=num_blocks,
            block_size=config.block_size,
            dtype=dtype,
            device=self.device,
            is_poisoned=is_poisoned,
        )
        vocab_size = self.model_config.vocab_size
        self.table = RequestTable(frozenset(i for i in eos_token_ids if i < vocab_size))
        self._lost: dict[int, int] = {}  # handle → epoch whose state went with a failed step
        self.is_async = self.device.type == "cuda" if is_async is None else is_async
        self.runner = self._make_runner(max_model_len, on_progress)
        self.facts = ExecutorFacts(
            max_model_len=max_model_len,
            limits=self.limits,
            vocab_size=self.model_config.vocab_size,
            num_device_blocks=num_blocks,
            block_bytes=bytes_per_block,
            dtype=str(dtype).removeprefix("torch."),
            device=str(self.device),
        )

    @torch.inference_mode()
    def _load_network(
        self, model_dir: Path, dtype: torch.dtype, ops: Ops, max_model_len: int
    ) -> Network:
        weights = open_weights(model_dir, self.config.load_format, dtype, self.device)
        return load_network(
            self.model_config, weights, ops, max_len=max_model_len, device=self.device
        )

    @torch.inference_mode()
    def _make_runner(
        self, max_model_len: int, on_progress: Callable[[str, float], None]
    ) -> ModelRunner:
        if not self.is_async:
            return ModelRunner(self.model, self.kv.device, self.table, self.device)
        return make_async_runner(
            self.model,
            self.kv.device,
            self.table,
            max_num_seqs=self.limits.max_num_seqs,
            max_model_len=max_model_len,
            vocab_size=self.model_config.vocab_size,
            capture=CudaCapture() if self.is_captured else None,
            on_progress=on_progress,
        )

    def execute(self, plan: SchedulerOutput) -> StepDone:
        """Carry out one plan."""
        return self.launch(plan)()

    @torch.inference_mode()
    def launch(self, plan: SchedulerOutput) -> Callable[[], StepDone]:
        """Begin one plan; what is returned waits for its end, on any thread.

        Where this raises, the requests of the plan are lost: how far their state had come is not
        known. What plans in flight still ask of them is left out. The others go on.
        """
        try:
            return self._launch(plan)
        except BaseException:
            self._lose(plan)
            raise

    def check_device(self) -> None:
        """Raise what the device raises at anything, once it has failed for good."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _launch(self, plan: SchedulerOutput) -> Callable[[], StepDone]:
        started = time.perf_counter()
        if plan.copies or plan.needs_copies:
            raise RuntimeError(f"step {plan.step_id} moves KV, and there is no host tier")
        for handle in plan.forget:
            self.table.forget(handle)
            self._lost.pop(handle, None)
        for new in plan.new_requests:
            self.table.add(new)
            self._lost.pop(new.request, None)
        works = self._without_lost(plan.work) if self._lost else plan.work
        for work in works:
            self.kv.admit(work.block_ids)
        states = [self.table.advance(work) for work in works]
        if isinstance(self.runner, AsyncModelRunner) and works:
            step = self.runner.launch(works, states)
            return partial(_await, plan, works, step)
        samples: Sequence[Sample] = ()
        prompt_logprobs: Mapping[int, Sequence[TokenLogprobs]] = {}
        if works:
            samples, prompt_logprobs = self.runner.run(works, states)
        seconds = time.perf_counter() - started
        done = StepDone(plan.step_id, _placed(plan, works, samples), seconds, prompt_logprobs)
        return lambda: done

    def _lose(self, plan: SchedulerOutput) -> None:
        for work in plan.work:
            self.table.forget(work.request)
            self._lost[work.request] = work.epoch

    def _without_lost(self, works: Sequence[Work]) -> Sequence[Work]:
        return [work for work in works if self._lost.get(work.request) != work.epoch]


def _await(plan: SchedulerOutput, works: Sequence[Work], step: PendingStep) -> StepDone:
    step.wait()
    samples = _placed(plan, works, step.samples)
    return StepDone(plan.step_id, samples, step.device_s, step.prompt_logprobs)


def _placed(
    plan: SchedulerOutput, works: Sequence[Work], samples: Sequence[Sample]
) -> Sequence[Sample]:
    """Return one sample for each Work of the plan; those of lost requests are read by nobody."""
    if len(works) == len(plan.work):
        return samples
    done = {work.request for work in works}
    drawn = iter(samples)
    sampled = [work for work in plan.work if work.sample]
    return [next(drawn) if work.request in done else Sample(0) for work in sampled]
