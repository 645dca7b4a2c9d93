"""Lays the figures of results/workloads.json out in docs/workloads.md, between its markers.

Rules: a table replaces what stands between `<!-- table: NAME -->` and the next `<!-- end -->`, and
nothing else of the document. Must not know: how figures were measured.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

Entry = Mapping[str, Any]
BLIND = ("mlfq", "skip-join-mlfq")
OTHERS = (*BLIND, "srpt")
NEVER_S = 1e9


def write_tables(source: Path, document: Path) -> None:
    """Write every table that the document has a place for."""
    figures = json.loads(source.read_text(encoding="utf-8"))["figures"]
    entries: list[Entry] = figures["entries"]
    tables = {
        "traces": traces_table(figures["traces"]),
        "ratios": ratio_table(entries, "jct_s", "mean"),
        "tails": ratio_table(entries, "jct_s", "p99"),
        "normalized": ratio_table(entries, "normalized_latency_s", "mean"),
        "first": ratio_table(entries, "ttft_s", "mean"),
        "slowdowns": ratio_table(entries, "slowdown", "mean"),
        "modes": mode_table(entries),
        "alpha": alpha_table(entries),
        "quanta": quanta_table(entries),
        "all": full_tables(entries),
    }
    text = document.read_text(encoding="utf-8")
    for name, table in tables.items():
        opening = f"<!-- table: {name} -->\n"
        if text.count(opening) != 1:
            raise ValueError(f"{document}: not exactly one place for the table {name!r}")
        before, _, rest = text.partition(opening)
        _, end, after = rest.partition("<!-- end -->")
        text = before + opening + table + end + after
    document.write_text(text, encoding="utf-8")


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table of Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def number(value: float | None) -> str:
    """Return three digits for people."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def ratio(value: float, base: float) -> str:
    """Return value / base; bold where it is worse by more than 2 %."""
    text = f"{value / base:.2f}"
    return f"**{text}**" if value / base > 1.02 else text


def select(entries: Sequence[Entry], **labels: Any) -> list[Entry]:
    """Return the entries with these labels, in order."""
    return [entry for entry in entries
            if all(entry.get(name) == value for name, value in labels.items())]  # fmt: skip


def distinct(entries: Sequence[Entry], label: str) -> list[Any]:
    """Return the values of a label in order of appearance."""
    return list(dict.fromkeys(entry[label] for entry in entries))


def limit(alpha: float) -> str:
    """Return α for people."""
    return "∞" if alpha >= NEVER_S else f"{alpha:g}"


def traces_table(traces: Mapping[str, Mapping[str, float]]) -> str:
    """Return what was run."""
    header = ("trace", "rows", "dropped", "mean prompt", "mean output", "CV² of output",
              "CV of gaps", "capacity, requests/s")  # fmt: skip
    return markdown(header, [
        (name, number(row["rows"]), number(row["dropped"]), number(row["prompt_mean"]),
         number(row["output_mean"]), number(row["output_cv2"]), number(row["gap_cv"]),
         number(row["capacity"]))
        for name, row in traces.items()
    ])  # fmt: skip


def ratio_table(entries: Sequence[Entry], figure: str, part: str) -> str:
    """Return a figure over that of FCFS, by trace and load: mlfq / skip-join / srpt."""
    mine = select(entries, part="policy")
    loads = distinct(mine, "load")
    rows = []
    for trace in distinct(mine, "trace"):
        cells = [trace]
        for load in loads:
            values = {entry["policy"]: entry[figure][part]
                      for entry in select(mine, trace=trace, load=load)}  # fmt: skip
            cells.append(" / ".join(ratio(values[policy], values["fcfs"]) for policy in OTHERS))
        rows.append(cells)
    return markdown(["trace", *(f"load {load:g}" for load in loads)], rows)


def mode_table(entries: Sequence[Entry]) -> str:
    """Return mean JCT with a free link and with recomputation, per policy."""
    mine = select(entries, part="mode")
    policies = distinct(mine, "policy")
    rows = []
    for trace in distinct(mine, "trace"):
        cells = [trace]
        for policy in policies:
            ideal, recompute = (
                select(mine, trace=trace, policy=policy, mode=mode)[0]
                for mode in ("ideal", "recompute")
            )
            cells.append(f"{number(ideal['jct_s']['mean'])} → {number(recompute['jct_s']['mean'])}"
                         f" ({recompute['recomputed_tokens']:,})")  # fmt: skip
        rows.append(cells)
    return markdown(["trace", *policies], rows)


def alpha_table(entries: Sequence[Entry]) -> str:
    """Return mean JCT over that of FCFS, P99 and longest gap by α."""
    mine = select(entries, part="alpha")
    alphas = distinct(mine, "alpha")
    rows = []
    for trace in distinct(mine, "trace"):
        for load in distinct(mine, "load"):
            fcfs = select(entries, part="policy", trace=trace, load=load, policy="fcfs")[0]
            for policy in BLIND:
                cells = [trace, f"{load:g}", policy]
                for alpha in alphas:
                    entry = select(mine, trace=trace, load=load, policy=policy, alpha=alpha)[0]
                    cells.append(tuned_cell(entry, fcfs))
                rows.append(cells)
    return markdown(["trace", "load", "policy", *(f"α {limit(a)} s" for a in alphas)], rows)


def quanta_table(entries: Sequence[Entry]) -> str:
    """Return the same by first quantum and ratio, for skip-join."""
    mine = select(entries, part="quanta")
    kinds = list(dict.fromkeys((entry["times"], entry["ratio"]) for entry in mine))
    rows = []
    for trace in distinct(mine, "trace"):
        for load in distinct(mine, "load"):
            fcfs = select(entries, part="policy", trace=trace, load=load, policy="fcfs")[0]
            for alpha in distinct(mine, "alpha"):
                cells = [trace, f"{load:g}", limit(alpha)]
                for times, step in kinds:
                    entry = select(mine, trace=trace, load=load, alpha=alpha, times=times,
                                   ratio=step)[0]  # fmt: skip
                    cells.append(tuned_cell(entry, fcfs))
                rows.append(cells)
    columns = [f"q₁ ×{times:g}, ratio {step:g}" for times, step in kinds]
    return markdown(["trace", "load", "α, s", *columns], rows)


def tuned_cell(entry: Entry, fcfs: Entry) -> str:
    """Return mean JCT over that of FCFS; P99 JCT over that of FCFS; P99 of the longest gap."""
    mean = ratio(entry["jct_s"]["mean"], fcfs["jct_s"]["mean"])
    tail = ratio(entry["jct_s"]["p99"], fcfs["jct_s"]["p99"])
    return f"{mean}; {tail}; {number(entry['max_gap_s']['p99'])} s"


def full_tables(entries: Sequence[Entry]) -> str:
    """Return every figure of the comparison of policies, a table per trace."""
    mine = select(entries, part="policy")
    header = ("load", "policy", "mean", "P50", "P95", "P99", "max", "slowdown mean", "P99",
              "s/token mean", "P95", "longest gap P99, s", "max, s")  # fmt: skip
    parts = []
    for trace in distinct(mine, "trace"):
        rows = []
        for entry in select(mine, trace=trace):
            jct, slow = entry["jct_s"], entry["slowdown"]
            norm, gap = entry["normalized_latency_s"], entry["max_gap_s"]
            values = [*(jct[name] for name in ("mean", "p50", "p95", "p99", "max")), slow["mean"],
                      slow["p99"], norm["mean"], norm["p95"], gap["p99"], gap["max"]]  # fmt: skip
            rows.append([f"{entry['load']:g}", entry["policy"], *map(number, values)])
        parts.append(f"### {trace}\n\n{markdown(header, rows)}\n")
    return "\n" + "".join(parts)
