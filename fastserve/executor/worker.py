"""Worker: one rank. `execute(plan)` is its only entry point.

Rules: owns the model, the KV and the state per request; all of it is used from one thread.
Sizes are measured here once and handed out as ExecutorFacts.
Dtype `auto`: on CUDA the checkpoint's; on a CPU float32, except for bfloat16 checkpoints of some
size: from a hidden size of 384 where the processor multiplies bfloat16 (half the time of a step,
docs/performance.md; below, too little is gained to give up exactness), from 1024 elsewhere, where
only reading half the bytes counts.
Must not know: scheduling, sockets, which thread runs it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import cast

import torch

from fastserve.config import ConfigError, EngineConfig, SchedulerConfig
from fastserve.core.output import Sample, SchedulerOutput, StepDone, TokenLogprobs
from fastserve.executor.async_runner import AsyncModelRunner, PendingStep, make_async_runner
from fastserve.executor.cuda_graphs import CudaCapture
from fastserve.executor.kv_store import KVStore, block_bytes, count_blocks
from fastserve.executor.model_runner import ModelRunner
from fastserve.executor.request_table import RequestTable
from fastserve.model.architectures import load_network
from fastserve.model.config import ModelConfig, read_model_config
from fastserve.model.config_llama import LlamaConfig
from fastserve.model.cpu.kernel_choice import KernelChoice, choose_kernels
from fastserve.model.cpu.native import BuildError
from fastserve.model.cpu_ops import CpuOps
from fastserve.model.deterministic_ops import DeterministicOps
from fastserve.model.loader import open_weights
from fastserve.model.ops import Ops
from fastserve.model.rowwise_ops import RowwiseCpuOps, RowwiseOps
from fastserve.model.torch_ops import TorchOps

BFLOAT16_HIDDEN_SIZE = 384
BFLOAT16_HIDDEN_SIZE_EMULATED = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class ExecutorFacts:
    """What was found out about the model and the machine."""

    max_model_len: int
    vocab_size: int
    num_device_blocks: int
    num_host_blocks: int
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
        self.scheduler_config = SchedulerConfig.resolve(
            config,
            max_model_len=max_model_len,
            is_cpu=self.device.type == "cpu",
            num_slots=1,
            lookahead=0,
            eos_token_ids=eos_token_ids,
        )
        on_progress("loading weights", 0.0)
        with torch.inference_mode():
            weights = open_weights(model_dir, config.load_format, dtype, self.device)
            self.model = load_network(
                self.model_config,
                weights,
                choose_ops(dtype, self.device, config.cpu_kernels, config.deterministic),
                max_len=max_model_len,
                device=self.device,
            )
        on_progress("loading weights", 1.0)
        bytes_per_block = block_bytes(self.model_config, config.block_size, dtype)
        num_blocks = count_blocks(
            config,
            bytes_per_block=bytes_per_block,
            max_num_seqs=self.scheduler_config.max_num_seqs,
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
        self.table = RequestTable(eos_token_ids)
        self.is_async = self.device.type == "cuda" if is_async is None else is_async
        self.runner = self._make_runner(max_model_len, on_progress)
        self.facts = ExecutorFacts(
            max_model_len=max_model_len,
            vocab_size=self.model_config.vocab_size,
            num_device_blocks=num_blocks,
            num_host_blocks=0,
            block_bytes=bytes_per_block,
            dtype=str(dtype).removeprefix("torch."),
            device=str(self.device),
        )

    @torch.inference_mode()
    def _make_runner(
        self, max_model_len: int, on_progress: Callable[[str, float], None]
    ) -> ModelRunner:
        if not self.is_async:
            return ModelRunner(self.model, self.kv.device, self.table, self.device)
        is_captured = not self.config.enforce_eager and is_capturable(
            self.model_config, self.device
        )
        return make_async_runner(
            self.model,
            self.kv.device,
            self.table,
            max_num_seqs=self.scheduler_config.max_num_seqs,
            max_model_len=max_model_len,
            vocab_size=self.model_config.vocab_size,
            capture=CudaCapture() if is_captured else None,
            on_progress=on_progress,
        )

    def execute(self, plan: SchedulerOutput) -> StepDone:
        """Carry out one plan."""
        return self.launch(plan)()

    @torch.inference_mode()
    def launch(self, plan: SchedulerOutput) -> Callable[[], StepDone]:
        """Begin one plan; what is returned waits for its end, on any thread."""
        started = time.perf_counter()
        if plan.copies or plan.needs_copies:
            raise RuntimeError(f"step {plan.step_id} moves KV, and there is no host tier")
        for handle in plan.forget:
            self.table.forget(handle)
        for new in plan.new_requests:
            self.table.add(new)
        for work in plan.work:
            self.kv.admit(work.block_ids)
        states = [self.table.advance(work) for work in plan.work]
        if isinstance(self.runner, AsyncModelRunner) and plan.work:
            step = self.runner.launch(plan.work, states)
            return partial(_await, plan.step_id, step)
        samples: Sequence[Sample] = ()
        prompt_logprobs: Mapping[int, Sequence[TokenLogprobs]] = {}
        if plan.work:
            samples, prompt_logprobs = self.runner.run(plan.work, states)
        seconds = time.perf_counter() - started
        done = StepDone(plan.step_id, samples, seconds, prompt_logprobs)
        return lambda: done


def _await(step_id: int, step: PendingStep) -> StepDone:
    step.wait()
    return StepDone(step_id, step.samples, step.device_s, step.prompt_logprobs)


def choose_device(name: str) -> torch.device:
    """Return the device of `--device`; auto takes CUDA where there is some."""
    has_cuda = torch.cuda.is_available()
    if name == "cuda" and not has_cuda:
        raise ConfigError("--device cuda: torch finds no CUDA device here")
    if name == "cuda" or (name == "auto" and has_cuda):
        return torch.device("cuda", 0)
    return torch.device("cpu")


def choose_dtype(name: str, config: ModelConfig, device: torch.device) -> torch.dtype:
    """Return the dtype of `--dtype`; see the module docstring for auto."""
    if name == "auto":
        is_kept = device.type == "cuda" or (
            config.dtype == "bfloat16" and config.hidden_size >= _least_bfloat16_size()
        )
        name = config.dtype if is_kept else "float32"
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def _least_bfloat16_size() -> int:
    has_products = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return BFLOAT16_HIDDEN_SIZE if has_products else BFLOAT16_HIDDEN_SIZE_EMULATED


def choose_ops(
    dtype: torch.dtype, device: torch.device, cpu_kernels: str, is_deterministic: bool
) -> Ops:
    """Return what the network is made of on this device."""
    if device.type == "cuda" and has_triton():
        from fastserve.model.cuda_ops import CudaOps  # Triton need not be where CUDA is not

        cuda_ops = CudaOps(dtype, is_batch_invariant=is_deterministic)
        return DeterministicOps(cuda_ops) if is_deterministic else cuda_ops
    if device.type != "cpu":
        return DeterministicOps(RowwiseOps(dtype)) if is_deterministic else TorchOps(dtype)
    try:
        kernels = choose_kernels(cast(KernelChoice, cpu_kernels), dtype)  # config.py checks it
    except BuildError as error:
        raise ConfigError(f"--cpu-kernels {cpu_kernels}: {error}") from error
    if is_deterministic:
        return DeterministicOps(RowwiseCpuOps(dtype, kernels))
    return CpuOps(dtype, kernels)


def is_capturable(config: ModelConfig, device: torch.device) -> bool:
    """Whether decodes can be CUDA graphs: plain attention and routing to experts ask the host."""
    has_experts = isinstance(config, LlamaConfig) and config.experts is not None
    return device.type == "cuda" and has_triton() and not has_experts


def has_triton() -> bool:
    """Whether Triton is installed, which comes with torch where that comes with CUDA."""
    return find_spec("triton") is not None


def choose_max_model_len(asked: int | None, config: ModelConfig) -> int:
    """Return the window: the model's, or the shorter one asked for."""
    if asked is None:
        return config.max_model_len
    if asked > config.max_model_len:
        reason = f"the model's window is {config.max_model_len} tokens"
        if config.max_model_len == config.sliding_window:
            reason = (
                f"the model attends to a sliding window of {config.sliding_window} tokens, "
                "and longer contexts are not supported"
            )
        raise ConfigError(f"--max-model-len: {asked} is too long: {reason}")
    return asked
