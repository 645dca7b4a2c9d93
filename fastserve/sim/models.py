"""Shapes of models: all that their cost depends on, by name or from what a server would read.

Rules: decoder-only networks. In a mixture of experts a token is multiplied by the experts it is
sent to, and a step reads all of them: true of large batches, too much for a few tokens. Of a
config.json, what cannot be served cannot be simulated.
Must not know: hardware, weights, torch, the keys of a config.json.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fastserve.checkpoint.config_llama import LlamaConfig
from fastserve.checkpoint.model_config import ModelConfig, read_config_file
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


def resolve_model(model: str) -> ModelShape:
    """Return the shape of a known name, of a model's directory or of its config.json.

    Hub spellings of the known names are understood. Raises ConfigError with one line otherwise.
    """
    path = Path(model)
    if path.suffix == ".json" or path.is_dir():
        file = path / "config.json" if path.is_dir() else path
        return shape_of(read_config_file(file), name=str(file))
    name = model.rpartition("/")[2].lower().removeprefix("meta-").removesuffix("-hf")
    shape = MODELS.get(name)
    if shape is None:
        raise ConfigError(
            f"--model {model}: unknown to the simulator (known: {', '.join(MODELS)}, "
            "or a directory with a config.json)"
        )
    return shape


def shape_of(config: ModelConfig, *, name: str) -> ModelShape:
    """Return the shape of a network that can be served.

    Raises ConfigError where layers without experts stand among others.
    """
    is_gated, width, num_experts, num_active = False, config.intermediate_size, 1, 1
    if isinstance(config, LlamaConfig):
        is_gated = True
        if experts := config.experts:
            if len(experts.sparse_layers) < config.num_layers:
                raise ConfigError(
                    f"--model {name}: layers without experts among others are not simulated"
                )
            width = experts.intermediate_size
            num_experts, num_active = experts.num_experts, experts.top_k
    return ModelShape(
        name=name,
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        intermediate_size=width,
        num_mlp_matrices=3 if is_gated else 2,
        vocab_size=config.vocab_size,
        max_model_len=config.max_model_len,
        is_tied=config.tie_word_embeddings,
        num_experts=num_experts,
        num_experts_per_token=num_active,
    )
