"""What was learned of answer lengths, in files that may be anything."""

from __future__ import annotations

import json
import logging
import math
import resource
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fastserve.core.lengths import MAX_LABELS, LengthModel
from fastserve.engine import length_file
from fastserve.engine.length_file import INTERVAL_S, LengthFile, length_path

EMPTY = LengthModel().state()


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the files of each test apart."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def opened(identity: str = "/models/m", now: float = 0.0) -> LengthFile:
    """Return the file of a model."""
    return LengthFile(length_path("org/m", identity), identity, now)


def path() -> Path:
    """Return where that is."""
    return length_path("org/m", "/models/m")


def learn(file: LengthFile, count: int) -> None:
    """Take some answers in."""
    for number in range(count):
        file.model.add(("p7", f"c{number % 3}é"), 10 + 7 * number)


def settle(file: LengthFile) -> None:
    """Wait for a write under way."""
    if file._writer is not None:
        file._writer.join(30)


def test_the_next_engine_begins_with_what_this_one_learned() -> None:
    """Written at the end, read to the last bit; another model's is its own."""
    file = opened()
    learn(file, 30)
    file.close()
    assert opened().model.state() == file.model.state()
    assert opened("/models/other").model.state() == EMPTY
    assert list(path().parent.iterdir()) == [path()]
    assert stat.S_IMODE(path().stat().st_mode) == 0o600  # client names are in it


def test_nothing_is_written_before_it_is_due_or_without_news() -> None:
    """Due an interval after the last try, and only once an answer has ended."""
    file = opened(now=100.0)
    assert file.due_at == math.inf
    file.keep(1e9)
    learn(file, 1)
    assert file.due_at == 100.0 + INTERVAL_S
    file.keep(99.0 + INTERVAL_S)
    settle(file)
    assert not path().exists()
    file.keep(100.0 + INTERVAL_S)
    settle(file)
    assert opened().model.num_ended == 1
    assert file.due_at == math.inf
    path().unlink()
    file.close()
    assert not path().exists()
    learn(file, 1)
    assert file.due_at == 100.0 + 2 * INTERVAL_S


def forged(**changes: object) -> str:
    """Return the text of a file with another state than it had."""
    file = opened()
    learn(file, 5)
    file.close()
    content = json.loads(path().read_text())
    content["lengths"] |= changes
    return json.dumps(content)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "cannot be read"),
        ("{", "cannot be read"),
        ("\udcff", "cannot be read"),
        ("[" * 100_000, "RecursionError"),
        ("[]", "must hold a JSON object"),
        ("{}", "KeyError('model')"),
        ('{"model": "m", "lengths": {}}', "another model's"),
        ({"format": 2}, "format 2 is not 1"),
        ({"all": [[10_000, 1.0]]}, "a bin or a weight"),
        ({"all": [[1, -1.0]]}, "a bin or a weight"),
        ({"all": [[1, math.nan]]}, "a bin or a weight"),
        ({"all": 3}, "TypeError"),
        ({"labels": []}, "another type"),
        ({"labels": {"": []}}, "IndexError"),
        ({"labels": {f"c{n}": [] for n in range(MAX_LABELS + 1)}}, "too many labels"),
        ({"sum": math.inf}, "a sum of lengths"),
        ({"num_ended": math.inf}, "another type"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_a_cold_start(
    text: str | dict[str, object], why: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Corrupt, foreign, of a version to come: one line that names the file; then it is replaced."""
    content = text if isinstance(text, str) else forged(**text)
    path().parent.mkdir(exist_ok=True)
    path().write_text(content, encoding="utf-8", errors="surrogateescape")
    file = opened()
    assert file.model.state() == EMPTY
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert str(path()) in record.message
    assert why in record.message
    assert "\n" not in record.message
    learn(file, 1)
    file.close()
    assert opened().model.num_ended == 1


def test_no_file_is_no_news(caplog: pytest.LogCaptureFixture) -> None:
    """The first start of a model says nothing."""
    assert opened().model.state() == EMPTY
    assert not caplog.records


@contextmanager
def full_disk() -> Iterator[None]:
    """Let no file of this process grow beyond a few bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_one_line_and_leaves_the_old_file(caplog: pytest.LogCaptureFixture) -> None:
    """However often it is tried; once there is room again, everything is written."""
    file = opened()
    learn(file, 3)
    file.close()
    learn(file, 4)
    with full_disk():
        for turn in range(1, 4):
            file.keep(turn * INTERVAL_S)
            settle(file)
            assert file.due_at == (turn + 1) * INTERVAL_S
    (record,) = caplog.records
    assert "is not kept" in record.message
    assert list(path().parent.iterdir()) == [path()]
    assert opened().model.num_ended == 3
    file.keep(4 * INTERVAL_S)
    settle(file)
    assert opened().model.num_ended == 7


def test_a_directory_that_cannot_be_made_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A user without a place for copies is served all the same."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    file = opened()
    learn(file, 1)
    file.close()
    (record,) = caplog.records
    assert "is not kept" in record.message


def test_a_file_system_that_hangs_holds_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine's thread goes on, no second writer is started, and the end does not wait."""
    begun, release = threading.Semaphore(0), threading.Event()

    def hang(path: Path, content: bytes) -> None:
        begun.release()
        release.wait(30)

    monkeypatch.setattr(length_file, "_replace", hang)
    monkeypatch.setattr(length_file, "LAST_WRITE_S", 0.01)
    file = opened()
    learn(file, 1)
    file.keep(INTERVAL_S)
    assert begun.acquire(timeout=30)
    learn(file, 1)
    file.keep(2 * INTERVAL_S)
    file.close()
    assert not begun.acquire(blocking=False)
    release.set()
    settle(file)


def test_of_two_servers_the_last_to_write_wins() -> None:
    """Whoever reads meanwhile finds one or the other, whole."""
    files = [opened(), opened()]
    learn(files[0], 20)
    learn(files[1], 300)
    states = [file.model.state() for file in files]
    is_over = threading.Event()

    def write(file: LengthFile) -> None:
        while not is_over.is_set():
            file._num_kept = 0
            file.close()

    files[0].close()
    writers = [threading.Thread(target=write, args=(file,)) for file in files]
    for writer in writers:
        writer.start()
    try:
        for _ in range(100):
            assert opened().model.state() in states
    finally:
        is_over.set()
        for writer in writers:
            writer.join()
    files[1]._num_kept = 0
    files[1].close()
    assert opened().model.state() == states[1]
    assert list(path().parent.iterdir()) == [path()]


def test_a_replica_without_a_file_begins_with_the_first_one_s() -> None:
    """Each keeps what it learned itself, in its own file; nobody writes another's."""
    first, second = (length_path("org/m", "/models/m", replica) for replica in range(2))
    assert first == path() != second
    file = opened()
    learn(file, 30)
    file.close()
    other = LengthFile(second, "/models/m", 0.0, begin_with=first)
    assert other.model.state() == file.model.state()
    other.close()
    assert not second.exists(), "nothing is new"
    learn(other, 5)
    other.close()
    again = LengthFile(second, "/models/m", 0.0, begin_with=first)
    assert again.model.num_ended == 35
    assert opened().model.num_ended == 30
