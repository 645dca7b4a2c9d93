"""Parts of matrices: those of all ranks make up the whole."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from fastserve.model.families.projections import ProjectionReader, shifted, stack, times
from fastserve.model.loader import open_weights
from fastserve.model.ops.torch_ops import TorchOps
from tests.model.thread_group import run_ranks

CPU = torch.device("cpu")
VOCAB_SIZE, HIDDEN, INNER = 5, 6, 9


@pytest.fixture
def tensors(tmp_path):
    """Save a table, a matrix and its bias."""
    torch.manual_seed(0)
    tensors = {
        "table.weight": torch.randn(VOCAB_SIZE, HIDDEN),
        "up.weight": torch.randn(INNER, HIDDEN),
        "up.bias": torch.randn(INNER),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    return tensors


def reader(path, group, *, is_transposed=False) -> ProjectionReader:
    """Open the matrices for one rank."""
    weights = open_weights(path, "auto", torch.float32, CPU)
    return ProjectionReader(weights, TorchOps(torch.float32), group, is_transposed=is_transposed)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7])
def test_a_vocabulary_is_filled_up(size, tmp_path, tensors):
    """Parts side by side are the table and zeros; a rank that has no rows left has zeros."""
    parts = run_ranks(
        size,
        lambda group: reader(tmp_path, group).vocabulary("table.weight", VOCAB_SIZE, HIDDEN),
    )
    assert len({part.shape for part in parts}) == 1
    whole = torch.cat(parts)
    assert torch.equal(whole[:VOCAB_SIZE], tensors["table.weight"])
    assert not whole[VOCAB_SIZE:].any()


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("is_transposed", [False, True])
def test_products_in_parts_make_up_the_whole(is_transposed, size, tmp_path, tensors):
    """Outputs side by side, and sums over inputs: the product, and its bias once."""
    weight = tensors["up.weight"].t() if is_transposed else tensors["up.weight"]
    out_width, in_width = weight.shape
    bias = torch.randn(out_width)
    save_file(tensors | {"up.bias": bias}, tmp_path / "model.safetensors")
    x = torch.randn(3, in_width)

    def run(group) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        matrices = reader(tmp_path, group, is_transposed=is_transposed)
        outputs, inputs = matrices.shard.columns(out_width), matrices.shard.columns(in_width)
        column = matrices.column_parallel("up", out_width, in_width, outputs, has_bias=True)
        row = matrices.row_parallel("up", out_width, in_width, inputs, has_bias=True)
        mine = x[:, inputs.start : inputs.stop]
        added = row.add_to(torch.ones(3, out_width), mine)
        return matrices.ops.linear(*column)(x), row(mine), added

    expected = x @ weight.t() + bias
    ranks = run_ranks(size, run)
    torch.testing.assert_close(torch.cat([column for column, _, _ in ranks], dim=1), expected)
    for _, row, added in ranks:
        torch.testing.assert_close(row, expected)
        torch.testing.assert_close(added, expected + 1.0)


def test_matrices_that_take_the_same_inputs_are_stacked():
    """Weights and biases alike; columns of heads and of thirds are where they lie."""
    pairs = [(torch.ones(2, 3), torch.zeros(2)), (torch.zeros(1, 3), torch.ones(1))]
    weight, bias = stack(pairs)
    assert weight.shape == (3, 3)
    assert bias is not None
    assert bias.tolist() == [0.0, 0.0, 1.0]
    assert stack([(torch.ones(2, 3), None)] * 2)[1] is None
    assert times(range(2, 4), 8) == range(16, 32)
    assert shifted(range(2, 4), 10) == range(12, 14)
