"""Batch-1 decode of FastServe and OpenVINO GenAI beside a process that keeps one core busy.

    benchmarks/openvino/setup                 # once: OpenVINO, in an environment of its own
    python -m benchmarks.beside_neighbour [--model llama-125m] [--rounds 5]

Engines have as many threads as this machine has cores; the neighbour is a loop that never waits,
bound to one core. OpenVINO binds its threads to cores by default, and is measured without that too.
Engines take turns, each alone and at once after that beside the neighbour, so that the ratio of a
round compares neighbouring seconds: of the median step, and of the mean step, which shows the steps
that waited for the neighbour.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.command import command_parser, origin, run_command
from benchmarks.contender import Contender
from benchmarks.contender_figures import Spread, medians, ratios
from benchmarks.contenders import (
    Limits,
    find_model,
    find_openvino,
    start_fastserve,
    start_openvino,
)
from benchmarks.small_model import NAMED
from experiments.markdown import fill, markdown
from fastserve.host.machine import num_cores
from fastserve.host.provenance import ROOT, output_path
from fastserve.settings.option import ConfigError

RESULT = "benchmarks/results/beside_neighbour.json"
DOCUMENT = ROOT / "docs" / "performance.md"
INPUT_LEN = OUTPUT_LEN = 128
LIMITS = Limits(tokens=256, seqs=1)
MEASURES = ("step_ms_p50", "step_ms_mean")
COLUMNS = (
    "engine", "median step alone, ms", "beside", "ratio", "mean step alone, ms", "beside", "ratio",
)  # fmt: skip
SPIN = """
import os, sys
os.sched_setaffinity(0, {int(sys.argv[1])})
print("busy", flush=True)
while True:
    pass
"""

ENGINES: dict[str, Callable[..., Contender]] = {
    "FastServe": start_fastserve,
    "OpenVINO": start_openvino,
    "OpenVINO, not bound": partial(start_openvino, is_bound=False),
}

Steps = dict[str, float]


@contextlib.contextmanager
def busy_core(core: int) -> Iterator[int]:
    """Keep a core busy meanwhile; yields the number of the process that does."""
    command = (sys.executable, "-c", SPIN, str(core))
    with subprocess.Popen(command, stdout=subprocess.PIPE) as neighbour:
        try:
            assert neighbour.stdout is not None
            neighbour.stdout.readline()  # it is there, and bound
            yield neighbour.pid
        finally:
            neighbour.kill()


def decode(contender: Contender, output_len: int) -> Steps:
    """Return the median and the mean of the steps of one request."""
    told = contender.ask("decode", batch_size=1, input_len=INPUT_LEN, output_len=output_len)
    return {"step_ms_p50": told["step_ms_p50"], "step_ms_mean": 1e3 / told["tokens_per_s"]}


def measure_round(
    contenders: Mapping[str, Contender], index: int, core: int, output_len: int
) -> dict[str, dict[str, Steps]]:
    """Return the steps of each engine, alone and beside the neighbour."""
    found: dict[str, dict[str, Steps]] = {}
    for name in list(contenders)[:: 1 if index % 2 == 0 else -1]:
        alone = decode(contenders[name], output_len)
        with busy_core(core):
            beside = decode(contenders[name], output_len)
        found[name] = {"alone": alone, "beside": beside}
    return {name: found[name] for name in contenders}


def figures(rounds: Sequence[Mapping[str, Mapping[str, Steps]]]) -> dict[str, Any]:
    """Return, of every engine, the medians over the rounds, and the ratios within them."""
    engines: dict[str, Any] = {}
    for name in rounds[0]:
        alone, beside = ([each[name][kind] for each in rounds] for kind in ("alone", "beside"))
        engines[name] = {
            "alone": medians(alone),
            "beside": medians(beside),
            "beside_over_alone": {
                measure: ratios(
                    [each[measure] for each in beside], [each[measure] for each in alone]
                )._asdict()
                for measure in MEASURES
            },
        }
    return engines


def as_cells(engines: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    """Yield a row for each engine."""
    for name, found in engines.items():
        cells = [name]
        for measure in MEASURES:
            cells += [f"{found[kind][measure]:.2f}" for kind in ("alone", "beside")]
            cells.append(str(Spread(**found["beside_over_alone"][measure])))
        yield tuple(cells)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Measure both engines."""
    load, threads, core = os.getloadavg()[0], num_cores(), max(os.sched_getaffinity(0))
    directory = find_model(args.model)
    with ExitStack() as stack:
        contenders = {
            name: stack.enter_context(start(directory, threads, LIMITS))
            for name, start in ENGINES.items()
        }
        described = {name: each.ask("describe") for name, each in contenders.items()}
        found = [
            measure_round(contenders, index, core, args.output_len)
            for index in range(1 + args.rounds)
        ]
    return {
        "model": args.model,
        "threads": threads,
        "contenders": described,
        "load_average_at_start": round(load, 2),
        "engines": figures(found[1:]),  # the first was to warm up
        **origin("beside_neighbour"),
    }


def parse_arguments() -> argparse.Namespace:
    """Read the command line; ConfigError for what cannot be run."""
    parser = command_parser("beside_neighbour", __doc__)
    parser.add_argument("--model", default="llama-125m", choices=NAMED)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output-len", type=int, default=OUTPUT_LEN)
    parser.add_argument("--output", default=RESULT, help=f"JSON file ({RESULT})")
    args = parser.parse_args()
    if args.rounds < 1:
        raise ConfigError("--rounds: at least one")
    if len(os.sched_getaffinity(0)) < 2:
        raise ConfigError("a neighbour on one core of several needs two cores")
    find_openvino()
    args.output = output_path(args.output)
    return args


def show(args: argparse.Namespace, result: Mapping[str, Any]) -> None:
    """Print the table, and put it into the document if the result is the one it is from."""
    print(
        f"{result['model']}, batch 1, threads: {result['threads']}, {result['machine']['cpu']}, "
        f"load average: {result['load_average_at_start']}"
    )
    table = markdown(COLUMNS, as_cells(result["engines"]))
    print(table)
    if args.output == Path(RESULT):
        fill(DOCUMENT, {"beside-neighbour": table})


def main() -> int:
    """Measure, write, print; exit code 2 for a run that cannot be."""
    return run_command(parse_arguments, measure, show)


if __name__ == "__main__":
    sys.exit(main())
