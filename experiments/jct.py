"""Job completion times by variant along one label: tables, gains and pictures.

Must not know: which experiment it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes

from experiments.capacity import over_seeds
from experiments.harness import Labels, Result
from experiments.sweep import Variant

PARTS = ("mean", "p95", "p99")


def jct(part: str) -> Callable[[Result], float]:
    """Return the figure: a part of the JCT's summary, in seconds."""
    return lambda result: float(result.report["jct_s"][part])


def counted(name: str) -> Callable[[Result], float]:
    """Return the figure: a count of the report."""
    return lambda result: float(result.report[name])


def along(
    results: Sequence[Result], labels: Labels, variants: Sequence[Variant], by: str
) -> dict[str, Any]:
    """Return, by variant, the JCT over the seeds at each value of the label `by`."""
    mine = [result for result in results if result.matches(labels)]
    values = sorted({result.labels[by] for result in mine}, key=float)
    return {
        variant.name: {
            by: values,
            **{
                part: [over_seeds(mine, {"variant": variant.name, by: value}, jct(part))
                       for value in values]
                for part in PARTS
            },
        }
        for variant in variants
    }  # fmt: skip


def gains(table: Mapping[str, Any], by: str, over: str, of: str) -> dict[str, Any]:
    """Return JCT of `over` divided by that of `of`: at each value, and the most there is."""
    base, ours = table[over], table[of]
    found: dict[str, Any] = {by: base[by]}
    for part in PARTS:
        ratios = [slow["mean"] / fast["mean"]
                  for slow, fast in zip(base[part], ours[part], strict=True)]  # fmt: skip
        found[part] = ratios
        found[f"most_{part}"] = max(ratios)
        found[f"most_{part}_at"] = base[by][ratios.index(max(ratios))]
    return found


def all_gains(
    table: Mapping[str, Any], by: str, bases: Sequence[Variant], ours: Sequence[Variant]
) -> dict[str, Any]:
    """Return the gains of each of `ours` over each of `bases`."""
    return {
        f"{mine.name} over {base.name}": gains(table, by, base.name, mine.name)
        for mine in ours
        for base in bases
    }


def draw(axes: Axes, table: Mapping[str, Any], by: str, part: str, title: str) -> None:
    """Draw JCT along the label, one line per variant, with the spread over the seeds."""
    for color, (name, row) in enumerate(table.items()):
        means = [value["mean"] for value in row[part]]
        stds = [value["std"] for value in row[part]]
        axes.errorbar(row[by], means, stds, label=name, color=f"C{color}", marker=".",
                      linewidth=1, capsize=2)  # fmt: skip
    axes.set_yscale("log")
    axes.set_title(title, fontsize=9)
    axes.set_xlabel(by, fontsize=8)
    axes.set_ylabel(f"JCT, s: {part}", fontsize=8)
    axes.grid(alpha=0.3)
