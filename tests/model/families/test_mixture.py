"""The mixture of experts against the sum over all experts, and what it does not compute."""

from __future__ import annotations

import pytest
import torch

from fastserve.model.families.mixture import Mixture
from fastserve.model.ops.torch_ops import TorchOps

NUM_EXPERTS, HIDDEN, WIDTH, TOP_K = 6, 24, 40, 2


class CountedExpert:
    """An expert that notes how many rows each call brings."""

    def __init__(self, expert) -> None:
        self.expert = expert
        self.calls: list[int] = []

    def add_to(self, residual, x):
        """Fit `MLPOp`."""
        self.calls.append(len(x))
        return self.expert.add_to(residual, x)


def make(dtype=torch.float32, *, is_normalized=True):
    """Return a mixture, its counted experts and its router's weights."""
    torch.manual_seed(0)
    ops = TorchOps(dtype)
    router = torch.randn(NUM_EXPERTS, HIDDEN).to(dtype)
    experts = [
        CountedExpert(
            ops.gated_mlp(
                ops.linear((torch.randn(2 * WIDTH, HIDDEN) * 0.3).to(dtype)),
                ops.linear((torch.randn(HIDDEN, WIDTH) * 0.3).to(dtype)),
            )
        )
        for _ in range(NUM_EXPERTS)
    ]
    mixture = Mixture(ops.linear(router.float()), experts, top_k=TOP_K, is_normalized=is_normalized)
    return mixture, experts, router


def definition(experts, router, x, *, is_normalized):
    """Return Σ share · expert(x) over all experts, where most shares are zero."""
    scores = (x.float() @ router.float().T).softmax(-1)
    floor = scores.sort(-1, descending=True).values[:, TOP_K - 1 : TOP_K]
    shares = scores * (scores >= floor)
    if is_normalized:
        shares = shares / shares.sum(-1, keepdim=True)
    outputs = [expert.expert.add_to(torch.zeros_like(x), x).float() for expert in experts]
    return sum(share[:, None] * output for share, output in zip(shares.T, outputs, strict=True))


@pytest.mark.parametrize("is_normalized", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_equals_the_sum_over_all_experts(dtype, is_normalized):
    """Only some experts are run, and the result is as if all were; it is added to the stream."""
    mixture, experts, router = make(dtype, is_normalized=is_normalized)
    x, residual = torch.randn(2, 33, HIDDEN).to(dtype)
    expected = residual.float() + definition(experts, router, x, is_normalized=is_normalized)
    result = mixture.add_to(residual, x)
    assert result is residual
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(result.float(), expected, atol=tolerance, rtol=tolerance)


def test_experts_that_nobody_chose_are_not_run():
    """Each token costs `top_k` rows of experts, and an expert without tokens is not called."""
    mixture, experts, _ = make()
    mixture.add_to(torch.zeros(1, HIDDEN), torch.randn(1, HIDDEN))
    assert sorted(expert.calls for expert in experts) == [[], [], [], [], [1], [1]]
    mixture.add_to(torch.zeros(50, HIDDEN), torch.randn(50, HIDDEN))
    assert sum(sum(expert.calls) for expert in experts) == 51 * TOP_K


def test_routing_is_float32():
    """Experts that differ by less than bfloat16 can tell are told apart."""
    _, experts, _ = make(torch.bfloat16)
    x = torch.ones(1, HIDDEN, dtype=torch.bfloat16)
    router = torch.full((NUM_EXPERTS, HIDDEN), 1.0)
    router[4, 0], router[2, 0] = 1.01, 1.02  # 24.01 and 24.02 are both 24 in bfloat16
    assert len((x @ router.to(torch.bfloat16).T).unique()) == 1
    mixture = Mixture(TorchOps(x.dtype).linear(router), experts, top_k=2, is_normalized=True)
    mixture.add_to(torch.zeros_like(x), x)
    assert [index for index, expert in enumerate(experts) if expert.calls] == [2, 4]


def test_a_row_does_not_depend_on_its_company():
    """Alone and among others a token gets the same, to the rounding of a matrix product."""
    mixture, _, _ = make()
    x = torch.randn(40, HIDDEN)
    together = mixture.add_to(torch.zeros(40, HIDDEN), x)
    alone = [mixture.add_to(torch.zeros(1, HIDDEN), row[None]) for row in x]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=1e-5)
