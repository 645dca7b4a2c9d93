"""The kernels as other processors build them: run here where they can be, else in emulation.

A build is checked by check_kernels.cpp, in which nothing is of Python or torch. What this processor
can run as well, AVX2 alone, is put through the tests of the kernels themselves too.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from fastserve.host.provenance import ROOT
from fastserve.model.kernels.cpu import native

CHECK = Path(__file__).with_name("check_kernels.cpp")
TESTS = (
    "tests/model/kernels/cpu/test_kernels.py",
    "tests/model/attention/test_cpu.py",
    "tests/model/ops/test_cpu_ops.py",
    "tests/model/ops/test_fused_layers.py",
    "tests/model/ops/test_panel_linear.py",
    "tests/model/ops/test_int8_linear.py",
)
KERNELS = (
    "rms_norm",
    "layer_norm",
    "silu_mul",
    "head_rms_norm",
    "rotate_and_write",
    "attend",
    "project",
    "project_int8",
)


class Processor(NamedTuple):
    """A processor that kernels are built for, and what builds and runs them here."""

    march: str
    compiler: str
    emulator: tuple[str, ...] = ()


HASWELL = Processor("haswell", "g++")  # AVX2 and FMA
OTHERS = (
    Processor("x86-64", "g++"),  # SSE2
    Processor("armv8-a", "aarch64-linux-gnu-g++", ("qemu-aarch64", "-cpu", "max")),  # NEON
    Processor("armv8.6-a", "aarch64-linux-gnu-g++", ("qemu-aarch64", "-cpu", "max")),  # bfloat16
    Processor("armv9-a+bf16", "aarch64-linux-gnu-g++", ("qemu-aarch64", "-cpu", "max")),  # SVE2
)


def skip_unless_here(processor: Processor) -> None:
    """Skip where a build cannot be made, or cannot be run."""
    for program in (processor.compiler, *processor.emulator[:1]):
        if shutil.which(program) is None:
            pytest.skip(f"no {program}: kernels for {processor.march} are not checked")
    if not processor.emulator and platform.machine() != "x86_64":
        pytest.skip(f"kernels for {processor.march} do not run on {platform.machine()}")
    if processor == HASWELL and " avx2 " not in Path("/proc/cpuinfo").read_text():
        pytest.skip("this processor has no AVX2")


def run_check(processor: Processor, directory: Path) -> list[str]:
    """Build check_kernels.cpp for a processor, run it, and return what it says."""
    skip_unless_here(processor)
    flags = [flag for flag in native.FLAGS if flag not in ("-march=native", "-fPIC", "-shared")]
    program = directory / "check"
    command = (processor.compiler, *flags, f"-march={processor.march}", "-pthread")
    if processor.emulator:
        command += ("-static",)  # an emulator has no libraries of that processor
    include = f"-I{native.SOURCE.parent}"
    built = subprocess.run(
        (*command, include, str(CHECK), "-o", str(program)), capture_output=True, text=True
    )
    assert built.returncode == 0, built.stderr
    ran = subprocess.run((*processor.emulator, str(program)), capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout.splitlines()


def check_lines(lines: list[str]) -> None:
    """Hold that every kernel was checked in both dtypes."""
    checked = {tuple(line.partition(":")[0].split()) for line in lines if line.endswith("right")}
    assert checked == {(name, dtype) for name in KERNELS for dtype in ("float32", "bfloat16")}


def test_avx2_alone(tmp_path: Path) -> None:
    """The build of a processor without AVX-512, on this one."""
    check_lines(run_check(HASWELL, tmp_path))


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("processor", OTHERS, ids=lambda processor: processor.march)
def test_other_processors(tmp_path: Path, processor: Processor) -> None:
    """Builds without any vector extension of Intel's, here or emulated."""
    check_lines(run_check(processor, tmp_path))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_suite_of_the_kernels_with_avx2_alone(tmp_path: Path) -> None:
    """Their tests pass over a library in which no register of AVX-512 is named."""
    skip_unless_here(HASWELL)
    if shutil.which("objdump") is None:
        pytest.skip("no objdump to see what was built")
    plugin = "tests.model.kernels.cpu.for_haswell"
    ran = subprocess.run(
        (sys.executable, "-m", "pytest", "-q", "-p", plugin, "-p", "no:cacheprovider", *TESTS),
        cwd=ROOT,
        env={**os.environ, "XDG_CACHE_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stdout
    (library,) = (tmp_path / "fastserve").glob("kernels-*.so")
    code = subprocess.run(("objdump", "-d", str(library)), capture_output=True, check=True).stdout
    assert b"%ymm" in code
    assert b"%zmm" not in code
