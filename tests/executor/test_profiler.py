"""The profiler: what it measures, its cache, and what it refuses."""

from __future__ import annotations

import json
import logging

import pytest

from fastserve.executor import profiler
from fastserve.executor.fitting import COEFFICIENTS, fit
from fastserve.executor.profiler import (
    cache_path,
    kinds_of_steps,
    load_or_measure,
    make_fingerprint,
    measure,
)
from fastserve.executor.worker import Worker
from fastserve.settings.engine import EngineConfig
from fastserve.settings.option import ConfigError
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


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A user's cache directory of this test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "fastserve"


def open_worker(path, **settings) -> Worker:
    """Load a worker with a small pool."""
    values = {"num_device_blocks": 64, "max_num_seqs": 4, "device": "cpu", **settings}
    config = EngineConfig(model=str(path), **values)
    return Worker(config, path, eos_token_ids=frozenset(), on_progress=silent)


def test_measuring_leaves_the_worker_as_it_was(checkpoint):
    """Every kind of step is run, progress reaches 1, and the worker knows no request after."""
    worker = open_worker(checkpoint)
    progress: list[float] = []
    measurements = measure(worker, lambda stage, fraction: progress.append(fraction))
    assert sorted(item.shares for item in measurements) == sorted(set(kinds_of_steps(worker)))
    assert all(item.seconds > 0.0 for item in measurements)
    assert progress == sorted(progress)
    assert progress[-1] == 1.0
    assert len(worker.table) == 0
    request, again = (Driven([5, 6, 7, 8], num_tokens=5) for _ in range(2))
    Driver(worker.execute, 64, 16).run(request)
    Driver(open_worker(checkpoint).execute, 64, 16, seed=1).run(again)
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
    worker = open_worker(checkpoint, **{"max_num_seqs": None, **settings})
    kinds = kinds_of_steps(worker)
    limits, block_size = worker.limits, worker.config.block_size
    assert kinds
    for kind in kinds:
        assert len(kind) <= limits.max_num_seqs
        assert sum(tokens for tokens, _ in kind) <= max(limits.max_num_batched_tokens, len(kind))
        blocks = sum(-(-(tokens + start) // block_size) for tokens, start in kind)
        assert blocks <= worker.facts.num_device_blocks
        assert all(tokens + start <= worker.facts.max_model_len for tokens, start in kind)


def test_a_profile_is_measured_once(checkpoint, cache, monkeypatch):
    """The second start reads what the first one measured, and the file tells how well it fits."""
    worker = open_worker(checkpoint)
    first = load_or_measure(worker, 1, silent)
    (file,) = cache.glob("*.json")
    profile = json.loads(file.read_text(encoding="utf-8"))
    assert profile["fingerprint"] == make_fingerprint(worker, 1)
    assert 0.0 <= profile["fit_error"]["mean"] <= profile["fit_error"]["max"]
    monkeypatch.setattr(profiler, "measure", None)
    assert load_or_measure(worker, 1, silent) == first


def test_a_stale_profile_is_measured_again(checkpoint, cache, caplog):
    """A cached profile of another setup, or a broken one, is replaced, with a note."""
    worker = open_worker(checkpoint)
    load_or_measure(worker, 1, silent)
    (file,) = cache.glob("*.json")
    profile = json.loads(file.read_text(encoding="utf-8"))
    profile["fingerprint"]["torch"] = "1.0"
    for text in (json.dumps(profile), "{"):
        file.write_text(text, encoding="utf-8")
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            load_or_measure(worker, 1, silent)
        assert "measuring step times again" in caplog.text
        assert json.loads(file.read_text(encoding="utf-8"))["fingerprint"]["torch"] != "1.0"


def test_setups_do_not_share_a_file(checkpoint, cache):
    """Another number of threads or another dtype has a file of its own."""
    load_or_measure(open_worker(checkpoint), 1, silent)
    load_or_measure(open_worker(checkpoint), 2, silent)
    load_or_measure(open_worker(checkpoint, dtype="bfloat16"), 1, silent)
    assert len(list(cache.glob("*.json"))) == 3


def test_going_back_to_a_setting_does_not_measure_again(checkpoint, cache, monkeypatch):
    """Kernels are known by what was chosen: `auto` and what it comes to are the same."""
    setups: tuple[dict, ...] = (
        {},
        {"cpu_kernels": "torch"},
        {"cpu_kernels": "native"},
        {"deterministic": True},
    )
    costs = [load_or_measure(open_worker(checkpoint, **setup), 1, silent) for setup in setups]
    assert costs[0] == costs[2]
    assert len(list(cache.glob("*.json"))) == 3
    monkeypatch.setattr(profiler, "measure", None)
    for setup, cost_model in zip(setups, costs, strict=True):
        assert load_or_measure(open_worker(checkpoint, **setup), 1, silent) == cost_model
    worker = open_worker(checkpoint)
    fingerprint = make_fingerprint(worker, 1)
    eager = cache_path(worker, fingerprint | {"enforce_eager": True})  # only CUDA takes the flag
    assert eager != cache_path(worker, fingerprint)


def test_a_named_profile_is_read_or_refused(checkpoint, cache, tmp_path):
    """--profile reads exactly that file; another setup's, a broken or missing one is an error."""
    first = load_or_measure(open_worker(checkpoint), 1, silent)
    (file,) = cache.glob("*.json")
    named = tmp_path / "named.json"
    file.rename(named)
    worker = open_worker(checkpoint, profile=str(named))
    assert load_or_measure(worker, 1, silent) == first
    assert not list(cache.glob("*.json"))
    with pytest.raises(ConfigError, match="num_threads is 1 there, 2 here"):
        load_or_measure(worker, 2, silent)
    named.write_text('{"fingerprint": 3}', encoding="utf-8")
    with pytest.raises(ConfigError, match="not a profile"):
        load_or_measure(worker, 1, silent)
    named.unlink()
    with pytest.raises(ConfigError, match="No such file"):
        load_or_measure(worker, 1, silent)


def test_a_cache_that_cannot_be_written_is_only_logged(checkpoint, cache, caplog):
    """Serving goes on with the measured model."""
    cache.parent.mkdir()
    cache.write_text("a file where the directory should be", encoding="utf-8")
    with caplog.at_level(logging.WARNING):
        assert load_or_measure(open_worker(checkpoint), 1, silent).min_iteration_s > 0.0
    assert "the profile is not kept" in caplog.text


def test_a_slow_model_is_measured_briefly(checkpoint, monkeypatch):
    """Past the time limit no further kind is begun, once there are enough for a fit."""
    monkeypatch.setattr(profiler, "TIME_LIMIT_S", 0.0)
    measurements = measure(open_worker(checkpoint), silent)
    assert len(measurements) == len(COEFFICIENTS) + 1
    assert fit(measurements).min_iteration_s > 0.0


def test_decodes_are_measured_at_mixed_contexts_and_the_largest_batch(checkpoint):
    """Real batches are of all lengths, up to max_num_seqs."""
    decodes = [
        kind
        for kind in kinds_of_steps(open_worker(checkpoint, max_num_seqs=6))
        if all(num_tokens == 1 for num_tokens, _ in kind)
    ]
    assert {len(kind) for kind in decodes} == {1, 2, 4, 6}
    widest = max(decodes, key=lambda kind: (len(kind), sum(start for _, start in kind)))
    assert len({start for _, start in widest}) > 3
