"""Measures coverage in the tests of some rooms, and lets all others run unwatched.

    python -m coverage run -m pytest -p tests.measured_rooms

Watching makes plain Python three times slower, so only what is held to a bar is watched. Tests that
go over the same lines again and again, for another reason than to reach them, are marked `no_cover`
and left out too. Must not know: the bar, how coverage is kept.
"""

from __future__ import annotations

import os
from collections.abc import Generator
from pathlib import Path

import pytest
from coverage import Coverage

TESTS = Path(__file__).parent
ROOMS = tuple(TESTS / room for room in ("core", "engine", "client", "server"))
OF_CHILDREN = "COVERAGE_PROCESS_CONFIG"  # by which processes that a test starts are watched


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Let nothing be watched while a test runs that does not count."""
    coverage = Coverage.current()
    if coverage is None or is_measured(item):
        return (yield)
    of_children = os.environ.pop(OF_CHILDREN, None)
    coverage.stop()
    try:
        return (yield)
    finally:
        coverage.start()
        if of_children is not None:
            os.environ[OF_CHILDREN] = of_children


def is_measured(item: pytest.Item) -> bool:
    """Return whether what a test reaches counts."""
    is_in_room = any(room in item.path.parents for room in ROOMS)
    return is_in_room and item.get_closest_marker("no_cover") is None
