"""A projection in plain torch, by oneDNN with a packed weight, and by our own kernel.

    python -m benchmarks.cpu_linear [--threads 2] [--dtype bfloat16]

Weights are taken in turn from 100 MB of them, so that they come from memory, as in a step; the
three take turns, and each figure is the best of seven rounds. Rates are those of our own.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence

import torch

from fastserve.model.kernels.cpu.kernel_choice import choose_kernels
from fastserve.model.ops.layers import Linear
from fastserve.model.ops.packed_linear import PackedLinear
from fastserve.model.ops.panel_linear import panel_linear

SHAPES = ((1280, 768), (768, 768), (4096, 768), (768, 2048), (32000, 768), (384, 384), (2048, 384))
ROWS = (1, 8, 32, 512)
WEIGHT_BYTES = 100_000_000
ROUNDS = 7


@torch.inference_mode()
def main() -> None:
    """Print one line per shape and number of rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    dtype = getattr(torch, args.dtype)
    kernels = choose_kernels("native", dtype)
    if kernels is None:
        parser.error(f"no kernels for {args.dtype}")
    print(
        f"{'out':>6} {'in':>5} {'rows':>5} {'plain µs':>9} {'packed µs':>9} {'own µs':>7} "
        f"{'GFLOP/s':>8} GB/s"
    )
    for width, depth in SHAPES:
        count = min(max(WEIGHT_BYTES // (width * depth * dtype.itemsize), 1), 24)
        weights = [torch.randn(width, depth).mul_(0.02).to(dtype) for _ in range(count)]
        kinds = (
            [Linear(w) for w in weights],
            [PackedLinear(w) for w in weights],
            [panel_linear(kernels, w) for w in weights],
        )
        for rows in ROWS:
            x = torch.randn(rows, depth).to(dtype)
            repeats = 24 if rows < 512 else 2
            seconds = best_of(kinds, x, repeats)
            speed = 2 * rows * width * depth / seconds[2] / 1e9
            bandwidth = width * depth * dtype.itemsize / seconds[2] / 1e9
            print(
                f"{width:6} {depth:5} {rows:5} {seconds[0] * 1e6:9.0f} {seconds[1] * 1e6:9.0f} "
                f"{seconds[2] * 1e6:7.0f} "
                f"{speed:8.0f} {bandwidth:4.0f}",
                flush=True,
            )


def best_of(
    kinds: Sequence[Sequence[Callable[[torch.Tensor], torch.Tensor]]],
    x: torch.Tensor,
    repeats: int,
) -> list[float]:
    """Return the seconds of one product of each kind."""
    rounds = []
    for _ in range(ROUNDS):
        seconds = []
        for linears in kinds:
            linears[0](x)
            started = time.perf_counter()
            for index in range(repeats):
                linears[index % len(linears)](x)
            seconds.append((time.perf_counter() - started) / repeats)
        rounds.append(seconds)
    return [min(times) for times in zip(*rounds, strict=True)]


if __name__ == "__main__":
    main()
