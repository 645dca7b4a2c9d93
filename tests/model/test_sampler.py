"""The sampler against a naive numpy one, and the distribution it draws from."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastserve.core import messages
from fastserve.model import sampler
from fastserve.model.sampler import NO_TOKEN, Adjustments, Draws, adjust, gumbel, sample, score

VOCAB = 60


def draws(num_rows, **changes) -> Draws:
    """Return settings of plain sampling for every row, with changes."""
    values = {
        "is_greedy": np.zeros(num_rows, bool),
        "temperature": np.ones(num_rows, np.float32),
        "top_k": np.zeros(num_rows, np.int64),
        "top_p": np.ones(num_rows, np.float32),
        "min_p": np.zeros(num_rows, np.float32),
        "seeds": np.arange(num_rows),
        "positions": np.full(num_rows, 7),
        **changes,
    }
    return Draws(**values)


def adjustments(num_rows, **changes) -> Adjustments:
    """Return changes to logits that change nothing, with changes."""
    none, ones, zeros = np.zeros(0, np.int64), np.ones(num_rows), np.zeros(num_rows)
    values = {
        **dict.fromkeys(("bias_rows", "bias_ids", "banned_rows", "banned_ids"), none),
        **dict.fromkeys(("seen_rows", "seen_ids"), none),
        "bias": np.zeros(0, np.float32),
        "seen_counts": np.zeros(0, np.float32),
        "repetition": ones.astype(np.float32),
        "presence": zeros.astype(np.float32),
        "frequency": zeros.astype(np.float32),
        **changes,
    }
    return Adjustments(**values)


def naive_distribution(logits, temperature, top_k, top_p, min_p):
    """The definition, in float64, id by id; ties with the last one kept are kept."""
    scaled = logits.astype(np.float64) / temperature
    floor = scaled.max() + (np.log(min_p) if min_p > 0 else -np.inf)
    if 0 < top_k < len(scaled):
        floor = max(floor, np.sort(scaled)[-top_k])
    weights = np.where(scaled >= floor, np.exp(scaled - scaled.max()), 0.0)
    weights /= weights.sum()
    if top_p < 1:
        held, last = 0.0, 0
        for token in np.argsort(-scaled, kind="stable"):
            if held >= top_p or weights[token] == 0:
                break
            held, last = held + weights[token], token
        weights = np.where(scaled >= scaled[last], weights, 0.0)
    return weights / weights.sum()


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    temperature=st.sampled_from([0.3, 1.0, 2.5]),
    top_k=st.sampled_from([-1, 0, 1, 2, 7, 59, 60, 500]),
    top_p=st.sampled_from([1e-6, 0.11, 0.5, 0.93, 0.999, 1.0]),
    min_p=st.sampled_from([0.0, 0.05, 0.5, 1.0]),
    candidates=st.sampled_from([1, 4, 256]),
    ties=st.booleans(),
)
def test_kept_ids_equal_the_naive_ones(seed, temperature, top_k, top_p, min_p, candidates, ties):
    """The support of the draw is the naive filter's, whatever the shortcut's size."""
    logits = np.random.default_rng(seed).normal(0, 2, (3, VOCAB)).astype(np.float32)
    if ties:
        logits = logits.round()
    config = draws(
        3,
        temperature=np.full(3, temperature, np.float32),
        top_k=np.array([top_k, 0, top_k]),
        top_p=np.array([top_p, top_p, 1.0], np.float32),
        min_p=np.array([min_p, 0.0, min_p], np.float32),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampler, "NUM_CANDIDATES", candidates)
        scaled = torch.from_numpy(logits) / temperature
        cutoff = sampler._cutoff(scaled, config)
    for row in range(3):
        expected = naive_distribution(
            logits[row], temperature, config.top_k[row], config.top_p[row], config.min_p[row]
        )
        kept = np.ones(VOCAB, bool) if cutoff is None else (scaled >= cutoff[:, None])[row].numpy()
        differing = np.flatnonzero(kept != (expected > 0))
        # A nucleus may end one rank off where the held share meets top_p to float32 rounding.
        assert len(differing) == 0 or is_rounding(expected, logits[row], differing, top_p)


def is_rounding(expected, logits, differing, top_p) -> bool:
    """Whether the ids in doubt share one logit at the very edge of the nucleus."""
    return len(set(logits[differing])) == 1 and top_p > 0.99


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"temperature": 0.5},
        {"top_k": 5},
        {"top_p": 0.8},
        {"min_p": 0.1},
        {"temperature": 1.7, "top_k": 12, "top_p": 0.9, "min_p": 0.02},
    ],
)
def test_frequencies_fit_the_distribution(changes):
    """Chi-square of 20,000 draws over positions stays below the 99.99 % quantile."""
    n = 20_000
    logits = np.random.default_rng(5).normal(0, 1.5, 24).astype(np.float32)
    arrays = {
        name: np.full(n, value, np.int64 if name == "top_k" else np.float32)
        for name, value in changes.items()
    }
    config = draws(n, seeds=np.full(n, 1234), positions=np.arange(n), **arrays)
    drawn = sample(torch.from_numpy(logits).expand(n, -1), config, None).numpy()
    expected = n * naive_distribution(
        logits,
        changes.get("temperature", 1.0),
        changes.get("top_k", 0),
        changes.get("top_p", 1.0),
        changes.get("min_p", 0.0),
    )
    counts = np.bincount(drawn, minlength=24)
    assert counts[expected == 0].sum() == 0
    likely = expected > 0
    chi_square = ((counts - expected)[likely] ** 2 / expected[likely]).sum()
    freedom = likely.sum() - 1
    # Wilson and Hilferty's approximation of the quantile.
    assert chi_square < freedom * (1 - 2 / (9 * freedom) + 3.72 * (2 / (9 * freedom)) ** 0.5) ** 3


def test_rows_do_not_see_each_other():
    """A row draws the same id alone, reversed, and among rows with other settings."""
    generator = np.random.default_rng(0)
    n = 40
    logits = torch.from_numpy(generator.normal(0, 2, (n, 700)).astype(np.float32))
    logits = (logits * 4).round() / 4  # ties, as half precision has
    config = draws(
        n,
        is_greedy=generator.random(n) < 0.2,
        temperature=generator.uniform(0.2, 2, n).astype(np.float32),
        top_k=generator.choice([0, 3, 300], n),
        top_p=generator.choice([1.0, 0.5, 0.99], n).astype(np.float32),
        min_p=generator.choice([0.0, 0.1], n).astype(np.float32),
        positions=generator.integers(0, 99, n),
    )
    together = sample(logits, config, None).tolist()

    def subset(rows):
        fields = {name: getattr(config, name)[rows] for name in Draws.__dataclass_fields__}
        return sample(logits[rows], Draws(**fields), None).tolist()

    assert [subset(np.array([row]))[0] for row in range(n)] == together
    assert subset(np.arange(n)[::-1].copy()) == together[::-1]
    for row in np.flatnonzero(config.is_greedy):
        assert together[row] == int(logits[row].argmax())


def test_greedy_batch_is_argmax():
    """Without draws every row takes its best id."""
    logits = torch.randn(9, VOCAB)
    assert torch.equal(sample(logits, None, None), logits.argmax(-1))


def test_noise_is_gumbel():
    """Noise over positions, seeds and ids follows the Gumbel law and is not correlated."""
    n = 50_000
    line = torch.arange(n)
    fixed = torch.tensor(-3)
    for noise in (
        gumbel(fixed, line, 7),
        gumbel(line - n // 2, fixed, 7),
        gumbel(fixed, fixed, line),
    ):
        uniform = torch.exp(-torch.exp(-noise)).numpy()
        counts = np.histogram(uniform, bins=50, range=(0, 1))[0]
        assert ((counts - n / 50) ** 2 / (n / 50)).sum() < 100
        assert abs(np.corrcoef(uniform[:-1], uniform[1:])[0, 1]) < 0.02


def test_noise_is_the_hash_it_claims():
    """It is splitmix64 of seed, position and id, computed here with plain integers."""

    def splitmix64(value: int) -> int:
        value = (value + 0x9E3779B97F4A7C15) % 2**64
        value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        value = (value ^ value >> 27) * 0x94D049BB133111EB % 2**64
        return value ^ value >> 31

    for seed, position, token in ((0, 0, 0), (42, 100, 3), (-1, 7, 2**40), (2**63 - 1, 131071, 9)):
        bits = splitmix64(splitmix64(splitmix64(seed % 2**64) ^ position) ^ token) >> 11
        expected = -math.log(-math.log((bits + 0.5) * 2.0**-53))
        noise = gumbel(torch.tensor([seed]), torch.tensor([position]), token)
        assert float(noise[0]) == pytest.approx(expected, rel=1e-9)


def test_vocabulary_beyond_the_candidates_is_drawn_fairly():
    """Ids that share one draw come out as often as their probabilities say."""
    vocab, n = 600, 60_000
    logits = torch.linspace(0.0, -1.5, vocab)[torch.randperm(vocab)]
    drawn = sample(logits.expand(n, vocab), draws(n, seeds=np.arange(n)), None)
    expected = logits.softmax(-1).numpy() * n
    counts = np.bincount(drawn.numpy(), minlength=vocab)
    assert ((counts - expected) ** 2 / expected).sum() < vocab + 5 * math.sqrt(2 * vocab)


def test_draws_survive_the_last_bits():
    """Logits that differ as a recomputation's do give the same ids, among unlikely ones too."""
    n, vocab = 4096, 3000
    logits = torch.randn(n, vocab)
    config = draws(n, seeds=np.arange(n))
    moved = sample(logits + 1e-6 * torch.randn(n, vocab), config, None)
    assert int((sample(logits.clone(), config, None) != moved).sum()) <= 1


@pytest.mark.parametrize("is_greedy", [True, False, None])
def test_a_row_without_numbers_has_no_token_and_harms_no_other(is_greedy):
    """One NaN, one infinity, or no logit that is finite: NO_TOKEN; -inf alone is a banned id."""
    logits = torch.randn(6, VOCAB)
    config = None if is_greedy is None else draws(6, top_p=0.9, is_greedy=np.full(6, is_greedy))
    whole = sample(logits.clone(), config, None).tolist()
    logits[1, 3] = torch.nan
    logits[2] = torch.nan
    logits[3, 5] = torch.inf
    logits[4] = -torch.inf
    logits[5, (whole[5] + 1) % VOCAB] = -torch.inf
    drawn = sample(logits.clone(), config, None).tolist()
    assert drawn[1:5] == [NO_TOKEN] * 4
    assert drawn[0] == whole[0]
    assert 0 <= drawn[5] < VOCAB


def test_no_token_is_said_in_one_way():
    """What the sampler draws is what a Sample says."""
    assert NO_TOKEN == messages.NO_TOKEN


def test_adjustments():
    """Bias, ban and penalties change exactly the logits they name, as the formulas say."""
    logits = torch.randn(3, VOCAB)
    changes = adjustments(
        3,
        bias_rows=np.array([0, 2]),
        bias_ids=np.array([4, 5]),
        bias=np.array([1.5, -2.0], np.float32),
        banned_rows=np.array([1, 1]),
        banned_ids=np.array([7, 8]),
        seen_rows=np.array([0, 0, 2]),
        seen_ids=np.array([4, 9, 6]),
        seen_counts=np.array([2, 0, 1], np.float32),
        repetition=np.array([1.3, 1.0, 0.5], np.float32),
        presence=np.array([0.2, 0.0, -0.4], np.float32),
        frequency=np.array([0.1, 0.0, 0.3], np.float32),
    )
    before = logits.clone()
    result = adjust(logits, changes)
    assert torch.equal(logits, before)
    expected = logits.numpy().copy()
    expected[0, 4] += 1.5
    expected[2, 5] -= 2.0
    expected[1, 7:9] = -np.inf
    for row, token, count, repetition, presence, frequency in (
        (0, 4, 2, 1.3, 0.2, 0.1),
        (0, 9, 0, 1.3, 0.2, 0.1),
        (2, 6, 1, 0.5, -0.4, 0.3),
    ):
        value = expected[row, token]
        value = value / repetition if value > 0 else value * repetition
        expected[row, token] = value - frequency * count - presence * (count > 0)
    np.testing.assert_allclose(result.numpy(), expected, rtol=1e-5)


def test_score():
    """Log probabilities, ranks and best ids are those of log_softmax, sorted."""
    logits = torch.randn(5, VOCAB)
    chosen = torch.tensor([0, 5, 59, 7, 7])
    scores = score(logits, chosen, 4)
    expected = logits.log_softmax(-1)
    for row, token in enumerate(chosen.tolist()):
        assert scores.logprobs[row] == pytest.approx(float(expected[row, token]))
        order = expected[row].argsort(descending=True).tolist()
        assert scores.ranks[row] == order.index(token) + 1
        assert scores.top_ids[row].tolist() == order[:4]
    assert score(logits, chosen, 0).top_ids.shape == (5, 0)
    assert score(logits, chosen, 999).top_ids.shape == (5, VOCAB)
