"""FastServe: LLM serving with token-level preemption, so that short requests never wait."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastserve.llm import LLM
    from fastserve.offline.sampling_params import SamplingParams
    from fastserve.settings.engine import EngineConfig

__version__ = "0.1.0"
__all__ = ["LLM", "EngineConfig", "SamplingParams", "__version__"]


def __getattr__(name: str) -> Any:
    """Resolve the public names on first use, so that `import fastserve` loads no torch."""
    if name == "LLM":
        from fastserve.llm import LLM

        return LLM
    if name == "SamplingParams":
        from fastserve.offline.sampling_params import SamplingParams

        return SamplingParams
    if name == "EngineConfig":
        from fastserve.settings.engine import EngineConfig

        return EngineConfig
    raise AttributeError(f"module 'fastserve' has no attribute {name!r}")
