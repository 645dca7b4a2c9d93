"""The journal: the same in any process, and enough to run a schedule again."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastserve.core.journal import Journal, read_fact
from fastserve.core.lengths import Labels, LengthModel
from fastserve.core.policies.fcfs import FCFS
from fastserve.core.request import Arrival, SamplingParams
from tests.core.arrivals import arrivals
from tests.core.harness import UNIT_COST, Harness, small_config
from tests.core.replayed import replayed

ROOT = Path(__file__).parents[2]
HASH_PROGRAM = """
from tests.core.test_random_runs import run
print(*(run(seed).journal.sha256 for seed in range(24)))
"""


@pytest.mark.no_cover
def test_any_process_writes_the_same_journal() -> None:
    """Neither hash randomization nor the process shows in a schedule."""
    printed = []
    for hash_seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", HASH_PROGRAM],
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            cwd=ROOT,
            check=True,
            capture_output=True,
            text=True,
        )
        printed.append(done.stdout.split())
    assert printed[0] == printed[1]
    assert len(set(printed[0])) == 24


def busy_run(
    lines: list[str],
    *,
    slots: int,
    lookahead: int,
    policy: str = "skip-join-mlfq",
    length_model: LengthModel | None = None,
) -> Harness:
    """Run a load with preemptions, recomputation, EOS, aborts, stops, a refusal, a failure."""
    config = small_config(
        max_num_seqs=2,
        max_num_batched_tokens=6,
        max_model_len=32,
        scheduling_policy=policy,
        enable_prefix_caching=True,
        starvation_limit=2.0,
        max_pause=2.0,
        priority_aging=3.0,
        num_slots=slots,
        lookahead=lookahead,
        eos_token_ids=frozenset((3,)),
    )
    harness = Harness(
        config,
        9,
        token=lambda seed, p: (seed + 5 * p) % 23,
        sink=lines.append,
        length_model=length_model,
    )
    for number in range(8):
        prompt: Any = [number % 3, *range(number + 2)] if number % 2 else range(number, number + 9)
        harness.add(prompt, 20, seed=number, priority=number % 2, logit_bias={7: 1.5})
        for _ in range(number):
            harness.step()
        if number == 4:
            harness.fail_next_step()
    with pytest.raises(ValueError, match="exceed"):
        harness.engine.add(Arrival([1], SamplingParams(max_tokens=99)))
    harness.abort(harness.live[0])
    harness.finish(harness.live[-1])
    harness.drain()
    return harness


@pytest.mark.parametrize(("slots", "lookahead"), [(1, 0), (1, 1), (2, 0)])
def test_replay_repeats_every_plan(slots: int, lookahead: int) -> None:
    """The facts of a journal lead a new scheduler to the very same lines."""
    lines: list[str] = []
    harness = busy_run(lines, slots=slots, lookahead=lookahead)
    assert harness.num_errors > 0
    stats = harness.scheduler.stats()
    assert stats.num_preemptions > 0
    assert stats.num_recomputed_tokens > 0
    assert stats.num_dropped_samples > 0 or not lookahead
    kinds = {json.loads(line)[0] for line in lines}
    assert kinds == {"add", "schedule", "update", "abort", "finish"}
    assert replayed(lines, harness.config, 9) == lines


SLOW_LINK = replace(UNIT_COST, prefill_token_s=0.2, copy_base_s=0.01, copy_block_s=0.02)


@pytest.mark.parametrize("write_through", [True, False])
@pytest.mark.parametrize("policy", ["learned", "skip-join-mlfq", "fcfs"])
@pytest.mark.parametrize(("slots", "lookahead"), [(1, 0), (1, 1), (2, 0)])
def test_replay_repeats_every_copy(
    slots: int, lookahead: int, policy: str, write_through: bool
) -> None:
    """Those that came late, out of order or failed are facts like any other."""
    lines: list[str] = []
    rng = random.Random(3)
    config = small_config(
        max_num_seqs=2,
        max_num_batched_tokens=8,
        max_model_len=32,
        scheduling_policy=policy,
        enable_prefix_caching=True,
        starvation_limit=2.0,
        max_pause=2.0,
        priority_aging=3.0,
        preemption_mode="proactive",
        write_through=write_through,
        num_slots=slots,
        lookahead=lookahead,
    )
    harness = Harness(
        config,
        9,
        20,
        seed=5,
        costs=SLOW_LINK,
        copy_s=lambda copy: rng.uniform(0.0, 4.0),
        copy_fails=lambda copy: rng.random() < 0.1,
        sink=lines.append,
    )
    for number in range(16):
        prompt = [*range(8 * (number % 2)), 100 + number, *range(number % 7)]
        harness.add(prompt, 14, seed=number, priority=number % 3)
        for _ in range(4 * (number % 3)):
            harness.step()
    harness.drain()
    stats = harness.scheduler.stats()
    assert stats.num_swaps > 0
    assert stats.num_swapped_out_blocks > 0
    assert stats.num_failed_copies > 0
    assert bool(stats.num_saved_blocks) == write_through
    reported = [json.loads(line)[3:] for line in lines if json.loads(line)[0] == "update"]
    assert any(copies for copies, _ in reported)
    assert any(failed for _, failed in reported)
    again = replayed(lines, harness.config, 9, num_host_blocks=20, costs=SLOW_LINK)
    assert again == lines


def opening(length_model: LengthModel) -> Any:
    """Return what the first line of a journal says of a model."""
    lines: list[str] = []
    Journal(lines.append).open(0.0, small_config(), UNIT_COST, 8, 0, length_model)
    return json.loads(lines[0])[-1]


@pytest.mark.parametrize(("slots", "lookahead"), [(1, 0), (1, 1), (2, 0)])
def test_a_policy_that_learns_plans_again_as_it_did(slots: int, lookahead: int) -> None:
    """From nothing, and from what three runs before had learned, as the first line has it."""
    model, orders = LengthModel(), set()
    for _ in range(4):
        lines: list[str] = []
        begun_with = opening(model)
        harness = busy_run(
            lines, slots=slots, lookahead=lookahead, policy="learned", length_model=model
        )
        again = LengthModel.restored(begun_with)
        assert replayed(lines, harness.config, 9, again) == lines
        assert opening(again) == opening(model)
        orders.add(harness.journal.sha256)
        model = LengthModel.restored(model.state())
    assert model.num_ended > 8
    assert len(orders) > 1  # what was learned decides something


LABELS = st.lists(st.sampled_from(("p7", "p8", "m3", "cé", "b00ff", "b\u2028")), unique=True)
ANSWERS = st.lists(st.tuples(LABELS.map(tuple), st.integers(1, 2**21)), max_size=40)


@given(ANSWERS, ANSWERS)
def test_a_length_model_reads_back_to_the_last_bit(
    before: list[tuple[Labels, int]], after: list[tuple[Labels, int]]
) -> None:
    """An engine that began with a restored model and a replay of it agree from then on."""
    first = LengthModel(half_life=7.0)
    for labels, num_tokens in before:
        first.add(labels, num_tokens)
    live = LengthModel.restored(first.state())
    again = LengthModel.restored(opening(live))
    for model in (live, again):
        for labels, num_tokens in after:
            model.add(labels, num_tokens)
    known = tuple(sorted({label for labels, _ in before + after for label in labels}))
    assert again.distribution(known) == live.distribution(known)
    assert again.mean_tokens == live.mean_tokens
    assert again.state() == live.state()
    assert list(again.state()["labels"]) == list(live.state()["labels"])  # the order they go in


def test_a_changed_fact_changes_the_hash() -> None:
    """One id, one bit of a time, or the order of two lines shows."""
    hashes = set()
    for lines in (
        (("update", 1.0, 5), ("abort", 2.0, 7)),
        (("update", 1.0, 6), ("abort", 2.0, 7)),
        (("update", 1.0000000000000002, 5), ("abort", 2.0, 7)),
        (("abort", 2.0, 7), ("update", 1.0, 5)),
    ):
        journal = Journal()
        for kind, now, value in lines:
            journal.write(kind, now, value)
        hashes.add(journal.sha256)
    assert len(hashes) == 4


@given(arrivals())
def test_an_arrival_reads_back_as_it_was_written(arrival: Arrival) -> None:
    """Every field, floats to the last bit."""
    lines: list[str] = []
    Journal(lines.append).told(arrival, 1.0)
    kind, _, *fields = json.loads(lines[0])
    assert read_fact(kind, fields) == arrival


def test_an_arrival_written_before_there_were_salts_is_read() -> None:
    """It shares KV as it did then."""
    lines: list[str] = []
    Journal(lines.append).told(Arrival((5, 6), SamplingParams()), 1.0)
    kind, _, fields = json.loads(lines[0])
    whole = read_fact(kind, [dict(fields)])
    assert fields.pop("cache_salt") == ""
    assert read_fact(kind, [fields]) == whole


def test_a_stall_can_be_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the scheduler asks itself again, that is still one question and one plan."""
    monkeypatch.setattr(FCFS, "ordered", lambda self: iter(()))
    lines: list[str] = []
    harness = Harness(small_config(is_strict=False), 8, sink=lines.append)
    for prompt in ([1, 2], [3]):
        harness.add(prompt, 2)
    while harness.is_busy:
        harness.step()
    assert harness.scheduler.stats().num_stalls == 2
    assert len(harness.executor.plans) == 4
    assert replayed(lines, harness.config, 8) == lines


def test_what_has_no_words_is_refused() -> None:
    """A value that could not be read back is an error, not a repr."""
    with pytest.raises(TypeError, match="object"):
        Journal().write("add", 0.0, object())
