"""What stages and shards are worth: tokens a second of one layout of ranks over another's.

    python -m benchmarks.parallel_layouts [--model llama-125m] [--pairs 5] [--batch-size 16]

Each layout is tensor parallel × pipeline parallel, with one thread of torch a rank, and is compared
with one rank. Both are open at once and take turns, A B B A …, each pair back to back: its ratio
counts, and the median of the ratios is the result. A turn is one offline batch of greedy requests
that arrive together (`fastserve bench offline`): prompts of random ids, answers of one length; the
rate is of decoding alone. Stages run steps of disjoint requests: they are compared once with steps
of as many requests as the one rank's (so that more are under way), once with as many under way (so
that steps are smaller, and read the weights for fewer tokens). The predicted rate is that of the
same batch on the simulated device, which takes as long as the layout's own profile says, and
decides and sends for nothing.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from rich.progress import track

from benchmarks.command import command_parser, origin, run_command
from benchmarks.small_model import NAMED, write_small_model
from fastserve.bench.offline import Offline
from fastserve.core.build import build_scheduler
from fastserve.engine.engine import Engine
from fastserve.executor.profile_file import load_or_measure
from fastserve.host.garbage_collector import quiet_garbage_collector
from fastserve.host.provenance import output_path
from fastserve.launch.engine import open_engine
from fastserve.settings.engine import EngineConfig
from fastserve.sim.clock import VirtualClock
from fastserve.sim.sim_executor import SimExecutor
from fastserve.wire.engine_messages import EngineInfo

RESULT = "benchmarks/results/parallel_layouts.json"
ENDLESS = 2**40


class Comparison(NamedTuple):
    """A layout, and the multiple of one rank's requests that it is given."""

    tensor_parallel_size: int
    pipeline_parallel_size: int
    times_requests: int


COMPARISONS = (Comparison(1, 2, 2), Comparison(1, 2, 1), Comparison(2, 1, 1))


class Opened(NamedTuple):
    """A layout that runs, and the same on the simulated device."""

    offline: Offline
    predicted: Offline


def open_layout(config: EngineConfig, opened: ExitStack, seed: int) -> Opened:
    """Load the model into one layout, and simulate what its profile says."""
    engine, info = open_engine(config)
    opened.callback(engine.close)
    return Opened(Offline(engine, info, seed), Offline(simulated(engine, info), info, seed))


def simulated(engine: Engine, info: EngineInfo) -> Engine:
    """Return the same scheduler before a device that only takes its time."""

    def unmeasured() -> list[Any]:
        raise AssertionError("opening the engine has measured it")

    executor: Any = engine.executor
    cost_model = load_or_measure(executor.setup, unmeasured)
    config, clock = engine.scheduler.config, VirtualClock()
    scheduler = build_scheduler(config, cost_model, info.num_device_blocks)
    ends = dict.fromkeys(range(10**6), ENDLESS)
    device = SimExecutor(clock, cost_model, ends, num_stages=config.num_slots)
    return Engine(scheduler, device, clock)


def compare(args: argparse.Namespace, model_dir: Path, chosen: Comparison) -> dict[str, Any]:
    """Measure one layout against one rank."""
    tp, pp, times_requests = chosen
    sizes = {"one rank": args.batch_size, "layout": args.batch_size * times_requests}
    common: dict[str, Any] = {
        "model": str(model_dir),
        "load_format": "dummy",
        "device": "cpu",
        "num_threads": 1,
        "max_num_seqs": args.batch_size * pp,
        "max_num_batched_tokens": args.batch_size * args.input_len * pp,
        "enable_prefix_caching": False,
        "swap_space": 0.0,
    }
    with ExitStack() as stack:
        alone = open_layout(EngineConfig(**common), stack, args.seed)
        several = open_layout(
            EngineConfig(**common, tensor_parallel_size=tp, pipeline_parallel_size=pp),
            stack,
            args.seed,
        )
        quiet_garbage_collector()  # as the engine process does

        def rate(name: str, offline: Offline) -> float:
            return offline.decode(sizes[name], args.input_len, args.output_len).tokens_per_s

        pairs: list[dict[str, float]] = []
        for number in track(range(-1, args.pairs), description=f"tp {tp} × pp {pp}"):
            arms = {"one rank": alone.offline, "layout": several.offline}
            names = list(arms)[:: -1 if number % 2 else 1]
            pair = {name: rate(name, arms[name]) for name in names}
            if number >= 0:  # the first was to warm up
                pairs.append(pair)
        predicted = {
            "one rank": rate("one rank", alone.predicted),
            "layout": rate("layout", several.predicted),
        }
    ratios = [pair["layout"] / pair["one rank"] for pair in pairs]
    return {
        "tensor_parallel_size": tp,
        "pipeline_parallel_size": pp,
        "num_requests": sizes,
        "dtype": several.offline.info.dtype,
        "tokens_per_s": {name: median(pair[name] for pair in pairs) for name in pairs[0]},
        "ratio": median(ratios),
        "ratios": ratios,
        "predicted_tokens_per_s": predicted,
        "predicted_ratio": predicted["layout"] / predicted["one rank"],
    }


def parse_arguments() -> argparse.Namespace:
    """Read the command line; ConfigError for a file that cannot be written."""
    parser = command_parser("parallel_layouts", __doc__)
    parser.add_argument("--model", default="llama-125m", choices=NAMED)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--input-len", type=int, default=32)
    parser.add_argument("--output-len", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default=RESULT, help=f"JSON file ({RESULT})")
    args = parser.parse_args()
    args.output = output_path(args.output)
    return args


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Compare every layout and return the result."""
    with tempfile.TemporaryDirectory() as folder:
        write_small_model(Path(folder), NAMED[args.model])
        rows = [compare(args, Path(folder), each) for each in COMPARISONS]
    return {
        **origin("parallel_layouts"),
        "model": args.model,
        "batch_size": args.batch_size,
        "input_len": args.input_len,
        "output_len": args.output_len,
        "threads_per_rank": 1,
        "layouts": rows,
    }


def show(args: argparse.Namespace, result: Mapping[str, Any]) -> None:
    """Print a line a layout."""
    for row in result["layouts"]:
        print(
            f"tp {row['tensor_parallel_size']} × pp {row['pipeline_parallel_size']}, "
            f"{row['num_requests']['layout']} requests: "
            f"{row['tokens_per_s']['layout']:.1f} tokens/s against "
            f" {row['tokens_per_s']['one rank']:.1f} of {row['num_requests']['one rank']} "
            f"on one rank: {row['ratio']:.2f} × "
            f"(predicted {row['predicted_ratio']:.2f})"
        )


def main() -> int:
    """Measure, write, print; exit code 2 for a run that cannot be."""
    return run_command(parse_arguments, measure, show)


if __name__ == "__main__":
    sys.exit(main())
