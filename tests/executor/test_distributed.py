"""A model over several ranks computes what it does in one process, whatever becomes of its KV.

What was compared is recorded with each test: `scripts/write_layout_grid` makes a table of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fastserve.executor.distributed import DistributedExecutor
from tests.checkpoints import make_checkpoint
from tests.executor.ranks import Run, arrivals, open_local, open_ranks, run

pytestmark = pytest.mark.processes

Reference = Callable[[str], tuple[Path, Run]]
Record = Callable[[str, object], None]
FEW = [("opt", 1, 2), ("mixtral", 2, 1), ("llama", 2, 2)]
GRID = [
    pytest.param((name, tp, pp), marks=pytest.mark.slow)
    for name in ("llama", "opt", "mixtral")
    for tp in (1, 2, 4)
    for pp in (1, 2, 3)
    if (name, tp, pp) not in FEW
]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """Return what makes the checkpoint of an architecture, and runs the requests undisturbed."""
    found: dict[str, tuple[Path, Run]] = {}

    def get(name: str) -> tuple[Path, Run]:
        if name not in found:
            path: Path = tmp_path_factory.mktemp(name)
            make_checkpoint(path, name, num_hidden_layers=4, num_attention_heads=8)
            local = open_local(path, num_device_blocks=400)
            try:
                undisturbed = run(
                    local, arrivals(), num_device_blocks=400, max_num_seqs=16,
                    max_num_batched_tokens=1000, scheduling_policy="fcfs",
                    enable_prefix_caching=False,
                )  # fmt: skip
            finally:
                local.close()
            assert undisturbed.stats.num_preemptions == 0
            found[name] = path, undisturbed
        return found[name]

    return get


@pytest.fixture(scope="module", params=[*FEW, *GRID], ids=lambda case: "{}-tp{}-pp{}".format(*case))
def opened(
    request: pytest.FixtureRequest, reference: Reference
) -> Iterator[tuple[DistributedExecutor, Run]]:
    """Open a model over several ranks; one launch serves all tests."""
    name, tp, pp = request.param
    path, undisturbed = reference(name)
    executor = open_ranks(path, tp, pp)
    yield executor, undisturbed
    executor.close()


def assert_same(found: Run, expected: Run, record: Record) -> None:
    """Every token, and every log probability within the noise of float32."""
    pairs = list(zip(found.tokens, expected.tokens, strict=True))
    record("requests", len(pairs))
    record("requests_with_equal_tokens", sum(one == other for one, other in pairs))
    record("steps_in_flight", found.max_in_flight)
    assert found.tokens == expected.tokens
    differences = [
        abs(one - other)
        for pair in zip(found.logprobs, expected.logprobs, strict=True)
        for one, other in zip(*pair, strict=True)
    ]
    record("max_logprob_difference", max(differences))
    assert max(differences) <= 1e-4


def test_requests_in_chunks_are_those_of_one_process(
    opened: tuple[DistributedExecutor, Run], record_property: Record
) -> None:
    """And more than one step is in flight where there are stages for them."""
    executor, expected = opened
    found = run(executor, arrivals(), scheduling_policy="fcfs", max_num_batched_tokens=24)
    assert_same(found, expected, record_property)
    assert found.max_in_flight == executor.layout.pipeline_parallel_size


def test_requests_that_are_recomputed_are_those_of_one_process(
    opened: tuple[DistributedExecutor, Run], record_property: Record
) -> None:
    """KV of some is dropped on all ranks at once."""
    executor, expected = opened
    found = run(executor, arrivals(), preemption_mode="recompute")
    assert_same(found, expected, record_property)
    record_property("recomputed_tokens", found.stats.num_recomputed_tokens)
    assert found.stats.num_preemptions > 0
    assert found.stats.num_recomputed_tokens > 0


def test_requests_that_are_swapped_are_those_of_one_process(
    opened: tuple[DistributedExecutor, Run], record_property: Record
) -> None:
    """Every rank has moved every block, and each came back as it was."""
    executor, expected = opened
    before = executor.count_moves()
    found = run(executor, arrivals(), preemption_mode="proactive")
    assert_same(found, expected, record_property)
    stats = found.stats
    assert stats.num_swaps > 0
    assert stats.num_failed_copies == 0
    ahead = stats.num_saved_blocks + stats.num_fetched_blocks
    num_moved = stats.num_swapped_out_blocks + stats.num_swapped_in_blocks + ahead
    moves = list(zip(executor.count_moves(), before, strict=True))
    record_property("moves_checked", sum(now.num_moves - was.num_moves for now, was in moves))
    record_property("moves_that_differ", sum(now.num_mismatches for now, _ in moves))
    for now, was in moves:
        assert now.num_moves - was.num_moves == num_moved
        assert now.num_mismatches == 0
