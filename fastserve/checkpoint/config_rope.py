"""RopeConfig: how a rotary embedding turns, and how far it stretches the window.

Rules: both dialects are read (`rope_theta` beside `rope_scaling`, and transformers 5's
`rope_parameters`); where both stand, `rope_scaling` is what transformers takes.
Must not know: weights, tensors, devices.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fastserve.checkpoint.config_fields import Values, read_real
from fastserve.settings.option import ConfigError

KINDS = ("default", "linear", "llama3")


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """Rotary embedding: base and, for `linear` and `llama3`, how its frequencies are stretched."""

    theta: float = 10_000.0
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192

    def num_positions(self, max_position_embeddings: int) -> int:
        """Return the positions of a window that config.json gives before it is stretched.

        `linear` puts `factor` positions where one was. The window of `llama3` is given stretched.
        """
        if self.kind == "linear":
            return int(max_position_embeddings * self.factor)
        return max_position_embeddings


def read_rope(values: Values, source: str) -> RopeConfig:
    """Return the rotary embedding of a config.json, defaults included."""
    given = values["rope_scaling"] or values["rope_parameters"] or {}
    if not isinstance(given, dict):
        raise ConfigError(f"{source}: rope_scaling must be an object, got {given!r}")
    parameters: dict[str, Any] = {
        "rope_theta": values["rope_theta"],
        "original_max_position_embeddings": values["max_position_embeddings"],
        **given,
    }
    if any(isinstance(value, dict) for value in parameters.values()):
        raise ConfigError(f"{source}: a rotary embedding for each kind of layer is not supported")
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind not in KINDS:
        raise ConfigError(
            f"{source}: rope type {kind!r} is not supported (only {', '.join(KINDS)})"
        )
    factors = [place.get("partial_rotary_factor", 1.0) for place in (values, parameters)]
    if factors != [1.0, 1.0]:
        raise ConfigError(f"{source}: partial_rotary_factor is not supported")
    theta = read_real(parameters, "rope_theta", source, minimum=1.0)
    if kind == "default":
        return RopeConfig(theta=theta)

    def number(name: str, minimum: float) -> float:
        if name not in parameters:
            raise ConfigError(f"{source}: rope type {kind!r} without {name}")
        return read_real(parameters, name, source, minimum=minimum)

    factor = number("factor", 1.0)
    if kind == "linear":
        return RopeConfig(theta=theta, kind=kind, factor=factor)
    return RopeConfig(
        theta=theta,
        kind=kind,
        factor=factor,
        low_freq_factor=number("low_freq_factor", 1e-3),
        high_freq_factor=number("high_freq_factor", 1e-3),
        original_max_position_embeddings=int(number("original_max_position_embeddings", 1.0)),
    )
