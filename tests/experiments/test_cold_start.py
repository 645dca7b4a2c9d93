"""The cold start's models: one that counts running answers, one that was taught."""

from __future__ import annotations

import numpy as np
import pytest

from experiments.cold_start import SurvivorModel, compare, row_of, taught
from experiments.workloads import SETUP
from fastserve.core.lengths import EDGES, Labels, LengthModel, bin_of
from fastserve.sim.workload import Workload


class Watching(SurvivorModel):
    """A SurvivorModel that is told what runs."""

    ages: tuple[tuple[int, Labels], ...] = ()

    def running(self) -> list[tuple[int, Labels]]:
        """Return what it was told."""
        return [(bin_of(age + 1), labels) for age, labels in self.ages]


def learn(model: LengthModel) -> None:
    """Take short answers in."""
    for number in range(40):
        model.add(("p7", f"c{number % 2}"), 10 + number)


def test_without_running_answers_the_estimate_is_the_plain_one() -> None:
    """Both are (h + k · p) / (n + k) by label."""
    plain, watching = LengthModel(), Watching()
    learn(plain)
    learn(watching)
    expected = plain.distribution(("p7", "c1"))
    assert watching.distribution(("p7", "c1")) == pytest.approx(expected, abs=1e-12)


def test_a_running_answer_moves_what_lies_before_its_age_behind_it() -> None:
    """All bins below lose in proportion to those at risk; the whole stays one."""
    watching = Watching()
    learn(watching)
    before = watching.distribution(("p7",))
    watching.ages = ((200, ("p7",)),) * 20
    after = watching.distribution(("p7",))
    beyond = bin_of(201)
    assert sum(after) == pytest.approx(1.0)
    assert min(after) >= 0.0
    assert sum(after[beyond:]) > 3 * sum(before[beyond:])
    assert all(less <= more + 1e-12 for less, more in zip(after[:20], before[:20], strict=True))
    assert watching.distribution(()) != LengthModel.distribution(watching, ())


def small_trace(num_rows: int) -> Workload:
    """Return a few long answers among short ones."""
    rng = np.random.default_rng(0)
    output_tokens = np.where(rng.random(num_rows) < 0.1, 900, rng.integers(5, 60, num_rows))
    return Workload(
        arrived_at=np.arange(num_rows, dtype=np.float64),
        prompt_tokens=rng.integers(10, 100, num_rows),
        output_tokens=output_tokens,
    )


def test_a_taught_model_has_seen_every_answer() -> None:
    """Under the labels that the policy asks by."""
    trace = small_trace(50)
    model = taught(trace, SETUP.config("learned", "ideal"))
    assert model.num_ended == 50
    assert {label[0] for label in model.state()["labels"]} == {"p"}
    assert model.mean_tokens < EDGES[-1]


def test_every_variant_runs_the_same_rows() -> None:
    """Each run has a figure of each variant, and a row shows them over the cold one."""
    jct_s = compare(small_trace(120), 1.1, 2, 40)
    assert {name: len(values) for name, values in jct_s.items()} == {
        "fcfs": 2, "cold": 2, "survivors": 2, "warm": 2,
    }  # fmt: skip
    jct_s["warm"] = jct_s["cold"] * np.array([0.5, 2.0])
    assert row_of(jct_s).endswith("| 1.000 (0.50 to 2.00)")
