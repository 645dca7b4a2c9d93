"""One request's key over its life: `python -m experiments.learned_key`.

Draws results/learned_key.png for docs/scheduling.md: the boost of an answer by the tokens that are
out, for three workloads, after a thousand answers of each. Must not know: queues.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from experiments.workloads import SETUP
from fastserve.core.gittins import AnswerLength
from fastserve.core.lengths import EDGES, LengthModel
from fastserve.core.policies.pricing import boost_s
from fastserve.host.provenance import ROOT

MEAN_WORK_S = 5.0
PROMPT_TOKENS = 500
OBJECTIVES = (0.0, 0.3)


def answers(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Return lengths of a thousand answers by what is said of them."""
    short, long = rng.lognormal(4.0, 0.7, 900), rng.lognormal(7.3, 0.2, 100)
    return {
        "alike (CV² 0.04)": rng.lognormal(5.5, 0.2, 1000),
        "as ShareGPT (CV² 0.5)": rng.lognormal(5.5, 0.65, 1000),
        "nine short, one long (CV² 5)": rng.permutation(np.concatenate([short, long])),
    }


def draw() -> Figure:
    """Return the picture: price and boost against the tokens that are out."""
    costs, config = SETUP.machine().cost_model, SETUP.config("learned")
    token_s = costs.decode_share_s(config.max_num_seqs, PROMPT_TOKENS)
    prefill_s = costs.added_prefill_s(PROMPT_TOKENS, 0)
    figure = Figure(figsize=(11, 4), layout="constrained")
    panels = figure.subplots(1, 2)
    for color, (name, lengths) in enumerate(answers(np.random.default_rng(0)).items()):
        model = LengthModel()
        for length in lengths.astype(int).tolist():
            model.add((), max(length, 1))
        for objective, style in zip(OBJECTIVES, ("-", "--"), strict=True):
            answer = AnswerLength(model.distribution(()), mean_tokens=model.mean_tokens,
                                  exponent=objective)  # fmt: skip
            ages = [edge - 1 for edge in EDGES if edge <= np.quantile(lengths, 0.99)]
            prices = [answer.index(answer.bin_at(age), 0.0 if age else prefill_s, token_s)
                      for age in ages]  # fmt: skip
            boosts = [boost_s(price, config.boost * MEAN_WORK_S) for price in prices]
            label = f"{name}, β {objective:g}"
            panels[0].plot(ages, prices, style, color=f"C{color}", label=label)
            panels[1].plot(ages, boosts, style, color=f"C{color}")
    panels[0].set_ylabel("price G, machine seconds")
    panels[0].set_yscale("log")
    panels[0].legend(fontsize=8)
    panels[1].set_ylabel(f"boost b(G), s, where an arrival finds {MEAN_WORK_S:g} s of work")
    for axes in panels:
        axes.set_xscale("symlog", linthresh=8)
        axes.set_xlabel("tokens of the answer that are out")
        axes.set_xlim(left=0)
        axes.grid(alpha=0.3)
    return figure


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "learned_key.png")
    figure = draw()
    FigureCanvasAgg(figure)
    figure.savefig(parser.parse_args().output, dpi=100, metadata={"Software": None})


if __name__ == "__main__":
    main()
