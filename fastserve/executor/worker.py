"""Worker: one rank; it loads weights, says its room for KV, allocates, then carries out plans.

Rules: `load`, `room`, `allocate`, once each and in this order, then `launch` and `move`. Owns the
model, the KV and the state per request; all of it is used from one thread, but for the end of a
launched step, which any thread may wait for and which writes the ids drawn, and for copies, which
begin as soon as they are submitted and run beside it. What makes or runs the network is in
inference mode, which a thread is in only where it says so. What ranks must have in common is handed
in. Must not know: scheduling, sockets, which thread runs it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch

from fastserve.checkpoint.model_config import ModelConfig
from fastserve.core.messages import Copy, Sample, SchedulerOutput, StepDone, TokenLogprobs, Work
from fastserve.core.request import Handle
from fastserve.executor.async_runner import AsyncModelRunner, PendingStep, make_async_runner
from fastserve.executor.block_checks import BlockChecks
from fastserve.executor.choices import Choices, choose_capture, choose_cpu_kernels, choose_ops
from fastserve.executor.collectives import NO_PEERS, Peers
from fastserve.executor.copier import Copier, Report
from fastserve.executor.copy_times import CopyTimes, measure_copies
from fastserve.executor.cuda_graphs import CudaCapture
from fastserve.executor.facts import BlockCounts, RankFacts
from fastserve.executor.kv_store import KVShape, KVStore, room_for_blocks
from fastserve.executor.model_runner import ModelRunner
from fastserve.executor.pipelined_network import PipelinedNetwork
from fastserve.executor.poison import Poison
from fastserve.executor.request_table import RequestTable
from fastserve.model.families.architectures import Network, load_network
from fastserve.model.loader import open_weights
from fastserve.model.ops.interfaces import Ops
from fastserve.model.parallel import Shard
from fastserve.model.stages import Stage
from fastserve.settings.engine import EngineConfig


class Worker:
    """Carries out plans with one model on one device."""

    model: Network  # from `load` on
    kv: KVStore  # from `allocate` on, as are the runner and the copier
    runner: ModelRunner
    copier: Copier

    def __init__(
        self,
        config: EngineConfig,
        model_config: ModelConfig,
        choices: Choices,
        *,
        eos_token_ids: frozenset[int],
        stage: Stage | None = None,  # of the layers; None: all of them
        peers: Peers = NO_PEERS,
        num_local_ranks: int = 1,  # that share the memory of this host
        is_poisoned: bool = False,
        is_checked: bool = False,  # whether blocks that move are held against what they were
        is_async: bool | None = None,  # whether `launch` returns before the end; None: on CUDA
    ) -> None:
        self.config = config
        self.model_config = model_config
        self.choices = choices
        self.device = choices.device
        self.stage = stage or Stage(0, model_config.num_layers, model_config.num_layers)
        self.peers = peers
        self.num_local_ranks = num_local_ranks
        self.is_poisoned = is_poisoned
        self.poison: Poison | None = None
        self.is_checked = is_checked
        self.checks: BlockChecks | None = None
        self.is_async = self.device.type == "cuda" if is_async is None else is_async
        self.kv_shape = KVShape(
            self.stage.stop - self.stage.first,
            len(Shard.of(peers.group).kv_heads(model_config)),
            model_config.head_dim,
        )
        self.block_bytes = self.kv_shape.block_bytes(config.block_size, choices.dtype)
        vocab_size = model_config.vocab_size
        self.table = RequestTable(frozenset(i for i in eos_token_ids if i < vocab_size))
        self._lost: dict[Handle, int] = {}  # → the epoch whose state went with a failed step

    def load(self, model_dir: Path, on_progress: Callable[[str, float], None]) -> RankFacts:
        """Read the weights. Raises ConfigError where settings do not fit the model."""
        config, dtype = self.config, self.choices.dtype
        on_progress("loading weights", 0.0)
        quantization, is_deterministic = config.quantization, config.deterministic
        kernels = choose_cpu_kernels(
            config.cpu_kernels, dtype, self.device, quantization, is_deterministic=is_deterministic
        )
        ops = choose_ops(dtype, self.device, kernels, is_deterministic, quantization)
        self.model = self._load_network(model_dir, ops)
        on_progress("loading weights", 1.0)
        return RankFacts(
            block_bytes=self.block_bytes,
            cpu_kernels="torch" if kernels is None else kernels.name,
            num_threads=torch.get_num_threads(),
        )

    @torch.inference_mode()
    def _load_network(self, model_dir: Path, ops: Ops) -> Network:
        choices = self.choices
        weights = open_weights(
            model_dir,
            self.config.load_format,
            choices.dtype,
            self.device,
            is_checked=self.config.check_weights,
        )
        decoder = load_network(
            self.model_config,
            weights,
            ops,
            max_len=choices.max_model_len,
            device=self.device,
            stage=self.stage,
            group=self.peers.group,
        )
        is_whole = self.stage.is_first and self.stage.is_last
        return decoder if is_whole else PipelinedNetwork(decoder, self.peers)

    def room(self) -> BlockCounts:
        """Return for how many KV blocks there is room; ConfigError when not one on the device."""
        return room_for_blocks(
            self.config, self.block_bytes, self.device, num_local_ranks=self.num_local_ranks
        )

    def allocate(self, blocks: BlockCounts, on_progress: Callable[[str, float], None]) -> None:
        """Make the KV of both tiers and all else that plans need."""
        config = self.config
        if blocks.host:
            on_progress("allocating host memory", 0.0)
        self.kv = KVStore(
            self.kv_shape,
            blocks,
            block_size=config.block_size,
            dtype=self.choices.dtype,
            device=self.device,
        )
        if self.is_poisoned:
            self.poison = Poison(
                self.kv, config.block_size, spares_full_blocks=config.enable_prefix_caching
            )
        if self.is_checked:
            self.checks = BlockChecks(self.kv)
        if blocks.host:
            on_progress("allocating host memory", 1.0)
        self.copier = Copier(self.kv, bandwidth=self._bandwidth, checks=self.checks)
        self.runner = self._make_runner(on_progress)

    @property
    def _bandwidth(self) -> float | None:
        gigabytes = self.config.swap_bandwidth
        return None if gigabytes is None else gigabytes * 1e9

    @torch.inference_mode()
    def _make_runner(self, on_progress: Callable[[str, float], None]) -> ModelRunner:
        if not self.is_async:
            return ModelRunner(self.model, self.kv.device, self.table, self.device)
        is_captured = choose_capture(self.config.enforce_eager, self.model_config, self.device)
        return make_async_runner(
            self.model,
            self.kv.device,
            self.table,
            max_num_seqs=self.choices.limits.max_num_seqs,
            max_model_len=self.choices.max_model_len,
            vocab_size=self.model_config.vocab_size,
            capture=CudaCapture() if is_captured else None,
            on_progress=on_progress,
        )

    def measure_copies(self) -> CopyTimes:
        """Measure copies between the tiers while no block is in use; there must be a host tier."""
        return measure_copies(self.kv, self._bandwidth)

    def move(self, copy: Copy, report: Report) -> None:
        """Begin a copy and return at once; `report` is called on another thread, or never more.

        Callable from any thread, as `launch` is not.
        """
        if self.poison is not None:
            self.poison.move(copy)
        self.copier.begin(copy, report)

    def close(self) -> None:
        """Stop what copies blocks."""
        self.copier.close()

    def expect(self, plan: SchedulerOutput) -> None:
        """Begin to receive what an earlier stage will hand over for a plan to come.

        Plans are launched in the order in which they are expected. Callable from any thread.
        """
        if plan.work and self.peers.upstream is not None:
            self.peers.upstream.expect(plan.num_tokens)

    def execute(self, plan: SchedulerOutput) -> StepDone:
        """Carry out the steps and the state of one plan, and wait for its end."""
        return self.launch(plan)()

    @torch.inference_mode()
    def launch(self, plan: SchedulerOutput) -> Callable[[], StepDone]:
        """Begin one plan but for its copies; what is returned waits for its end, on any thread.

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
        started, waited_s = time.perf_counter(), self.peers.waited_s
        for handle in plan.forget:
            self._forget(handle)
            self._lost.pop(handle, None)
        for new in plan.new_requests:
            self._forget(new.handle)  # what it was in an earlier epoch
            self.table.add(new)
            self._lost.pop(new.handle, None)
        works = self._without_lost(plan.work) if self._lost else plan.work
        if self.poison is not None:
            for work in works:
                self.poison.enter(work)
        states = [self.table.advance(work) for work in works]
        if isinstance(self.runner, AsyncModelRunner) and works:
            step = self.runner.launch(works, states)
            return partial(_await, plan, works, step)
        samples: Sequence[Sample] = ()
        prompt_logprobs: Mapping[Handle, Sequence[TokenLogprobs]] = {}
        if works:
            samples, prompt_logprobs = self.runner.run(works, states)
            self._finish_stream()
        # Waiting for an earlier stage is no work of this one.
        seconds = time.perf_counter() - started - (self.peers.waited_s - waited_s)
        done = StepDone(plan.step_id, _placed(plan, works, samples), seconds, prompt_logprobs)
        return lambda: done

    def _finish_stream(self) -> None:
        """Wait for what was launched: a stage without samples has not waited for anything."""
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()

    def _forget(self, handle: Handle) -> None:
        if self.poison is not None:
            self.poison.leave(handle, *self.table.named(handle))
        self.table.forget(handle)

    def _lose(self, plan: SchedulerOutput) -> None:
        for work in plan.work:
            self._forget(work.handle)
            self._lost[work.handle] = work.epoch

    def _without_lost(self, works: Sequence[Work]) -> Sequence[Work]:
        return [work for work in works if self._lost.get(work.handle) != work.epoch]


def _await(plan: SchedulerOutput, works: Sequence[Work], step: PendingStep) -> StepDone:
    step.wait()
    samples = _placed(plan, works, step.samples)
    return StepDone(plan.step_id, samples, step.device_s, step.prompt_logprobs)


def _placed(
    plan: SchedulerOutput, works: Sequence[Work], samples: Sequence[Sample]
) -> Sequence[Sample]:
    """Return one sample for each Work of the plan; those of lost requests are never read."""
    if len(works) == len(plan.work):
        return samples
    done = {work.handle for work in works}
    drawn = iter(samples)
    sampled = [work for work in plan.work if work.sample]
    return [next(drawn) if work.handle in done else Sample(0) for work in sampled]
