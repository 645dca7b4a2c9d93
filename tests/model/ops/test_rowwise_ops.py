"""The row-by-row parts in plain torch: right, and to the bit the same wherever a row stands."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from fastserve.model.ops import layers
from fastserve.model.ops.rowwise_ops import RowwiseRMSNorm, activate

REFERENCES: Any = {
    "relu": F.relu,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


@pytest.fixture(params=[1, 2])
def threads(request):
    """Compute by one thread and by two, which cut tensors where no row ends."""
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(1)


def slices(num_rows):
    """Return some runs of rows, short and long."""
    return [slice(i, i + n) for i, n in ((0, 1), (3, 1), (5, 2), (7, 30), (1, num_rows - 2))]


@pytest.mark.parametrize("width", [7, 80, 2049])
@pytest.mark.parametrize("activation", REFERENCES)
def test_activations(activation, width, threads):
    """Values are those of the built-in function; their bits do not depend on where they stand."""
    x = torch.randn(120, width, generator=torch.Generator().manual_seed(width)) * 4
    whole = activate(x, activation)
    torch.testing.assert_close(whole, REFERENCES[activation](x))
    assert all(torch.equal(activate(x[rows], activation), whole[rows]) for rows in slices(120))
    # A gate is half of the columns.
    wide = torch.stack((x, x), dim=1).flatten(1)
    assert torch.equal(activate(wide[:, :width], activation), whole)


def test_extreme_gates_stay_finite():
    """Where the exponential overflows, the gate is shut, or fully open."""
    x = torch.tensor([-1e4, -100.0, 0.0, 100.0, 1e4])
    torch.testing.assert_close(activate(x, "silu"), torch.tensor([0.0, 0.0, 0.0, 100.0, 1e4]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(48,), (2048,), (5, 16)])
def test_rms_norm(shape, dtype, threads):
    """Rows, and heads with a weight each: the plain norm's values, the same bits in any company."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator).to(dtype)
    x = torch.randn(120, *shape, generator=generator).to(dtype)
    norm = RowwiseRMSNorm(weight, 1e-5)
    whole = norm(x)
    assert whole.dtype == dtype
    tolerance: Any = {} if dtype == torch.float32 else {"atol": 0.05, "rtol": 0.02}
    torch.testing.assert_close(whole, layers.RMSNorm(weight, 1e-5)(x), **tolerance)
    assert all(torch.equal(norm(x[rows]), whole[rows]) for rows in slices(120))
    if len(shape) == 2:  # heads of a wider tensor
        wide = torch.cat((x, x), dim=1)
        assert torch.equal(norm(wide[:, : shape[0]]), whole)
