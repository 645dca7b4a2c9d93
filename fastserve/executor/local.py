"""LocalExecutor: one worker on one compute thread of this process.

Rules: everything torch happens on that thread (its thread pool belongs to it), except that on CUDA
a second one waits for launched steps. Copies run beside it, on threads of the worker's copier, from
the moment they are submitted, and wait for no step. A step that cannot be launched is reported as
failed, and the next one runs; a plan without work has no step to report, so that its failure is one
of the device. Must not know: scheduling, what is in flight.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import NoReturn

from fastserve.core.messages import ExecutorOutput, SchedulerOutput, StepDone
from fastserve.executor.block_checks import BlockChecks
from fastserve.executor.copy_times import CopyTimes
from fastserve.executor.fitting import Measurement
from fastserve.executor.in_flight import InFlight
from fastserve.executor.opening import open_worker
from fastserve.executor.profiler import measure, num_profiled_blocks
from fastserve.executor.work_thread import WorkThread
from fastserve.settings.engine import EngineConfig

logger = logging.getLogger(__name__)


class LocalExecutor:
    """Fits engine.interfaces.Executor; `setup` is what was found out in opening."""

    num_slots = 1

    def __init__(
        self,
        config: EngineConfig,
        model_dir: Path,
        *,
        num_threads: int,  # of one CPU operation
        eos_token_ids: frozenset[int],
        on_progress: Callable[[str, float], None],
        lookahead: int | None = None,
        is_poisoned: bool = False,
        is_checked: bool = False,
        is_async: bool | None = None,
    ) -> None:
        self._thread = WorkThread("fastserve-compute")
        try:
            self._worker, self.setup = self._thread.call(
                lambda: open_worker(
                    config,
                    model_dir,
                    num_threads=num_threads,
                    eos_token_ids=eos_token_ids,
                    on_progress=on_progress,
                    is_poisoned=is_poisoned,
                    is_checked=is_checked,
                    is_async=is_async,
                )
            )
        except BaseException:
            self._thread.close()
            raise
        self.lookahead = int(self._worker.is_async) if lookahead is None else lookahead
        self._in_flight = InFlight(self.num_slots, self.lookahead)
        # Where a launched step is not a finished one, another thread waits for its end.
        self._reporter = WorkThread("fastserve-report") if self._worker.is_async else None

    def measure(self, on_progress: Callable[[str, float], None]) -> list[Measurement]:
        """Measure step times while no request is known: KV from the start of the pool is lost."""

        def measure_here() -> list[Measurement]:
            self._worker.kv.touch(num_profiled_blocks(self.setup))
            return measure(self.setup, self._worker.execute, on_progress)

        return self._thread.call(measure_here)

    def measure_copies(self) -> CopyTimes:
        """Measure copies between the tiers while no request is known."""
        return self._worker.measure_copies()

    @property
    def checks(self) -> BlockChecks | None:
        """What became of the blocks that moved, where `is_checked`."""
        return self._worker.checks

    def spoil(self, device_ids: Iterable[int], host_ids: Iterable[int]) -> None:
        """Poison free places of both tiers, behind the plans submitted so far."""
        poison = self._worker.poison
        assert poison is not None, "what is not poisoned cannot be spoiled"
        self._thread.call(lambda: poison.spoil(device_ids, host_ids))

    def can_submit(self) -> bool:
        """Whether a compute slot is free."""
        return self._in_flight.can_begin()

    def submit(self, plan: SchedulerOutput) -> None:
        """Begin to carry out a plan and return at once."""
        self._in_flight.begin(plan)
        for copy in plan.copies:
            self._worker.move(copy, self._in_flight.finish_copy)
        if plan.work or plan.forget or plan.new_requests:
            self._thread.submit(partial(self._run, plan))

    def wait(self, until: float) -> ExecutorOutput | None:
        """Return everything that finished, or None once woken or late."""
        return self._in_flight.wait(until)

    def wake(self) -> None:
        """End a `wait` in progress, or the next one."""
        self._in_flight.wake()

    def close(self) -> None:
        """Finish the step in progress and stop the threads; copies end where they are."""
        self._worker.close()
        self._thread.close()
        if self._reporter is not None:
            self._reporter.close()

    def _run(self, plan: SchedulerOutput) -> None:
        if self._in_flight.has_failed:
            return
        started = time.perf_counter()
        try:
            finish = self._worker.launch(plan)
        except Exception as error:
            if plan.work:
                logger.exception("step %d failed; its requests end with an error", plan.step_id)
                seconds = time.perf_counter() - started
                done = StepDone(plan.step_id, (), seconds, error=_one_line(error))
                finish = partial(self._unless_broken, done)
            else:
                finish = partial(_raise, error)
        except BaseException as error:
            finish = partial(_raise, error)
        if self._reporter is None:
            self._report(finish)
        else:
            self._reporter.submit(partial(self._report, finish))

    def _unless_broken(self, failed: StepDone) -> StepDone:
        self._worker.check_device()
        return failed

    def _report(self, finish: Callable[[], StepDone]) -> None:
        if self._in_flight.has_failed:
            return
        try:
            done = finish()
        except BaseException as error:  # raised again by `wait`, on the engine's thread
            self._in_flight.fail(f"a step failed: {error!r}", error)
            return
        self._in_flight.finish(done)


def _raise(error: BaseException) -> NoReturn:
    raise error


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split()).removesuffix(":")
