"""The bar of `bench serve` moves with the tokens that come, and ends with the requests."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from fastserve.bench.meter import Meter
from fastserve.bench.requests import Planned

REQUESTS = [Planned(0.0, [1], 10) for _ in range(4)]


def counted(pieces: int, done: int) -> int:
    """Return the tokens that a meter shows after so many pieces and ends."""
    meter = Meter(Console(file=io.StringIO()), is_shown=True)
    with meter.following("requests", REQUESTS):
        for _ in range(pieces):
            meter.count_piece()
        for _ in range(done):
            meter.count_done()
        return meter.num_tokens


@pytest.mark.parametrize(
    ("pieces", "done", "tokens"),
    [
        (0, 0, 0),
        (13, 0, 13),  # no request has ended, and the bar moves
        (13, 2, 20),  # pieces of several tokens
        (0, 4, 40),  # all lost is the end too
        (99, 0, 40),
    ],
)
def test_the_bar_moves_with_tokens(pieces, done, tokens):
    """The larger of the pieces and the share of the requests that ended, never beyond the end."""
    assert counted(pieces, done) == tokens


@pytest.mark.parametrize("width", [40, 80])
def test_a_terminal_sees_requests_and_share(width):
    """In one line of its width."""
    terminal = Console(file=io.StringIO(), force_terminal=True, width=width, color_system=None)
    with Meter(terminal, is_shown=True) as meter, meter.following("requests", REQUESTS):
        for _ in range(20):
            meter.count_piece()
        meter.count_done()
        with terminal.capture() as capture:
            terminal.print(*meter.get_renderables())
    assert all(word in capture.get() for word in ("requests", "50%", "1/4"))
    assert capture.get().count("\n") == 1


def test_a_phase_without_requests_is_not_shown():
    """Nothing is measured alone unless that is asked for."""
    terminal = Console(file=io.StringIO(), force_terminal=True, width=80, color_system=None)
    with (
        Meter(terminal, is_shown=True) as meter,
        meter.following("alone", []),
        terminal.capture() as capture,
    ):
        terminal.print(*meter.get_renderables())
    assert "alone" not in capture.get()


@pytest.mark.parametrize(("is_terminal", "is_shown"), [(False, True), (True, False)])
def test_nothing_is_drawn_in_a_pipe_or_when_not_wanted(is_terminal, is_shown):
    """Not one character."""
    file = io.StringIO()
    console = Console(file=file, force_terminal=is_terminal)
    with Meter(console, is_shown=is_shown) as meter, meter.following("requests", REQUESTS):
        meter.count_done()
    assert file.getvalue() == ""
