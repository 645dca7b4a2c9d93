"""Measures step times of the loaded model and fits the CostModel.

Rules: real plans on the real worker, before it serves: prefills of several lengths and starts,
decodes of several batch sizes and contexts. One JSON per (model, dtype, device, tp, pp, threads,
kernels, eager or not, deterministic or not) is kept in the user's cache directory with a
fingerprint; one that does not match is measured again, except where `--profile` named it: then it
is refused.
Must not know: the scheduler, requests of users.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import platform
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastserve.core.cost_model import CostModel
from fastserve.core.messages import NewRequest, SchedulerOutput, Work
from fastserve.core.request import SamplingParams
from fastserve.executor.fitting import (
    COEFFICIENTS,
    Measurement,
    Shares,
    fit,
    relative_errors,
)
from fastserve.executor.worker import Worker
from fastserve.host.cache_dir import cache_dir
from fastserve.settings.option import ConfigError

logger = logging.getLogger(__name__)

FORMAT = 3
TIME_LIMIT_S = 6.0
"""No further kind of step is begun after this; the first ones suffice for a fit."""
REPEATS = 5
MEMORY_LIMIT = 128 * 2**20
"""Bytes of KV to touch, unless one full window needs more: a pool is mapped as it is used."""


def load_or_measure(
    worker: Worker, num_threads: int, on_progress: Callable[[str, float], None]
) -> CostModel:
    """Return the cost model of `--profile`, of the cache, or of a measurement made now.

    Raises ConfigError when the file that `--profile` names is missing, broken or of another setup.
    """
    fingerprint = make_fingerprint(worker, num_threads)
    named = worker.config.profile
    if named is not None:
        return read_profile(Path(named), fingerprint)
    path = cache_path(worker, fingerprint)
    if path.is_file():
        try:
            return read_profile(path, fingerprint)
        except ConfigError as error:
            logger.warning("measuring step times again: %s", error)
    return write_profile(path, fingerprint, measure(worker, on_progress))


def read_profile(path: Path, fingerprint: Mapping[str, Any]) -> CostModel:
    """Read a profile; raises ConfigError unless it was made for this setup."""
    try:
        profile = json.loads(path.read_text(encoding="utf-8"))
        found, coefficients = profile["fingerprint"], profile["cost_model"]
        differing = [key for key, value in fingerprint.items() if found.get(key) != value]
        if not differing:
            return CostModel(**{key: float(value) for key, value in coefficients.items()})
    except OSError as error:
        raise ConfigError(f"profile {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"profile {path}: not a profile: {error!r}") from error
    key = differing[0]
    raise ConfigError(
        f"profile {path}: made for another setup: {key} is {found.get(key)!r} there, "
        f"{fingerprint[key]!r} here"
    )


def write_profile(
    path: Path, fingerprint: Mapping[str, Any], measurements: Sequence[Measurement]
) -> CostModel:
    """Fit and store a profile; a cache directory that cannot be written is only logged."""
    cost_model = fit(measurements)
    errors = relative_errors(cost_model, measurements)
    profile = {
        "fingerprint": fingerprint,
        "cost_model": dataclasses.asdict(cost_model),
        "fit_error": {"mean": float(np.mean(errors)), "max": float(np.max(errors))},
        "measurements": [{"shares": item.shares, "seconds": item.seconds} for item in measurements],
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}.tmp")
        partial.write_text(json.dumps(profile, indent=1) + "\n", encoding="utf-8")
        partial.replace(path)  # several servers may start at once; readers see whole files
    except OSError as error:
        logger.warning("the profile is not kept: %s", error)
    return cost_model


def cache_path(worker: Worker, fingerprint: Mapping[str, Any]) -> Path:
    """Return where the profile of this setup is kept."""
    identity = str(fingerprint["model"])
    name = re.sub(r"[^A-Za-z0-9.]+", "-", worker.config.model).strip("-")[-40:]
    parts = (
        name,
        identity[:8],
        worker.facts.dtype,
        worker.device.type,
        f"tp{fingerprint['tensor_parallel_size']}",
        f"pp{fingerprint['pipeline_parallel_size']}",
        f"t{fingerprint['num_threads']}",
        *([fingerprint["cpu_kernels"]] if worker.device.type == "cpu" else []),
        *(name for name in ("enforce_eager", "deterministic") if fingerprint[name]),
    )
    return cache_dir() / ("_".join(parts) + ".json")


def make_fingerprint(worker: Worker, num_threads: int) -> dict[str, Any]:
    """Describe everything that step times depend on."""
    shape = dataclasses.asdict(worker.model_config)
    digest = hashlib.sha256(json.dumps(shape, sort_keys=True).encode()).hexdigest()
    return {
        "format": FORMAT,
        "model": digest,
        "dtype": worker.facts.dtype,
        "device": device_name(worker.device),
        "tensor_parallel_size": worker.config.tensor_parallel_size,
        "pipeline_parallel_size": worker.config.pipeline_parallel_size,
        "num_threads": num_threads,
        "block_size": worker.config.block_size,
        "cpu_kernels": worker.cpu_kernels,
        "enforce_eager": worker.config.enforce_eager and worker.device.type == "cuda",
        "deterministic": worker.config.deterministic,
        "torch": torch.__version__,
    }


def device_name(device: torch.device) -> str:
    """Return the marketing name of the device, as far as the system tells."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return f"{line.partition(':')[2].strip()} x{os.cpu_count()}"
    return f"{platform.processor() or platform.machine()} x{os.cpu_count()}"


def kinds_of_steps(worker: Worker) -> list[Shares]:
    """Return the steps to measure: from one decode to the longest prefill that fits."""
    facts, limits = worker.facts, worker.limits
    block_size = worker.config.block_size
    num_blocks = num_profiled_blocks(worker)
    room = min(facts.max_model_len - 1, num_blocks * block_size)
    longest = max(min(limits.max_num_batched_tokens, room), 1)
    lengths = sorted({max(longest >> shift, 1) for shift in (0, 1, 2, 4, 6)})
    contexts = sorted({max(room >> shift, 1) for shift in (0, 1, 2, 3, 5)})
    sizes = {1, 2, 4, 8, 16, 64, 256, limits.max_num_seqs}
    batches = sorted(size for size in sizes if size <= limits.max_num_seqs)

    kinds: list[Shares] = [((length, 0),) for length in lengths if length > 1]
    kinds += [((length, room - length),) for length in lengths[:-1] if 1 < length < room]
    for batch in batches:
        for context in contexts:
            kinds.append(tuple((1, start) for start in _spread(context, batch, room)))
    half = lengths[-1] // 2
    if half > 1 and limits.max_num_seqs >= 4:
        kinds.append((*((1, contexts[0] - 1),) * 4, (half, 0)))
    return [kind for kind in kinds if _num_blocks(kind, block_size) <= num_blocks]


def _spread(context: int, batch: int, room: int) -> list[int]:
    """Return starts whose contexts lie between a quarter of `context` and what mirrors it.

    No batch of real requests is of one length, and some attention pays for the longest in it.
    """
    if batch == 1:
        return [context - 1]
    contexts = (context // 4 + 3 * context * index // (2 * (batch - 1)) for index in range(batch))
    return [min(max(length, 1), room) - 1 for length in contexts]


def num_profiled_blocks(worker: Worker) -> int:
    """Return how many blocks of the pool a profile may touch."""
    window = -(-worker.facts.max_model_len // worker.config.block_size)
    blocks = max(MEMORY_LIMIT // worker.facts.block_bytes, window)
    return min(blocks, worker.facts.num_device_blocks)


def measure(worker: Worker, on_progress: Callable[[str, float], None]) -> list[Measurement]:
    """Run every kind of step a few times; stops early when it takes too long."""
    # Spread by the golden ratio: cut short, what was measured still covers every sort of step.
    kinds = [
        kind
        for _, kind in sorted(
            (index * 0.618 % 1, kind) for index, kind in enumerate(kinds_of_steps(worker))
        )
    ]
    on_progress("measuring step times", 0.0)
    worker.kv.touch(num_profiled_blocks(worker))
    run_step(worker, kinds[0])  # the first step ever pays for allocations
    begun = time.monotonic()
    measurements: list[Measurement] = []
    for index, kind in enumerate(kinds):
        is_late = time.monotonic() - begun > TIME_LIMIT_S
        if is_late and len(measurements) > len(COEFFICIENTS):
            break
        run_step(worker, kind)  # warms up this shape
        times = [run_step(worker, kind)]
        while len(times) < REPEATS and sum(times) < TIME_LIMIT_S / 40:
            times.append(run_step(worker, kind))
        measurements.append(Measurement(kind, float(np.median(times))))
        on_progress("measuring step times", (index + 1) / len(kinds))
    on_progress("measuring step times", 1.0)
    return measurements


def run_step(worker: Worker, shares: Shares) -> float:
    """Run one step of made-up requests on blocks from the start of the pool; returns seconds."""
    block_size = worker.config.block_size
    params = SamplingParams(temperature=0.0)
    new, works = [], []
    next_block = 0
    for index, (num_tokens, start) in enumerate(shares):
        handle = -1 - index  # no request of the scheduler has a negative handle
        blocks = tuple(range(next_block, next_block - (-(start + num_tokens) // block_size)))
        next_block += len(blocks)
        new.append(NewRequest(handle, 0, start + num_tokens, params, (0,) * start))
        works.append(Work(handle, 0, start, num_tokens, (0,) * num_tokens, 0, blocks, True, "last"))
    seconds = worker.execute(SchedulerOutput(-1, tuple(new), tuple(works))).device_s
    worker.execute(SchedulerOutput(-1, (), (), forget=tuple(item.request for item in new)))
    return seconds


def _num_blocks(shares: Shares, block_size: int) -> int:
    return sum(-(-(start + num_tokens) // block_size) for num_tokens, start in shares)
