"""LocalExecutor: one worker on one compute thread of this process.

Rules: everything torch happens on that thread (its thread pool belongs to it), except that on CUDA
a second one waits for launched steps; callers wait on a condition, never poll. A slot is free again
once `wait` has handed its step out, so that a plan never splits a batch that could run together. A
step that cannot be launched is reported as failed, and the next one runs. A failure of the device
ends the executor: `wait` raises it, after what finished before it. Must not know: scheduling.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NoReturn, TypeVar

import torch

from fastserve.core.cost_model import CostModel
from fastserve.core.messages import ExecutorOutput, SchedulerOutput, StepDone
from fastserve.executor.profiler import load_or_measure
from fastserve.executor.worker import ExecutorFacts, Worker
from fastserve.settings.engine import EngineConfig

T = TypeVar("T")

logger = logging.getLogger(__name__)


class LocalExecutor:
    """Fits engine.interfaces.Executor."""

    num_slots = 1

    def __init__(
        self,
        config: EngineConfig,
        model_dir: Path,
        *,
        eos_token_ids: frozenset[int],
        on_progress: Callable[[str, float], None],
        lookahead: int | None = None,
        is_poisoned: bool = False,
        is_async: bool | None = None,
    ) -> None:
        self._on_progress = on_progress
        self._changed = threading.Condition()
        self._done: list[StepDone] = []
        self._num_unreported = 0
        self._is_woken = False
        self._error: BaseException | None = None
        self._num_threads = config.num_threads or torch.get_num_threads()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="fastserve-compute")
        try:
            self._call(lambda: torch.set_num_threads(self._num_threads))
            self._worker = self._call(
                lambda: Worker(
                    config,
                    model_dir,
                    eos_token_ids=eos_token_ids,
                    on_progress=on_progress,
                    is_poisoned=is_poisoned,
                    is_async=is_async,
                )
            )
        except BaseException:
            self._thread.shutdown()
            raise
        self.lookahead = int(self._worker.is_async) if lookahead is None else lookahead
        # Where a launched step is not a finished one, another thread waits for its end.
        self._reporter = (
            ThreadPoolExecutor(1, "fastserve-report") if self._worker.is_async else None
        )

    @property
    def facts(self) -> ExecutorFacts:
        """Sizes of the model and of the KV pool."""
        return self._worker.facts

    def cost_model(self) -> CostModel:
        """Return the fitted step times, measured now unless a fitting profile is at hand."""
        return self._call(
            lambda: load_or_measure(self._worker, self._num_threads, self._on_progress)
        )

    def can_submit(self) -> bool:
        """Whether a compute slot is free."""
        with self._changed:
            return self._num_unreported < self.num_slots + self.lookahead

    def submit(self, plan: SchedulerOutput) -> None:
        """Begin to carry out a plan and return at once."""
        with self._changed:
            self._num_unreported += 1
        self._thread.submit(self._run, plan)

    def wait(self, until: float) -> ExecutorOutput | None:
        """Return everything that finished, or None once woken or late."""
        with self._changed:
            while not (self._done or self._is_woken or self._error):
                timeout = until - time.monotonic()
                if timeout <= 0.0:
                    break
                self._changed.wait(None if math.isinf(timeout) else timeout)
            self._is_woken = False
            if self._done:
                steps, self._done = tuple(self._done), []
                self._num_unreported -= len(steps)
                return ExecutorOutput(steps)
            if self._error is not None:
                raise RuntimeError(f"a step failed: {self._error!r}") from self._error
            return None

    def wake(self) -> None:
        """End a `wait` in progress, or the next one."""
        with self._changed:
            self._is_woken = True
            self._changed.notify_all()

    def close(self) -> None:
        """Finish the step in progress and stop the thread."""
        self._thread.shutdown(cancel_futures=True)
        if self._reporter is not None:
            self._reporter.shutdown(cancel_futures=True)

    def _run(self, plan: SchedulerOutput) -> None:
        if self._error is not None:
            return
        started = time.perf_counter()
        try:
            finish = self._worker.launch(plan)
        except Exception as error:
            logger.exception("step %d failed; its requests end with an error", plan.step_id)
            done = StepDone(plan.step_id, (), time.perf_counter() - started, error=_one_line(error))
            finish = partial(self._fail, done)
        except BaseException as error:  # raised again by `wait`, on the engine's thread
            finish = partial(_raise, error)
        if self._reporter is None:
            self._report(finish)
        else:
            self._reporter.submit(self._report, finish)

    def _fail(self, done: StepDone) -> StepDone:
        self._worker.check_device()
        return done

    def _report(self, finish: Callable[[], StepDone]) -> None:
        if self._error is not None:
            return
        try:
            done = finish()
        except BaseException as error:  # the same, and after the steps before it
            with self._changed:
                self._error = error
                self._changed.notify_all()
            return
        with self._changed:
            self._done.append(done)
            self._changed.notify_all()

    def _call(self, function: Callable[[], T]) -> T:
        return self._thread.submit(function).result()


def _raise(error: BaseException) -> NoReturn:
    raise error


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split()).removesuffix(":")
