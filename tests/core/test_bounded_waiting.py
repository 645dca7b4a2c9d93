"""Priorities through the whole core: however busy the classes above are, nobody waits for ever."""

from __future__ import annotations

import itertools

import pytest

from tests.core.builders import one_second, prompt_of
from tests.core.harness import Harness, small_config

AGING_S = 10.0
MAX_PAUSE_S = 4.0
QUANTUM_S = 3.0
LENGTH = 24  # tokens of the answers that wait


def run_beside_a_flood(policy: str, quantum_s: float, num_classes: int = 2) -> list[list[float]]:
    """Return when each token came of two answers of the last class, at a second a step.

    Each class above keeps three short requests coming, and there are two seats.
    """
    config = small_config(
        scheduling_policy=policy,
        max_num_seqs=2,
        priority_aging=AGING_S,
        priority_quantum=quantum_s,
        max_pause=MAX_PAUSE_S,
        starvation_limit=MAX_PAUSE_S,
    )
    harness = Harness(config, 64, step_s=one_second)
    low = [harness.add(prompt_of(n, 3), LENGTH, priority=num_classes - 1) for n in range(2)]
    times: list[list[float]] = [[0.0], [0.0]]
    flood: dict[int, int] = {}
    while any(harness.expected[handle].finish_reason is None for handle in low):
        for priority in range(num_classes - 1):
            live = sum(
                harness.expected[handle].finish_reason is None
                for handle, own in flood.items()
                if own == priority
            )
            for _ in range(3 - live):
                prompt = prompt_of(len(harness.expected), 3)
                flood[harness.add(prompt, 4, priority=priority)] = priority
        harness.step()
        for index, handle in enumerate(low):
            new = len(harness.expected[handle].received) - len(times[index]) + 1
            times[index] += [harness.clock.now()] * new
    for handle in harness.live:
        harness.abort(handle)
    harness.drain()
    return times


def gaps_of(times: list[float]) -> list[float]:
    """Return the seconds before each token."""
    return [after - before for before, after in itertools.pairwise(times)]


# What the inner policy lets one wait that has come first of all: under `fcfs` for the two that
# have begun to end; under the others no longer than their own limit to a pause, and a step.
INNER_WAIT_S = {"fcfs": 4.0, "learned": MAX_PAUSE_S + 2.0, "skip-join-mlfq": MAX_PAUSE_S + 2.0}


@pytest.mark.parametrize("num_classes", [2, 3])
@pytest.mark.parametrize("policy", sorted(INNER_WAIT_S))
def test_waiting_is_bounded_across_classes_and_a_turn_is_a_quantum(
    policy: str, num_classes: int
) -> None:
    """Between two tokens: at most c · aging_s and the wait within a class; and then a quantum.

    A quantum that any step uses up is a token a turn.
    """
    bound_s = (num_classes - 1) * AGING_S + INNER_WAIT_S[policy]
    for quantum_s, tokens_a_turn in ((QUANTUM_S, QUANTUM_S), (0.0, 1.0)):
        for times in run_beside_a_flood(policy, quantum_s, num_classes):
            gaps = gaps_of(times)
            assert max(gaps) <= bound_s
            num_turns = sum(gap >= AGING_S for gap in gaps)
            assert num_turns == LENGTH / tokens_a_turn
