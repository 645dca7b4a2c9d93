"""What scripts/gpu_check would run, on a small scale and in Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_measure, gpu_selfcheck, gpu_swap
from fastserve.model.ops.cuda_ops import CudaOps
from tests import triton_device

ROOT = Path(__file__).parents[2]
DEVICE = triton_device.device()
BLOCKED = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
import importlib.util
found = importlib.util.find_spec
def find_spec(name, package=None):
    return None if name in {blocked!r} else found(name, package)
importlib.util.find_spec = find_spec
from benchmarks import gpu_check
gpu_check.allow_absent_safetensors()
from benchmarks import gpu_measure, gpu_selfcheck, gpu_swap
print(gpu_check.run_tests()["status"])
"""


def keep(action):
    """Stand for the capture of a graph: the action itself."""
    return action


def test_without_a_device_it_says_so():
    """Where torch finds no CUDA device, one line and status 0."""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [ROOT / "scripts" / "gpu_check"],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "gpu_check: not run: no CUDA device\n"


def test_torch_triton_and_numpy_are_enough():
    """It loads where nothing else is installed, and says that the tests are skipped."""
    blocked = {"safetensors", "tokenizers", "huggingface_hub", "transformers"}
    blocked |= {"fastapi", "pydantic", "msgspec", "jinja2", "rich", "pytest", "hypothesis"}
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED.format(blocked=blocked)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "skipped"
    assert "safetensors is not installed" in done.stdout


def test_checks_pass(monkeypatch):
    """Every check passes on kernels that are right."""
    monkeypatch.setattr(gpu_selfcheck, "SHAPES", ((4, 2, 32),))
    monkeypatch.setattr(gpu_selfcheck, "TOLERANCE", {torch.bfloat16: 4e-2})
    monkeypatch.setattr(gpu_selfcheck, "SHARES", [(1, 0), (1, 30), (5, 9)])
    monkeypatch.setitem(gpu_selfcheck.TINY, "num_hidden_layers", 1)
    results = gpu_selfcheck.run(DEVICE, None if DEVICE.type == "cuda" else keep)
    assert len(results) == 5
    assert [check for check in results if not check["ok"]] == []


def test_checks_fail_where_a_kernel_is_wrong(monkeypatch):
    """A norm that forgets its weight is found."""

    class WithoutWeights(CudaOps):
        def rms_norm(self, weight, eps):
            return super().rms_norm(torch.ones_like(weight), eps)

    monkeypatch.setattr(gpu_selfcheck, "CudaOps", WithoutWeights)
    is_ok, detail = gpu_selfcheck.check_rowwise(DEVICE)
    assert not is_ok
    assert detail.startswith("largest difference")


@pytest.mark.parametrize("is_opt", [False, True])
def test_measurements(is_opt, monkeypatch):
    """Rows carry rates and shares that fit each other; what does not fit is said to be skipped."""
    monkeypatch.setattr(gpu_measure, "REPEATS", 1)
    monkeypatch.setattr(gpu_measure, "SPARE_BYTES", 0)
    values = dict(gpu_measure.OPT_13B if is_opt else gpu_measure.LLAMA_3_8B)
    values |= {"hidden_size": 64, "num_attention_heads": 2, "num_hidden_layers": 1}
    values |= {"vocab_size": 100, "max_position_embeddings": 64}
    if is_opt:
        values |= {"ffn_dim": 64, "word_embed_proj_dim": 64}
    else:
        values |= {"intermediate_size": 64, "num_key_value_heads": 1}
    roof = gpu_measure.measure_roof(DEVICE, size=64, copy_bytes=2**20)
    weights = 2 * gpu_measure.num_weights(values)
    per_token = 4 * 32 * (2 if is_opt else 1)
    rows = gpu_measure.measure_model(
        "tiny",
        values,
        DEVICE,
        roof,
        batch_sizes=(1, 2, 4),
        prefill_sizes=(1,),
        context=16,
        memory_bytes=weights + 2 * 16 * per_token,
        capture=None if DEVICE.type == "cuda" else keep,
    )
    decode, larger, too_large, prefill = rows
    assert "skipped" in too_large
    assert decode["kind"] == larger["kind"] == "decode"
    assert prefill["kind"] == "prefill"
    for row in (decode, larger, prefill):
        tokens = row["batch_size"] * (16 if row["kind"] == "prefill" else 1)
        seconds = row["step_ms"] / 1e3
        assert row["tokens_per_s"] == pytest.approx(tokens / seconds)
        moved = weights + row["batch_size"] * 16 * per_token
        assert row["gb_per_s"] == pytest.approx(moved / seconds / 1e9)
        assert row["share_of_copy"] == pytest.approx(row["gb_per_s"] / roof["copy_gb_per_s"])
        assert row["tflops"] > 0


TINY = {"hidden_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2, "vocab_size": 100}


def test_copies_keep_their_order():
    """Both checks pass where copies are right; no kernel spins where there is no device."""
    wait = gpu_swap.spin if DEVICE.type == "cuda" else lambda seconds: None
    for check in (gpu_swap.check_beside, gpu_swap.check_behind):
        is_ok, detail = check(DEVICE, wait)
        assert is_ok, detail


def test_copies_out_of_order_are_found(monkeypatch):
    """A copier that reports before it has copied fails the check."""

    class Early(gpu_swap.Copier):
        def begin(self, copy, report):
            report(copy.copy_id, True)

    monkeypatch.setattr(gpu_swap, "Copier", Early)
    is_ok, detail = gpu_swap.check_behind(DEVICE, lambda seconds: None)
    assert not is_ok
    assert detail.startswith("100 of 100") or detail.startswith("99 of 100")


def test_copies_are_measured(monkeypatch):
    """Every model, each way, in one run and apart, by a plain copy; and a decode beside them."""
    monkeypatch.setattr(gpu_swap, "REPEATS", 1)
    monkeypatch.setattr(gpu_measure, "REPEATS", 1)
    rows = gpu_swap.measure_bandwidth(DEVICE, 2**24)
    assert len({(row["model"], row["direction"], row["blocks"]) for row in rows}) == 8
    assert all(row["gb_per_s"] > 0.0 and row["share_of_plain"] > 0.0 for row in rows)
    values = gpu_measure.LLAMA_3_8B | TINY | {"intermediate_size": 64, "num_key_value_heads": 1}
    load = gpu_swap.Load("tiny", values, batch_size=2, context=16, num_moving=3)
    found = gpu_swap.measure_overlap(load, DEVICE, None if DEVICE.type == "cuda" else keep)
    assert found["ratio"] == pytest.approx(found["step_ms_beside_copies"] / found["step_ms_alone"])
    assert found["copied_gb_per_s"] > 0.0


def test_real_shapes_have_their_size():
    """8.0 and 13 billion weights, give or take the embedding that is not multiplied."""
    assert gpu_measure.num_weights(gpu_measure.LLAMA_3_8B) == pytest.approx(7.5e9, rel=0.01)
    assert gpu_measure.num_weights(gpu_measure.OPT_13B) == pytest.approx(12.85e9, rel=0.01)
