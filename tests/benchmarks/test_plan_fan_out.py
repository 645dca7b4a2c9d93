"""The benchmark of telling ranks of a step: every rank hears every plan."""

from __future__ import annotations

import pytest

from benchmarks import plan_fan_out


@pytest.mark.processes
def test_times_grow_with_what_is_counted_in_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan is known after it was sent, to as many ranks as there are."""
    monkeypatch.setattr(plan_fan_out, "WARM_UP", 1)
    row = plan_fan_out.measure(2, num_sequences=4, num_steps=20)
    assert row["ranks"] == 2
    assert 0.0 < row["sent_us"]["p50"] < row["known_us"]["p50"]
    assert row["frame_bytes"] > 4 * 20


def test_a_plan_is_one_decode_of_every_sequence() -> None:
    """Now and then with a new block."""
    plans = [plan_fan_out.plan(step_id, 8) for step_id in range(16)]
    assert {plan.num_tokens for plan in plans} == {8}
    assert sum(len(work.block_ids) for plan in plans for work in plan.work) == 8
