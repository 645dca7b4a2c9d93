"""What a machine with a GPU shows: the kernels are right, and how fast the model path is.

    python -m benchmarks.gpu_check [--output FILE.json]

torch, triton and numpy are enough; what else is missing is said, and what needs it skipped. Without
a CUDA device it says so in one line and ends with 0.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
TEST_NEEDS = ("pytest", "pytest_timeout", "hypothesis", "transformers", "tokenizers", "safetensors")


def main() -> int:
    """Run everything; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/gpu_<card>.json")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu_check: not run: no CUDA device")
        return 0
    if importlib.util.find_spec("triton") is None:
        print("gpu_check: not run: Triton is not installed")
        return 2
    allow_absent_safetensors()
    from benchmarks import gpu_measure, gpu_selfcheck, gpu_swap

    device = torch.device("cuda", 0)
    tests = run_tests()
    checks = [*gpu_selfcheck.run(device), *gpu_swap.check(device)]
    for check in checks:
        print(f"{'ok  ' if check['ok'] else 'FAIL'} {check['name']}: {check['detail']}", flush=True)
    result = {
        "card": torch.cuda.get_device_name(device),
        "machine": machine(device),
        "tests": tests,
        "checks": checks,
        **gpu_measure.run(device),
        "swap": gpu_swap.run(device),
    }
    output = arguments.output or default_output(str(result["card"]))
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"written: {output}")
    return 0 if tests["status"] != "failed" and all(check["ok"] for check in checks) else 1


def allow_absent_safetensors() -> None:
    """Let the model room load where no checkpoint can be read: weights are made here."""
    if importlib.util.find_spec("safetensors") is not None:
        return
    print("skipped: reading checkpoints (safetensors is not installed)")
    absent = ModuleType("safetensors")
    absent.safe_open = None  # type: ignore[attr-defined]
    absent.SafetensorError = OSError  # type: ignore[attr-defined]
    sys.modules["safetensors"] = absent


def run_tests() -> dict[str, Any]:
    """Run the tests that a device changes, where everything they need is installed."""
    missing = [name for name in TEST_NEEDS if importlib.util.find_spec(name) is None]
    if missing:
        print(f"skipped: tests ({', '.join(missing)} not installed)")
        return {"status": "skipped", "missing": missing}
    files = sorted(str(path) for path in (ROOT / "tests").glob("*/test_triton_*.py"))
    command = [sys.executable, "-m", "pytest", "-q", "--timeout=600"]
    status = "passed"
    for selection in (["-m", "gpu", "tests"], files):
        done = subprocess.run([*command, *selection], cwd=ROOT, check=False)
        if done.returncode:
            status = "failed"
    return {"status": status}


def machine(device: torch.device) -> dict[str, Any]:
    """Describe what it ran on."""
    import triton

    properties = torch.cuda.get_device_properties(device)
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": triton.__version__,
        "memory_bytes": properties.total_memory,
        "processors": properties.multi_processor_count,
        "capability": f"{properties.major}.{properties.minor}",
        "commit": commit.stdout.strip() or None,
    }


def default_output(card: str) -> Path:
    """Return the file of a card's results."""
    name = re.sub(r"[^a-z0-9]+", "_", card.lower()).strip("_")
    return ROOT / "benchmarks" / "results" / f"gpu_{name}.json"


if __name__ == "__main__":
    sys.exit(main())
