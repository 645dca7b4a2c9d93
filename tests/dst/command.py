"""Runs many seeds and says what they came to; `scripts/dst` calls it.

Seeds of the corpus, which failed once, go first. A seed that fails is told with the story of its
request, and the exit status is 1. `--summary` writes the figures as they stand after each chunk.
Must not know: what a seed does.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import Pool
from pathlib import Path

from fastserve.host.provenance import output_path, provenance, write_result
from tests.dst.outcome import Outcome
from tests.dst.world import Failure, run_seed

CORPUS = Path(__file__).with_name("corpus.txt")
CHUNK = 20
NEWS_S = 10.0


@dataclass
class Report:
    """What some seeds came to; `failures` are told by their seed."""

    num_seeds: int = 0
    outcome: Outcome = field(default_factory=Outcome)
    failures: dict[int, str] = field(default_factory=dict)
    cpu_s: float = 0.0

    def add(self, other: Report) -> None:
        """Take in another's."""
        self.num_seeds += other.num_seeds
        self.outcome.add(other.outcome)
        self.failures |= other.failures
        self.cpu_s += other.cpu_s

    @property
    def num_faults(self) -> int:
        """How often something went wrong, by plan or by chance."""
        return sum(self.outcome.faults.values())

    def figures(self) -> dict[str, object]:
        """Return what is worth keeping."""
        outcome = self.outcome
        return {
            "seeds": self.num_seeds,
            "failing_seeds": sorted(self.failures),
            "requests": outcome.num_requests,
            "lost_requests": outcome.num_requests - sum(outcome.ends.values()),
            "tokens": outcome.num_tokens,
            "moves_to_another_engine": outcome.num_moves,
            "virtual_hours": round(outcome.virtual_s / 3600, 1),
            "cpu_s": round(self.cpu_s),
            "requests_per_cpu_s": round(outcome.num_requests / max(self.cpu_s, 1e-9)),
            "faults": self.num_faults,
            "faults_by_kind": dict(outcome.faults.most_common()),
            "ends": dict(outcome.ends.most_common()),
            "engine_counters": dict(outcome.stats.most_common()),
        }


def read_corpus() -> list[int]:
    """Return the seeds that failed once."""
    lines = CORPUS.read_text(encoding="utf-8").splitlines()
    return [int(line.split()[0]) for line in lines if line and not line.startswith("#")]


def run_seeds(seeds: Iterable[int]) -> Report:
    """Run seeds in this process, each to its end or to its failure."""
    report, begun = Report(), time.process_time()
    for seed in seeds:
        report.num_seeds += 1
        try:
            report.outcome.add(run_seed(seed))
        except Failure as failure:
            report.failures[seed] = str(failure)
    report.cpu_s = time.process_time() - begun
    return report


def main(arguments: Sequence[str]) -> int:
    """Run what the command line asks for; return the exit status."""
    parser = argparse.ArgumentParser(prog="scripts/dst", description=__doc__)
    parser.add_argument("--seeds", type=int, default=200, help="how many (200)")
    parser.add_argument("--first", type=int, default=0, help="the first of them (0)")
    parser.add_argument("--seed", type=int, help="only this one, and not the corpus")
    parser.add_argument("--jobs", type=int, default=1, help="processes that share them (1)")
    parser.add_argument("-x", "--exitfirst", action="store_true", help="stop where one fails")
    parser.add_argument("--summary", metavar="FILE", help="write the figures as JSON")
    options = parser.parse_args(arguments)
    if options.seed is not None:
        seeds = [options.seed]
    else:
        corpus = read_corpus()
        fresh = range(options.first, options.first + options.seeds)
        seeds = corpus + [seed for seed in fresh if seed not in corpus]
    summary = None if options.summary is None else output_path(options.summary, "--summary")
    origin = provenance(["scripts/dst", *arguments])
    total, told_at, begun = Report(), 0.0, time.monotonic()
    with _reports(seeds, options.jobs) as reports:
        for report in reports:
            total.add(report)
            _tell(report)
            if summary is not None:
                write_result(summary, origin | total.figures())
            now = time.monotonic()
            if now - told_at > NEWS_S:
                told_at = now
                _say_progress(total, len(seeds), now - begun)
            if total.failures and options.exitfirst:
                break
    _print(total)
    return 1 if total.failures else 0


@contextmanager
def _reports(seeds: Sequence[int], num_jobs: int) -> Iterator[Iterable[Report]]:
    chunks = [seeds[start : start + CHUNK] for start in range(0, len(seeds), CHUNK)]
    if num_jobs == 1:
        yield map(run_seeds, chunks)
        return
    with Pool(num_jobs) as pool:
        yield pool.imap_unordered(run_seeds, chunks)


def _tell(report: Report) -> None:
    for text in report.failures.values():
        print(text, flush=True)


def _say_progress(total: Report, num_seeds: int, seconds: float) -> None:
    rate = total.outcome.num_requests / seconds
    print(
        f"{total.num_seeds} of {num_seeds} seeds, {total.outcome.num_requests} requests "
        f"({rate:.0f}/s), {total.num_faults} faults, {len(total.failures)} failures",
        file=sys.stderr,
    )


def _print(total: Report) -> None:
    for name, value in total.figures().items():
        if isinstance(value, dict):
            print(name)
            for kind, count in value.items():
                print(f"  {count:>10,}  {kind}")
        else:
            print(f"{name}: {value}")


if __name__ == "__main__":
    logging.getLogger("fastserve").setLevel(logging.CRITICAL)  # what goes wrong is told here
    sys.exit(main(sys.argv[1:]))
