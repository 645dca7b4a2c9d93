"""The supervisor's restarts: so many within a window, and not one more."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from fastserve.client.supervisor import MAX_RESTARTS, RESTART_WINDOW_S, Restarts

GAPS = st.lists(st.floats(0.0, RESTART_WINDOW_S), max_size=30)


@given(GAPS)
def test_no_window_holds_more_restarts_than_are_allowed(gaps: list[float]) -> None:
    """A restart is allowed if, and only if, the window before it holds fewer than the bound."""
    restarts, now = Restarts(), 0.0
    allowed: list[float] = []
    for gap in gaps:
        now += gap
        in_window = sum(at >= now - RESTART_WINDOW_S for at in allowed)
        assert restarts.allow(now) == (in_window < MAX_RESTARTS)
        if in_window < MAX_RESTARTS:
            allowed.append(now)


def test_a_cleared_account_allows_as_many_again() -> None:
    """What one request cost is not the others' fault."""
    restarts = Restarts()
    for _ in range(2):
        assert [restarts.allow(0.0) for _ in range(MAX_RESTARTS + 1)] == [True] * MAX_RESTARTS + [
            False
        ]
        restarts.clear()
