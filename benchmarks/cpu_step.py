"""Where the time of a decode step on a CPU goes, part by part.

    python -m benchmarks.cpu_step --model DIR --dtype bfloat16 --batch-size 1,8,32 [--threads 1]

The layers are one call; `--parts` calls their parts one by one, to tell them apart. With one thread
it counts processor time, which other work on the machine hardly changes; with more, wall time.
Every part is the mean over the fastest half of the steps.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fastserve.executor import model_runner
from fastserve.executor.opening import open_worker
from fastserve.executor.profiler import run_step
from fastserve.executor.worker import Worker
from fastserve.model.attention.cpu import CpuAttention
from fastserve.model.decoder import Decoder
from fastserve.model.kernels.cpu.kernels import CpuKernels
from fastserve.model.kernels.cpu.layer_program import LayerProgram
from fastserve.model.ops import packed_linear
from fastserve.model.ops.fused_layers import FusedLayers
from fastserve.settings.engine import EngineConfig

CONTEXT = 192
STEPS = 40


class Stopwatch:
    """Adds up the time spent in functions that it stands in for."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.seconds: defaultdict[str, float] = defaultdict(float)

    def watch(self, owner: Any, name: str, label: Callable[..., str]) -> None:
        """Measure every call of owner.name from now on."""
        function = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            started = self.clock()
            result = function(*args, **kwargs)
            self.seconds[label(*args)] += self.clock() - started
            return result

        setattr(owner, name, timed)


def watch_parts(stopwatch: Stopwatch, worker: Worker) -> None:
    """Put the watch on everything that a step is made of."""
    stopwatch.watch(
        packed_linear, "_product", lambda x, weight, *rest: "linear {}x{}".format(*weight.shape)
    )
    stopwatch.watch(
        CpuKernels, "project", lambda _, x, weight, *rest: f"linear {weight.width}x{weight.depth}"
    )
    for name in ("rms_norm", "silu_mul", "rotate_and_write", "attend"):
        stopwatch.watch(CpuKernels, name, lambda *args, name=name: name)
    stopwatch.watch(LayerProgram, "__call__", lambda *args: "layers")
    stopwatch.watch(CpuAttention, "plan", lambda *args: "plan attention")
    for name, label in (("_build", "input batch"), ("_sample", "sample")):
        stopwatch.watch(model_runner.ModelRunner, name, lambda *args, label=label: label)
    stopwatch.watch(type(worker.model), "__call__", lambda *args: "the network in all")
    stopwatch.watch(Worker, "launch", lambda *args: "the step in all")


def main() -> None:
    """Print a table for each batch size."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="directory with a config.json of a Llama")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--batch-size", default="1,8,32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--parts", action="store_true", help="call the parts of layers one by one")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    config = EngineConfig(
        model=args.model, dtype=args.dtype, load_format="dummy", num_device_blocks=1024
    )
    worker, _ = open_worker(
        config,
        Path(args.model),
        num_threads=args.threads,
        eos_token_ids=frozenset(),
        on_progress=lambda stage, share: None,
    )
    worker.kv.touch(1024)
    network = worker.model
    if args.parts and isinstance(network, Decoder) and isinstance(network.layers, FusedLayers):
        network.layers = network.layers.loop
    stopwatch = Stopwatch(time.thread_time if args.threads == 1 else time.perf_counter)
    watch_parts(stopwatch, worker)
    for batch_size in map(int, args.batch_size.split(",")):
        steps = []
        for _ in range(STEPS):
            stopwatch.seconds.clear()
            run_step(worker.execute, ((1, CONTEXT - 1),) * batch_size, config.block_size)
            steps.append(dict(stopwatch.seconds))
        fastest = sorted(steps, key=lambda step: step["the step in all"])[: STEPS // 2]
        print(f"batch {batch_size}, context {CONTEXT}")
        means = {name: sum(s[name] for s in fastest) / len(fastest) for name in fastest[0]}
        for name, seconds in sorted(means.items(), key=lambda item: -item[1]):
            print(f"  {name:20} {seconds * 1e6:8.0f} µs")


if __name__ == "__main__":
    main()
