"""The command line of a benchmark: how each is asked, says where it comes from, and ends.

Rules: a file that cannot be written to is refused before anything is measured. What cannot be
measured is one line, and exit code 2, and so is a contender that ended too early.
Must not know: what is measured.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Collection, Mapping
from typing import Any

from benchmarks.contender import ContenderError
from fastserve.host.provenance import provenance, write_result
from fastserve.settings.option import ConfigError


def command_parser(name: str, description: str | None) -> argparse.ArgumentParser:
    """Return a parser for `python -m benchmarks.NAME`, whose description is its docstring."""
    return argparse.ArgumentParser(
        prog=f"python -m benchmarks.{name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def names_of(flag: str, words: str, known: Collection[str]) -> list[str]:
    """Return the names in `words`, parted by commas; ConfigError for one that is not known."""
    names = words.split(",")
    if unknown := set(names) - set(known):
        raise ConfigError(f"{flag}: there is no {', '.join(sorted(unknown))}")
    return names


def origin(name: str) -> dict[str, Any]:
    """Return what a result begins with: whose it is, the command, the machine, the commit."""
    return {
        "benchmark": name,
        **provenance(["python", "-m", f"benchmarks.{name}", *sys.argv[1:]]),
    }


def run_command(
    parse: Callable[[], argparse.Namespace],
    measure: Callable[[argparse.Namespace], Mapping[str, Any]],
    show: Callable[[argparse.Namespace, Mapping[str, Any]], None],
) -> int:
    """Measure, write to the `output` of the arguments, if any, print; return the exit code."""
    try:
        args = parse()
        result = measure(args)
        if args.output is not None:
            write_result(args.output, result)
    except (ConfigError, ContenderError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    show(args, result)
    if args.output is not None:
        print(f"written to {args.output}")
    return 0
