"""The tables of docs/kv-memory.md, from results/kv_tiers.json.

Must not know: how anything is simulated.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.markdown import fill, markdown, number, quotient, ratio, share

Entry = Mapping[str, Any]
SWAPPING = ("reactive", "proactive")


def write_tables(file: Path, document: Path) -> None:
    """Write the figures of a file into the document."""
    figures = json.loads(file.read_text(encoding="utf-8"))["figures"]
    entries = figures["entries"]
    fill(document, {
        "modes": mode_table(entries, figures["capacity"]),
        "ideal": ideal_table(entries),
        "bytes": bytes_table(entries),
    })  # fmt: skip


def select(entries: Sequence[Entry], **labels: Any) -> list[Entry]:
    """Return the entries with these labels."""
    return [entry for entry in entries
            if all(entry.get(name) == value for name, value in labels.items())]  # fmt: skip


def distinct(entries: Sequence[Entry], label: str) -> list[Any]:
    """Return the values of a label in the order of their first appearance."""
    return list(dict.fromkeys(entry[label] for entry in entries))


def mode_table(entries: Sequence[Entry], capacity: Mapping[str, Mapping[str, float]]) -> str:
    """Return mean and P99 JCT over those of FCFS that recomputes, a row per policy."""
    modes = distinct(entries, "mode")
    rows = []
    for setup, trace, load, policy in cases(entries):
        mine = select(entries, setup=setup, trace=trace, load=load)
        base = select(mine, policy="fcfs", mode="recompute")[0]["jct_s"]
        cells = [setup, trace, f"{load:g} ({number(load * capacity[setup][trace])})", policy]
        for mode in modes:
            jct = select(mine, policy=policy, mode=mode)[0]["jct_s"]
            if (policy, mode) == ("fcfs", "recompute"):
                cells.append(f"{number(base['mean'])} s; {number(base['p99'])} s")
            else:
                cells.append(f"{ratio(jct['mean'], base['mean'])}; "
                             f"{ratio(jct['p99'], base['p99'])}")  # fmt: skip
        rows.append(cells)
    return markdown(["machine", "trace", "load (requests/s)", "policy", *modes], rows)


def ideal_table(entries: Sequence[Entry]) -> str:
    """Return mean JCT of the modes that swap over that of the ideal link, a row per machine."""
    rows = []
    for setup in distinct(entries, "setup"):
        for trace in distinct(entries, "trace"):
            if not select(entries, setup=setup, trace=trace):
                continue
            for policy in distinct(entries, "policy"):
                cells = [setup, trace, policy]
                for mode in SWAPPING:
                    mine = select(entries, setup=setup, trace=trace, policy=policy, mode=mode)
                    cells.append(" / ".join(over_ideal(entries, entry) for entry in mine))
                rows.append(cells)
    loads = " / ".join(f"{load:g}" for load in distinct(entries, "load"))
    header = ["machine", "trace", "policy", *(f"{mode}, load {loads}" for mode in SWAPPING)]
    return markdown(header, rows)


def over_ideal(entries: Sequence[Entry], entry: Entry) -> str:
    """Return mean JCT over that of the ideal link; bold beyond 2 %."""
    labels = {name: entry[name] for name in ("setup", "trace", "load", "policy")}
    ideal = select(entries, **labels, mode="ideal")[0]
    return share(quotient(entry["jct_s"]["mean"], ideal["jct_s"]["mean"]))


def bytes_table(entries: Sequence[Entry]) -> str:
    """Return what moved at the highest load, and what waited for it."""
    load = max(distinct(entries, "load"))
    rows = []
    for entry in select(entries, load=load):
        if entry["mode"] not in SWAPPING or not entry["preemptions"]:
            continue
        shares = [f"{100 * entry[f'link_{way}_share']:.0f} %" for way in ("out", "in")]
        stall_ms = number(1000 * entry["breakdown_s"]["swap"])
        rows.append([
            entry["setup"], entry["trace"], entry["policy"], entry["mode"],
            f"{entry['preemptions']:,}", *(gigabytes(entry[f"{name}_bytes"]) for name in
            ("swap_out", "saved", "wasted", "swap_in", "fetched")), " / ".join(shares),
            f"{stall_ms} ms", f"{100 * entry['copy_wait_s'] / entry['makespan_s']:.1f} %",
            f"{entry['recomputed_tokens']:,}",
        ])  # fmt: skip
    header = ["machine", "trace", "policy", "mode", "preemptions", "out, GB", "of it ahead",
              "wasted", "in, GB", "of it ahead", "link busy out / in", "swap per request",
              "nothing ran", "tokens recomputed"]  # fmt: skip
    return markdown(header, rows)


def gigabytes(num_bytes: float) -> str:
    """Return GB for people."""
    return number(num_bytes / 1e9)


def cases(entries: Sequence[Entry]) -> list[tuple[Any, ...]]:
    """Return machine, trace, load and policy of every row of a table."""
    names = ("setup", "trace", "load", "policy")
    return list(dict.fromkeys(tuple(entry[name] for name in names) for entry in entries))
