"""What ranks agree on before they allocate."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from fastserve.executor.choices import Choices
from fastserve.executor.opening import WINDOWS_PER_SEQ, agree_on_blocks
from fastserve.settings.engine import EngineConfig
from fastserve.settings.scheduler import StepLimits

CHOICES = Choices(
    device=torch.device("cpu"),
    dtype=torch.float32,
    max_model_len=100,
    limits=StepLimits(max_num_seqs=4, max_num_batched_tokens=64),
)


def blocks(*rooms: int, choices: Choices = CHOICES, **settings) -> int:
    """Agree on blocks of ten tokens."""
    return agree_on_blocks(EngineConfig(block_size=10, **settings), choices, rooms)


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
