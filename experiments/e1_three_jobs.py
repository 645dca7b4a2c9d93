"""E1: three jobs, batch of one: mean latency by policy, to the hundredth of a second by hand.

J1 has a prefill of 2.62 s, J2 and J3 of 0.77 s, and each one decode of 0.42 s; all arrive at 0.
"""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from experiments.harness import Lab, Point
from fastserve.core.cost_model import CostModel
from fastserve.settings.scheduler import SchedulerConfig
from fastserve.sim.sim_executor import EOS_TOKEN_ID
from fastserve.sim.simulator import Machine
from fastserve.sim.workload import Workload

# A prefill of n tokens takes 0.42 + (n - 42) / 100 s, a decode 0.42 s.
COSTS = CostModel(base_s=0.42, prefill_token_s=0.01)
PROMPTS = (220, 35, 35)
BY_HAND_S = {"fcfs": 4.23, "mlfq": 5.00, "skip-join-mlfq": 3.25, "srpt": 3.00}


def point(policy: str) -> Point:
    """Return the example under a policy; starvation is out of the picture."""
    config = SchedulerConfig(
        max_num_seqs=1,
        max_num_batched_tokens=512,
        max_model_len=512,
        enable_chunked_prefill=False,
        enable_prefix_caching=False,
        scheduling_policy=policy,
        starvation_limit=1e9,
        eos_token_ids=frozenset({EOS_TOKEN_ID}),
        is_strict=True,
    )
    workload = Workload(
        arrived_at=np.zeros(3), prompt_tokens=np.array(PROMPTS), output_tokens=np.full(3, 2)
    )
    return Point(
        {"policy": policy}, config, Machine(cost_model=COSTS, num_device_blocks=64), workload
    )


def run(lab: Lab) -> None:
    """Run the example under each policy."""
    results = lab.run("e1_three_jobs", [point(policy) for policy in BY_HAND_S])
    figures = {}
    for result in results:
        policy = str(result.labels["policy"])
        figures[policy] = {
            "finished_s": result.rows["jct_s"],
            "mean_s": result.report["jct_s"]["mean"],
            "by_hand_s": BY_HAND_S[policy],
        }
    picture = Figure(figsize=(6, 3), layout="constrained")
    axes = picture.subplots()
    for row, policy in enumerate(figures):
        ends = figures[policy]["finished_s"]
        axes.scatter(ends, [row] * 3, c=["tab:red", "tab:blue", "tab:green"], zorder=3)
        for job, end in enumerate(ends, start=1):
            axes.annotate(f"J{job}", (end, row), textcoords="offset points", xytext=(-5, 7))
        axes.scatter(figures[policy]["mean_s"], row - 0.25, marker="^", c="black")
    axes.set_yticks(range(4), list(figures))
    axes.set_ylim(-0.6, 3.6)
    axes.set_xlabel("finished at (s); triangle: mean")
    settings = {"cost_model": "prefill 0.42 + (n - 42)/100 s, decode 0.42 s", "prompts": PROMPTS,
                "outputs": 2, "max_num_seqs": 1, "chunked_prefill": False, "seeds": "none: nothing "
                "is random"}  # fmt: skip
    lab.save("e1_three_jobs", settings=settings, figures=figures, picture=picture)
