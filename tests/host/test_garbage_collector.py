"""The garbage collector of processes that serve."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import gc, sys, weakref
from fastserve.host import garbage_collector
kept = [[] for _ in range(1000)]
getattr(garbage_collector, sys.argv[1])()
assert gc.get_freeze_count() > 1000

class Node: pass

node = Node()
node.itself = node
gone = weakref.ref(node)
del node
later = []
while gone() is not None and len(later) < 1_000_000:
    later.append([])
print(gone() is None)
"""


@pytest.mark.parametrize("name", ["quiet_garbage_collector", "leave_startup_alone"])
def test_what_a_process_begins_with_is_left_alone(name: str) -> None:
    """And cycles that come later are found."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, name],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout == "True\n"
