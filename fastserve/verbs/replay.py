"""`fastserve replay JOURNAL`: does a fresh scheduler, told the same, plan the same?

Rules: every fact of the journal goes to a scheduler built from the journal's own first line, and
every line it writes is held against the recorded one. A file may hold several runs, one after the
other; each begins with its own first line. Must not know: what made the journal.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fastserve.core.build import build_scheduler
from fastserve.core.cost_model import CostModel
from fastserve.core.journal import FORMAT, Journal, read_fact
from fastserve.core.lengths import LengthModel
from fastserve.core.messages import Aborted, ExecutorOutput, Fact, Finished
from fastserve.core.request import Arrival
from fastserve.core.scheduler import Scheduler
from fastserve.host.terminal import say
from fastserve.settings.option import ConfigError
from fastserve.settings.scheduler import SchedulerConfig

SHOWN_CHARACTERS = 300


class DifferenceError(Exception):
    """A line that the fresh scheduler writes differently."""


@dataclasses.dataclass(slots=True)
class Tally:
    """What was replayed."""

    num_runs: int = 0
    num_requests: int = 0
    num_plans: int = 0


def replay(path: Path) -> int:
    """Replay a file; 0 if every plan is the same, 1 if one is not.

    Raises ConfigError when the file is not a journal.
    """
    tally = Tally()
    try:
        with path.open(encoding="utf-8") as file:
            replay_lines(_parsed(file), tally)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not a text file: is this a journal?") from error
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    except DifferenceError as difference:
        say(f"{path}: {difference}", stderr=False)
        return 1
    runs = f" in {tally.num_runs} runs" if tally.num_runs > 1 else ""
    counts = f"{tally.num_plans:,} plans for {tally.num_requests:,} requests{runs}"
    say(f"{path}: {counts}: all the same", stderr=False)
    return 0


def _parsed(file: Iterator[str]) -> Iterator[tuple[int, list[Any]]]:
    """Yield (line number, values); the last line of a run that was killed may be cut off."""
    for number, text in enumerate(file, start=1):
        try:
            values = json.loads(text)
        except (ValueError, RecursionError):
            if not text.endswith("\n"):
                return
            raise ConfigError(f"line {number} is not JSON: is this a journal?") from None
        if not isinstance(values, list) or len(values) < 2:
            raise ConfigError(f"line {number}: not a line of a journal")
        yield number, values


def replay_lines(lines: Iterator[tuple[int, list[Any]]], tally: Tally) -> None:
    """Feed all facts; raises DifferenceError at the first line that comes out differently."""
    scheduler: Scheduler | None = None
    written: list[str] = []
    journal = Journal(written.append)
    for number, values in lines:
        try:
            kind, now, *fields = values[0], float.fromhex(values[1]), *values[2:]
            if kind == "open":
                scheduler = _fresh(fields)
                tally.num_runs += 1
                continue
            if scheduler is None:
                raise ConfigError("the journal does not begin with what the scheduler was built of")
            written.clear()
            if kind == "schedule":
                journal.planned(scheduler.schedule(now, fields[0]), fields[0], now)
            else:
                fact = read_fact(kind, fields)
                journal.told(fact, now)
                _tell(scheduler, fact, now)
            replayed = written[0]
        except ConfigError as error:
            raise ConfigError(f"line {number}: {error}") from None
        except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError) as error:
            raise ConfigError(f"line {number}: not a line of a journal: {error!r}") from error
        if json.loads(replayed) != values:
            raise DifferenceError(_difference(number, now, values, replayed))
        tally.num_plans += kind == "schedule" and fields[1] is not None
        tally.num_requests += kind == "add"
    if scheduler is None:
        raise ConfigError("the journal is empty")


def _fresh(fields: Sequence[Any]) -> Scheduler:
    if fields[0] != FORMAT:
        number = fields[0] if isinstance(fields[0], int) else "no number"
        raise ConfigError(
            f"a journal of another format: {number}, not {FORMAT}; the version of fastserve that "
            "wrote it can replay it"
        )
    settings, costs, num_device_blocks, num_host_blocks, learned = fields[1:]
    settings = settings | {"eos_token_ids": frozenset(settings["eos_token_ids"])}
    length_model = None if learned is None else LengthModel.restored(learned)
    try:
        return build_scheduler(
            SchedulerConfig(**settings),
            CostModel(**costs),
            num_device_blocks,
            num_host_blocks,
            length_model=length_model,
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _tell(scheduler: Scheduler, fact: Fact, now: float) -> None:
    match fact:
        case Arrival():
            with contextlib.suppress(ValueError):  # it was refused then as well
                scheduler.add(fact, now)
        case Aborted(handle):
            scheduler.abort(handle, now)
        case Finished(handle, num_output_tokens):
            scheduler.finish(handle, num_output_tokens, now)
        case ExecutorOutput():
            scheduler.update(fact, now)


def _difference(number: int, now: float, recorded: list[Any], replayed: str) -> str:
    was = json.dumps(recorded, separators=(",", ":"))
    became = replayed.rstrip()
    at = next(
        (index for index, pair in enumerate(zip(was, became, strict=False)) if pair[0] != pair[1]),
        min(len(was), len(became)),
    )
    start = max(at - SHOWN_CHARACTERS // 3, 0)
    return (
        f"line {number}, at {now:.6f} s: the plan is another one\n"
        f"  recorded: …{was[start : start + SHOWN_CHARACTERS]}\n"
        f"  replayed: …{became[start : start + SHOWN_CHARACTERS]}"
    )
