"""The threads of team.h: every chunk once, stage after stage, and none left behind."""

from __future__ import annotations

import gc
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from fastserve.model.kernels.cpu import native
from tests.model.kernels.cpu.kernel_cases import own_products, threads

SOURCE = Path(__file__).with_name("team_program.cpp")
COMPILER = next(filter(None, map(shutil.which, native.COMPILERS)), None)

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")


def build(directory: Path, *flags: str) -> Path:
    """Return the program of SOURCE."""
    program = directory / "team"
    include = f"-I{native.SOURCE.parent}"
    options = ("-std=c++17", "-O2", "-pthread", "-fopenmp", *flags, include)
    assert COMPILER is not None
    subprocess.run([COMPILER, *options, str(SOURCE), "-o", str(program)], check=True)
    return program


def run(program: Path, kind: str, *numbers: int, under: tuple[str, ...] = ()) -> int:
    """Run it with so many threads, programs and stages; returns the chunks that others did."""
    command = (*under, str(program), kind, *map(str, numbers))
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    failures, _, helped = done.stdout.partition(" failures, ")
    assert failures == "0"
    return int(helped.split()[0])


@pytest.fixture(scope="module")
def program(tmp_path_factory) -> Path:
    """Build it once."""
    return build(tmp_path_factory.mktemp("team"))


def test_every_chunk_is_done_once_and_in_its_stage(program):
    """More threads than cores, which sleep and wake, some of them in the middle of a stage."""
    for size in (2, 5):
        assert run(program, "own", size, 800, 20) > 0
    assert run(program, "own", 1, 20, 20) == 0
    run(program, "openmp", 2, 100, 20)  # whose threads may all come too late on a busy machine
    assert run(program, "alone", 1, 20, 20) == 0


@pytest.mark.skipif(shutil.which("taskset") is None, reason="no taskset")
def test_threads_that_take_each_others_core_go_on(program):
    """All on one core, where each is interrupted by the others."""
    assert run(program, "own", 4, 2000, 20, under=("taskset", "-c", "0")) > 0


@pytest.mark.slow
def test_nothing_races(tmp_path):
    """The same under the compiler's race detector."""
    program = build(tmp_path, "-g", "-fsanitize=thread")
    for size in (2, 4):
        assert run(program, "own", size, 2000, 20) > 0


def count_threads() -> int:
    """Return the threads of this process."""
    return len(list(Path("/proc/self/task").iterdir()))


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="no /proc")
def test_threads_end_with_their_kernels():
    """A team has one thread less than it counts, for who calls is one of it."""
    x, weight = torch.randn(9, 64), torch.rand(64)
    kernels = own_products(torch.float32)
    with threads(4):
        before = count_threads()
        kernels.rms_norm(x, weight, 1e-5)
        assert count_threads() == before + 3
        kernels.rms_norm(x, weight, 1e-5)
        assert count_threads() == before + 3
        del kernels
        gc.collect()
        assert count_threads() == before
