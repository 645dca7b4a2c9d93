"""The kernels as other processors build them: run here where they can be, else in emulation.

A build is checked by check_kernels.cpp, in which nothing is of Python or torch. What this processor
can run as well, AVX2 alone and, with what tile_emulator.cpp does for it, AMX, is put through the
tests of the kernels themselves too.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from fastserve.host.provenance import ROOT
from fastserve.model.kernels.cpu import native

CHECK = Path(__file__).with_name("check_kernels.cpp")
TILE_EMULATOR = Path(__file__).with_name("tile_emulator.cpp")
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

    flags: tuple[str, ...]
    compiler: str = "g++"
    emulator: tuple[str, ...] = ()
    needs: str = ""  # of this processor, where nothing emulates it


HASWELL = Processor(("-march=haswell",), needs="avx2")
AMX = Processor(("-march=native", "-mamx-tile", "-mamx-bf16"), needs="avx512_bf16")
ARM = ("aarch64-linux-gnu-g++", ("qemu-aarch64", "-cpu", "max"))
OTHERS = (
    Processor(("-march=x86-64",)),  # SSE2
    Processor(("-march=armv8-a",), *ARM),  # NEON
    Processor(("-march=armv8.6-a",), *ARM),  # bfloat16
    Processor(("-march=armv9-a+bf16",), *ARM),  # SVE2
)


def features() -> set[str]:
    """Return what this processor has."""
    return set(Path("/proc/cpuinfo").read_text().split())


def skip_unless_here(processor: Processor) -> None:
    """Skip where a build cannot be made, or cannot be run."""
    for program in (processor.compiler, *processor.emulator[:1]):
        if shutil.which(program) is None:
            pytest.skip(f"no {program}: kernels of {processor.flags} are not checked")
    if not processor.emulator and platform.machine() != "x86_64":
        pytest.skip(f"kernels of {processor.flags} do not run on {platform.machine()}")
    if processor.needs and processor.needs not in features():
        pytest.skip(f"this processor has no {processor.needs}")


def emulates_tiles() -> bool:
    """Whether AMX's tiles are the emulator's here."""
    return "amx_bf16" not in features()


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a program of ours to its end."""
    ran = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran


def run_check(processor: Processor, directory: Path, *sources: Path) -> tuple[list[str], str]:
    """Build check_kernels.cpp for a processor, run it, and return what it says and its errors."""
    skip_unless_here(processor)
    flags = [flag for flag in native.FLAGS if flag not in ("-march=native", "-fPIC", "-shared")]
    flags += (*processor.flags, "-pthread", f"-I{native.SOURCE.parent}")
    if processor.emulator:
        flags.append("-static")  # an emulator has no libraries of that processor
    program = str(directory / "check")
    run(processor.compiler, *flags, str(CHECK), *map(str, sources), "-o", program)
    ran = run(*processor.emulator, program)
    return ran.stdout.splitlines(), ran.stderr


def check_lines(lines: list[str]) -> None:
    """Hold that every kernel was checked in both dtypes."""
    checked = {tuple(line.partition(":")[0].split()) for line in lines if line.endswith("right")}
    assert checked == {(name, dtype) for name in KERNELS for dtype in ("float32", "bfloat16")}


def test_avx2_alone(tmp_path: Path) -> None:
    """The build of a processor without AVX-512, on this one."""
    lines, _ = run_check(HASWELL, tmp_path)
    check_lines(lines)


def test_amx(tmp_path: Path) -> None:
    """The build of a processor with tiles, and all in them that can be."""
    lines, errors = run_check(AMX, tmp_path, *[TILE_EMULATOR] * emulates_tiles())
    assert lines.pop(0) == "in tiles"
    check_lines(lines)
    check_emulation(errors)


def check_emulation(errors: str) -> None:
    """Hold that products were computed in emulated tiles, where there are no others."""
    counts = re.findall(r"^tile_emulator: (\d+) products$", errors, re.MULTILINE)
    assert sum(map(int, counts)) > 10_000 or not emulates_tiles()


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("processor", OTHERS, ids=lambda processor: processor.flags[0])
def test_other_processors(tmp_path: Path, processor: Processor) -> None:
    """Builds without any vector extension of Intel's, here or emulated."""
    lines, _ = run_check(processor, tmp_path)
    check_lines(lines)


def run_suite(plugin: str, cache: Path, *more: str, **environment: str) -> tuple[str, str]:
    """Run the tests of the kernels with others built, which are returned, with pytest's errors."""
    if shutil.which("objdump") is None:
        pytest.skip("no objdump to see what was built")
    plugins = ("-p", f"tests.model.kernels.cpu.{plugin}", "-p", "no:cacheprovider")
    pytest_ = (
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:faulthandler",
        *plugins,
        *TESTS,
        *more,
    )
    errors = run(*pytest_, XDG_CACHE_HOME=str(cache), **environment).stderr
    libraries = map(str, (cache / "fastserve").glob("kernels-*.so"))
    return run("objdump", "-d", *libraries).stdout, errors


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_suite_of_the_kernels_with_avx2_alone(tmp_path: Path) -> None:
    """Their tests pass over a library in which no register of AVX-512 is named."""
    skip_unless_here(HASWELL)
    code, _ = run_suite("for_haswell", tmp_path)
    assert "%ymm" in code
    assert "%zmm" not in code


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_suite_of_the_kernels_with_amx(tmp_path: Path) -> None:
    """Their tests, and those of --deterministic, pass over a library that multiplies in tiles."""
    skip_unless_here(AMX)
    preloaded = {}
    if emulates_tiles():
        emulator = str(tmp_path / "tile_emulator.so")
        run(AMX.compiler, "-O2", "-shared", "-fPIC", str(TILE_EMULATOR), "-o", emulator)
        preloaded["LD_PRELOAD"] = emulator
    deterministic = ("-m", "not slow", "tests/test_deterministic.py")
    code, errors = run_suite("for_amx", tmp_path, *deterministic, **preloaded)
    assert "tdpbf16ps" in code
    check_emulation(errors)
