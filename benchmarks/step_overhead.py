"""What a decode step takes outside the compiled kernels: two checkouts, in turns.

    python -m benchmarks.step_overhead OTHER [--batch-size 1,8,32] [--rounds 20] [--threads 1]

OTHER is A, this checkout is B. Each is a process that holds a Llama (random weights, bfloat16) and
decodes when asked; they take turns, A B, B A, …, and a ratio is taken within a round. µs of a step,
medians of a turn: by the clock, in processor time of the whole process, and that less what kernels
took. Processor time is hardly disturbed by other work; it is left out where there are more threads
than one, which spin.
Must not know: what differs between the checkouts.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.command import command_parser, origin, run_command
from benchmarks.small_model import NAMED, write_small_model
from fastserve.core.request import Arrival, SamplingParams
from fastserve.engine.engine import Engine
from fastserve.host.garbage_collector import quiet_garbage_collector
from fastserve.host.provenance import ROOT
from fastserve.launch.engine import open_engine
from fastserve.settings.engine import EngineConfig

PROMPT = 128
STEPS = 60
MARGIN = 8  # steps after the prefill that are left out

Turn = dict[str, float]
"""µs of a step, by what was counted."""


def in_turns(sides: Sequence[str], rounds: int) -> Iterator[Sequence[str]]:
    """Yield the order of each round."""
    for index in range(rounds):
        yield sides if index % 2 == 0 else sides[::-1]


def figures(a: Sequence[Turn], b: Sequence[Turn]) -> dict[str, dict[str, float]]:
    """Return, of what was counted, the medians of both sides and the ratios B / A of the rounds."""
    result = {}
    for name in a[0]:
        ratios = [after[name] / before[name] for before, after in zip(a, b, strict=True)]
        result[name] = {
            "a_us": round(statistics.median(turn[name] for turn in a), 1),
            "b_us": round(statistics.median(turn[name] for turn in b), 1),
            "ratio": round(statistics.median(ratios), 3),
            "least": round(min(ratios), 3),
            "most": round(max(ratios), 3),
        }
    return result


class KernelTime:
    """Processor time of the calling thread in compiled kernels."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def watch(self) -> None:
        """Count every call from now on."""
        from fastserve.model.kernels.cpu.kernels import Call  # torch: once its threads are settled

        call = Call.__call__

        def timed(entry: Call, *values: Any) -> None:
            started = time.thread_time()
            call(entry, *values)
            self.seconds += time.thread_time() - started

        setattr(Call, "__call__", timed)  # noqa: B010 - assigned, it would have to have its type


def measure_turn(engine: Engine, kernels: KernelTime, batch_size: int, has_cpu: bool) -> Turn:
    """Decode a batch from its prompts on."""
    params = SamplingParams(max_tokens=STEPS + MARGIN, temperature=0.0, ignore_eos=True)
    for index in range(batch_size):
        engine.add(Arrival(range(index, index + PROMPT), params))
    steps: list[tuple[float, float, float]] = []
    while engine.num_requests:
        before = time.perf_counter(), time.process_time(), kernels.seconds
        engine.step()
        after = time.perf_counter(), time.process_time(), kernels.seconds
        wall, cpu, inside = (end - start for start, end in zip(before, after, strict=True))
        steps.append((wall, cpu, cpu - inside))
    while not engine.is_idle:
        engine.step()
    names = ("wall", "processor", "outside kernels")[: 3 if has_cpu else 1]
    columns = zip(*steps[MARGIN:], strict=True)
    return {
        name: statistics.median(column) * 1e6 for name, column in zip(names, columns, strict=False)
    }


def serve(directory: str, threads: int) -> int:
    """Be one side: decode a batch of each size that is read, until nothing more is."""
    config = EngineConfig(
        model=directory, dtype="bfloat16", load_format="dummy", num_threads=threads,
        max_num_batched_tokens=4096, max_num_seqs=64, enable_prefix_caching=False,
    )  # fmt: skip
    engine, _ = open_engine(config)
    quiet_garbage_collector()
    kernels = KernelTime()
    kernels.watch()
    for line in sys.stdin:
        turn = measure_turn(engine, kernels, int(line), has_cpu=threads == 1)
        print(json.dumps(turn), flush=True)
    engine.close()
    return 0


class Side:
    """The process of one checkout."""

    def __init__(self, tree: Path, directory: str, threads: int) -> None:
        self._process = subprocess.Popen(
            (sys.executable, "-P", __file__, "--serve", directory, str(threads)),
            env={**os.environ, "PYTHONPATH": str(tree)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def turn(self, batch_size: int) -> Turn:
        """Decode one batch."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(batch_size, file=self._process.stdin, flush=True)
        return dict(json.loads(self._process.stdout.readline()))

    def close(self) -> None:
        """End the process."""
        self._process.communicate()


@contextmanager
def sides_of(other: Path, model: str, threads: int) -> Iterator[dict[str, Side]]:
    """Open both sides."""
    with tempfile.TemporaryDirectory() as directory:
        write_small_model(Path(directory), NAMED[model])
        sides = {"a": Side(other, directory, threads), "b": Side(ROOT, directory, threads)}
        try:
            yield sides
        finally:
            for side in sides.values():
                side.close()


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Return the figures of every batch size."""
    rows: dict[str, Any] = {}
    with sides_of(args.other.resolve(), args.model, args.threads) as sides:
        for batch_size in map(int, args.batch_size.split(",")):
            turns: dict[str, list[Turn]] = {name: [] for name in sides}
            for order in in_turns(tuple(sides), 1 + args.rounds):
                for name in order:
                    turns[name].append(sides[name].turn(batch_size))
            rows[str(batch_size)] = figures(turns["a"][1:], turns["b"][1:])  # one to warm up
    return {**origin("step_overhead"), "load": os.getloadavg()[0], "batch_sizes": rows}


def show(args: argparse.Namespace, result: Mapping[str, Any]) -> None:
    """Print a line for each figure."""
    for batch_size, row in result["batch_sizes"].items():
        for name, each in row.items():
            print(
                f"batch {batch_size:>3}  {name:16} {each['a_us']:8.0f} → {each['b_us']:8.0f} µs  "
                f"{each['ratio']:.2f} ({each['least']:.2f}–{each['most']:.2f})"
            )


def parse() -> argparse.Namespace:
    """Return what is asked for."""
    parser = command_parser("step_overhead", __doc__)
    parser.add_argument("other", type=Path)
    parser.add_argument("--model", choices=tuple(NAMED), default="llama-17m")
    parser.add_argument("--batch-size", default="1,8,32")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        sys.exit(serve(sys.argv[2], int(sys.argv[3])))
    sys.exit(run_command(parse, measure, show))
