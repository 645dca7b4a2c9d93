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


def test_whoever_is_alone_at_two_deaths_needs_no_trial() -> None:
    """But one death alone is no proof, nor are two with a token between them."""
    suspects = Suspects()
    assert suspects.charge(numbers(7)) is None
    suspects.clear(RequestNumber(7))
    assert suspects.charge(numbers(7)) is None
    assert suspects.charge(numbers(7)) == 7


def test_a_death_with_nobody_present_blames_nobody() -> None:
    """An engine may die of itself."""
    suspects = Suspects()
    assert suspects.charge([]) is None
    suspects.begin_trials()
    assert suspects.on_trial is None
