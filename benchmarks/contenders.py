"""FastServe and OpenVINO GenAI, started side by side on one model.

Rules: OpenVINO lives in an environment of its own, benchmarks/openvino/.venv, which
`benchmarks/openvino/setup` makes; models are written once, into benchmarks/openvino/models. Both
contenders are given the same weights, dtype, threads and limits of a step.
Must not know: what is asked of them.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from benchmarks.contender import Contender
from fastserve.host.provenance import ROOT
from fastserve.settings.option import ConfigError

FOLDER = ROOT / "benchmarks" / "openvino"
PYTHON = FOLDER / ".venv" / "bin" / "python"
MODELS = FOLDER / "models"


class Limits(NamedTuple):
    """The largest step that a run asks for."""

    tokens: int
    seqs: int

    def flags(self) -> tuple[str, ...]:
        """Return these as a contender is told them."""
        return ("--max-tokens", str(self.tokens), "--max-seqs", str(self.seqs))


def find_openvino() -> None:
    """Raise ConfigError where OpenVINO is not installed for measurements."""
    if not PYTHON.exists():
        raise ConfigError(f"no {PYTHON.relative_to(ROOT)}: run benchmarks/openvino/setup first")


def find_model(name: str) -> Path:
    """Return the folder of a model, in both formats; it is written if it is not there."""
    directory = MODELS / name
    if not directory.exists():
        MODELS.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=MODELS) as beside:
            whole = Path(beside) / name
            module = "benchmarks.openvino.export_model"
            command = (str(PYTHON), "-W", "ignore", "-m", module, name, str(whole))
            subprocess.run(command, cwd=ROOT, check=True, stdout=sys.stderr)
            shutil.move(whole, directory)
    return directory


def environment() -> dict[str, str]:
    """Return this environment without what tells threads how many they are and how to wait."""
    told = ("OMP_", "GOMP_", "KMP_")
    return {name: value for name, value in os.environ.items() if not name.startswith(told)}


def start_fastserve(model: Path, threads: int, limits: Limits) -> Contender:
    """Start FastServe; it answers once it has loaded."""
    words = (str(model / "checkpoint"), "--threads", str(threads), *limits.flags())
    command = (sys.executable, "-m", "benchmarks.fastserve_contender", *words)
    return Contender(f"FastServe, threads: {threads}", command, ROOT, environment())


def start_openvino(
    model: Path, threads: int, limits: Limits, *, is_bound: bool = True
) -> Contender:
    """Start OpenVINO GenAI, its threads bound to cores, as by default, or not."""
    words = (str(model / "openvino"), "--threads", str(threads), *limits.flags())
    if not is_bound:
        words += ("--unbound",)
    command = (str(PYTHON), "-m", "benchmarks.openvino.contender", *words)
    return Contender(f"OpenVINO, threads: {threads}", command, ROOT, environment())
