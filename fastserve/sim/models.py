"""Shapes of models: all that their cost depends on, by name or from a Hugging Face config.json.

Rules: decoder-only networks. In a mixture of experts a token is multiplied by the experts it is
sent to, and a step reads all of them: true of large batches, too much for a few tokens. Quantized
weights and other kinds of experts are refused, for their cost follows other laws.
Must not know: hardware, weights, torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastserve.checkpoint.config_defaults import DEFAULTS, with_defaults
from fastserve.settings.option import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """A decoder-only network. `num_mlp_matrices` is 3 where the activation is gated, else 2.

    `intermediate_size` is that of one expert where there are several.
    """

    name: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    num_mlp_matrices: int
    vocab_size: int
    max_model_len: int
    is_tied: bool  # one matrix serves as embedding and as head
    num_experts: int = 1
    num_experts_per_token: int = 1

    @property
    def layer_params(self) -> int:
        """Weights of the matrix products of one layer, all of which a step reads."""
        return self._layer_params(self.num_experts)

    @property
    def active_layer_params(self) -> int:
        """Weights of one layer that a token is multiplied by."""
        return self._layer_params(self.num_experts_per_token)

    def _layer_params(self, num_experts: int) -> int:
        qkv = self.hidden_size * (self.num_heads + 2 * self.num_kv_heads) * self.head_dim
        output = self.num_heads * self.head_dim * self.hidden_size
        expert = self.num_mlp_matrices * self.hidden_size * self.intermediate_size
        router = self.num_experts * self.hidden_size if self.num_experts > 1 else 0
        return qkv + output + num_experts * expert + router

    @property
    def head_params(self) -> int:
        """Weights of the product that turns a hidden state into logits; as many embed a token."""
        return self.vocab_size * self.hidden_size

    @property
    def num_params(self) -> int:
        """All weights that count."""
        return self.num_layers * self.layer_params + (2 - self.is_tied) * self.head_params


def _opt(size: str, num_layers: int, hidden_size: int, num_heads: int) -> ModelShape:
    return _gpt(f"opt-{size}", num_layers, hidden_size, num_heads, vocab_size=50272)


def _gpt(
    name: str, num_layers: int, hidden_size: int, num_heads: int, *, vocab_size: int = 50257
) -> ModelShape:
    return ModelShape(
        name=name,
        num_layers=num_layers,
        hidden_size=hidden_size,
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=hidden_size // num_heads,
        intermediate_size=4 * hidden_size,
        num_mlp_matrices=2,
        vocab_size=vocab_size,
        max_model_len=2048,
        is_tied=True,
    )


def _llama(
    name: str, sizes: tuple[int, int, int, int, int], *, vocab_size: int, max_model_len: int
) -> ModelShape:
    num_layers, hidden_size, num_heads, num_kv_heads, intermediate_size = sizes
    return ModelShape(
        name=name,
        num_layers=num_layers,
        hidden_size=hidden_size,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=128,
        intermediate_size=intermediate_size,
        num_mlp_matrices=3,
        vocab_size=vocab_size,
        max_model_len=max_model_len,
        is_tied=False,
    )


MODELS = {
    shape.name: shape
    for shape in (
        _opt("6.7b", 32, 4096, 32),
        _opt("13b", 40, 5120, 40),
        _opt("30b", 48, 7168, 56),
        _opt("66b", 64, 9216, 72),
        _opt("175b", 96, 12288, 96),
        _gpt("gpt-3-2.7b", 32, 2560, 32),
        _gpt("gpt-3-6.7b", 32, 4096, 32),
        _gpt("gpt-3-13b", 40, 5120, 40),  # 5140 in the paper's table, which 40 heads of 128 deny
        _gpt("gpt-3-175b", 96, 12288, 96),
        _llama("llama-2-7b", (32, 4096, 32, 32, 11008), vocab_size=32000, max_model_len=4096),
        _llama("llama-2-13b", (40, 5120, 40, 40, 13824), vocab_size=32000, max_model_len=4096),
        _llama("llama-2-70b", (80, 8192, 64, 8, 28672), vocab_size=32000, max_model_len=4096),
        _llama("llama-3-8b", (32, 4096, 32, 8, 14336), vocab_size=128256, max_model_len=8192),
        _llama("llama-3-70b", (80, 8192, 64, 8, 28672), vocab_size=128256, max_model_len=8192),
    )
}

# Families whose feed-forward network has two matrices: no gate.
_UNGATED = frozenset(
    {"opt", "gpt2", "gptj", "gpt_neo", "gpt_neox", "gpt_bigcode", "bloom", "falcon", "mpt", "phi"}
)
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
# Families whose every expert is a gated network of one size, and none is shared.
_PLAIN_EXPERTS = frozenset({"mixtral", "qwen3_moe"})


def resolve_model(model: str) -> ModelShape:
    """Return the shape of a known name, of a model's directory or of its config.json.

    Hub spellings of the known names are understood. Raises ConfigError with one line otherwise.
    """
    path = Path(model)
    if path.suffix == ".json" or path.is_dir():
        return read_shape(path / "config.json" if path.is_dir() else path)
    name = model.rpartition("/")[2].lower().removeprefix("meta-").removesuffix("-hf")
    shape = MODELS.get(name)
    if shape is None:
        raise ConfigError(
            f"--model {model}: unknown to the simulator (known: {', '.join(MODELS)}, "
            "or a directory with a config.json)"
        )
    return shape


def read_shape(path: Path) -> ModelShape:
    """Read a Hugging Face config.json."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"--model {path}: no such file") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"--model {path}: cannot be read: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"--model {path}: must hold a JSON object")
    try:
        return parse_shape(values, name=str(path))
    except KeyError as error:
        raise ConfigError(f"--model {path}: {error.args[0]!r} is missing") from None
    except (TypeError, ZeroDivisionError) as error:
        raise ConfigError(f"--model {path}: {error}") from None


def parse_shape(values: Mapping[str, Any], *, name: str) -> ModelShape:
    """Turn the fields of a config.json into a shape.

    What a file of a family that is served leaves out is that family's default; of other families,
    raises KeyError for what is missing.
    """
    model_type = values.get("model_type")
    if model_type in DEFAULTS:
        values = with_defaults(values, model_type, f"--model {name}")
    num_experts, num_active = _experts(values, name)
    if values.get("quantization_config"):
        raise ConfigError(f"--model {name}: quantized weights cannot be simulated")
    hidden_size = int(_first(values, "hidden_size", "n_embd", "d_model"))
    num_heads = int(_first(values, "num_attention_heads", "n_head", "n_heads"))
    inner = values.get("intermediate_size") or values.get("ffn_dim") or values.get("n_inner")
    if num_experts > 1:
        inner = values.get("moe_intermediate_size") or inner
    return ModelShape(
        name=name,
        num_layers=int(_first(values, "num_hidden_layers", "n_layer", "n_layers")),
        hidden_size=hidden_size,
        num_heads=num_heads,
        num_kv_heads=_num_kv_heads(values, num_heads),
        head_dim=int(values.get("head_dim") or hidden_size // num_heads),
        intermediate_size=int(inner or 4 * hidden_size),
        num_mlp_matrices=2 if model_type in _UNGATED else 3,
        vocab_size=int(values["vocab_size"]),
        max_model_len=_max_model_len(values),
        is_tied=bool(values.get("tie_word_embeddings")),
        num_experts=num_experts,
        num_experts_per_token=num_active,
    )


def _experts(values: Mapping[str, Any], name: str) -> tuple[int, int]:
    """Return how many experts a layer has, and how many of them a token is sent to."""
    num_experts = max(int(values.get(key) or 0) for key in _EXPERTS)
    if num_experts <= 1:
        return 1, 1
    if values.get("model_type") not in _PLAIN_EXPERTS:
        raise ConfigError(
            f"--model {name}: a mixture of experts of this kind cannot be simulated "
            f"(only of {', '.join(sorted(_PLAIN_EXPERTS))})"
        )
    if values.get("mlp_only_layers") or int(values.get("decoder_sparse_step") or 1) > 1:
        raise ConfigError(f"--model {name}: layers without experts among others are not simulated")
    return num_experts, int(values["num_experts_per_tok"])


def _max_model_len(values: Mapping[str, Any]) -> int:
    names = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
    positions = int(_first(values, *names))
    rope = values.get("rope_scaling") or values.get("rope_parameters") or {}
    if rope.get("rope_type", rope.get("type")) == "linear":
        positions = int(positions * float(rope["factor"]))
    window = values.get("sliding_window")
    if window is None or not values.get("use_sliding_window", True):
        return positions
    return min(positions, int(window))


def _num_kv_heads(values: Mapping[str, Any], num_heads: int) -> int:
    if values.get("multi_query"):
        return 1
    return int(values.get("num_key_value_heads") or values.get("num_kv_heads") or num_heads)


def _first(values: Mapping[str, Any], *keys: str) -> Any:
    for key in keys:
        if values.get(key) is not None:
            return values[key]
    raise KeyError(keys[0])
