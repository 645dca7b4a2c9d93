"""Reads the shape of a network from a Hugging Face config.json, whatever its family.

Rules: each family has a dataclass and a parser of its own; transformers 4's and 5's dialects are
both read. What the layers cannot compute exactly is refused here, in one line.
Must not know: weights, tensors, devices.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from fastserve.checkpoint.config_defaults import ARCHITECTURES, with_defaults
from fastserve.checkpoint.config_fields import ModelConfig, Values
from fastserve.checkpoint.config_gpt2 import parse_gpt2
from fastserve.checkpoint.config_llama import parse_llama
from fastserve.checkpoint.config_opt import parse_opt
from fastserve.checkpoint.kinds import describe_quantization
from fastserve.host.json_file import read_object
from fastserve.settings.option import ConfigError

__all__ = ["ModelConfig", "parse_model_config", "read_model_config"]

PARSERS: dict[str, Callable[[Values, str, str], ModelConfig]] = {
    **dict.fromkeys(ARCHITECTURES, parse_llama),
    "OPTForCausalLM": parse_opt,
    "GPT2LMHeadModel": parse_gpt2,
}

POSITIVE = (
    "vocab_size",
    "hidden_size",
    "num_layers",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "intermediate_size",
    "max_position_embeddings",
)
MAX_POSITIONS = 2**26
"""More is a typing error: angles would be tabulated for all of them."""
OTHER_KINDS = {
    "ForMaskedLM": "an encoder, which generates no text",
    "Classification": "a classifier, which generates no text",
    "ForQuestionAnswering": "which marks answers and generates no text",
    "ForConditionalGeneration": "an encoder-decoder, or one for images or sound",
    "Model": "a network without a head that generates text",
}
"""What names of other architectures end in."""


def read_model_config(model_dir: Path) -> ModelConfig:
    """Read `config.json`; raises ConfigError with one line when the model cannot be served."""
    path = model_dir / "config.json"
    if not path.exists():
        raise ConfigError(f"{model_dir}: no config.json; not a Hugging Face model")
    return read_config_file(path)


def read_config_file(path: Path) -> ModelConfig:
    """Read a `config.json` wherever it lies; raises ConfigError as `read_model_config` does."""
    values = read_object(path)
    if values is None:
        raise ConfigError(f"{path}: no such file")
    return parse_model_config(values, source=str(path))


def parse_model_config(values: Values, *, source: str) -> ModelConfig:
    """Turn the fields of a config.json into the ModelConfig of its family."""
    architecture = _architecture(values, source)
    if quantization := describe_quantization(values):
        raise ConfigError(f"{source}: quantized weights ({quantization}) are not supported")
    try:
        complete = with_defaults(values, ARCHITECTURES[architecture], source)
        config = PARSERS[architecture](complete, source, architecture)
    except ConfigError:
        raise
    except (TypeError, ValueError, OverflowError) as error:
        raise ConfigError(f"{source}: {error}") from None
    for name in POSITIVE:
        if getattr(config, name) < 1:
            raise ConfigError(f"{source}: {name} must be positive, got {getattr(config, name)}")
    if not 1 < config.num_positions <= MAX_POSITIONS:
        raise ConfigError(
            f"{source}: a window of {config.num_positions} tokens; from 2 to {MAX_POSITIONS} "
            "can be served"
        )
    _check_heads(config, source)
    return config


def _check_heads(config: ModelConfig, source: str) -> None:
    """Refuse heads that do not fit together."""
    if config.num_heads % config.num_kv_heads:
        raise ConfigError(
            f"{source}: {config.num_heads} attention heads cannot share "
            f"{config.num_kv_heads} key-value heads"
        )
    if config.has_rotary_positions and config.head_dim % 2:
        raise ConfigError(
            f"{source}: head_dim {config.head_dim} is odd; rotary pairs need an even one"
        )


def _architecture(values: Values, source: str) -> str:
    """Return the class to be served: the first one known, or by model_type where none is named."""
    names = values.get("architectures") or []
    if not isinstance(names, list):
        raise ConfigError(f"{source}: architectures must be a list, got {names!r}")
    model_type = values.get("model_type")
    for name, family in ARCHITECTURES.items():
        if name in names or (not names and family == model_type):
            return name
    asked = ", ".join(map(str, names)) or str(model_type or "none named")
    kind = next((f", {kind}" for end, kind in OTHER_KINDS.items() if asked.endswith(end)), "")
    raise ConfigError(
        f"{source}: architecture not supported: {asked}{kind} (supported: {', '.join(PARSERS)})"
    )
