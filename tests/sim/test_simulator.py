"""The simulator against sums done by hand, and its invariants under every policy and mode."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from fastserve.core.journal import Journal
from fastserve.core.policies.fcfs import FCFS
from fastserve.sim import generators
from fastserve.sim.config import SIMULATED_POLICIES, SIMULATED_PREEMPTION_MODES
from fastserve.sim.report import alone_s
from fastserve.sim.sim_executor import StepOverhead
from fastserve.sim.simulator import Peaks, simulate
from tests.sim.machines import COSTS, MACHINE, SWAPPING, Checker, make_workload, small_config

ONE_TIER = ("recompute", "defer")


def random_workload(seed=3, num_requests=60, rate=0.4):
    """Return more work than the machine has room for at once."""
    rng = np.random.default_rng(seed)
    lengths = generators.Zipf(0.8, 1, 60)
    return generators.generate(rng, num_requests, rate, lengths, lengths)


def checked(config, machine, workload, **how):
    """Simulate with the invariants checked after every step."""
    checkers: list[Checker] = []

    def observers(scheduler):
        checkers.append(Checker(scheduler))
        return checkers

    outcome = simulate(config, machine, workload, observers=observers, **how)
    assert checkers[0].num_checks > 0
    return outcome, checkers[0]


def test_one_request_by_hand():
    """A prompt of 40 in chunks of 32 and 8, then two decodes: every term of the cost model."""
    outcome, _ = checked(small_config(), MACHINE, make_workload((2.0, 40, 3)))
    prefill_s = (0.5 + 0.32) + (0.5 + 0.08)
    decodes_s = (0.5 + 0.05 + 0.041) + (0.5 + 0.05 + 0.042)
    assert outcome.arrived_at.tolist() == [2.0]
    assert outcome.first_token_at[0] == pytest.approx(2.0 + prefill_s)
    assert outcome.finished_at[0] == pytest.approx(2.0 + prefill_s + decodes_s)
    assert outcome.max_gap_s[0] == pytest.approx(0.592)
    assert outcome.queue_s[0] == 0.0
    assert outcome.busy_s == pytest.approx(prefill_s + decodes_s)
    assert outcome.num_steps == 4
    assert outcome.peaks == Peaks(device_blocks=11, live_blocks=11, live_requests=1)


@pytest.mark.parametrize("num_slots", [1, 2, 4])
@pytest.mark.parametrize("is_chunked", [True, False])
def test_alone_a_request_takes_what_the_report_calls_alone(num_slots, is_chunked):
    """The yardstick of slowdown is the simulator's own answer for a lone request."""
    overhead = StepOverhead(0.03, 0.002)
    machine = replace(MACHINE, overhead=overhead)
    config = small_config(
        num_slots=num_slots,
        enable_chunked_prefill=is_chunked,
        max_num_batched_tokens=32 if is_chunked else 128,
    )
    rows = [(1000.0 * index, 1 + 17 * index, 1 + 9 * index) for index in range(5)]
    workload = make_workload(*rows)
    outcome, _ = checked(config, machine, workload)
    jct_s = outcome.finished_at - outcome.arrived_at
    assert jct_s == pytest.approx(alone_s(config, machine, workload))


def test_a_second_request_waits_under_fcfs_with_a_batch_of_one():
    """Its queueing time is the rest of the first one's run."""
    config = small_config(max_num_seqs=1)
    workload = make_workload((0.0, 8, 4), (0.1, 8, 4))
    alone = alone_s(config, MACHINE, workload)
    outcome, _ = checked(config, MACHINE, workload)
    assert outcome.finished_at == pytest.approx([alone[0], alone[0] + alone[1]])
    assert outcome.queue_s == pytest.approx([0.0, alone[0] - 0.1])


def test_one_token_answers_have_no_gap():
    """A longest gap needs two tokens."""
    outcome, _ = checked(small_config(), MACHINE, make_workload((0.0, 4, 1), (0.0, 4, 2)))
    assert np.isnan(outcome.max_gap_s).tolist() == [True, False]


def test_overhead_counts_against_every_step():
    """Fixed, and per sequence in the step."""
    workload = make_workload((0.0, 4, 3), (0.0, 4, 3))
    plain, _ = checked(small_config(), MACHINE, workload)
    machine = replace(MACHINE, overhead=StepOverhead(0.1, 0.01))
    slowed, _ = checked(small_config(), machine, workload)
    assert slowed.finished_at == pytest.approx(plain.finished_at + 3 * 0.12)
    assert slowed.busy_s == pytest.approx(plain.busy_s)


def test_lookahead_hides_the_overhead():
    """The next step is prepared while the device works: only the first and the last is paid for."""
    machine = replace(MACHINE, overhead=StepOverhead(0.1, 0.0))
    workload = make_workload((0.0, 4, 20))
    behind, _ = checked(small_config(), machine, workload)
    ahead, _ = checked(small_config(lookahead=1), machine, workload)
    assert behind.finished_at[0] - ahead.finished_at[0] == pytest.approx(19 * 0.1)


def test_pipeline_stages_work_at_the_same_time():
    """Four requests on four stages: more throughput, and no request is faster for it."""
    workload = make_workload(*[(0.0, 8, 12)] * 4)
    config = small_config(max_num_seqs=1, max_num_batched_tokens=128)
    one, _ = checked(config, MACHINE, workload)
    four, checker = checked(replace(config, num_slots=4), MACHINE, workload)
    alone = alone_s(config, MACHINE, workload)
    assert checker.most_in_flight == 4
    assert four.finished_at.max() < one.finished_at.max() / 2
    assert (four.finished_at >= alone - 1e-9).all()


@pytest.mark.parametrize("mode", SIMULATED_PREEMPTION_MODES)
@pytest.mark.parametrize("policy", SIMULATED_POLICIES)
def test_every_policy_and_mode_ends_every_request(policy, mode):
    """Under memory pressure: nobody is lost, nobody beats the machine, nothing livelocks."""
    config = small_config(
        scheduling_policy=policy, preemption_mode=mode, max_num_seqs=8, starvation_limit=5.0
    )
    workload = random_workload()
    outcome, _ = checked(config, SWAPPING, workload)
    jct_s = outcome.finished_at - outcome.arrived_at
    assert (jct_s >= alone_s(config, SWAPPING, workload) - 1e-9).all()
    assert (outcome.queue_s <= jct_s + 1e-9).all()
    assert (outcome.swap_s <= outcome.queue_s + 1e-9).all()
    stats, peaks = outcome.stats, outcome.peaks
    assert stats.device_blocks_used == stats.host_blocks_used == 0
    assert stats.device_blocks_moving == stats.host_blocks_moving == 0
    assert peaks.device_blocks <= SWAPPING.num_device_blocks
    if mode in ONE_TIER:
        assert peaks.host_blocks == stats.num_swapped_out_blocks == stats.num_saved_blocks == 0
        assert peaks.live_blocks == peaks.device_blocks
    elif mode == "ideal":
        assert stats.num_recomputed_tokens == 0
        assert peaks.live_blocks <= peaks.device_blocks + peaks.host_blocks
    else:
        assert peaks.host_blocks <= SWAPPING.num_host_blocks


@pytest.mark.parametrize("mode", ["reactive", "proactive", "proactive-by-level", "ideal"])
def test_preempted_kv_moves_and_comes_back(mode):
    """Under a policy that preempts: out, back, and in only as often as it came out."""
    config = small_config(
        scheduling_policy="skip-join-mlfq", preemption_mode=mode, max_num_seqs=8,
        starvation_limit=5.0,
    )  # fmt: skip
    machine = replace(SWAPPING, num_host_blocks=1000)
    outcome, _ = checked(config, machine, random_workload())
    stats = outcome.stats
    assert stats.num_swaps > 0
    assert stats.num_swapped_out_blocks + stats.num_saved_blocks > 0
    assert stats.num_swapped_in_blocks + stats.num_fetched_blocks > 0
    assert outcome.peaks.live_blocks > machine.num_device_blocks
    assert (outcome.swap_s.sum() > 0) or mode == "ideal"
    if mode == "ideal":
        assert stats.copy_wait_s == 0.0


def test_a_link_of_zero_seconds_is_the_ideal_one():
    """`ideal` is no other scheduler: reactive with a free link and room plans the same."""
    machine = replace(SWAPPING, cost_model=COSTS, num_host_blocks=1000)
    finished = {}
    for mode in ("ideal", "reactive"):
        config = small_config(
            scheduling_policy="skip-join-mlfq", preemption_mode=mode, max_num_seqs=8,
            starvation_limit=5.0, enable_prefix_caching=False,
        )  # fmt: skip
        outcome, _ = checked(config, machine, random_workload())
        assert outcome.stats.num_swaps > 0
        finished[mode] = outcome.finished_at.tolist()
    assert finished["reactive"] == finished["ideal"]


def test_the_slower_the_link_the_later_all_is_done():
    """Copies are waited for: ten times slower, and the waiting shows where it should."""
    rows = random_workload()
    means, waits = [], []
    for block_s in (0.001, 0.1, 1.0):
        costs = replace(COSTS, copy_block_s=block_s)
        machine = replace(SWAPPING, cost_model=costs, num_host_blocks=1000)
        config = small_config(
            scheduling_policy="skip-join-mlfq", preemption_mode="reactive", max_num_seqs=8,
            starvation_limit=5.0,
        )  # fmt: skip
        outcome, _ = checked(config, machine, rows)
        means.append(float((outcome.finished_at - outcome.arrived_at).mean()))
        waits.append(outcome.stats.copy_wait_s)
    assert means[0] < means[2]
    assert waits[0] < waits[2]


@pytest.mark.parametrize(("num_slots", "lookahead"), [(1, 0), (1, 1), (2, 0), (4, 0)])
def test_slots_and_lookahead_end_every_request(num_slots, lookahead):
    """The same, with several steps in flight."""
    config = small_config(
        scheduling_policy="skip-join-mlfq", num_slots=num_slots, lookahead=lookahead
    )
    outcome, checker = checked(config, MACHINE, random_workload())
    assert checker.most_in_flight == max(num_slots, 1 + lookahead)
    assert outcome.stats.num_preemptions > 0


def test_short_requests_gain_from_preemption():
    """What the whole thing is about: mlfq, not told the lengths, lets the short one overtake."""
    workload = make_workload((0.0, 60, 60), (1.0, 4, 2))
    jct_s = {}
    for policy in ("fcfs", "skip-join-mlfq", "srpt"):
        config = small_config(max_num_seqs=1, scheduling_policy=policy)
        outcome, _ = checked(config, MACHINE, workload)
        jct_s[policy] = outcome.finished_at - outcome.arrived_at
    assert jct_s["skip-join-mlfq"][1] < jct_s["fcfs"][1] / 5
    assert jct_s["srpt"].mean() <= jct_s["skip-join-mlfq"].mean() < jct_s["fcfs"].mean()


def test_equal_prefixes_are_computed_once():
    """The second prompt shares its first 512 tokens by hash id and starts behind them."""
    config = small_config(max_model_len=1200, max_num_batched_tokens=2048, block_size=16)
    machine = replace(MACHINE, num_device_blocks=256)
    rows = ((0.0, 600, 2), (1000.0, 600, 2))
    shared, _ = checked(config, machine, make_workload(*rows, hash_ids=((1, 2), (1, 3))))
    apart, _ = checked(config, machine, make_workload(*rows, hash_ids=((1, 2), (4, 3))))
    ttft_s = shared.first_token_at - shared.arrived_at
    assert ttft_s[1] == pytest.approx(COSTS.prefill_s(600 - 512, 512, 2048))
    assert ttft_s[0] == pytest.approx(COSTS.prefill_s(600, 0, 2048))
    assert apart.first_token_at[1] - 1000.0 == pytest.approx(ttft_s[0])
    assert shared.stats.num_cached_prompt_tokens == 512


def test_a_closed_loop_waits_for_the_answer():
    """Turn two arrives when its user has thought about turn one's answer."""
    columns = {"session_id": np.array([5, 5]), "think_s": np.array([0.0, 7.0])}
    workload = make_workload((1.0, 8, 4), (1.5, 16, 4), **columns)
    closed, _ = checked(small_config(), MACHINE, workload, is_closed_loop=True)
    assert closed.arrived_at == pytest.approx([1.0, closed.finished_at[0] + 7.0])
    logged, _ = checked(small_config(), MACHINE, workload)
    assert logged.arrived_at.tolist() == [1.0, 1.5]


def test_a_limit_of_its_own_is_what_orca_reserves():
    """Two requests that may get long do not fit together, two that say they will not do."""
    rows = ((0.0, 8, 8), (0.0, 8, 8))
    config = small_config(scheduling_policy="orca", max_model_len=128)
    machine = replace(MACHINE, num_device_blocks=32)
    long, _ = checked(config, machine, make_workload(*rows))
    limit = np.array([8, 8])
    short, _ = checked(config, machine, make_workload(*rows, max_tokens=limit))
    assert long.peaks.live_requests == 1
    assert short.peaks.live_requests == 2
    assert short.finished_at.max() < long.finished_at.max()


class Clients(FCFS):
    """FCFS that notes who asks with a prompt of which length."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, int]] = []

    def admit(self, request, now) -> None:
        """Note it."""
        super().admit(request, now)
        self.seen.append((request.client, request.num_prompt_tokens))


def test_the_policy_is_told_who_asks():
    """By row, also where a session's turns come in another order than the rows."""
    columns = {"session_id": np.array([5, 5, 6]), "think_s": np.array([0.0, 70.0, 0.0])}
    rows = ((0.0, 8, 4), (0.1, 9, 4), (0.2, 10, 4))
    policy = Clients()
    workload = make_workload(*rows, client=("a", "b", "c"), **columns)
    checked(small_config(), MACHINE, workload, policy=policy, is_closed_loop=True)
    assert policy.seen == [("a", 8), ("c", 10), ("b", 9)]
    nobody = Clients()
    checked(small_config(), MACHINE, make_workload(*rows), policy=nobody)
    assert [client for client, _ in nobody.seen] == ["", "", ""]


def test_the_same_run_has_the_same_journal():
    """Same workload and settings, same hash; another seed, another one."""
    hashes = []
    for seed in (3, 3, 4):
        journal = Journal()
        config = small_config(scheduling_policy="skip-join-mlfq")
        simulate(config, MACHINE, random_workload(seed), observers=lambda scheduler: [journal])  # noqa: B023
        hashes.append(journal.sha256)
    assert hashes[0] == hashes[1] != hashes[2]


def test_progress_is_told_and_ends_at_all():
    """The last word is that everything has ended."""
    told: list[int] = []
    simulate(small_config(), MACHINE, random_workload(), on_progress=told.append)
    assert told == sorted(told)
    assert told[-1] == 60
