"""Who is blamed for the death of an engine, and who runs until that is known."""

from __future__ import annotations

from fastserve.client.suspects import Suspects
from fastserve.wire.engine_messages import RequestNumber


def numbers(*values: int) -> list[RequestNumber]:
    """Return some requests."""
    return [RequestNumber(value) for value in values]


def test_one_death_makes_nobody_a_suspect() -> None:
    """It may have been anything: everybody goes on."""
    suspects = Suspects()
    assert suspects.charge(numbers(1, 2)) is None
    suspects.begin_trials()
    assert suspects.on_trial is None


def test_suspects_are_tried_one_at_a_time_until_their_next_token() -> None:
    """In the order in which they were charged; those past it, and those who left, are free."""
    suspects = Suspects()
    for present in (numbers(1, 2, 3), numbers(4, 1, 2, 3)):
        assert suspects.charge(present) is None
    suspects.begin_trials()
    assert suspects.on_trial == 1
    assert not suspects.clear(RequestNumber(3))  # its client left before its turn
    assert not suspects.clear(RequestNumber(9))
    assert suspects.clear(RequestNumber(1))
    assert suspects.on_trial == 2
    assert suspects.clear(RequestNumber(2))
    assert suspects.on_trial is None


def test_a_death_during_a_trial_is_the_tried_ones() -> None:
    """Whatever else the process had; the others keep their place."""
    suspects = Suspects()
    suspects.charge(numbers(1, 2))
    suspects.charge(numbers(1, 2))
    suspects.begin_trials()
    assert suspects.charge(numbers(1, 2, 3)) == 1
    suspects.clear(RequestNumber(1))
    suspects.begin_trials()
    assert suspects.on_trial == 2


def test_whoever_is_alone_at_two_deaths_is_tried_too() -> None:
    """They may have come from outside; a third one, in its trial, is proof."""
    suspects = Suspects()
    for _ in range(2):
        assert suspects.charge(numbers(7)) is None
    suspects.begin_trials()
    assert suspects.on_trial == 7
    assert suspects.charge(numbers(7)) == 7


def test_deaths_with_a_token_between_them_make_no_suspect() -> None:
    """Only those in a row count."""
    suspects = Suspects()
    assert suspects.charge(numbers(7)) is None
    suspects.clear(RequestNumber(7))
    assert suspects.charge(numbers(7)) is None
    suspects.begin_trials()
    assert suspects.on_trial is None


def test_a_death_with_nobody_present_blames_nobody() -> None:
    """An engine may die of itself."""
    suspects = Suspects()
    assert suspects.charge([]) is None
    suspects.begin_trials()
    assert suspects.on_trial is None


def test_of_several_replicas_one_holds_the_trial() -> None:
    """It runs the one on trial and nobody else; the rest goes on elsewhere, without suspects."""
    suspects = Suspects()
    suspects.charge(numbers(1, 2), replica=0)
    suspects.charge(numbers(1, 2), replica=1)
    assert suspects.untried == [1, 2]
    one, two, other = numbers(1, 2, 3)
    assert not suspects.may_run(one, 2)
    assert suspects.may_run(other, 2)
    suspects.begin_trials(1)
    suspects.begin_trials(0)  # which takes those that are no suspects meanwhile
    assert (suspects.on_trial, suspects.trial_at) == (1, 1)
    assert suspects.may_run(one, 1)
    assert not any(suspects.may_run(number, 1) for number in (two, other))
    assert not any(suspects.may_run(number, 0) for number in (one, two))
    assert suspects.may_run(other, 0)


def test_a_death_elsewhere_leaves_a_trial_alone() -> None:
    """Whom it makes suspects is tried after those that wait already, in the same replica."""
    suspects = Suspects()
    for replica in (0, 1):
        suspects.charge(numbers(1, 2), replica)
    suspects.charge(numbers(5, 6), 2)
    suspects.begin_trials(0)
    assert suspects.charge(numbers(5, 6), 2) is None
    assert suspects.on_trial == 1
    tried = []
    while suspects.on_trial is not None:
        tried.append(suspects.on_trial)
        assert suspects.trial_at == 0
        assert suspects.clear(suspects.on_trial)
    assert tried == [1, 2, 5, 6]
    assert suspects.trial_at is None
