"""What a test asks of the neighbours of an attacker: that they noticed nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from benchmarks.neighbours import Seen, watched


@contextlib.contextmanager
def watching(url: str, api_key: str, *, p99_s: float) -> Iterator[Seen]:
    """Let neighbours use the server meanwhile, and judge at the end what they saw."""
    with watched(url, api_key) as seen:
        yield seen
    check(seen, p99_s)


def check(seen: Seen, p99_s: float) -> None:
    """Assert that neighbours got what they always get, and that /health was quick.

    The bound is for a machine of the test's own; what /health took before is added twice.
    """
    assert seen.failures == []
    assert seen.num_answers > 0
    assert seen.num_different == 0
    worst_calm_s = max(seen.calm_health_s)
    found_s = seen.health_percentile_s(99)
    assert found_s < p99_s + 2 * worst_calm_s, (found_s, worst_calm_s)
