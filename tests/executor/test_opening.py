"""What ranks agree on before they allocate, and what is refused before anything is loaded."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from fastserve.checkpoint.model_config import read_model_config
from fastserve.executor import kv_store, worker
from fastserve.executor.choices import Choices, choose
from fastserve.executor.facts import BlockCounts
from fastserve.executor.opening import WINDOWS_PER_SEQ, agree_on_blocks, open_worker
from fastserve.executor.worker import Worker
from fastserve.settings.engine import EngineConfig
from fastserve.settings.option import ConfigError
from fastserve.settings.scheduler import StepLimits
from tests.checkpoints import greedy, make_checkpoint
from tests.executor.driver import Driven, Driver

CHOICES = Choices(
    device=torch.device("cpu"),
    dtype=torch.float32,
    max_model_len=100,
    limits=StepLimits(max_num_seqs=4, max_num_batched_tokens=64),
)


def blocks(*rooms: int, choices: Choices = CHOICES, **settings) -> int:
    """Agree on blocks of ten tokens on the device."""
    counts = [BlockCounts(room, 0) for room in rooms]
    return agree_on_blocks(EngineConfig(block_size=10, **settings), choices, counts, 1).device


@pytest.mark.parametrize("settings", [{"num_device_blocks": 7}, {"kv_cache_memory_bytes": 10**6}])
def test_what_was_asked_for_is_not_bounded(settings):
    """The least room counts, however much more than can be of use it is."""
    assert blocks(10**7, 10**6, 10**8, **settings) == 10**6


def test_more_than_can_be_of_use_is_not_taken():
    """Memory that nobody limited is taken for so many windows of each running sequence."""
    assert blocks(9, 8, 10) == 8
    assert blocks(10**6) == WINDOWS_PER_SEQ * 4 * 10
    longer = dataclasses.replace(CHOICES, max_model_len=101)  # a block more in each window
    assert blocks(10**6, 10**7, choices=longer) == WINDOWS_PER_SEQ * 4 * 11


@pytest.mark.parametrize("settings", [{}, {"num_device_blocks": 9}])
def test_the_least_room_on_the_host_counts(settings):
    """A rank that has more leaves it: one decision is carried out on all."""
    rooms = [BlockCounts(9, 70), BlockCounts(9, 50), BlockCounts(9, 60)]
    assert agree_on_blocks(EngineConfig(**settings), CHOICES, rooms, 1) == (9, 50)


@pytest.mark.parametrize(("least", "num_lines"), [(512, 1), (4095, 1), (4096, 0)])
def test_a_host_tier_smaller_than_asked_for_is_said_once(least, num_lines, caplog):
    """By whoever asked the ranks, however many of them have no room for it."""
    rooms = [BlockCounts(9, 600), BlockCounts(9, least), BlockCounts(9, 600)][1 - num_lines :]
    config = EngineConfig(preemption_mode="reactive", swap_space=4)
    agree_on_blocks(config, CHOICES, rooms[: 1 + 2 * num_lines], 2**20)
    lines = [line for line in caplog.messages if line.startswith("--swap-space: ")]
    assert len(lines) == num_lines


def silent(stage: str, fraction: float) -> None:
    """Show no progress."""


def test_ranks_with_different_room_allocate_the_same(tmp_path, monkeypatch):
    """One plan fits both: a block that one has, the other has too."""
    model = make_checkpoint(tmp_path, "llama")
    config = EngineConfig(
        model=str(tmp_path),
        device="cpu",
        max_model_len=64,
        preemption_mode="reactive",
        swap_space=1.0,
    )
    model_config = read_model_config(tmp_path)
    choices = choose(config, model_config)
    ranks = [Worker(config, model_config, choices, eos_token_ids=frozenset()) for _ in range(2)]
    facts = [rank.load(tmp_path, silent) for rank in ranks]
    rooms = []
    for rank, fact, fit in zip(ranks, facts, (9, 7), strict=True):
        memory = int(fit * fact.block_bytes / kv_store.CPU_SHARE) + 1
        monkeypatch.setattr(kv_store, "available_memory", lambda memory=memory: memory)
        rooms.append(rank.room())
    assert rooms == [(9, 18), (7, 14)]
    agreed = agree_on_blocks(config, choices, rooms, facts[0].block_bytes)
    for rank in ranks:
        rank.allocate(agreed, silent)
        assert (len(rank.kv.device.tensor), rank.kv.host.num_blocks) == (7, 14)
        request = Driven(range(5, 25), num_tokens=8)
        Driver(rank.execute, agreed.device, config.block_size).run(request)
        assert request.output == greedy(model, request.ids, 8)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"max_model_len": 10**6}, "--max-model-len"),
        ({"enable_chunked_prefill": False, "max_num_batched_tokens": 16}, "--max-num-batched"),
        ({"cpu_kernels": "native", "dtype": "float16"}, "--cpu-kernels"),
    ],
)
def test_what_does_not_fit_is_refused_before_weights_are_read(
    settings, reason, tmp_path, monkeypatch
):
    """A large model takes minutes to load."""
    make_checkpoint(tmp_path, "llama")

    def load(*args: object) -> None:
        raise AssertionError("weights are read")

    monkeypatch.setattr(worker, "open_weights", load)
    with pytest.raises(ConfigError, match=reason):
        open_worker(
            EngineConfig(model=str(tmp_path), device="cpu", **settings),
            tmp_path,
            num_threads=1,
            eos_token_ids=frozenset(),
            on_progress=silent,
        )
