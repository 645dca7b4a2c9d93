"""Published measurements of GPUs, read from `../shared/profiles`, as rows that a fit understands.

Rules: seconds and bytes; the tables themselves never enter the project. A table that must not be
believed (see the README beside them) is not read. Must not know: how anything is fitted.
"""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fastserve.host.provenance import ROOT
from fastserve.sim.models import MODELS, ModelShape

PROFILES = ROOT.parent / "shared" / "profiles"

DENSE = {
    "vidur_a100_llama-2-7b_mlp": ("a100", "llama-2-7b"),
    "vidur_a100_llama-2-70b_mlp": ("a100", "llama-2-70b"),
    "vidur_a100_llama-3-8b_mlp": ("a100", "llama-3-8b"),
    "vidur_a100_llama-3-70b_mlp": ("a100", "llama-3-70b"),
    "vidur_h100_llama-2-7b_mlp": ("h100", "llama-2-7b"),
    "vidur_h100_llama-2-70b_mlp": ("h100", "llama-2-70b"),
}
ATTENTION = {
    "vidur_a100_llama-2-70b_tp2_attention": ("a100", "llama-2-70b"),
    "frontier_a800_llama-2-7b_tp1_attention": ("a100", "llama-2-7b"),
    "llmservingsim_h100_llama-3.1-70b_tp4_prefill_attention": ("h100", "llama-3-70b"),
}
NETWORK = {
    "vidur_a100_dgx_all_reduce": "a100",
    "vidur_a100_dgx_send_recv": "a100",
    "vidur_h100_dgx_all_reduce": "h100",
    "vidur_h100_dgx_send_recv": "h100",
}
LARGEST_MESSAGE = 64 * 2**20
"""Hidden states of a step are no larger."""


class Dense(NamedTuple):
    """Everything but attention, in one layer."""

    shape: ModelShape
    ranks: int
    num_tokens: int
    seconds: float


class Attention(NamedTuple):
    """Attention of one layer: one prompt chunk behind `start` tokens, or `batch` decodes."""

    shape: ModelShape
    ranks: int
    batch: int
    chunk: int  # 0: decodes
    start: int
    seconds: float


class Message(NamedTuple):
    """A collective over the devices of one node."""

    ranks: int
    num_bytes: int
    seconds: float


def rows_of(name: str) -> Iterator[dict[str, str]]:
    """Yield the rows of a table."""
    with gzip.open(PROFILES / f"{name}.csv.gz", "rt", encoding="utf-8", newline="") as file:
        yield from csv.DictReader(file)


def dense_rows(name: str) -> list[Dense]:
    """Read one of DENSE. The embedding is left out: a model has one, not one a layer."""
    shape = MODELS[DENSE[name][1]]
    found = []
    for row in rows_of(name):
        times = [
            float(value)
            for key, value in row.items()
            if key.endswith("_median_ms") and key != "emb_median_ms" and value
        ]
        ranks, num_tokens = int(row["num_tensor_parallel_workers"]), int(row["num_tokens"])
        found.append(Dense(shape, ranks, num_tokens, sum(times) / 1e3))
    return found


def attention_rows(name: str) -> list[Attention]:
    """Read one of ATTENTION."""
    shape = MODELS[ATTENTION[name][1]]
    found = []
    for row in rows_of(name):
        is_prefill = row["is_prefill"] == "True"
        time_ms = float(row["attn_prefill_median_ms" if is_prefill else "attn_decode_median_ms"])
        batch, start = int(row["batch_size"]), int(row["kv_cache_size"])
        chunk = int(row["prefill_chunk_size"])
        if time_ms > 0.0 and (batch == 1 or not is_prefill):
            ranks = int(row["num_tensor_parallel_workers"])
            found.append(Attention(shape, ranks, batch, chunk, start, time_ms / 1e3))
    return found


def messages(name: str) -> list[Message]:
    """Read one of NETWORK, as far as all devices sit in one node."""
    column = "send_recv_median_ms" if name.endswith("send_recv") else "all_reduce_median_ms"
    return [
        Message(int(row["num_workers"]), int(row["size"]), float(row[column]) / 1e3)
        for row in rows_of(name)
        if row["num_workers"] == row["devices_per_node"] and int(row["size"]) <= LARGEST_MESSAGE
    ]


def distserve_fits() -> dict[str, dict[str, dict[str, Any]]]:
    """Return DistServe's fits of vLLM: model → devices → coefficients in milliseconds."""
    path = PROFILES / "distserve_profiler-a100-80g.vllm.json"
    fits = json.loads(path.read_text(encoding="utf-8"))
    return {name.rpartition("/")[2]: by_ranks for name, by_ranks in fits.items()}


def capacities() -> list[tuple[ModelShape, int, int, int]]:
    """Return DistServe's KV capacities: (model, tensor parallel, pipeline parallel, tokens)."""
    with (PROFILES / "distserve_max_num_tokens.csv").open(encoding="utf-8", newline="") as file:
        return [
            (
                MODELS[row["model"].rpartition("/")[2]],
                int(row["tp"]),
                int(row["pp"]),
                int(row["max_num_tokens"]),
            )
            for row in csv.DictReader(file)
        ]


def host_overheads() -> npt.NDArray[np.float64]:
    """Return (sequences, host seconds of a step) of vLLM on one A100."""
    parts = (
        "schedule_median",
        "sampler_e2e_median",
        "prepare_inputs_e2e_median",
        "process_model_outputs_median",
    )
    return np.array(
        [
            (float(row["batch_size"]), sum(float(row[part]) for part in parts) / 1e3)
            for row in rows_of("vidur_a100_cpu_overheads")
            if row["tensor_parallel_degree"] == "1"
        ]
    )
