"""docs/adding-a-policy.md: the example is a policy."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path
from typing import Any

from fastserve.core.policies.protocol import Policy
from fastserve.sim.simulator import simulate
from tests.core.builders import one_second, prompt_of
from tests.core.harness import Harness
from tests.core.harness import small_config as small_core
from tests.sim.machines import MACHINE, make_workload, small_config

PAGE = Path(__file__).parents[3] / "docs" / "adding-a-policy.md"


def make_example() -> Policy:
    """Return the policy of the page."""
    code = re.search(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert code is not None
    names: dict[str, Any] = {}
    exec(textwrap.dedent("   " + code[1].lstrip()), names)
    policy: Policy = names["LastInFirstOut"]()
    return policy


def test_the_example_orders_a_simulation() -> None:
    """Batch of one: three wait while the first decodes, and the latest of them always runs."""
    workload = make_workload((0.0, 8, 4), (0.1, 8, 4), (0.2, 8, 4))
    config = small_config(max_num_seqs=1)
    finished_at = simulate(config, MACHINE, workload, policy=make_example()).finished_at
    assert finished_at.argsort().tolist() == [2, 1, 0]
    by_arrival = simulate(config, MACHINE, workload).finished_at
    assert by_arrival.argsort().tolist() == [0, 1, 2]


def test_the_example_loses_kv_from_its_oldest() -> None:
    """Where blocks run out, every invariant of the scheduler holds and the latest keep theirs."""
    config = small_core(max_model_len=32, max_num_batched_tokens=32)
    harness = Harness(config, 9, step_s=one_second, policy=make_example())
    for handle in range(5):
        harness.add(prompt_of(handle, 9), 6)
        harness.step()
    harness.drain()
    assert harness.scheduler.stats().num_recomputed_tokens > 0
