"""Processor time of other processes."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from benchmarks.process_cpu import Stat, children_of, cpu_seconds, stat_of


def test_a_line_is_read_behind_the_name():
    """A process may call itself `a) b (c`; user and system time are added up."""
    line = "42 (a) b (c) S 7 42 42 0 -1 4194304 100 0 0 0 150 50 9 9 20 0 1 0 12345 0 0"
    assert stat_of(line, ticks_per_s=100) == Stat(state="S", parent=7, cpu_s=2.0)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_this_process_and_its_child():
    """A child is found while it lives, and what this process has taken is what it says itself."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        assert child.pid in children_of(os.getpid())
        child.kill()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # it has ended, and is still there
        assert child.pid not in children_of(os.getpid())
    before = time.process_time()
    found = cpu_seconds([os.getpid()])
    assert before - 0.05 <= found <= time.process_time() + 0.05
