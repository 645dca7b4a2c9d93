"""Made-up workloads: the moments they promise, and the seed that fixes them."""

from __future__ import annotations

import numpy as np
import pytest

from fastserve.sim import generators
from fastserve.sim.generators import Empirical, Fixed, Lognormal, Zipf
from tests.sim.machines import make_workload


def rng(seed=1):
    """Return a seeded generator."""
    return np.random.default_rng(seed)


@pytest.mark.parametrize("cv", [0.5, 1.0, 4.0])
def test_arrivals_have_the_rate_and_spread_asked_for(cv):
    """Gamma gaps: mean 1 / rate, standard deviation cv times that."""
    gaps = np.diff(generators.arrivals(rng(), 200_000, 5.0, cv))
    assert gaps.mean() == pytest.approx(0.2, rel=0.05)
    assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.05)
    assert (gaps >= 0).all()


def test_arrivals_without_spread_are_even():
    """A CV of 0 is a metronome."""
    assert generators.arrivals(rng(), 3, 2.0, 0.0).tolist() == [0.5, 1.0, 1.5]


def test_the_seed_fixes_everything():
    """Same seed, same workload; another seed, another one."""
    draw = [
        generators.generate(rng(seed), 50, 2.0, Zipf(1.1, 1, 100), Lognormal(50, 1.0, 1, 500))
        for seed in (1, 1, 2)
    ]
    assert draw[0].arrived_at.tolist() == draw[1].arrived_at.tolist()
    assert draw[0].prompt_tokens.tolist() == draw[1].prompt_tokens.tolist()
    assert draw[0].output_tokens.tolist() == draw[1].output_tokens.tolist()
    assert draw[0].arrived_at.tolist() != draw[2].arrived_at.tolist()


def test_zipf_follows_its_power_law():
    """P(1) / P(2) = 2^θ; θ = 0 is uniform; the range is kept."""
    drawn = Zipf(2.0, 1, 50).draw(rng(), 200_000)
    counts = np.bincount(drawn)
    assert counts[1] / counts[2] == pytest.approx(4.0, rel=0.05)
    assert (drawn.min(), drawn.max()) == (1, 50)
    assert Zipf(0.0, 1, 9).draw(rng(), 100_000).mean() == pytest.approx(5.0, rel=0.02)


def test_lognormal_has_its_median_and_stays_in_range():
    """Half lie below the median; nothing leaves the range."""
    drawn = Lognormal(100.0, 1.0, 8, 400).draw(rng(), 100_000)
    assert np.median(drawn) == pytest.approx(100, rel=0.03)
    assert (drawn.min(), drawn.max()) == (8, 400)


def test_fixed_and_empirical_lengths():
    """One value; only values that were seen."""
    assert set(Fixed(7).draw(rng(), 5).tolist()) == {7}
    seen = np.array([3, 5, 9])
    assert set(Empirical(seen).draw(rng(), 100).tolist()) == {3, 5, 9}


def test_a_resample_keeps_prompt_and_answer_together():
    """Rows are drawn whole."""
    observed = make_workload((0.0, 1, 10), (1.0, 2, 20), (2.0, 3, 30))
    drawn = generators.resample(rng(), observed, 500, 3.0, 1.0)
    assert (drawn.output_tokens == 10 * drawn.prompt_tokens).all()
    assert drawn.rate == pytest.approx(3.0, rel=0.2)


def test_a_mix_has_its_shares_and_says_where_rows_come_from():
    """Nine in ten short, each row with the lengths of its part."""
    parts = {
        "short": (0.9, make_workload((0.0, 1, 10))),
        "long": (0.1, make_workload((0.0, 100, 1000))),
    }
    drawn = generators.mix(rng(), parts, 5000)
    assert drawn.source is not None
    is_long = np.array(drawn.source) == "long"
    assert is_long.mean() == pytest.approx(0.1, abs=0.02)
    assert set(drawn.prompt_tokens[is_long].tolist()) == {100}
    assert set(drawn.output_tokens[~is_long].tolist()) == {10}


def test_sessions_grow_turn_by_turn():
    """Each turn's prompt is the last turn's prompt and answer and a new prompt."""
    drawn = generators.sessions(rng(), 20, 1.0, Fixed(3), Fixed(5), Fixed(7), mean_think_s=2.0)
    assert drawn.prompt_tokens.tolist() == [5, 17, 29] * 20
    assert len(drawn.next_turns()) == 40
    assert drawn.think_s is not None
    assert (drawn.think_s.reshape(20, 3)[:, 0] == 0).all()
    assert drawn.think_s.reshape(20, 3)[:, 1:].mean() == pytest.approx(2.0, rel=0.4)
    assert (np.diff(drawn.arrived_at) >= 0).all()


def test_jitter_keeps_rows_whole_and_sorted():
    """Each row moves by less than the noise, with its lengths."""
    rows = [(float(at // 3), at + 1, at + 1) for at in range(30)]
    moved = generators.jittered(rng(), make_workload(*rows), 3.0)
    assert (np.diff(moved.arrived_at) >= 0).all()
    assert (moved.prompt_tokens == moved.output_tokens).all()
    assert sorted(moved.prompt_tokens.tolist()) == list(range(1, 31))
    before = (moved.prompt_tokens - 1) // 3
    assert ((moved.arrived_at - before >= 0) & (moved.arrived_at - before < 3)).all()
