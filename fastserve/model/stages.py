"""Stages: which layers of a network each stage of a pipeline computes.

Rules: a stage has at least one layer; the embedding comes with the first one and the head with the
last. By cost unless counts are given: the dearest stage, which the others wait for, is made as
cheap as it can be. The cost of a part is the number of weights that a token is multiplied by, which
is what a decode waits for: an embedding is one row, a head as dear as several layers. Memory is not
weighed; who lacks it gives counts.
Imports no torch. Must not know: weights, how hidden state travels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate

from fastserve.checkpoint.config_fields import ModelConfig
from fastserve.checkpoint.config_llama import LlamaConfig
from fastserve.checkpoint.config_opt import OPTConfig
from fastserve.settings.option import ConfigError


@dataclass(frozen=True, slots=True)
class Stage:
    """Layers [first, stop) of a network; the embedding and the head come with its ends."""

    first: int
    stop: int
    num_layers: int  # of the whole network

    def __post_init__(self) -> None:
        """Raise ValueError where there are no such layers."""
        if not 0 <= self.first < self.stop <= self.num_layers:
            raise ValueError(f"no layers [{self.first}, {self.stop}) among {self.num_layers}")

    @property
    def is_first(self) -> bool:
        """Whether it begins with token ids."""
        return self.first == 0

    @property
    def is_last(self) -> bool:
        """Whether it ends with logits."""
        return self.stop == self.num_layers


def split_layers(
    config: ModelConfig, num_stages: int, counts: Sequence[int] | None = None
) -> list[Stage]:
    """Return the stages of a network in their order; `counts` are the layers of each, if given.

    Raises ConfigError where there are fewer layers than stages, or other layers than counted.
    """
    num_layers = config.num_layers
    if not 1 <= num_stages <= num_layers:
        raise ConfigError(
            f"--pipeline-parallel-size {num_stages}: the model has {num_layers} layers, "
            "and a stage needs one"
        )
    if counts is None:
        counts = balance(layer_costs(config), num_stages)
    elif len(counts) != num_stages or sum(counts) != num_layers or min(counts) < 1:
        raise ConfigError(
            f"--pipeline-layers {','.join(map(str, counts))}: {num_stages} counts of at least 1 "
            f"are needed that add up to {num_layers}"
        )
    stops = list(accumulate(counts))
    return [
        Stage(stop - count, stop, num_layers) for count, stop in zip(counts, stops, strict=True)
    ]


def layer_costs(config: ModelConfig) -> list[int]:
    """Return the weights that a token is multiplied by in each layer, the ends included."""
    hidden, width = config.hidden_size, config.num_heads * config.head_dim
    qkv = hidden * (width + 2 * config.num_kv_heads * config.head_dim)
    costs = [qkv + width * hidden + _mlp_cost(config, i) for i in range(config.num_layers)]
    table_width = config.embedding_size if isinstance(config, OPTConfig) else hidden
    projection = 0 if table_width == hidden else table_width * hidden
    costs[0] += hidden + projection
    costs[-1] += config.vocab_size * table_width + projection
    return costs


def _mlp_cost(config: ModelConfig, layer: int) -> int:
    hidden = config.hidden_size
    if not isinstance(config, LlamaConfig):
        return 2 * hidden * config.intermediate_size
    experts = config.experts
    if experts is None or layer not in experts.sparse_layers:
        return 3 * hidden * config.intermediate_size
    return hidden * (experts.num_experts + 3 * experts.top_k * experts.intermediate_size)


def balance(costs: Sequence[int], num_stages: int) -> tuple[int, ...]:
    """Return how many layers each stage takes: the dearest stage is cheap, then all are alike."""
    sums = [0, *accumulate(costs)]

    @cache
    def cheapest(stop: int, num_stages: int) -> tuple[int, int, tuple[int, ...]]:
        """Of layers [0, stop): the cost of the dearest stage, the sum of squares, the counts."""
        if num_stages == 1:
            return sums[stop], sums[stop] ** 2, (stop,)
        choices = []
        for start in range(num_stages - 1, stop):
            dearest, squares, counts = cheapest(start, num_stages - 1)
            cost = sums[stop] - sums[start]
            choices.append((max(dearest, cost), squares + cost**2, (*counts, stop - start)))
        return min(choices)

    return cheapest(len(costs), num_stages)[2]
