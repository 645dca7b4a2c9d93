"""Every kernel compiles to machine code for the devices it is meant for; none need be here."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024}  # bytes of one block of threads


def test_kernels_compile(tmp_path):
    """The compiler and the assembler accept each kernel, and its tiles fit the shared memory."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, "-m", "tests.model.compile_kernels", *map(str, SHARED_MEMORY)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert {name for _, _, name, _ in lines} == {
        "decode_kernel",
        "reduce_kernel",
        "chunk_kernel",
        "rotate_and_write_kernel",
        "rms_norm_kernel",
        "silu_mul_kernel",
    }
    for capability, *_, shared in lines:
        assert int(shared) <= SHARED_MEMORY[int(capability)]
    assert {int(capability) for capability, *_ in lines} == set(SHARED_MEMORY)
