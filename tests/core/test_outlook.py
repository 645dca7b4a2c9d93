"""What is expected: what a version is, when another is due, the work that arrivals find."""

from __future__ import annotations

import random

import pytest

from fastserve.core.gittins import AnswerLength
from fastserve.core.lengths import LengthModel, bin_of
from fastserve.core.outlook import (
    ARRIVALS,
    MAX_ANSWERS,
    MAX_DRIFT,
    MIN_NEWS,
    NUM_DECILES,
    Outlook,
)

KNOWN = 1000  # answers that a model has seen


def learned(num_tokens: int = 40) -> LengthModel:
    """Return a model that has seen many answers of one length."""
    model = LengthModel()
    for _ in range(KNOWN):
        model.add(("pa",), num_tokens)
    return model


def end(outlook: Outlook, num_tokens: int) -> None:
    """Let an answer end that was predicted as things stand."""
    outlook.ended(("pa",), num_tokens, outlook.answer(("pa",), None))


def test_the_mean_work_is_that_which_arrivals_find() -> None:
    """Not that after them, and time does not count: by hand from 0, 3 and 6 s."""
    outlook = Outlook(LengthModel(), 0.0)
    for _ in range(3):
        outlook.arrived(8)
        outlook.expect(3.0)
    assert outlook.forecasts().mean_work_s == pytest.approx(3.0)
    assert outlook.forecasts().work_s == pytest.approx(9.0)
    outlook.expect(-9.0)
    assert outlook.forecasts().work_s == pytest.approx(0.0)
    assert outlook.mean_work_s == 0.0, "it takes effect with a version"
    outlook.renew()
    assert outlook.mean_work_s == pytest.approx(3.0)


def test_the_mean_prompt_is_that_of_the_last_arrivals() -> None:
    """It takes effect with a version, as the mean work does."""
    outlook = Outlook(LengthModel(), 0.0)
    for num_prompt_tokens in (10, 20, 60):
        outlook.arrived(num_prompt_tokens)
    assert outlook.mean_prompt_tokens == 0.0
    outlook.renew()
    assert outlook.mean_prompt_tokens == pytest.approx(30.0)


def test_the_mean_work_follows_the_last_arrivals() -> None:
    """After a few times as many as it is taken over, what was before is all but forgotten."""
    outlook = Outlook(LengthModel(), 0.0)
    outlook.expect(500.0)
    for _ in range(10 * ARRIVALS):
        outlook.arrived(8)
    outlook.expect(-400.0)
    for _ in range(10 * ARRIVALS):
        outlook.arrived(8)
    assert outlook.forecasts().mean_work_s == pytest.approx(100.0, rel=1e-3)


def test_a_version_is_due_when_the_work_has_drifted() -> None:
    """By more than its share of the mean, up or down, and no sooner."""
    for direction in (1.0, -1.0):
        outlook = Outlook(LengthModel(), 0.0)
        assert not outlook.is_due
        outlook.expect(100.0)
        outlook.arrived(8)
        assert outlook.is_due, "nothing was known before"
        outlook.renew()
        assert not outlook.is_due
        outlook.expect(direction * 99.0 * MAX_DRIFT)
        for _ in range(20 * ARRIVALS):
            outlook.arrived(8)
        assert not outlook.is_due
        outlook.expect(direction * 2.0 * MAX_DRIFT)
        for _ in range(20 * ARRIVALS):
            outlook.arrived(8)
        assert outlook.is_due


def test_a_version_is_due_when_enough_answers_are_new() -> None:
    """The first at once; of many known ones a share."""
    outlook = Outlook(LengthModel(), 0.0)
    end(outlook, 5)
    assert outlook.is_due
    outlook = Outlook(learned(), 0.0)
    while not outlook.is_due:
        end(outlook, 5)
    assert outlook.model.num_ended - KNOWN == pytest.approx(MIN_NEWS * KNOWN, abs=1.0)
    version = outlook.version
    outlook.renew()
    assert outlook.version == version + 1
    assert not outlook.is_due


def test_within_a_version_equal_questions_have_equal_answers() -> None:
    """What ends meanwhile is seen in the next version, by all at once."""
    outlook = Outlook(learned(40), 0.3)
    before = outlook.answer(("pa",), None)
    mean = outlook.mean_tokens
    for _ in range(200):
        end(outlook, 4000)
    assert outlook.answer(("pa",), None) is before
    assert outlook.mean_tokens == mean
    outlook.renew()
    after = outlook.answer(("pa",), None)
    assert after.tokens_left(0) > 2 * before.tokens_left(0)
    assert outlook.mean_tokens > 2 * mean


def test_clients_who_only_ask_leave_little_behind() -> None:
    """Each under a name of its own, and none waits for an answer that could be learned from.

    What is expected of them is that of the version, whatever is learned meanwhile.
    """
    outlook = Outlook(learned(), 0.0)
    outlook.renew()
    first = outlook.answer(("pa", "c0"), None)
    end(outlook, 4000)
    for client in range(1, 2 * MAX_ANSWERS):
        outlook.answer(("pa", f"c{client}"), None)
        assert outlook.num_answers <= MAX_ANSWERS
    assert outlook.num_answers == MAX_ANSWERS
    assert outlook.num_made == 2 * MAX_ANSWERS + 1, "and one that has ended"
    assert not outlook.is_due, "too little was learned for prices to be made anew"
    again = outlook.answer(("pa", "c0"), None)
    assert again is not first
    assert again.tokens_left(0) == first.tokens_left(0)
    outlook.renew()
    assert outlook.num_answers == 0
    assert outlook.answer(("pa", "c0"), None).tokens_left(0) > first.tokens_left(0)


def test_answers_are_told_apart_by_label_and_limit() -> None:
    """Each pair of both has a distribution of its own."""
    outlook = Outlook(learned(40), 0.0)
    known = outlook.answer(("pa",), None).tokens_left(0)
    assert outlook.answer(("pa",), 10).tokens_left(0) <= 10.0 < known
    assert outlook.answer(("pz",), None).tokens_left(0) != known


def test_the_objective_takes_effect_as_answers_become_known() -> None:
    """From nothing all objectives are the same; of many answers β = 1 makes short ones cheaper."""
    new = [Outlook(LengthModel(), beta).answer(("pa",), None) for beta in (0.0, 1.0)]
    assert new[0].index(0, 0.0, 1.0) == new[1].index(0, 0.0, 1.0)

    def price(beta: float, num_tokens: int) -> float:
        model = learned(num_tokens)
        for _ in range(KNOWN):
            model.add(("pb",), 1000)
        return Outlook(model, beta).answer(("pa",), None).index(0, 0.0, 1.0)

    assert price(1.0, 10) < price(0.3, 10) < price(0.0, 10)


def test_right_predictions_fall_into_every_decile_alike() -> None:
    """Lengths drawn from what is predicted; tokens are counted on both sides."""
    rng, outlook = random.Random(3), Outlook(LengthModel(), 0.0)
    for _ in range(4000):
        outlook.model.add((), 1 + int(rng.expovariate(1 / 300.0)))
    outlook.renew()
    drawn = [1 + int(rng.expovariate(1 / 300.0)) for _ in range(4000)]
    answer = outlook.answer((), None)
    for num_tokens in drawn:
        outlook.ended((), num_tokens, answer)
    forecasts = outlook.forecasts()
    assert sum(forecasts.num_by_decile) == 4000
    assert len(forecasts.num_by_decile) == NUM_DECILES
    assert all(200 < num < 600 for num in forecasts.num_by_decile)
    assert forecasts.answered_tokens == sum(drawn)
    assert forecasts.predicted_tokens == pytest.approx(sum(drawn), rel=0.1)


def test_wrong_predictions_show() -> None:
    """Answers that are longer than predicted are in the last decile; one beyond a limit too."""
    outlook = Outlook(LengthModel(), 0.0)
    shares = [0.0] * (bin_of(10_000) + 1)
    shares[bin_of(10)] = 1.0
    for num_tokens in (1000, 10_000):
        outlook.ended((), num_tokens, AnswerLength(shares))
    assert outlook.forecasts().num_by_decile == (0,) * (NUM_DECILES - 1) + (2,)
