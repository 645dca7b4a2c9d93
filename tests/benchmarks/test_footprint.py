"""What a process takes up, read from /proc."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from benchmarks.footprint import Footprint, footprint, read_status
from benchmarks.process_cpu import PROC

STATUS = "Name:\tpython3\nVmPeak:\t  999 kB\nVmRSS:\t    1234 kB\nThreads:\t7\n"


def test_a_status_is_read():
    """Kilobytes become bytes."""
    assert read_status(STATUS, 5) == Footprint(5, 7, 1234 * 1024)


@pytest.mark.skipif(not PROC.is_dir(), reason="Linux only")
def test_a_process_takes_up_what_it_opens():
    """A pipe is two descriptors; a process that has ended is an error."""
    before = footprint(os.getpid())
    ends = os.pipe()
    assert footprint(os.getpid()).num_fds == before.num_fds + 2
    for end in ends:
        os.close(end)
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    with pytest.raises(OSError, match=str(child.pid)):
        footprint(child.pid)
