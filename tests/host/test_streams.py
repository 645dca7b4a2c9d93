"""The standard streams in every state in which a shell can leave them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fastserve.host.streams import as_text
from fastserve.settings.option import ConfigError

FASTSERVE = f"{sys.executable} -m fastserve"
GENERATE = f"{FASTSERVE} generate hello --max-tokens 2 --max-model-len 64 --num-threads 1"


def shell(line: str, **changes: str | None) -> subprocess.CompletedProcess[str]:
    """Run a line of bash whose status is that of its first command."""
    environment = {**os.environ, **changes}
    return subprocess.run(
        ["bash", "-c", f"{line}; exit ${{PIPESTATUS[0]}}"],
        env={name: value for name, value in environment.items() if value is not None},
        capture_output=True,
        encoding="utf-8",
        timeout=100,
        stdin=subprocess.DEVNULL,
    )


@pytest.mark.parametrize(
    ("line", "status", "says"),
    [
        (f"{FASTSERVE} --help | true", 1, ""),
        (f"{FASTSERVE} --help > /dev/full", 1, "No space left on device"),
        (f"{FASTSERVE} version > /dev/full", 1, "No space left on device"),
        (f"{FASTSERVE} generate - <&-", 2, "PROMPT: it is empty"),
        (f"printf 'caf\\xe9' | {FASTSERVE} generate -; exit $?", 2, "PROMPT: not UTF-8"),
        (f"{FASTSERVE} generate $'caf\\xe9'", 2, "PROMPT: not UTF-8"),
        (f"{FASTSERVE} serve $'caf\\xe9/x/y'", 2, "no such directory"),
        (f"D=$(mktemp -d); cd $D; rmdir $D; {FASTSERVE} generate x", 2, "working directory"),
    ],
)
def test_streams_and_bytes_are_one_line(line: str, status: int, says: str) -> None:
    """Full, closed, not UTF-8, or gone: at most one complaint, and no traceback."""
    done = shell(line)
    complaints = [line for line in done.stderr.splitlines() if "loading" not in line]
    assert done.returncode == status
    assert len(complaints) == bool(says)
    assert says in "".join(complaints)


def test_help_fits_any_width() -> None:
    """COLUMNS of scripts and of odd terminals."""
    line = "; ".join(f"COLUMNS={n} {FASTSERVE} serve --help >/dev/null" for n in (0, 1, -5, "x"))
    done = shell(f"set -e; {line}")
    assert (done.returncode, done.stderr) == (0, "")


def test_every_stream_may_be_closed() -> None:
    """What is printed then goes nowhere, and not into the next file that is opened."""
    assert shell(f"{GENERATE} <&- >&- 2>&-").returncode == 0


def test_a_locale_without_letters_is_no_error() -> None:
    """An answer with letters that the terminal lacks is printed all the same."""
    strict = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    code = (
        "import sys; from fastserve import cli; from fastserve.llm import LLM;"
        "LLM.stream = lambda *_: iter(['caf\\u00e9']); sys.exit(cli.main())"
    )
    done = shell(GENERATE.replace("-m fastserve", f'-c "{code}"'), **strict)
    assert (done.returncode, done.stdout) == (0, "caf?\n")


def test_a_user_without_home_or_name_can_run() -> None:
    """As in a container that is given a user number of its own."""
    code = (
        "import pwd, sys\ndef no(*_): raise KeyError\npwd.getpwuid = no\n"
        "from fastserve import cli; sys.exit(cli.main())"
    )
    line = GENERATE.replace("-m fastserve", f'-c "{code}"')
    done = shell(line, HOME=None, XDG_CACHE_HOME=None, LOGNAME=None, USER=None)
    assert done.returncode == 0, done.stderr


@pytest.mark.processes
@pytest.mark.parametrize("after", ["loading demo", None])
def test_an_interrupted_answer_is_no_traceback(after: str | None, tmp_path: Path) -> None:
    """Ctrl-C while a model is loaded and while it answers: exit status 130, and nothing said."""
    process = subprocess.Popen(
        [*f"{FASTSERVE} generate hello --num-threads 1 --max-tokens 1900".split()],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    assert "loading demo" in process.stderr.readline()
    if after is None:
        process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in errors


@pytest.mark.parametrize("given", ["", "hello", "caf\u00e9 \U0001f642"])
def test_text_passes(given: str) -> None:
    """Whatever language."""
    assert as_text(given, "PROMPT") == given


def test_bytes_of_another_encoding_are_named() -> None:
    """Python hands them over as lone surrogates."""
    with pytest.raises(ConfigError, match="--system: not UTF-8"):
        as_text("caf\udce9", "--system")
