"""The figures of int8 weights: bytes as they are held, ratios by round, distances of networks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.int8_error import Case, compare, differences, load, random_texts
from benchmarks.int8_weights import BFLOAT16, INT8, error_cells, figures, weight_bytes
from benchmarks.small_model import CONFIG, write_small_model
from fastserve.model.decoder import Decoder
from fastserve.model.decoder_parts import Head
from fastserve.model.ops.fused_layers import FusedLayers
from fastserve.model.ops.panel_linear import PanelLinear
from tests.model.kernels.cpu.kernel_cases import needs_int8

SMALL = {**CONFIG, "num_hidden_layers": 2}


def open_network(directory: Path, quantization: str | None = None) -> Decoder:
    """Load random weights, the same ones every time."""
    with torch.inference_mode():
        return load(directory, "dummy", torch.bfloat16, 32, quantization)


@needs_int8
def test_the_bytes_are_those_held(tmp_path: Path) -> None:
    """Of all products of a network, scales included."""
    write_small_model(tmp_path, SMALL)
    for kind, quantization in ((BFLOAT16, None), (INT8, "int8")):
        network = open_network(tmp_path, quantization)
        assert isinstance(network.layers, FusedLayers)
        assert isinstance(network.head, Head)
        parts = [p for each in network.layers._layers for p in (each.qkv, each.output)]
        parts += [p for each in network.layers._layers for p in (each.gate_up, each.down)]
        held = 0
        for part in (*parts, network.head.vocabulary):
            assert isinstance(part, PanelLinear)
            scales = part.panels.scales
            held += part.panels.tensor.nbytes + (0 if scales is None else scales.nbytes)
        assert held == weight_bytes(SMALL)[kind]


@needs_int8
def test_a_network_is_no_distance_from_itself(tmp_path: Path) -> None:
    """And some from its quantized self, which chooses most tokens alike."""
    write_small_model(tmp_path, SMALL)
    plain, quantized = open_network(tmp_path), open_network(tmp_path, "int8")
    texts = list(random_texts(Case("any", 2, 30)))
    texts = [[token % SMALL["vocab_size"] for token in text] for text in texts]
    with torch.inference_mode():
        same, other = (differences(plain, each, texts) for each in (plain, quantized))
    assert same == {"mean_kl": 0, "largest_kl": 0, "equal_greedy_tokens": 1}
    assert 0 < other["mean_kl"] < other["largest_kl"] < 0.01
    assert 0.5 < other["equal_greedy_tokens"] <= 1


@needs_int8
def test_trained_weights_are_compared_on_real_text() -> None:
    """The demo model's error is more than rounding's, and small."""
    entry = compare(Case("demo", 2, 50))
    rounding, int8 = (entry["compared"][key] for key in ("float32, bfloat16", "bfloat16, int8"))
    assert 0 < rounding["mean_kl"] < int8["mean_kl"] < 0.01
    assert len([*error_cells(entry)]) == 3


def test_a_ratio_is_taken_within_a_round() -> None:
    """A machine that slows down between rounds changes none."""
    rounds = [{"row": {BFLOAT16: 10.0, INT8: 15.0}}, {"row": {BFLOAT16: 4.0, INT8: 6.0}}]
    found = figures("row", rounds)
    assert found["int8_over_bfloat16"] == {"median": 1.5, "least": 1.5, "most": 1.5}
    assert found["median"] == pytest.approx({BFLOAT16: 7.0, INT8: 10.5})
