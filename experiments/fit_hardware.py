"""Fits the simulator's hardware coefficients to published tables, and says how well they fit.

    python -m experiments.fit_hardware

Writes fastserve/sim/hardware_fits.json (what the simulator reads) and results/fit_hardware.json
(the errors, and comparisons with whole-model tables that nothing was fitted to). Rules: least
squares of the relative error, coefficients not negative. Must not know: schedulers, workloads.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table

from experiments import published_tables as tables
from experiments.distserve_fit import distserve_steps, fit_direct, fit_rows
from experiments.hardware_checks import checks
from fastserve.core.cost_model import CostModel
from fastserve.host.provenance import ROOT, provenance
from fastserve.host.terminal import print_table
from fastserve.sim.hardware import FITS_FILE, HARDWARE, Fits, load_fits
from fastserve.sim.roofline import Efficiency, Roofline

Floats = npt.NDArray[np.float64]

DEVICE_OF_CHIP = {"a100": HARDWARE["a100-80g"], "h100": HARDWARE["h100"]}
RESULTS = ROOT / "results" / "fit_hardware.json"
SOURCE = {
    "a100": "A100 kernels of Vidur and Frontier",
    "h100": "H100 kernels of Vidur and LLMServingSim; KV reads scaled from the A100",
    "direct": "DistServe's fit of vLLM, host time included",
}
UNIT = Efficiency(
    layer_s=0.0,
    weight_bandwidth=1.0,
    matmul_flops=1.0,
    activation_passes=1.0,
    attention_s=0.0,
    attention_flops=1.0,
    kv_bandwidth=1.0,
    all_reduce_s=0.0,
    all_reduce_bandwidth=1.0,
    send_recv_s=0.0,
    send_recv_bandwidth=1.0,
)


def roofline(chip: str, row: tables.Dense | tables.Attention, fit: Efficiency) -> Roofline:
    """Return the roofline of a row's model on its devices."""
    return Roofline(
        shape=row.shape,
        hardware=DEVICE_OF_CHIP[chip],
        efficiency=fit,
        tensor_parallel_size=row.ranks,
    )


# ── predictions of a table's rows ────────────────────────────────────────────────────────────


def dense_s(chip: str, row: tables.Dense, fit: Efficiency) -> float:
    """Return the seconds of one layer without attention."""
    line = roofline(chip, row, fit)
    return fit.layer_s + max(line.layer_weights_s, row.num_tokens * line.layer_token_s)


def attention_s(chip: str, row: tables.Attention, fit: Efficiency) -> float:
    """Return the seconds of one layer's attention."""
    line = roofline(chip, row, fit)
    if row.chunk:
        return fit.attention_s + row.chunk * (row.start + row.chunk / 2) * line.layer_pair_s
    return fit.attention_s + row.batch * row.start * line.layer_context_s


def message_s(chip: str, row: tables.Message, fit: Efficiency, *, is_all_reduce: bool) -> float:
    """Return the seconds of a collective."""
    nvlink = DEVICE_OF_CHIP[chip].nvlink
    if is_all_reduce:
        moved = row.num_bytes * 2 * (row.ranks - 1) / row.ranks
        return fit.all_reduce_s + moved / (nvlink * fit.all_reduce_bandwidth)
    return fit.send_recv_s + row.num_bytes / (nvlink * fit.send_recv_bandwidth)


def table_errors(fits: Fits) -> dict[str, dict[str, float]]:
    """Return the relative errors of the fitted coefficients, by table."""
    errors = {}
    for name, (chip, _) in tables.DENSE.items():
        fit = fits.efficiency[chip]
        errors[name] = error_of(
            [(dense_s(chip, row, fit), row.seconds) for row in tables.dense_rows(name)]
        )
    for name, (chip, _) in tables.ATTENTION.items():
        fit = fits.efficiency[chip]
        rows = tables.attention_rows(name)
        for part, is_prefill in (("prefill", True), ("decode", False)):
            pairs = [
                (attention_s(chip, row, fit), row.seconds)
                for row in rows
                if bool(row.chunk) == is_prefill
            ]
            if pairs:
                errors[f"{name}: {part}"] = error_of(pairs)
    for name, chip in tables.NETWORK.items():
        fit = fits.efficiency[chip]
        is_all_reduce = name.endswith("all_reduce")
        errors[name] = error_of(
            [
                (message_s(chip, row, fit, is_all_reduce=is_all_reduce), row.seconds)
                for row in tables.messages(name)
            ]
        )
    for model, by_ranks in tables.distserve_fits().items():
        for ranks, measured in by_ranks.items():
            cost_model = CostModel(**fits.direct[model]["a100-80g"][ranks])
            errors[f"distserve_profiler-a100-80g.vllm: {model} tp{ranks}"] = error_of(
                [
                    (cost_model.step_s(shares), seconds)
                    for shares, seconds in distserve_steps(measured)
                ]
            )
    return errors


def error_of(pairs: Sequence[tuple[float, float]]) -> dict[str, float]:
    """Return the error of (predicted, measured) pairs."""
    relative = np.array([predicted / measured - 1.0 for predicted, measured in pairs])
    return {
        "rows": len(pairs),
        "mean_error": round(float(np.mean(np.abs(relative))), 4),
        "p95_error": round(float(np.quantile(np.abs(relative), 0.95)), 4),
        "bias": round(float(np.mean(relative)), 4),
    }


# ── fits ─────────────────────────────────────────────────────────────────────────────────────


def fit_dense(chip: str) -> dict[str, float]:
    """Fit the matrix products and what lies between them; the knee is found by iteration."""
    rows = [
        row
        for name, (where, _) in tables.DENSE.items()
        if where == chip
        for row in tables.dense_rows(name)
    ]
    lines = [roofline(chip, row, UNIT) for row in rows]
    seconds = np.array([row.seconds for row in rows])
    tokens = np.array([float(row.num_tokens) for row in rows])
    reading = np.array([line.layer_weights_s for line in lines])
    products = tokens * [line.products_s(line.shape.layer_params) for line in lines]
    moving = tokens * [line.hidden_bytes / line.hardware.bandwidth for line in lines]
    is_reading = tokens < 200.0
    for _ in range(50):
        features = np.stack(
            [
                np.ones(len(rows)),
                reading * is_reading,
                products * ~is_reading,
                moving * ~is_reading,
            ],
            axis=1,
        )
        found = fit_rows(features, seconds)
        is_reading = found[1] * reading >= found[2] * products + found[3] * moving
    return {
        "layer_s": float(found[0]),
        "weight_bandwidth": float(1 / found[1]),
        "matmul_flops": float(1 / found[2]),
        "activation_passes": float(found[3]),
    }


def fit_attention(chip: str) -> dict[str, float]:
    """Fit attention; every table and kind of it counts the same."""
    groups: dict[tuple[str, bool], list[tables.Attention]] = defaultdict(list)
    for name, (where, _) in tables.ATTENTION.items():
        if where == chip:
            for row in tables.attention_rows(name):
                groups[name, bool(row.chunk)].append(row)
    features, seconds, weights = [], [], []
    for rows in groups.values():
        for row in rows:
            line = roofline(chip, row, UNIT)
            pairs = row.chunk * (row.start + row.chunk / 2)
            context = 0 if row.chunk else row.batch * row.start
            features.append((1.0, pairs * line.layer_pair_s, context * line.layer_context_s))
            seconds.append(row.seconds)
            weights.append(len(rows) ** -0.5)
    found = fit_rows(np.array(features), np.array(seconds), np.array(weights))
    shares = {"attention_s": float(found[0]), "attention_flops": float(1 / found[1])}
    if found[2]:
        shares["kv_bandwidth"] = float(1 / found[2])
    return shares


def fit_network(chip: str) -> dict[str, float]:
    """Fit the start and the rate of collectives."""
    found = {}
    for name, where in tables.NETWORK.items():
        if where == chip:
            is_all_reduce = name.endswith("all_reduce")
            rows = tables.messages(name)
            features = np.array(
                [(1.0, message_s(chip, row, UNIT, is_all_reduce=is_all_reduce)) for row in rows]
            )
            start_s, slowness = fit_rows(features, np.array([row.seconds for row in rows]))
            kind = "all_reduce" if is_all_reduce else "send_recv"
            found[f"{kind}_s"] = float(start_s)
            found[f"{kind}_bandwidth"] = float(1 / slowness)
    return found


def fit_capacity() -> tuple[float, float]:
    """Return the memory utilization of DistServe's capacities, and activations per hidden unit."""
    device = DEVICE_OF_CHIP["a100"]
    features, usable = [], []
    for shape, ranks, stages, num_tokens in tables.capacities():
        line = Roofline(shape=shape, hardware=device, efficiency=UNIT, tensor_parallel_size=ranks)
        num_layers = -(-shape.num_layers // stages)
        num_tables = 1
        weights = (num_layers * shape.layer_params + num_tables * shape.head_params) * 2 / ranks
        features.append((device.memory_bytes, -float(shape.hidden_size)))
        usable.append(weights + num_tokens * num_layers * line.layer_kv_bytes)
    utilization, per_hidden = fit_rows(np.array(features), np.array(usable))
    return float(utilization), float(per_hidden)


def fit_all() -> tuple[Fits, dict[str, Any]]:
    """Return the fits, and what else was learnt on the way."""
    a100 = {**fit_dense("a100"), **fit_attention("a100"), **fit_network("a100")}
    h100 = {**fit_dense("h100"), **fit_attention("h100"), **fit_network("h100")}
    h100["kv_bandwidth"] = a100["kv_bandwidth"]
    direct = {
        model: {"a100-80g": {ranks: fit_direct(fit) for ranks, fit in by_ranks.items()}}
        for model, by_ranks in tables.distserve_fits().items()
    }
    utilization, per_hidden = fit_capacity()
    rows = tables.host_overheads()
    fixed_s, per_seq_s = fit_rows(np.stack([np.ones(len(rows)), rows[:, 0]], axis=1), rows[:, 1])
    fits = Fits(
        {"a100": Efficiency(**a100), "h100": Efficiency(**h100)}, direct, per_hidden, SOURCE
    )
    others = {
        "distserve_memory_utilization": utilization,
        "vidur_a100_cpu_overheads": {"fixed_s": float(fixed_s), "per_seq_s": float(per_seq_s)},
    }
    return fits, others


def as_values(fits: Fits) -> dict[str, Any]:
    """Return the fits as they are kept, to five digits."""
    values = {
        "efficiency": {chip: dataclasses.asdict(fit) for chip, fit in fits.efficiency.items()},
        "direct": fits.direct,
        "activation_bytes_per_hidden": fits.activation_bytes_per_hidden,
        "source": dict(fits.source),
    }
    rounded: dict[str, Any] = json.loads(
        json.dumps(values), parse_float=lambda text: float(f"{float(text):.5g}")
    )
    return rounded


def main() -> int:
    """Fit, write, print."""
    console = Console()
    if not tables.PROFILES.is_dir():
        console.print(f"skipped: the published tables are not here ({tables.PROFILES})")
        return 0
    fits, others = fit_all()
    FITS_FILE.write_text(json.dumps(as_values(fits), indent=1) + "\n", encoding="utf-8")
    load_fits.cache_clear()
    errors = table_errors(load_fits())
    result = {
        "provenance": provenance(["python", "-m", "experiments.fit_hardware"]),
        "tables": errors,
        **others,
        "measured_over_predicted": checks(others["distserve_memory_utilization"]),
    }
    RESULTS.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    table = Table("table", "rows", "mean error", "95 %", "bias")
    for name, error in errors.items():
        shares = [f"{error[key]:.1%}" for key in ("mean_error", "p95_error", "bias")]
        table.add_row(name, f"{error['rows']:.0f}", *shares)
    print_table(table)
    console.print_json(json.dumps(result["measured_over_predicted"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
