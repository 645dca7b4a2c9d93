"""Weights of int8 against bfloat16's: tokens a second in turns, bytes, and the error.

    python -m benchmarks.int8_weights [--rounds 5]

Two processes hold one model with random weights, one in bfloat16 and one with `--quantization
int8`; row by row they take turns, A B, then B A, after one round to warm up, and the one that is
not asked sleeps. A ratio is taken within a round. With one thread a second is one of processor
time, which other work on the machine changes little, and which counts the short prompts of a
decode row too; with more it is one of the clock. The error is that of benchmarks/int8_error.py.
Writes benchmarks/results/int8_weights.json and fills the tables of docs/performance.md.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.against_openvino import BATCH_SIZES, LIMITS, OUTPUT_LEN, PREFILL_LEN, Question
from benchmarks.command import command_parser, origin, run_command
from benchmarks.contender import Contender
from benchmarks.contender_figures import Spread, ratios, weights_of
from benchmarks.contenders import environment
from benchmarks.int8_error import CASES, compare
from benchmarks.small_model import NAMED, write_small_model
from experiments.markdown import fill, markdown, number
from fastserve.host.machine import num_cores
from fastserve.host.provenance import ROOT, output_path

RESULT = "benchmarks/results/int8_weights.json"
DOCUMENT = ROOT / "docs" / "performance.md"
BFLOAT16, INT8 = "bfloat16", "int8"
INPUT_LEN = 8
SPEED_COLUMNS = ("row", BFLOAT16, INT8, "int8 / bfloat16")
ERROR_COLUMNS = ("model", "tokens", "compared", "mean KL", "largest KL", "equal greedy tokens")


def measure_model(directory: Path, threads: int, rounds: int) -> dict[str, Any]:
    """Measure every row of a model with so many threads."""
    load = os.getloadavg()[0]
    with ExitStack() as stack:
        contenders = {
            BFLOAT16: stack.enter_context(start(directory, threads)),
            INT8: stack.enter_context(start(directory, threads, "--quantization", INT8)),
        }
        measured = [measure_round(contenders, threads, index) for index in range(1 + rounds)]
    return {
        "threads": threads,
        "load_average": [round(load, 2), round(os.getloadavg()[0], 2)],
        # The first round was to warm up.
        "rows": [figures(each.row, measured[1:]) for each in questions()],
    }


def questions() -> Iterator[Question]:
    """Yield the rows of a round."""
    for size in BATCH_SIZES:
        details = {"batch_size": size, "input_len": INPUT_LEN, "output_len": OUTPUT_LEN}
        yield Question(f"decode, batch {size}", "decode", details, size * OUTPUT_LEN, size)
    details = {"length": PREFILL_LEN}
    yield Question(f"prefill of {PREFILL_LEN}", "prefill", details, PREFILL_LEN, 1)


def start(directory: Path, threads: int, *flags: str) -> Contender:
    """Start the engine over random weights; it answers once it has made them."""
    words = (str(directory), "--threads", str(threads), "--load-format", "dummy", *LIMITS.flags())
    command = (sys.executable, "-m", "benchmarks.fastserve_contender", *words, *flags)
    return Contender(" ".join(("FastServe", *flags)), command, ROOT, environment())


def measure_round(
    contenders: Mapping[str, Contender], threads: int, index: int
) -> dict[str, dict[str, float]]:
    """Return the tokens a second of both in every row."""
    order = list(contenders)[:: 1 if index % 2 == 0 else -1]

    def rate(each: Question, key: str) -> float:
        found = each.ask(contenders[key])
        return each.tokens / found["cpu_s"] if threads == 1 else found["tokens_per_s"]

    return {each.row: {key: rate(each, key) for key in order} for each in questions()}


def figures(row: str, rounds: Sequence[Mapping[str, Mapping[str, float]]]) -> dict[str, Any]:
    """Return what was measured in a row, the medians, and the ratio."""
    rates = {key: [each[row][key] for each in rounds] for key in (BFLOAT16, INT8)}
    return {
        "row": row,
        "tokens_per_s": {key: [round(rate, 1) for rate in rates[key]] for key in rates},
        "median": {key: round(statistics.median(rates[key]), 1) for key in rates},
        "int8_over_bfloat16": ratios(rates[INT8], rates[BFLOAT16])._asdict(),
    }


def weight_bytes(config: Mapping[str, Any]) -> dict[str, int]:
    """Return the bytes of all weights in products, which a step reads."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    kv_width = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    channels = 3 * hidden + 2 * kv_width + 2 * inner  # of a layer: qkv, output, gate, up, down
    num_scales = config["num_hidden_layers"] * channels + config["vocab_size"]
    num_weights = sum(weights_of(config))
    return {BFLOAT16: 2 * num_weights, INT8: num_weights + 4 * num_scales}


def speed_cells(name: str, entry: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    """Yield the rows of a model for people."""
    held = entry["weight_bytes"]
    yield (
        f"{name}, MB of weights in products",
        *(number(held[key] / 1e6) for key in (BFLOAT16, INT8)),
        f"{held[INT8] / held[BFLOAT16]:.2f}",
    )
    for measured in entry["by_threads"]:
        for row in measured["rows"]:
            title = f"{name}, {row['row']}, threads: {measured['threads']}"
            medians = (number(row["median"][key]) for key in (BFLOAT16, INT8))
            yield title, *medians, str(Spread(**row["int8_over_bfloat16"]))


def error_cells(entry: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    """Yield the errors of a model for people."""
    for compared, error in entry["compared"].items():
        kls = (f"{error[key]:.1e}" for key in ("mean_kl", "largest_kl"))
        share = f"{error['equal_greedy_tokens']:.1%}"
        yield entry["model"], number(entry["tokens"]), compared, *kls, share


def parse_arguments() -> argparse.Namespace:
    """Read the command line; ConfigError for a file that cannot be written."""
    parser = command_parser("int8_weights", __doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", default=RESULT, help=f"JSON file ({RESULT})")
    args = parser.parse_args()
    args.output = output_path(args.output)
    return args


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Measure the speed of every model and the error of every case."""
    models = {}
    with tempfile.TemporaryDirectory() as beside:
        for name in reversed(NAMED):
            directory = Path(beside) / name
            directory.mkdir()
            write_small_model(directory, NAMED[name])
            models[name] = {
                "weight_bytes": weight_bytes(NAMED[name]),
                "by_threads": [
                    measure_model(directory, threads, args.rounds)
                    for threads in sorted({1, num_cores()})
                ],
            }
        errors = [compare(case) for case in CASES]
    return {"models": models, "errors": errors, **origin("int8_weights")}


def show(args: argparse.Namespace, result: Mapping[str, Any]) -> None:
    """Print the tables, and put them into the document if the result is the one they are from."""
    speeds = [cells for name, each in result["models"].items() for cells in speed_cells(name, each)]
    errors = [cells for each in result["errors"] for cells in error_cells(each)]
    tables = {
        "int8-weights": markdown(SPEED_COLUMNS, speeds),
        "int8-error": markdown(ERROR_COLUMNS, errors),
    }
    print(*tables.values(), sep="\n\n")
    if args.output == Path(RESULT):
        fill(DOCUMENT, tables)


def main() -> int:
    """Measure, write, print; exit code 2 for a run that cannot be."""
    return run_command(parse_arguments, measure, show)


if __name__ == "__main__":
    sys.exit(main())
