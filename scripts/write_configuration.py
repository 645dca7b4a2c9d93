"""Writes docs/configuration.md from the config classes; `--check` only compares.

Must not know: any setting by name.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

from fastserve.bench.config import OfflineBenchConfig, SchedulerBenchConfig
from fastserve.bench.serve_config import ServeBenchConfig
from fastserve.settings.engine import EngineConfig
from fastserve.settings.option import field_type, takes_many
from fastserve.settings.server import ServerConfig
from fastserve.sim.config import SimulateConfig
from fastserve.verbs.config import TextConfig, TopConfig

PAGE = Path(__file__).resolve().parent.parent / "docs" / "configuration.md"
OPENING = """\
# Configuration

<!-- Written by scripts/write_configuration.py from the config classes; edit there. -->

Every setting has one name: `--max-num-seqs` on the command line, `max-num-seqs` or `max_num_seqs`
in a `--config FILE.yaml`, `max_num_seqs=` in `LLM(...)`. A given flag wins over the file. An
unknown key, a value out of range and settings that contradict each other are refused in one line,
with exit code 2. A switch has a negative form: `--no-enable-chunked-prefill`. What takes one or
more words takes them after one flag, by a repeated flag or as a list in YAML; MODEL goes before it:
`fastserve serve MODEL --api-key KEY1 KEY2`. A default in parentheses is worked out at start.

`fastserve profile MODEL --output FILE` writes step times that `--profile FILE` reads. `generate`
takes its prompt as an argument (`-`: standard input) and the model as `--model`, as `bench offline`
does; `chat` takes a `--system` message; `convert DIR`, `replay JOURNAL` and `reproduce` have no
settings from here.
"""
CLASSES = (
    (EngineConfig, "`serve`, `generate`, `chat`, `profile`, `bench offline`, `LLM(...)`"),
    (ServerConfig, "`serve`"),
    (TextConfig, "`generate`, `chat`"),
    (SimulateConfig, "`simulate`, beside the engine's settings that shape a schedule"),
    (TopConfig, "`top`"),
    (OfflineBenchConfig, "`bench offline`, beside the engine's settings"),
    (ServeBenchConfig, "`bench serve`"),
    (SchedulerBenchConfig, "`bench scheduler`"),
)


def main() -> int:
    """Write the page, or with --check say whether it is current."""
    if "--check" in sys.argv[1:]:
        if PAGE.read_text(encoding="utf-8") == render():
            return 0
        print(f"{PAGE} is out of date: run {Path(__file__).name}", file=sys.stderr)
        return 1
    PAGE.write_text(render(), encoding="utf-8")
    return 0


def render() -> str:
    """Return the page."""
    return OPENING + "".join(section(owner, verbs) for owner, verbs in CLASSES)


def section(owner: type, verbs: str) -> str:
    """Return the table of one class."""
    title = (owner.__doc__ or "").split("\n")[0].rstrip(".;")
    lines = [f"\n## {title}\n", f"\nFor {verbs}.\n\n", "| flag | what | values | default |\n"]
    lines.append("|---|---|---|---|\n")
    own = owner.__annotations__  # what it inherits stands in the table it comes from
    lines += [row(owner, spec) for spec in dataclasses.fields(owner) if spec.name in own]
    return "".join(lines)


def row(owner: type, spec: dataclasses.Field[object]) -> str:
    """Return the line of one setting."""
    meta = spec.metadata
    flag = "--" + spec.name.replace("_", "-")
    if meta["positional"]:
        flag = spec.name.upper()
    names = ", ".join(f"`{name}`" for name in (flag, *meta["aliases"]))
    default = "" if spec.default in (None, ()) else f"`{str(spec.default).lower()}`"
    if isinstance(spec.default, str):
        default = f"`{spec.default}`"
    return f"| {names} | {meta['help']} | {values(owner, spec)} | {default} |\n"


def values(owner: type, spec: dataclasses.Field[object]) -> str:
    """Return the values that a setting can take."""
    meta = spec.metadata
    if meta["choices"]:
        return " ".join(f"`{choice}`" for choice in meta["choices"])
    kind = field_type(owner, spec.name).__name__
    if takes_many(owner, spec.name):
        return f"{kind}, one or more"
    low, high = meta["minimum"], meta["maximum"]
    if low is not None and high is not None:
        return f"{kind}, {low:g} to {high:g}"
    if low is not None:
        return f"{kind}, at least {low:g}"
    return f"{kind}, at most {high:g}" if high is not None else kind


if __name__ == "__main__":
    sys.exit(main())
