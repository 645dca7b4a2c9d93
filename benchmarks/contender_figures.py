"""The figures of contenders that took turns: ratios by round, and what the machine allows.

Rules: plain arithmetic. A machine's speed drifts by more than what is compared, so a ratio is taken
within a round, and its median and range over the rounds are stated. A floor is that of weights
alone: each read once a step at the speed of a copy, two operations a weight and row at the speed of
a large product, whichever takes longer; keys and values are left out.
Must not know: processes, files, how anything was measured.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

WEIGHT_BYTES = 2  # of bfloat16


class Weights(NamedTuple):
    """Weights that a step multiplies with: those of every row, and those of rows with logits."""

    layers: int
    head: int


class Spread(NamedTuple):
    """A ratio over the rounds of a run."""

    median: float
    least: float
    most: float

    def __str__(self) -> str:
        """Return it for people."""
        return f"{self.median:.2f} ({self.least:.2f}–{self.most:.2f})"


class Floor(NamedTuple):
    """Tokens a second that a machine allows, and what bounds them."""

    tokens_per_s: float
    bound_by: str


def weights_of(config: Mapping[str, Any]) -> Weights:
    """Return the weights in the products of a Llama."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    kv_width = hidden // heads * config["num_key_value_heads"]
    attention = 2 * hidden * hidden + 2 * hidden * kv_width
    mlp = 3 * hidden * config["intermediate_size"]
    layers = config["num_hidden_layers"] * (attention + mlp)
    return Weights(layers, config["vocab_size"] * hidden)


def floor_of(
    weights: Weights, *, tokens: int, rows_with_logits: int, floors: Mapping[str, float]
) -> Floor:
    """Return what a step of `tokens` rows could reach; `floors` are those of `fastserve.bench`."""
    reading_s = WEIGHT_BYTES * sum(weights) / (floors["copy_gb_per_s"] * 1e9)
    operations = 2 * (weights.layers * tokens + weights.head * rows_with_logits)
    computing_s = operations / (floors["product_gflop_per_s"] * 1e9)
    if reading_s > computing_s:
        return Floor(tokens / reading_s, "copy")
    return Floor(tokens / computing_s, "product")


def ratios(over: Sequence[float], under: Sequence[float]) -> Spread:
    """Return over / under of each round."""
    found = [round(above / below, 4) for above, below in zip(over, under, strict=True)]
    return Spread(round(statistics.median(found), 4), min(found), max(found))


def medians(rounds: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the median of each figure over the rounds."""
    return {name: statistics.median(each[name] for each in rounds) for name in rounds[0]}
