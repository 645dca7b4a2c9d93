"""FastServe and OpenVINO GenAI on the same weights, in turns, with one thread and with all.

    benchmarks/openvino/setup                # once: OpenVINO, in an environment of its own
    python -m benchmarks.against_openvino [--models llama-125m,llama-17m] [--rounds 3]

Four processes hold one model: both engines with all threads of this machine and with one. Row by
row they take turns, A B C D, then D C B A, after one round to warm up; all but the one that is
asked sleep. Each round also measures the floors: a copy and a large product, with as many threads.
The result of a model is kept as soon as it is measured, beside those of models that a run leaves
out; the command without options measures all and fills the table of docs/performance.md.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.command import command_parser, names_of, run_command
from benchmarks.contender import Contender
from benchmarks.contender_figures import Spread, floor_of, medians, ratios, weights_of
from benchmarks.contenders import (
    Limits,
    find_model,
    find_openvino,
    start_fastserve,
    start_openvino,
)
from benchmarks.small_model import NAMED
from experiments.markdown import fill, markdown, number
from fastserve.host.machine import num_cores
from fastserve.host.provenance import ROOT, output_path, provenance, write_result
from fastserve.settings.option import ConfigError

NAME = "against_openvino"
RESULT = "benchmarks/results/against_openvino.json"
DOCUMENT = ROOT / "docs" / "performance.md"
BATCH_SIZES = (1, 8, 32)
INPUT_LEN = OUTPUT_LEN = 128
PREFILL_LEN = 1024
LIMITS = Limits(tokens=max(BATCH_SIZES) * INPUT_LEN, seqs=max(BATCH_SIZES))
CHECKED_PROMPTS = 16
FASTSERVE, OPENVINO = "fastserve", "openvino"
ONE_THREAD = "_one_thread"
COLUMNS = (
    "row", "FastServe", "OpenVINO", "FastServe / OpenVINO", "FastServe / floor",
    "OpenVINO / floor", "threads: FastServe", "threads: OpenVINO",
)  # fmt: skip


class Question(NamedTuple):
    """One row: what contenders are asked, and what its floor depends on."""

    row: str
    question: str
    details: Mapping[str, int]
    tokens: int  # of a step
    rows_with_logits: int

    def ask(self, contender: Contender) -> dict[str, float]:
        """Return what a contender reached."""
        return contender.ask(self.question, **self.details)


def questions(output_len: int = OUTPUT_LEN) -> Iterator[Question]:
    """Yield the rows of a round."""
    for size in BATCH_SIZES:
        details = {"batch_size": size, "input_len": INPUT_LEN, "output_len": output_len}
        yield Question(f"decode, batch {size}", "decode", details, size, size)
    details = {"length": PREFILL_LEN}
    yield Question(f"prefill of {PREFILL_LEN}", "prefill", details, PREFILL_LEN, 1)


def measure_model(name: str, threads: int, rounds: int, output_len: int) -> dict[str, Any]:
    """Measure every row of a model and return the figures."""
    load = os.getloadavg()[0]
    model = find_model(name)
    with ExitStack() as stack:
        contenders = {
            key: stack.enter_context(start(model, count, LIMITS))
            for suffix, count in (("", threads), (ONE_THREAD, 1))
            for key, start in (
                (FASTSERVE + suffix, start_fastserve),
                (OPENVINO + suffix, start_openvino),
            )
        }
        described = {key: each.ask("describe") for key, each in contenders.items()}
        agreed = count_equal_first_tokens(contenders, NAMED[name]["vocab_size"])
        measured = [measure_round(contenders, index, output_len) for index in range(1 + rounds)]
    return {
        "threads": threads,
        "contenders": described,
        "first_tokens_equal": f"{agreed} of {CHECKED_PROMPTS}",
        "load_average_at_start": round(load, 2),
        # The first round was to warm up.
        **figures(NAMED[name], list(questions(output_len)), measured[1:]),
        **provenance(["python", "-m", f"benchmarks.{NAME}", *sys.argv[1:]]),
    }


def count_equal_first_tokens(contenders: Mapping[str, Contender], vocab_size: int) -> int:
    """Return for how many prompts all choose the same token, as one model does."""
    drawn = random.Random(1)
    prompts = [[drawn.randrange(vocab_size) for _ in range(64)] for _ in range(CHECKED_PROMPTS)]
    answers = [each.ask("first_tokens", prompts=prompts)["tokens"] for each in contenders.values()]
    return sum(len(set(tokens)) == 1 for tokens in zip(*answers, strict=True))


def measure_round(
    contenders: Mapping[str, Contender], index: int, output_len: int
) -> dict[str, dict[str, dict[str, float]]]:
    """Return what each contender reached in each row, and the floors, of one round."""
    order = list(contenders)[:: 1 if index % 2 == 0 else -1]
    found: dict[str, dict[str, dict[str, float]]] = {
        each.row: {key: each.ask(contenders[key]) for key in order}
        for each in questions(output_len)
    }
    found["floors"] = {
        key: contenders[key].ask("floors") for key in order if key.startswith(FASTSERVE)
    }
    return found


def figures(
    config: Mapping[str, Any],
    asked: Sequence[Question],
    rounds: Sequence[Mapping[str, Mapping[str, Mapping[str, float]]]],
) -> dict[str, Any]:
    """Return floors and, of every row, all that was measured, its ratios and shares."""
    keys = [engine + suffix for suffix in ("", ONE_THREAD) for engine in (FASTSERVE, OPENVINO)]
    floors = {key: medians([each["floors"][key] for each in rounds]) for key in rounds[0]["floors"]}
    rows = []
    for each in asked:
        rates = {key: [found[each.row][key]["tokens_per_s"] for found in rounds] for key in keys}
        floor = floor_of(
            weights_of(config),
            tokens=each.tokens,
            rows_with_logits=each.rows_with_logits,
            floors=floors[FASTSERVE],
        )
        middle = medians([{key: rates[key][index] for key in keys} for index in range(len(rounds))])
        rows.append({
            "row": each.row,
            "tokens_per_s": {key: [round(rate, 1) for rate in rates[key]] for key in keys},
            "median": {key: round(middle[key], 1) for key in keys},
            "fastserve_over_openvino": ratios(rates[FASTSERVE], rates[OPENVINO])._asdict(),
            "all_threads_over_one": {
                key: ratios(rates[key], rates[key + ONE_THREAD])._asdict()
                for key in (FASTSERVE, OPENVINO)
            },
            "floor_tokens_per_s": round(floor.tokens_per_s, 1),
            "floor_is_of_a": floor.bound_by,
            "share_of_floor": {
                key: round(middle[key] / floor.tokens_per_s, 3) for key in (FASTSERVE, OPENVINO)
            },
        })  # fmt: skip
    return {"floors": floors, "rows": rows}


def as_cells(name: str, entry: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    """Yield the rows of a model for people."""
    for row in entry["rows"]:
        threads, shares = row["all_threads_over_one"], row["share_of_floor"]
        yield (
            f"{name}, {row['row']}",
            *(number(row["median"][key]) for key in (FASTSERVE, OPENVINO)),
            str(Spread(**row["fastserve_over_openvino"])),
            *(f"{shares[key]:.0%}" for key in (FASTSERVE, OPENVINO)),
            *(str(Spread(**threads[key])) for key in (FASTSERVE, OPENVINO)),
        )


def summary(name: str, entry: Mapping[str, Any]) -> str:
    """Return what the rows of a model were measured on."""
    floors = entry["floors"][FASTSERVE]
    return (
        f"{name}, bfloat16, threads: {entry['threads']}, {entry['machine']['cpu']}: "
        f"copy {floors['copy_gb_per_s']:.1f} GB/s, "
        f"product {floors['product_gflop_per_s']:,.0f} GFLOP/s; first tokens equal: "
        f"{entry['first_tokens_equal']}; load average: {entry['load_average_at_start']}"
    )


def parse_arguments() -> argparse.Namespace:
    """Read the command line; ConfigError for what cannot be run."""
    parser = command_parser("against_openvino", __doc__)
    parser.add_argument("--models", default=",".join(reversed(NAMED)), help="as NAME,NAME")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output-len", type=int, default=OUTPUT_LEN)
    parser.add_argument("--output", default=RESULT, help=f"JSON file ({RESULT})")
    args = parser.parse_args()
    args.models = names_of("--models", args.models, NAMED)
    if args.rounds < 1:
        raise ConfigError("--rounds: at least one")
    find_openvino()
    args.output = output_path(args.output)
    return args


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Measure the models, beside those in the file already; each is written when it is done."""
    output: Path = args.output
    kept = json.loads(output.read_text(encoding="utf-8")) if output.exists() else {"models": {}}
    result: dict[str, Any] = {"benchmark": NAME, "models": kept["models"]}
    for name in args.models:
        entry = measure_model(name, num_cores(), args.rounds, args.output_len)
        result["models"][name] = entry
        write_result(output, result)
    return result


def show(args: argparse.Namespace, result: Mapping[str, Any]) -> None:
    """Print what was measured; all there is goes into the document if it is from this result."""
    models = result["models"]
    for name in args.models:
        print(summary(name, models[name]))
        print(markdown(COLUMNS, as_cells(name, models[name])))
    if args.output == Path(RESULT):
        rows = [cells for name, entry in models.items() for cells in as_cells(name, entry)]
        fill(DOCUMENT, {"against-openvino": markdown(COLUMNS, rows)})


def main() -> int:
    """Measure, write, print; exit code 2 for a run that cannot be."""
    return run_command(parse_arguments, measure, show)


if __name__ == "__main__":
    sys.exit(main())
