"""An engine over the real executor, in this process."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from fastserve.core.request import Arrival, SamplingParams
from fastserve.launch.engine import open_engine
from fastserve.settings.engine import EngineConfig
from fastserve.settings.option import ConfigError
from fastserve.verbs.replay import replay
from tests import tiny_tokenizers
from tests.checkpoints import make_checkpoint
from tests.launch.engines import SMALL, generate


def test_info_is_what_was_measured() -> None:
    """The facts of the executor and of the model's files are in EngineInfo."""
    engine, info = open_engine(SMALL)
    engine.close()
    assert info.model == "demo"
    assert info.num_device_blocks == 32
    assert info.max_request_tokens == 32 * info.block_size < info.max_model_len
    assert info.device == "cpu"
    assert info.eos_token_ids
    assert info.sampling_defaults["temperature"] > 0


def test_the_tokenizers_end_ends_a_text_too(tmp_path: Path) -> None:
    """Another id than the model's files name, of the model's tokenizer or of one named."""
    model, other = tmp_path / "model", tmp_path / "other"
    make_checkpoint(model, "llama")  # ends by 1
    other.mkdir()
    settings = {"eos_token": "<|user|>"}
    tiny_tokenizers.save(tiny_tokenizers.byte_level(), other)
    (other / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    config = dataclasses.replace(SMALL, model=str(model), max_num_seqs=2)
    for tokenizer, expected in ((None, {1}), (str(other), {1, 2})):
        engine, info = open_engine(dataclasses.replace(config, tokenizer=tokenizer))
        engine.close()
        assert info.eos_token_ids == expected


def test_generation_config_can_be_left_out() -> None:
    """With `vllm` the model's sampling defaults are not used."""
    engine, info = open_engine(
        EngineConfig(model="demo", num_device_blocks=32, num_threads=1, generation_config="vllm")
    )
    engine.close()
    assert info.sampling_defaults == {}


def test_loading_tells_what_it_is_at() -> None:
    """Progress goes from 0 to 1 in each stage."""
    seen: list[tuple[str, float]] = []
    engine, _ = open_engine(SMALL, lambda stage, fraction: seen.append((stage, fraction)))
    engine.close()
    assert seen
    assert all(stage and 0.0 <= fraction <= 1.0 for stage, fraction in seen)


def test_a_journal_holds_setting_facts_and_plans(tmp_path: Path) -> None:
    """Each life of an engine begins with its setting; a second life follows in the same file."""
    path = tmp_path / "journal.jsonl"
    config = EngineConfig(model="demo", num_device_blocks=32, num_threads=1, journal=str(path))
    for _ in range(2):
        engine, _ = open_engine(config)
        generate(engine, SamplingParams(seed=1, max_tokens=3, ignore_eos=True))
        engine.close()
    kinds = [json.loads(line)[0] for line in path.read_text(encoding="utf-8").splitlines()]
    assert kinds.count("open") == kinds.count("add") == 2
    assert kinds[0] == "open"
    assert kinds.count("update") == 6


@pytest.mark.parametrize("swap_space", [0.0, 0.01])
def test_an_engine_with_a_host_tier_swaps_and_is_replayed(
    swap_space: float, tmp_path: Path
) -> None:
    """Its journal has both tiers and the price of the link; without host memory it recomputes."""
    path = tmp_path / "journal.jsonl"
    config = EngineConfig(
        model="demo", num_device_blocks=16, max_model_len=128, max_num_seqs=3, num_threads=1,
        scheduling_policy="mlfq", mlfq_quantum=1e-3, preemption_mode="reactive",
        swap_space=swap_space, swap_bandwidth=0.5, journal=str(path),
    )  # fmt: skip
    engine, info = open_engine(config)
    for seed in range(6):
        params = SamplingParams(seed=seed, max_tokens=60, ignore_eos=True)
        engine.add(Arrival(range(10 + seed, 50 + seed), params))
    while engine.num_requests:
        engine.step()
    stats = engine.stats().scheduler
    engine.close()
    assert info.block_bytes * info.num_host_blocks <= swap_space * 2**30
    assert (stats.num_swaps > 0) == (stats.host_blocks_total > 0) == (swap_space > 0.0)
    assert stats.host_blocks_total == info.num_host_blocks
    opening = json.loads(path.read_text(encoding="utf-8").splitlines()[0])
    assert opening[5:7] == [16, info.num_host_blocks]
    costs = opening[4]
    assert (costs["copy_block_s"] >= info.block_bytes / 0.5e9) == (swap_space > 0.0)
    assert replay(path) == 0


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"journal": "/dev/full"}, "--journal /dev/full: No space left"),
        ({"journal": "/no/such/journal"}, "--journal /no/such/journal: No such file"),
        ({"profile": "/no/such/profile"}, "profile /no/such/profile: No such file"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused(settings: dict[str, Any], says: str) -> None:
    """A full disk or a path that is none: an error of the setting while the engine is loaded."""
    with pytest.raises(ConfigError, match=f"^{says}"):
        open_engine(dataclasses.replace(SMALL, **settings))


def test_a_restarted_engine_goes_on_without_a_journal(caplog: pytest.LogCaptureFixture) -> None:
    """Requests wait for it, and a full disk is no reason to let them down: one line says so."""
    config = dataclasses.replace(SMALL, journal="/dev/full")
    engine, _ = open_engine(config, is_restart=True)
    assert len(generate(engine, SamplingParams(max_tokens=5, ignore_eos=True))) == 5
    engine.close()
    assert [record.getMessage() for record in caplog.records] == [
        "the engine goes on without its journal: --journal /dev/full: No space left on device"
    ]


def test_a_setting_that_cannot_be_honoured_closes_the_executor() -> None:
    """The error is the configuration's, and nothing keeps running behind it."""
    config = EngineConfig(
        model="demo", num_device_blocks=32, num_threads=1, enable_chunked_prefill=False,
        max_num_batched_tokens=128,
    )  # fmt: skip
    with pytest.raises(ConfigError, match="max-num-batched-tokens"):
        open_engine(config)
