"""Worker: one rank. `execute(plan)` is its only entry point.

Rules: owns the model, the KV and the state per request; all of it is used from one thread.
Sizes are measured here once and handed out as ExecutorFacts.
Dtype `auto`: on CUDA the checkpoint's; on a CPU float32 (exact, and the fastest for small models,
whose steps are bound by operations, not by memory), except for bfloat16 checkpoints of a hidden
size of 1024 and more, where reading half the bytes wins.
Must not know: scheduling, sockets, which thread runs it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from fastserve.config import ConfigError, EngineConfig, SchedulerConfig
from fastserve.core.output import SchedulerOutput, StepDone
from fastserve.executor.kv_store import KVStore, block_bytes, count_blocks
from fastserve.executor.model_runner import ModelRunner
from fastserve.executor.request_table import RequestTable
from fastserve.model.config import ModelConfig, read_model_config
from fastserve.model.llama import LlamaModel
from fastserve.model.loader import open_weights
from fastserve.model.torch_ops import TorchOps

SMALL_HIDDEN_SIZE = 1024


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
            self.model = LlamaModel(
                self.model_config,
                weights,
                TorchOps(dtype),
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
        self.runner = ModelRunner(self.model, self.kv.device, self.table, self.device)
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
    def execute(self, plan: SchedulerOutput) -> StepDone:
        """Carry out one plan."""
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
        if not plan.work:
            return StepDone(plan.step_id, (), time.perf_counter() - started)
        samples, prompt_logprobs = self.runner.run(plan.work, states)
        return StepDone(plan.step_id, samples, time.perf_counter() - started, prompt_logprobs)


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
        is_large_bfloat16 = config.dtype == "bfloat16" and config.hidden_size >= SMALL_HIDDEN_SIZE
        name = config.dtype if device.type == "cuda" or is_large_bfloat16 else "float32"
    dtype: torch.dtype = getattr(torch, name)
    return dtype


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
