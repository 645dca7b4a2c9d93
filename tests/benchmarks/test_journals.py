"""What observers see of a journal is what they would have seen in the loop."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.journals import observe
from experiments.validate_cpu import Beside, Speed
from fastserve.core.journal import Journal
from fastserve.sim.simulator import simulate
from tests.sim.machines import COSTS, MACHINE, small_config
from tests.sim.test_simulator import random_workload


def test_observers_see_the_same_steps(tmp_path: Path) -> None:
    """The shares of every plan, what every step took, and when."""
    path, config = tmp_path / "journal", small_config(scheduling_policy="learned")
    live = (Speed(COSTS), Beside())
    with path.open("w") as file:
        journal = Journal(file.write)
        journal.open(0.0, config, COSTS, MACHINE.num_device_blocks)
        simulate(config, MACHINE, random_workload(), observers=lambda _: (journal, *live))
    read = (Speed(COSTS), Beside())
    told = observe(path, read)
    assert told.config == config
    assert told.cost_model == COSTS
    assert told.num_device_blocks == MACHINE.num_device_blocks
    assert told.num_requests == len(random_workload())
    assert live[0].device_s > 0.0
    assert read[0].factor == pytest.approx(live[0].factor, rel=1e-12)
    assert read[1].seconds == live[1].seconds
