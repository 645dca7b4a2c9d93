"""Profiles in files: measured once for a setup, and refused for another."""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
import shutil

import pytest

from fastserve.executor.facts import Setup
from fastserve.executor.fitting import Measurement
from fastserve.executor.opening import open_worker
from fastserve.executor.profile_file import cache_path, load_or_measure, make_fingerprint
from fastserve.settings.engine import EngineConfig
from fastserve.settings.option import ConfigError
from tests.checkpoints import make_checkpoint
from tests.fresh_cache import make_fresh_cache

runs = itertools.count(1)


def measured() -> list[Measurement]:
    """Return the times of some steps, other ones at each call."""
    slowness = next(runs)
    return [
        Measurement(((1, context),) * batch, slowness * (1e-3 + 1e-8 * batch * context))
        for batch in (1, 2, 4, 8)
        for context in (8, 64)
    ]


def unmeasured() -> list[Measurement]:
    """Fail: there is a profile."""
    raise AssertionError("measured again")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A tiny Llama."""
    path = tmp_path_factory.mktemp("llama")
    make_checkpoint(path, "llama")
    return path


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A user's cache directory of this test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", make_fresh_cache(tmp_path / "cache"))
    return tmp_path / "cache" / "fastserve"


def setup_of(path, num_threads=1, **settings) -> Setup:
    """Load a model, and say what its step times depend on."""
    config = EngineConfig(model=str(path), num_device_blocks=64, device="cpu", **settings)
    opened = open_worker(
        config,
        path,
        num_threads=num_threads,
        eos_token_ids=frozenset(),
        on_progress=lambda stage, fraction: None,
    )
    return opened.setup


def test_a_profile_is_measured_once(checkpoint, cache):
    """The second start reads what the first one measured, and the file tells how well it fits."""
    setup = setup_of(checkpoint)
    first = load_or_measure(setup, measured)
    (file,) = cache.glob("*.json")
    profile = json.loads(file.read_text(encoding="utf-8"))
    assert profile["fingerprint"] == make_fingerprint(setup)
    assert 0.0 <= profile["fit_error"]["mean"] <= profile["fit_error"]["max"]
    assert load_or_measure(setup, unmeasured) == first


def test_a_stale_profile_is_measured_again(checkpoint, cache, caplog):
    """A cached profile of another setup, or a broken one, is replaced, with a note."""
    setup = setup_of(checkpoint)
    load_or_measure(setup, measured)
    (file,) = cache.glob("*.json")
    profile = json.loads(file.read_text(encoding="utf-8"))
    profile["fingerprint"]["torch"] = "1.0"
    for text in (json.dumps(profile), "{"):
        file.write_text(text, encoding="utf-8")
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            load_or_measure(setup, measured)
        assert "measuring step times again" in caplog.text
        assert json.loads(file.read_text(encoding="utf-8"))["fingerprint"]["torch"] != "1.0"


def test_setups_do_not_share_a_file(checkpoint, cache):
    """Another number of threads or another dtype has a file of its own."""
    load_or_measure(setup_of(checkpoint), measured)
    load_or_measure(setup_of(checkpoint, 2), measured)
    load_or_measure(setup_of(checkpoint, dtype="bfloat16"), measured)
    assert len(list(cache.glob("*.json"))) == 3


def test_going_back_to_a_setting_does_not_measure_again(checkpoint, cache):
    """Kernels are known by what was chosen: `auto` and what it comes to are the same."""
    kinds: tuple[dict, ...] = (
        {},
        {"cpu_kernels": "torch"},
        {"cpu_kernels": "native"},
        {"deterministic": True},
        {"quantization": "int8"},
    )
    costs = [load_or_measure(setup_of(checkpoint, **kind), measured) for kind in kinds]
    assert costs[0] == costs[2]
    assert len({cost.base_s for cost in costs}) == 4
    assert len(list(cache.glob("*.json"))) == 4
    for kind, cost_model in zip(kinds, costs, strict=True):
        assert load_or_measure(setup_of(checkpoint, **kind), unmeasured) == cost_model
    setup = setup_of(checkpoint)
    fingerprint = make_fingerprint(setup)
    eager = cache_path(setup, fingerprint | {"enforce_eager": True})  # only CUDA takes the flag
    assert eager != cache_path(setup, fingerprint)


def test_a_named_profile_is_read_or_refused(checkpoint, cache, tmp_path):
    """--profile reads exactly that file; another setup's, a broken or missing one is an error."""
    first = load_or_measure(setup_of(checkpoint), measured)
    (file,) = cache.glob("*.json")
    named = tmp_path / "named.json"
    file.rename(named)
    setup = setup_of(checkpoint, profile=str(named))
    assert load_or_measure(setup, unmeasured) == first
    assert not list(cache.glob("*.json"))
    with pytest.raises(ConfigError, match="num_threads is 1 there, 2 here"):
        load_or_measure(dataclasses.replace(setup, num_threads=2), unmeasured)
    named.write_text('{"fingerprint": 3}', encoding="utf-8")
    with pytest.raises(ConfigError, match="not a profile"):
        load_or_measure(setup, unmeasured)
    named.unlink()
    with pytest.raises(ConfigError, match="No such file"):
        load_or_measure(setup, unmeasured)


def test_a_cache_that_cannot_be_written_is_only_logged(checkpoint, cache, caplog):
    """Serving goes on with the measured model."""
    setup = setup_of(checkpoint)
    shutil.rmtree(cache)
    cache.write_text("a file where the directory should be", encoding="utf-8")
    with caplog.at_level(logging.WARNING):
        assert load_or_measure(setup, measured).min_iteration_s > 0.0
    assert "the profile is not kept" in caplog.text
