"""Engines of others: what a step of them costs beyond the device.

Rules: a preset holds two numbers, fitted once against measured runs for all rates together, and
says how the engine carries out a plan. Never the default. Must not know: models, hardware.
"""

from __future__ import annotations

from typing import NamedTuple

from fastserve.settings.option import ConfigError
from fastserve.sim.sim_executor import StepOverhead


class EnginePreset(NamedTuple):
    """What the host adds to a step, and where that comes from."""

    overhead: StepOverhead
    source: str


ENGINES = {
    # The numbers are those of `python -m experiments.validate_vllm_2023 --fit`.
    "vllm-2023": EnginePreset(
        StepOverhead(fixed_s=0.002, per_seq_s=0.0003, has_separate_passes=True),
        "fitted to DistServe's measured runs of vLLM, OPT-13B on one A100-80G",
    ),
}


def resolve_engine(name: str) -> EnginePreset:
    """Return a preset; raises ConfigError naming the known ones."""
    preset = ENGINES.get(name)
    if preset is None:
        raise ConfigError(f"--engine {name}: unknown (known: {', '.join(ENGINES)})")
    return preset
