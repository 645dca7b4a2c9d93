"""An engine process without a model: the real loop and scheduler before a checked fake device.

`--engine-fd N` as in fastserve.launch; the model's name chooses a fault. Steps take real time, so
that a test can act while they run; ids are a function of (seed, position), as a sampler's.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable

from fastserve.core.build import build_scheduler
from fastserve.core.cost_model import CostModel
from fastserve.core.messages import ExecutorOutput, SchedulerOutput
from fastserve.engine import process
from fastserve.engine.engine import Engine, MonotonicClock
from fastserve.host.log import open_log
from fastserve.settings.option import ConfigError
from fastserve.settings.scheduler import SchedulerConfig
from fastserve.sim.clock import VirtualClock
from fastserve.wire.engine_messages import Configure, EngineInfo, Progress
from fastserve.wire.frames import encode_frame
from fastserve.wire.joining import JoinError
from tests.fake_executor import FakeExecutor

STEP_S = 0.001
BLOCK_SIZE = 16
NUM_BLOCKS = 256
WINDOW = 2048
FAILING_STEP = 30
POISON = 666  # a token that some models cannot compute


class PacedExecutor:
    """A FakeExecutor whose steps take STEP_S of real time; `wait` blocks, as a device's does."""

    num_slots = 1
    lookahead = 0

    def __init__(
        self,
        failing_step: int | None = None,
        on_poison: Callable[[PacedExecutor], None] | None = None,
    ) -> None:
        self.fails_next = False  # the step that is submitted next fails
        self.hangs_next = False  # it never ends
        self._inner = FakeExecutor(VirtualClock(), BLOCK_SIZE)
        self._failing_step = failing_step
        self._on_poison = on_poison
        self._finishes_at = float("inf")
        self._condition = threading.Condition()
        self._is_woken = False

    def can_submit(self) -> bool:
        """Whether no step runs."""
        return self._inner.can_submit()

    def submit(self, plan: SchedulerOutput) -> None:
        """Start a step."""
        if plan.step_id == self._failing_step:
            raise RuntimeError("the device\nfell off the bus")
        if self._on_poison and any(POISON in work.token_ids for work in plan.work):
            self._on_poison(self)
        self._inner.fails_next |= self.fails_next
        self._inner.submit(plan)
        if plan.work:
            takes_s = float("inf") if self.hangs_next else STEP_S
            self._finishes_at = time.monotonic() + takes_s
        self.fails_next = self.hangs_next = False

    def wait(self, until: float) -> ExecutorOutput | None:
        """Block until the step is done, `wake`, or `until`."""
        with self._condition:
            while not self._is_woken:
                left = min(until, self._finishes_at) - time.monotonic()
                if left <= 0:
                    break
                self._condition.wait(None if left == float("inf") else left)
            self._is_woken = False
        if time.monotonic() < self._finishes_at:
            return None
        self._finishes_at = float("inf")
        return self._inner.wait(float("inf"))

    def wake(self) -> None:
        """End a wait."""
        with self._condition:
            self._is_woken = True
            self._condition.notify()

    def close(self) -> None:
        """There is nothing to free."""


def fail(device: PacedExecutor) -> None:
    """Fail as a device does that says so."""
    raise RuntimeError("an illegal address")


def die(device: PacedExecutor) -> None:
    """End without a word."""
    os.kill(os.getpid(), signal.SIGKILL)


def fail_the_step(device: PacedExecutor) -> None:
    """Fail this step, and go on."""
    device.fails_next = True


def hang_the_step(device: PacedExecutor) -> None:
    """Never end this step, while all threads live."""
    device.hangs_next = True


def hang_the_loop(device: PacedExecutor) -> None:
    """Keep the engine's own thread, while others live."""
    threading.Event().wait()


def kill_a_thread(device: PacedExecutor) -> None:
    """Let another thread die, of what it should have done."""
    threading.Thread(target=encode_frame, args=(UNSAYABLE,), name="helper").start()


UNSAYABLE = Progress("a number that no message can carry", 2**70)
FATES: dict[str, Callable[[PacedExecutor], None]] = {
    "fails-on-poison": fail,
    "dies-on-poison": die,
    "fails-steps-on-poison": fail_the_step,
    "step-hangs-on-poison": hang_the_step,
    "loop-hangs-on-poison": hang_the_loop,
    "thread-dies-on-poison": kill_a_thread,
}


def open_engine(configure: Configure, on_progress: Callable[[str, float], None]) -> process.Opened:
    """Return an engine over the paced device."""
    config = configure.config
    on_progress("loading weights", 0.5)
    if config.model == "unloadable":
        raise ConfigError("the weights are\nnot there")
    if config.model == "lonely":
        raise JoinError("rank 1 did not join within 30 s")
    if config.model == "endless":
        threading.Event().wait()
    executor = PacedExecutor(
        FAILING_STEP if config.model == "failing" else None, FATES.get(config.model)
    )
    scheduler_config = SchedulerConfig(
        max_num_seqs=8,
        max_num_batched_tokens=64,
        max_model_len=WINDOW,
        block_size=BLOCK_SIZE,
        scheduling_policy=config.scheduling_policy,
    )
    costs = CostModel(base_s=STEP_S, prefill_token_s=1e-5, decode_seq_s=1e-5)
    scheduler = build_scheduler(scheduler_config, costs, NUM_BLOCKS)
    info = EngineInfo(
        model=config.model,
        max_model_len=2**70 if config.model == "unsayable" else WINDOW,
        max_request_tokens=WINDOW,
        vocab_size=60_000,
        block_size=BLOCK_SIZE,
        num_device_blocks=NUM_BLOCKS,
        num_host_blocks=0,
        block_bytes=1000,
        eos_token_ids=frozenset(),
        dtype="float32",
        device="cpu",
        cost_model=costs,
        max_num_seqs=8,
        enable_prefix_caching=True,
    )
    return process.Opened(Engine(scheduler, executor, MonotonicClock()), info)


if __name__ == "__main__":
    open_log("WARNING")
    sys.exit(process.run(int(sys.argv[2]), open_engine))
