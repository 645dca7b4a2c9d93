"""What the subjects of `fastserve bench` take. Must not know: how anything is measured."""

from __future__ import annotations

from dataclasses import dataclass

from fastserve.settings.engine import POLICIES
from fastserve.settings.option import ConfigError, check_ranges, option


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerBenchConfig:
    """What `bench scheduler` measures."""

    waiting: int = option(10_000, "most requests that wait beside the running ones", minimum=0)
    running: int = option(256, "most requests that run in one step", minimum=1)
    steps: int = option(300, "timed steps of each row", minimum=10)
    scheduling_policy: str = option("learned", "order in which requests run", choices=POLICIES)
    output: str | None = option(None, "file to write the rows to, as JSON")

    def __post_init__(self) -> None:
        """Refuse settings out of range."""
        check_ranges(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class OfflineBenchConfig:
    """What `bench offline` measures."""

    input_len: int = option(128, "prompt tokens of a decoding request", minimum=1)
    output_len: int = option(
        128, "tokens that a request generates; those after the first are timed", minimum=2
    )
    batch_size: str = option("1,8,32", "requests that decode together, one row each: N,N,N")
    prefill_len: int = option(1024, "prompt tokens of the timed prefill", minimum=1)
    output: str | None = option(None, "file to write the figures to, as JSON")

    def __post_init__(self) -> None:
        """Refuse settings out of range."""
        check_ranges(self)
        self.batch_sizes()

    def batch_sizes(self) -> tuple[int, ...]:
        """Return the batch sizes in the order given."""
        try:
            sizes = tuple(int(part) for part in self.batch_size.split(","))
        except ValueError:
            sizes = ()
        if not sizes or min(sizes) < 1:
            raise ConfigError(
                f"--batch-size: {self.batch_size!r} is not a list of numbers like 1,8,32"
            )
        return sizes
