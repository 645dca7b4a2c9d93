"""The log of a process: nobody waits for it, and what is lost of it is counted."""

from __future__ import annotations

import logging
import os
import subprocess
import sys

import pytest

from fastserve.host.log import QueuedHandler, once_in_a_while

PIPE_BYTES = 1 << 16
PROGRAM = """
import logging, sys
from fastserve.host.log import end_process, open_log
open_log("INFO")
for number in range(int(sys.argv[1])):
    logging.info("line %05d", number)
print("logged", flush=True)
if sys.argv[2] == "ends here":
    end_process(3)
sys.exit(3)
"""


def make_log(descriptor: int, max_waiting: int) -> logging.Logger:
    """Return a logger of its own that writes to a descriptor."""
    logger = logging.Logger("test", logging.INFO)
    logger.addHandler(QueuedHandler(descriptor, max_waiting))
    return logger


def close(logger: logging.Logger) -> None:
    """Do what logging does at exit."""
    for handler in logger.handlers:
        handler.close()


def test_lines_come_in_order_and_whole() -> None:
    """Those with bytes that are no text too."""
    reader, writer = os.pipe()
    log = make_log(writer, 100)
    for number in range(50):
        log.info("%d \ud800 α", number)
    close(log)
    os.close(writer)
    with open(reader, encoding="utf-8") as lines:
        assert lines.read().splitlines() == [f"{number} \\ud800 α" for number in range(50)]


def test_where_nobody_reads_lines_are_dropped_and_counted() -> None:
    """Logging never waits; once there is room again, the next line comes behind the count."""
    reader, writer = os.pipe()
    log = make_log(writer, 10)
    line = "x" * 1000
    num_lines = 2 * PIPE_BYTES // len(line)
    for _ in range(num_lines):  # in this thread: a handler that waits would never return
        log.info(line)
    with open(reader, encoding="utf-8") as lines:
        num_read = 0
        told = ""
        while not told:
            log.info("again")
            read = lines.readline().strip()
            num_read += read == line
            told = read if "dropped" in read else ""
        num_dropped = int(told.split()[0])
        # Of those that follow the count, each was logged once there was room.
        assert num_read + num_dropped >= num_lines
        assert num_read < num_lines
        assert "nobody read them" in told
        # The count may have taken the only place there was: then the line behind it is counted.
        following = told
        while "dropped" in following:
            log.info("again")
            following = lines.readline()
        assert following == "again\n"
        os.close(writer)
        close(log)


def test_a_reader_that_has_gone_is_no_error() -> None:
    """There is nobody left to tell."""
    reader, writer = os.pipe()
    os.close(reader)
    log = make_log(writer, 10)
    for _ in range(100):
        log.info("x")
    close(log)
    os.close(writer)


@pytest.mark.processes
@pytest.mark.parametrize("end", ["ends here", "returns"])
def test_the_last_lines_are_written_before_the_end(end: str) -> None:
    """However the process ends."""
    done = subprocess.run(
        (sys.executable, "-c", PROGRAM, "500", end), capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 3
    assert [line.split()[-1] for line in done.stderr.splitlines()] == [
        f"{number:05d}" for number in range(500)
    ]


@pytest.mark.processes
@pytest.mark.parametrize("end", ["ends here", "returns"])
def test_a_pipe_that_nobody_reads_does_not_hold_the_end_up(end: str) -> None:
    """All is logged, and the process ends, with a full pipe and a full queue."""
    reader, writer = os.pipe()
    process = subprocess.Popen(
        (sys.executable, "-c", PROGRAM, "30000", end), stdout=subprocess.PIPE, stderr=writer
    )
    os.close(writer)
    assert process.communicate(timeout=60)[0] == b"logged\n"
    assert process.returncode == 3
    os.close(reader)


def test_a_warning_that_comes_again_and_again_is_said_seldom() -> None:
    """Each by itself, and with how often it came meanwhile; errors are always said."""
    time = 0.0
    said: list[str] = []
    log = logging.Logger("test", logging.INFO)
    log.addFilter(once_in_a_while(10.0, lambda: time))
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    log.addHandler(handler)
    for time in (0.0, 1.0, 9.0, 10.0, 11.0, 30.0):
        log.warning("bad %s", time)
        log.warning("other")
        log.error("fault")
    assert said[:3] == ["bad 0.0", "other", "fault"]
    assert [line for line in said if line.startswith("bad")] == [
        "bad 0.0",
        "bad 10.0 (and 2 times before)",
        "bad 30.0 (and 1 times before)",
    ]
    assert said.count("fault") == 6
