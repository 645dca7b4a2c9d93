"""WorkThread: order, results, and what is left out at the end."""

from __future__ import annotations

import subprocess
import sys
import threading
from functools import partial

import pytest

from fastserve.executor.work_thread import WorkThread


def test_functions_run_in_order_on_one_thread() -> None:
    """Whether they were submitted or called."""
    thread = WorkThread("under-test")
    ran: list[tuple[int, str]] = []

    def note(index: int) -> None:
        ran.append((index, threading.current_thread().name))

    for index in range(5):
        thread.submit(partial(note, index))
    assert thread.call(lambda: ran) == [(index, "under-test") for index in range(5)]
    thread.close()


def test_what_a_called_function_raises_is_raised() -> None:
    """And the thread goes on."""
    thread = WorkThread("under-test")
    with pytest.raises(ZeroDivisionError):
        thread.call(lambda: 1 // 0)
    assert thread.call(lambda: 7) == 7
    thread.close()


def test_closing_finishes_what_runs_and_leaves_out_the_rest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The thread has ended when `close` returns; to close again does nothing."""
    thread = WorkThread("under-test")
    has_begun, is_closing = threading.Event(), threading.Event()
    ran: list[str] = []

    def first() -> None:
        has_begun.set()
        is_closing.wait(30)
        ran.append("first")

    def join() -> None:
        is_closing.set()
        threading.Thread.join(thread._thread)

    thread.submit(first)
    thread.submit(lambda: ran.append("second"))
    assert has_begun.wait(30)
    monkeypatch.setattr(thread._thread, "join", join)
    thread.close()
    assert ran == ["first"]
    thread.close()
    with pytest.raises(RuntimeError, match="under-test was closed"):
        thread.call(lambda: None)
    assert "under-test" not in {other.name for other in threading.enumerate()}


def test_a_process_that_ends_waits_for_what_runs() -> None:
    """But for nothing else, though nobody closed the thread."""
    program = """
import threading
from fastserve.executor.work_thread import WorkThread
thread, has_begun = WorkThread("under-test"), threading.Event()
def work():
    has_begun.set()
    print(sum(range(3_000_000)))
thread.submit(work)
has_begun.wait()
"""
    done = subprocess.run(
        (sys.executable, "-c", program), capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == "4499998500000\n"
    assert not done.stderr
