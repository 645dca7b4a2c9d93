"""The profiler: what it measures, and what it leaves behind."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from fastserve.core.cost_model import TERMS
from fastserve.executor import profiler
from fastserve.executor.fitting import Measurement, fit
from fastserve.executor.opening import Opened, open_worker
from fastserve.executor.profiler import kinds_of_steps, measure, num_profiled_blocks
from fastserve.settings.engine import EngineConfig
from tests.checkpoints import make_checkpoint
from tests.executor.driver import Driven, Driver


def silent(stage: str, fraction: float) -> None:
    """Show no progress."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A tiny Llama."""
    path = tmp_path_factory.mktemp("llama")
    make_checkpoint(path, "llama")
    return path


def opened(path, **settings) -> Opened:
    """Load a worker with a small pool."""
    values = {"num_device_blocks": 64, "max_num_seqs": 4, "device": "cpu", **settings}
    config = EngineConfig(model=str(path), **values)
    return open_worker(config, path, num_threads=1, eos_token_ids=frozenset(), on_progress=silent)


def measured(each: Opened, on_progress: Callable[[str, float], None] = silent) -> list[Measurement]:
    """Measure on a worker."""
    return measure(each.setup, each.worker.execute, on_progress)


def test_measuring_leaves_the_worker_as_it_was(checkpoint):
    """Every kind of step is run, progress reaches 1, and the worker knows no request after."""
    worker, setup = each = opened(checkpoint)
    progress: list[float] = []
    measurements = measured(each, lambda stage, fraction: progress.append(fraction))
    assert sorted(item.shares for item in measurements) == sorted(set(kinds_of_steps(setup)))
    assert all(item.seconds > 0.0 for item in measurements)
    assert progress == sorted(progress)
    assert progress[-1] == 1.0
    assert len(worker.table) == 0
    request, again = (Driven([5, 6, 7, 8], num_tokens=5) for _ in range(2))
    Driver(worker.execute, 64, 16).run(request)
    Driver(opened(checkpoint).worker.execute, 64, 16, seed=1).run(again)
    assert request.output == again.output


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"num_device_blocks": 1},
        {"max_model_len": 2, "num_device_blocks": 1},
        {"max_num_seqs": 1, "max_num_batched_tokens": 1},
        {"block_size": 1, "num_device_blocks": 2},
    ],
)
def test_kinds_of_steps_fit_the_limits(checkpoint, settings):
    """Whatever the limits, there is something to measure, and nothing beyond them."""
    setup = opened(checkpoint, **{"max_num_seqs": None, **settings}).setup
    kinds = kinds_of_steps(setup)
    facts, block_size = setup.facts, setup.config.block_size
    limits = facts.limits
    assert 1 <= num_profiled_blocks(setup) <= facts.num_device_blocks
    assert kinds
    for kind in kinds:
        assert len(kind) <= limits.max_num_seqs
        assert sum(tokens for tokens, _ in kind) <= max(limits.max_num_batched_tokens, len(kind))
        blocks = sum(-(-(tokens + start) // block_size) for tokens, start in kind)
        assert blocks <= facts.num_device_blocks
        assert all(tokens + start <= facts.max_model_len for tokens, start in kind)


def test_a_slow_model_is_measured_briefly(checkpoint, monkeypatch):
    """Past the time limit no further kind is begun, once there are enough for a fit."""
    monkeypatch.setattr(profiler, "TIME_LIMIT_S", 0.0)
    measurements = measured(opened(checkpoint))
    assert len(measurements) == len(TERMS) + 1
    assert fit(measurements).min_iteration_s > 0.0


def test_decodes_are_measured_at_mixed_contexts_and_the_largest_batch(checkpoint):
    """Real batches are of all lengths, up to max_num_seqs."""
    decodes = [
        kind
        for kind in kinds_of_steps(opened(checkpoint, max_num_seqs=6).setup)
        if all(num_tokens == 1 for num_tokens, _ in kind)
    ]
    assert {len(kind) for kind in decodes} == {1, 2, 4, 6}
    widest = max(decodes, key=lambda kind: (len(kind), sum(start for _, start in kind)))
    assert len({start for _, start in widest}) > 3
