"""Several simulated machines behind the router: the engines that serve, on one clock."""

from __future__ import annotations

from dataclasses import replace

import msgspec
import numpy as np
import pytest

from fastserve.client import dispatch
from fastserve.sim.replicas import facts_of, simulate_replicas
from fastserve.sim.report import alone_s
from fastserve.sim.simulator import simulate
from tests.sim.machines import COSTS, MACHINE, SWAPPING, Checker, make_workload, small_config
from tests.sim.test_simulator import random_workload
from tests.wire.test_engine_messages import INFO

POLICIES = ("fcfs", "learned", "skip-join-mlfq", "srpt")


class Placed(Checker):
    """Checks an engine after every step, and notes the prompts that it was told of."""

    def __init__(self, scheduler) -> None:
        super().__init__(scheduler)
        self.prompts: list[range] = []

    def told(self, fact, now) -> None:
        """Note an arrival."""
        if hasattr(fact, "prompt_token_ids"):
            self.prompts.append(fact.prompt_token_ids)


def replicated(config, machine, workload, num_replicas, **how):
    """Simulate with the invariants checked, and return which rows went where."""
    placed: list[Placed] = []

    def observers(scheduler):
        placed.append(Placed(scheduler))
        return placed[-1:]

    outcome = simulate_replicas(config, machine, workload, num_replicas, observers=observers, **how)
    assert len(placed) == num_replicas
    prompts = workload.prompts()
    row_of = {prompts[row].start: row for row in range(len(workload))}
    return outcome, [[row_of[ids.start] for ids in one.prompts] for one in placed]


@pytest.mark.parametrize("policy", POLICIES)
def test_one_replica_is_the_plain_simulation(policy):
    """To the last bit, whichever loop turns the crank."""
    config, workload = small_config(scheduling_policy=policy), random_workload()
    alone = simulate(config, MACHINE, workload)
    outcome, _ = replicated(config, MACHINE, workload, 1)
    for name in ("arrived_at", "first_token_at", "finished_at", "max_gap_s", "queue_s"):
        assert np.array_equal(getattr(outcome, name), getattr(alone, name), equal_nan=True)
    assert (outcome.num_steps, outcome.stats) == (alone.num_steps, alone.stats)


@pytest.mark.parametrize("policy", POLICIES)
def test_each_replica_does_what_it_would_alone_with_its_rows(policy):
    """They share a clock and nothing else: each set of rows by itself ends at the same times."""
    config = small_config(scheduling_policy=policy)
    workload = random_workload().faster(3.0)
    outcome, rows_by_replica = replicated(config, MACHINE, workload, 3)
    assert sorted(row for rows in rows_by_replica for row in rows) == list(range(len(workload)))
    assert min(map(len, rows_by_replica)) > len(workload) / 6
    num_steps = 0
    for rows in rows_by_replica:
        index = np.array(rows)
        alone = simulate(config, MACHINE, workload.rows(index))
        assert outcome.finished_at[index] == pytest.approx(alone.finished_at, rel=1e-12)
        num_steps += alone.num_steps
    assert outcome.num_steps == num_steps
    assert outcome.stats.num_steps == num_steps


@pytest.mark.parametrize("mode", ["reactive", "proactive", "ideal"])
@pytest.mark.parametrize("rate", [2.5, 2.7, 3.0])
def test_copies_of_replicas_run_beside_each_other(mode, rate):
    """Each machine has a link of its own; all ends as it would with each alone."""
    config = small_config(scheduling_policy="skip-join-mlfq", preemption_mode=mode)
    workload = random_workload().faster(rate)
    machine = replace(SWAPPING, num_device_blocks=40)
    outcome, rows_by_replica = replicated(config, machine, workload, 2)
    assert outcome.stats.num_swapped_out_blocks + outcome.stats.num_saved_blocks > 0
    for rows in rows_by_replica:
        index = np.array(rows)
        alone = simulate(config, machine, workload.rows(index))
        assert outcome.finished_at[index] == pytest.approx(alone.finished_at, rel=1e-12)


def test_a_closed_loop_goes_on_wherever_the_turn_before_was_answered():
    """The next turn comes when its user has thought, whichever replica is next."""
    columns = {"session_id": np.array([5, 6, 5, 6]), "think_s": np.array([0.0, 0.0, 7.0, 1.0])}
    workload = make_workload((1.0, 8, 4), (1.0, 16, 9), (1.5, 16, 4), (2.0, 8, 3), **columns)
    outcome, _ = replicated(small_config(), MACHINE, workload, 2, is_closed_loop=True)
    thought_s = outcome.arrived_at[2:] - outcome.finished_at[:2]
    assert thought_s == pytest.approx(np.array([7.0, 1.0]))


def test_equal_prefixes_meet_in_one_replica():
    """Two prompts in turn, each four times: each is computed once, in a replica of its own."""
    config = small_config(max_model_len=1200, max_num_batched_tokens=2048, block_size=16)
    machine = replace(MACHINE, num_device_blocks=256)
    rows = [(1000.0 * (n // 2), 600, 2) for n in range(8)]
    hash_ids = tuple((1 + n % 2, 100 + n) for n in range(8))
    outcome, rows_by_replica = replicated(
        config, machine, make_workload(*rows, hash_ids=hash_ids), 2
    )
    assert sorted(rows_by_replica) == [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert outcome.stats.num_cached_prompt_tokens == 6 * 512


def test_slots_may_be_machines_beside_each_other():
    """One scheduler over three: as many requests as there are machines take their time alone."""
    config = small_config(num_slots=3, max_num_seqs=1, max_num_batched_tokens=96)
    rows = [(0.0, 20, 10), (0.0, 28, 30), (0.0, 5, 50)]
    workload = make_workload(*rows)
    machine = replace(MACHINE, num_device_blocks=3 * 64)
    outcome = simulate(config, machine, workload, is_parallel=True)
    one = small_config(max_num_seqs=1)
    jct_s = outcome.finished_at - outcome.arrived_at
    assert jct_s == pytest.approx(alone_s(one, MACHINE, workload))
    staged = simulate(config, machine, workload)
    assert staged.busy_s == pytest.approx(outcome.busy_s / 3)


def test_a_router_costs_little_beside_one_queue_that_sees_all():
    """Near capacity, over a mixture of lengths: the claim of docs/replicas.md in small."""
    workload = random_workload(num_requests=200).faster(3.6)
    for policy in ("fcfs", "learned"):
        config = small_config(scheduling_policy=policy)
        routed, _ = replicated(config, MACHINE, workload, 4)
        pooled = replace(MACHINE, num_device_blocks=4 * 64)
        one = replace(config, num_slots=4, max_num_batched_tokens=4 * 32)
        queue = simulate(one, pooled, workload, is_parallel=True)
        means = [float((o.finished_at - o.arrived_at).mean()) for o in (routed, queue)]
        assert means[0] < 1.15 * means[1]


def test_the_api_process_and_the_simulator_tell_a_router_the_same() -> None:
    """Of equal engines, whose two stages share time and KV."""
    info = msgspec.structs.replace(
        INFO, cost_model=COSTS, max_num_seqs=4, num_device_blocks=64, max_request_tokens=128,
        block_size=4, pipeline_parallel_size=2,
    )  # fmt: skip
    simulated = facts_of(small_config(num_slots=2), MACHINE)
    assert dispatch.facts_of(info) == simulated
    assert simulated.cost_model.base_s == COSTS.base_s / 2
    assert simulated.num_kv_tokens == 64 * 4 / 2
    unshared = msgspec.structs.replace(info, enable_prefix_caching=False)
    assert dispatch.facts_of(unshared).num_cached_blocks == 0
