"""Profiles: the fitted step times of a setup, kept in files.

Rules: one JSON per (model, dtype, device, tp, pp, threads, kernels, eager or not, deterministic or
not, quantization) is kept in the user's cache directory with a fingerprint; one that does not match
is measured again, except where `--profile` named it: then it is refused.
Must not know: how steps are measured.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastserve.core.cost_model import CostModel
from fastserve.executor.facts import Setup
from fastserve.executor.fitting import Measurement, fit, relative_errors
from fastserve.host.cache_dir import cache_dir
from fastserve.host.machine import cpu_name
from fastserve.settings.option import ConfigError

logger = logging.getLogger(__name__)

FORMAT = 3


def load_or_measure(setup: Setup, measure: Callable[[], Sequence[Measurement]]) -> CostModel:
    """Return the cost model of `--profile`, of the cache, or of a measurement made now.

    Raises ConfigError when the file that `--profile` names is missing, broken or of another setup.
    """
    fingerprint = make_fingerprint(setup)
    named = setup.config.profile
    if named is not None:
        return read_profile(Path(named), fingerprint)
    path = cache_path(setup, fingerprint)
    if path.is_file():
        try:
            return read_profile(path, fingerprint)
        except ConfigError as error:
            logger.warning("measuring step times again: %s", error)
    return write_profile(path, fingerprint, measure())


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


def cache_path(setup: Setup, fingerprint: Mapping[str, Any]) -> Path:
    """Return where the profile of this setup is kept."""
    device_type = torch.device(setup.facts.device).type
    identity = str(fingerprint["model"])
    name = re.sub(r"[^A-Za-z0-9.]+", "-", setup.config.model).strip("-")[-40:]
    parts = (
        name,
        identity[:8],
        setup.facts.dtype,
        device_type,
        f"tp{fingerprint['tensor_parallel_size']}",
        f"pp{fingerprint['pipeline_parallel_size']}",
        f"t{fingerprint['num_threads']}",
        *([fingerprint["cpu_kernels"]] if device_type == "cpu" else []),
        *(name for name in ("enforce_eager", "deterministic") if fingerprint[name]),
        *filter(None, [fingerprint["quantization"]]),
    )
    return cache_dir() / ("_".join(parts) + ".json")


def make_fingerprint(setup: Setup) -> dict[str, Any]:
    """Describe everything that step times depend on."""
    config, facts = setup.config, setup.facts
    device = torch.device(facts.device)
    shape = dataclasses.asdict(setup.model_config)
    digest = hashlib.sha256(json.dumps(shape, sort_keys=True).encode()).hexdigest()
    return {
        "format": FORMAT,
        "model": digest,
        "dtype": facts.dtype,
        "device": device_name(device),
        "tensor_parallel_size": config.tensor_parallel_size,
        "pipeline_parallel_size": config.pipeline_parallel_size,
        "num_threads": setup.num_threads,
        "block_size": config.block_size,
        "cpu_kernels": facts.cpu_kernels,
        "enforce_eager": config.enforce_eager and device.type == "cuda",
        "deterministic": config.deterministic,
        "quantization": config.quantization,
        "torch": torch.__version__,
    }


def device_name(device: torch.device) -> str:
    """Return the marketing name of the device, as far as the system tells."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{cpu_name()} x{os.cpu_count()}"
