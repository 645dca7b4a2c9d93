"""What it costs to tell every rank of a step: microseconds for 2, 4 and 16 ranks.

    python -m benchmarks.plan_fan_out [--ranks 2,4,16] [--sequences 16] [--steps 2000]

The plan is a decode of so many sequences, in each of which every 16th begins a new block. It is
encoded once and written to each rank's socket; ranks are processes that read, decode and answer
with a byte. `sent` is what the engine's thread spends in a step, until the last socket has the
plan; `known` is until the last rank has decoded it and the driver has heard so. Where there are
more ranks than cores, ranks wait for each other's cores in `known`, as they would in a step.
"""

from __future__ import annotations

import argparse
import os
import socket
import sys
import time
from statistics import median, quantiles
from typing import Any

from benchmarks.command import command_parser, origin
from fastserve.core.messages import SchedulerOutput, Work
from fastserve.core.request import Handle
from fastserve.host.provenance import ROOT, output_path, write_result
from fastserve.settings.option import ConfigError
from fastserve.wire.child import be_child, reap, spawn
from fastserve.wire.frames import encode_frame, read_frame
from fastserve.wire.rank_messages import Carry, decode_order

RESULT = "benchmarks/results/plan_fan_out.json"
WARM_UP = 100


def plan(step_id: int, num_sequences: int) -> SchedulerOutput:
    """Return one decode of every sequence."""
    works = tuple(
        Work(
            handle=Handle(index),
            epoch=0,
            start=500 + step_id,
            num_tokens=1,
            token_ids=(17_000 + index,),
            table_from=30,
            block_ids=(4000 + index,) if (index + step_id) % 16 == 0 else (),
            sample=True,
            logits="last",
        )
        for index in range(num_sequences)
    )
    return SchedulerOutput(step_id, (), works)


def be_rank(fd: int) -> None:
    """Read plans until the driver leaves, and say of each that it is known."""
    with be_child(fd) as connection, connection.makefile("rb") as stream:
        while (payload := read_frame(stream)) is not None:
            decode_order(payload)
            connection.sendall(b".")


def measure(num_ranks: int, num_sequences: int, num_steps: int) -> dict[str, Any]:
    """Return the microseconds of a step for so many ranks."""
    command = (sys.executable, "-m", "benchmarks.plan_fan_out", "--rank-fd")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    started = [spawn(command, environment) for _ in range(num_ranks)]
    connections: list[socket.socket] = [connection for _, connection in started]
    sent, known = [], []
    for step_id in range(WARM_UP + num_steps):
        order = Carry(plan(step_id, num_sequences))
        begun = time.perf_counter()
        frame = encode_frame(order)
        for connection in connections:
            connection.sendall(frame)
        sent.append(1e6 * (time.perf_counter() - begun))
        for connection in connections:
            connection.recv(1)
        known.append(1e6 * (time.perf_counter() - begun))
    for process, connection in started:
        connection.close()
        reap(process)
    return {
        "ranks": num_ranks,
        "frame_bytes": len(frame),
        "sent_us": described(sent[WARM_UP:]),
        "known_us": described(known[WARM_UP:]),
    }


def described(times: list[float]) -> dict[str, float]:
    """Return the median and the 95th percentile."""
    return {"p50": round(median(times), 1), "p95": round(quantiles(times, n=20)[-1], 1)}


def parse_arguments() -> argparse.Namespace:
    """Read the command line; ConfigError for a file that cannot be written."""
    parser = command_parser("plan_fan_out", __doc__)
    parser.add_argument("--ranks", default="2,4,16", help="how many, as N,N,... (2,4,16)")
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--output", default=RESULT, help=f"JSON file ({RESULT})")
    parser.add_argument("--rank-fd", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank_fd is None:
        args.output = output_path(args.output)
    return args


def main() -> int:
    """Measure, print, write; exit code 2 for a run that cannot be."""
    try:
        args = parse_arguments()
        if args.rank_fd is not None:
            be_rank(args.rank_fd)
            return 0
        rows = [measure(int(count), args.sequences, args.steps) for count in args.ranks.split(",")]
        result = {
            **origin("plan_fan_out"),
            "sequences": args.sequences,
            "steps": args.steps,
            "rows": rows,
        }
        write_result(args.output, result)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for row in rows:
        print(
            f"{row['ranks']} ranks: sent in {row['sent_us']['p50']:.0f} µs, "
            f"known in {row['known_us']['p50']:.0f} µs ({row['frame_bytes']} bytes)"
        )
    print(f"written to {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
