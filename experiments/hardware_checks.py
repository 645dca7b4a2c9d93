"""Comparisons of the fitted hardware with tables that nothing was fitted to.

Rules: what is stated is measured over predicted, its median and quartiles. Whole-model tables hold
the time of the host and of other kernels, which the roofline leaves out: they are slower.
Must not know: how anything was fitted.
"""

from __future__ import annotations

from collections import defaultdict

import numpy as np

from experiments import published_tables as tables
from fastserve.sim.hardware import HARDWARE, load_fits, num_blocks_that_fit, resolve_cost_model
from fastserve.sim.models import MODELS
from fastserve.sim.roofline import Roofline

BLOCK_SIZE = 16
PRODUCTS = frozenset({"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"})


def checks(memory_utilization: float) -> dict[str, dict[str, dict[str, float]]]:
    """Return every comparison."""
    return {
        "distserve_max_num_tokens": capacity(memory_utilization),
        "splitwise_a100_h100_iteration": whole_model(),
        "llmservingsim_h100_layers": products(),
    }


def capacity(memory_utilization: float) -> dict[str, dict[str, float]]:
    """Compare the tokens of KV that fit."""
    ratios = defaultdict(list)
    hardware = HARDWARE["a100-80g"]
    for shape, ranks, stages, num_tokens in tables.capacities():
        line = Roofline(
            shape=shape,
            hardware=hardware,
            efficiency=load_fits().efficiency[hardware.chip],
            tensor_parallel_size=ranks,
        )
        found = num_blocks_that_fit(line, stages, BLOCK_SIZE, memory_utilization) * BLOCK_SIZE
        ratios[shape.name].append(num_tokens / found)
    return summary(ratios)


def whole_model() -> dict[str, dict[str, float]]:
    """Compare prompts and tokens of Llama-2-70B, each batch run by itself."""
    ratios = defaultdict(list)
    for row in tables.rows_of("splitwise_a100_h100_iteration"):
        hardware = {"a100-80gb": "a100-80g", "h100-80gb": "h100"}.get(row["hardware"])
        if hardware is None or row["model"] != "llama2-70b":
            continue
        ranks, length, batch = (
            int(row[key]) for key in ("tensor_parallel", "prompt_size", "batch_size")
        )
        fit = resolve_cost_model(
            "llama-2-70b", hardware, tensor_parallel_size=ranks, num_device_blocks=1
        )
        context = length + int(row["token_size"]) // 2
        prompt_s = fit.cost_model.step_s([(length, 0)] * batch)
        token_s = fit.cost_model.step_s([(1, context - 1)] * batch)
        where = f"{hardware} tp{ranks}"
        ratios[f"{where} prompt"].append(float(row["prompt_time_ms"]) / 1e3 / prompt_s)
        ratios[f"{where} token"].append(float(row["token_time_ms"]) / 1e3 / token_s)
    return summary(ratios)


def products() -> dict[str, dict[str, float]]:
    """Compare the matrix products of a layer on an H100."""
    ratios = defaultdict(list)
    for model, name, ranks in (
        ("llama-3-8b", "8b", 1),
        ("llama-3-8b", "8b", 2),
        ("llama-3-70b", "70b", 1),
        ("llama-3-70b", "70b", 2),
        ("llama-3-70b", "70b", 4),
    ):
        seconds: dict[int, float] = defaultdict(float)
        for row in tables.rows_of(f"llmservingsim_h100_llama-3.1-{name}_tp{ranks}_layers"):
            if row["layer_name"] in PRODUCTS:
                seconds[int(row["num_tokens"])] += float(row["latency_ns"]) / 1e9
        line = Roofline(
            shape=MODELS[model],
            hardware=HARDWARE["h100"],
            efficiency=load_fits().efficiency["h100"],
            tensor_parallel_size=ranks,
        )
        fit = line.efficiency
        for num_tokens, measured in seconds.items():
            computing = num_tokens * line.products_s(line.shape.layer_params)
            predicted = fit.layer_s + max(line.layer_weights_s, computing)
            ratios[f"{model} tp{ranks}"].append(measured / predicted)
    return summary(ratios)


def summary(ratios: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """Return median and quartiles of each list."""
    found = {}
    for name, values in sorted(ratios.items()):
        low, median, high = np.quantile(np.array(values), (0.25, 0.5, 0.75))
        found[name] = {
            "rows": len(values),
            "q1": round(float(low), 3),
            "median": round(float(median), 3),
            "q3": round(float(high), 3),
        }
    return found
