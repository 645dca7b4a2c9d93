"""Engines of others: what a step of them costs beyond the device.

Rules: a preset holds two numbers, fitted once against measured runs for all rates together, and
says how the engine carries out a plan. Never the default. Must not know: models, hardware.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from fastserve.config import ConfigError
from fastserve.core.cost_model import CostModel
from fastserve.sim.sim_executor import StepOverhead


@dataclass(frozen=True, slots=True, kw_only=True)
class SeparatePasses(CostModel):
    """Prompts and decodes of a step pass through the model one after the other, not as one batch.

    Each pass costs its own base; `pass_overhead_s` is what driving the second one takes.
    """

    pass_overhead_s: float = 0.0

    def step_s(self, shares: Iterable[tuple[int, int]]) -> float:
        """Return the seconds of a step; a share is (num_tokens, start)."""
        prompts, decodes = [], []
        for share in shares:
            (decodes if share[0] == 1 else prompts).append(share)
        if prompts and decodes:
            prompts_s = CostModel.step_s(self, prompts)
            return prompts_s + self.pass_overhead_s + CostModel.step_s(self, decodes)
        return CostModel.step_s(self, prompts or decodes)


@dataclass(frozen=True, slots=True)
class EnginePreset:
    """Host seconds of a step, and where they come from."""

    overhead: StepOverhead
    source: str

    def applied(self, cost_model: CostModel) -> CostModel:
        """Return the costs under this engine, whose host drives each pass by itself."""
        coefficients = {
            name: getattr(cost_model, name) for name in CostModel.__dataclass_fields__
        }
        return SeparatePasses(**coefficients, pass_overhead_s=self.overhead.fixed_s)


ENGINES = {
    # experiments/validate_vllm_2023.py --fit
    "vllm-2023": EnginePreset(
        StepOverhead(fixed_s=0.003, per_seq_s=0.0002),
        "fitted to DistServe's measured runs of vLLM, OPT-13B on one A100-80G",
    ),
}


def resolve_engine(name: str) -> EnginePreset:
    """Return a preset; raises ConfigError naming the known ones."""
    preset = ENGINES.get(name)
    if preset is None:
        raise ConfigError(f"--engine {name}: unknown (known: {', '.join(ENGINES)})")
    return preset
