"""Lays the figures of results/workloads.json out in docs/workloads.md.

Rules: where a figure was not measured there is a dash, and a part that was not measured has no
rows. Must not know: how figures were measured.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.markdown import fill, markdown, number, quotient, ratio, share

Entry = Mapping[str, Any]
MLFQS = ("mlfq", "skip-join-mlfq")
SHOWN = ("skip-join-mlfq", "sjf", "learned", "srpt")
REDRAWN = ("skip-join-mlfq", "learned")
NEVER_S = 1e9
MEASURES = {
    "JCT, mean": ("jct_s", "mean"),
    "JCT, P99": ("jct_s", "p99"),
    "s/token, mean": ("normalized_latency_s", "mean"),
    "TTFT, mean": ("ttft_s", "mean"),
}


def write_tables(source: Path, document: Path) -> None:
    """Write every table."""
    figures = json.loads(source.read_text(encoding="utf-8"))["figures"]
    entries: list[Entry] = figures["entries"]
    tables = {
        "traces": traces_table(figures["traces"]),
        "summary": summary_table(entries),
        "seeds": seed_table(entries),
        "ratios": ratio_table(entries, "jct_s", "mean"),
        "tails": ratio_table(entries, "jct_s", "p99"),
        "normalized": ratio_table(entries, "normalized_latency_s", "mean"),
        "first": ratio_table(entries, "ttft_s", "mean"),
        "slowdowns": ratio_table(entries, "slowdown", "mean"),
        "modes": mode_table(entries),
        "kv": kv_table(entries, figures.get("kv", {})),
        "kv-seeds": kv_seed_table(entries),
        "alpha": alpha_table(entries),
        "quanta": quanta_table(entries),
        "all": full_tables(entries),
    }
    fill(document, tables)


def select(entries: Sequence[Entry], **labels: Any) -> list[Entry]:
    """Return the entries with these labels, in order."""
    return [entry for entry in entries
            if all(entry.get(name) == value for name, value in labels.items())]  # fmt: skip


def distinct(entries: Sequence[Entry], label: str) -> list[Any]:
    """Return the values of a label in order of appearance."""
    return list(dict.fromkeys(entry[label] for entry in entries))


def values_of(entries: Sequence[Entry], figure: str, part: str, **labels: Any) -> dict[str, float]:
    """Return a figure by trace, of the entries with these labels."""
    return {entry["trace"]: entry[figure][part] for entry in select(entries, **labels)}


def ratios_to(values: Mapping[str, float], bases: Mapping[str, float]) -> list[float]:
    """Return the ratios of what has a value and a base."""
    found = [quotient(value, bases.get(name)) for name, value in values.items()]
    return [value for value in found if value is not None]


def geometric_mean(values: Sequence[float]) -> float | None:
    """Return the geometric mean; None of nothing, or where a value is not above 0."""
    if not values or min(values) <= 0:
        return None
    return float(np.exp(np.mean(np.log(values))))


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


def summary_table(entries: Sequence[Entry]) -> str:
    """Return the geometric mean over the traces of each figure over that of FCFS, and the worst.

    The longest gap is in seconds: FCFS, which pauses nobody, is nothing to measure it by.
    """
    mine = select(entries, part="policy")
    loads, policies = distinct(mine, "load"), distinct(mine, "policy")
    rows = []
    for title, (figure, part) in MEASURES.items():
        rows += [
            [title, policy, *(over_cell(mine, figure, part, load, policy, "fcfs")
                              for load in loads)]
            for policy in policies if policy != "fcfs"
        ]  # fmt: skip
        cells = (over_cell(mine, figure, part, load, "learned", "srpt") for load in loads)
        rows.append([title, "learned over srpt", *cells])
    rows += [
        ["longest gap P99, s", policy, *(gap_cell(mine, load, policy) for load in loads)]
        for policy in policies
    ]
    return markdown(["figure", "policy", *(f"load {load:g}" for load in loads)], rows)


def over_cell(
    entries: Sequence[Entry], figure: str, part: str, load: float, policy: str, base: str
) -> str:
    """Return the geometric mean of a policy's figures over those of another, then the worst."""
    ratios = ratios_to(values_of(entries, figure, part, load=load, policy=policy),
                       values_of(entries, figure, part, load=load, policy=base))  # fmt: skip
    return f"{share(geometric_mean(ratios))} ({share(max(ratios, default=None))})"


def gap_cell(entries: Sequence[Entry], load: float, policy: str) -> str:
    """Return the geometric mean of P99 of the longest gap in seconds, then the worst."""
    gaps = list(values_of(entries, "max_gap_s", "p99", load=load, policy=policy).values())
    return f"{number(geometric_mean(gaps))} ({number(max(gaps, default=None))})"


def seed_table(entries: Sequence[Entry]) -> str:
    """Return least–most of mean JCT over that of FCFS when arrivals are drawn anew, and before it
    that of the geometric mean.
    """
    redrawn = select(entries, part="seeds")
    loads, traces = distinct(redrawn, "load"), distinct(redrawn, "trace")
    own = [entry for entry in select(entries, part="policy")
           if entry["trace"] in traces and entry["load"] in loads]  # fmt: skip
    draws = [own, *(select(redrawn, seed=seed) for seed in distinct(redrawn, "seed"))]
    rows = [[f"**geometric mean of {len(traces)}**"] if traces else []]
    rows += [[trace] for trace in traces]
    for load in loads:
        by_policy = {policy: [ratios_by_trace(draw, load, policy) for draw in draws]
                     for policy in REDRAWN}  # fmt: skip
        means = {policy: [geometric_mean(list(draw.values())) for draw in by_trace]
                 for policy, by_trace in by_policy.items()}  # fmt: skip
        rows[0].append(" / ".join(span(means[policy]) for policy in REDRAWN))
        for row, trace in zip(rows[1:], traces, strict=True):
            row.append(" / ".join(span([draw.get(trace) for draw in by_policy[policy]])
                                  for policy in REDRAWN))  # fmt: skip
    return markdown(["trace", *(f"load {load:g}" for load in loads)], rows if traces else [])


def ratios_by_trace(entries: Sequence[Entry], load: float, policy: str) -> dict[str, float]:
    """Return mean JCT over that of FCFS by trace."""
    base = values_of(entries, "jct_s", "mean", load=load, policy="fcfs")
    mine = values_of(entries, "jct_s", "mean", load=load, policy=policy)
    return {trace: value / base[trace] for trace, value in mine.items() if trace in base}


def span(values: Sequence[float | None]) -> str:
    """Return least–most of what there is."""
    known = [value for value in values if value is not None]
    return f"{share(min(known))}–{share(max(known))}" if known else "-"


def ratio_table(entries: Sequence[Entry], figure: str, part: str) -> str:
    """Return a figure over that of FCFS, by trace and load: the policies of SHOWN."""
    mine = select(entries, part="policy")
    loads = distinct(mine, "load")
    rows = []
    for trace in distinct(mine, "trace"):
        cells = [trace]
        for load in loads:
            values = {entry["policy"]: entry[figure][part]
                      for entry in select(mine, trace=trace, load=load)}  # fmt: skip
            cells.append(" / ".join(ratio(values.get(policy), values["fcfs"]) for policy in SHOWN))
        rows.append(cells)
    return markdown(["trace", *(f"load {load:g}" for load in loads)], rows)


def mode_table(entries: Sequence[Entry]) -> str:
    """Return mean JCT with a free link and with recomputation, per policy."""
    mine = select(entries, part="mode")
    policies = distinct(mine, "policy")
    rows = []
    for trace in distinct(mine, "trace"):
        for load in distinct(mine, "load"):
            cells = [trace, f"{load:g}"]
            for policy in policies:
                ideal, recompute = (
                    select(mine, trace=trace, load=load, policy=policy, mode=mode)[0]
                    for mode in ("ideal", "recompute")
                )
                mean = number(ideal["jct_s"]["mean"])
                recomputed = number(recompute["jct_s"]["mean"])
                cells.append(f"{mean} → {recomputed} ({recompute['recomputed_tokens']:,})")
            rows.append(cells)
    return markdown(["trace", "load", *policies], rows)


def kv_table(entries: Sequence[Entry], capacity: Mapping[str, Mapping[str, float]]) -> str:
    """Return what short KV leaves of a policy: mean and P99 JCT over those of FCFS, and the tokens
    computed again.
    """
    mine = select(entries, part="kv")
    policies = distinct(mine, "policy")
    rows = []
    for setup in distinct(mine, "setup"):
        for trace in distinct(mine, "trace"):
            for load in distinct(mine, "load"):
                here = select(mine, setup=setup, trace=trace, load=load)
                found = {entry["policy"]: entry for entry in here}
                fcfs = found["fcfs"]
                mean = number(fcfs["jct_s"]["mean"])
                cells = [setup, trace, number(capacity[setup][trace]), f"{load:g}",
                         f"{mean} s ({fcfs['recomputed_tokens']:,})"]  # fmt: skip
                cells += [kv_cell(found[policy], fcfs) for policy in policies if policy != "fcfs"]
                rows.append(cells)
    header = ["machine", "trace", "capacity, requests/s", "load", *policies]
    return markdown(header, rows)


def kv_seed_table(entries: Sequence[Entry]) -> str:
    """Return what drawing the arrivals anew does to mean and P99 JCT over those of FCFS, where KV
    is short: the geometric mean, then least–most.
    """
    mine = select(entries, part="kv-seeds")
    policies = [policy for policy in distinct(mine, "policy") if policy != "fcfs"]
    rows = []
    for trace in distinct(mine, "trace"):
        here = select(mine, trace=trace)
        draws = {entry["seed"]: entry for entry in select(here, policy="fcfs")}
        cells = [trace, number(len(draws))]
        for policy in policies:
            parts = []
            for part in ("mean", "p99"):
                ratios = [entry["jct_s"][part] / draws[entry["seed"]]["jct_s"][part]
                          for entry in select(here, policy=policy)]  # fmt: skip
                parts.append(f"{share(geometric_mean(ratios))} ({span(ratios)})")
            cells.append("; ".join(parts))
        rows.append(cells)
    return markdown(["trace", "draws", *policies], rows)


def kv_cell(entry: Entry, fcfs: Entry) -> str:
    """Return mean JCT over that of FCFS; P99 JCT over that of FCFS; tokens computed again."""
    mean = ratio(entry["jct_s"]["mean"], fcfs["jct_s"]["mean"])
    tail = ratio(entry["jct_s"]["p99"], fcfs["jct_s"]["p99"])
    return f"{mean}; {tail} ({entry['recomputed_tokens']:,})"


def alpha_table(entries: Sequence[Entry]) -> str:
    """Return mean JCT over that of FCFS, P99 and longest gap by α."""
    mine = select(entries, part="alpha")
    alphas = distinct(mine, "alpha")
    rows = []
    for trace in distinct(mine, "trace"):
        for load in distinct(mine, "load"):
            fcfs = select(entries, part="policy", trace=trace, load=load, policy="fcfs")[0]
            for policy in MLFQS:
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
