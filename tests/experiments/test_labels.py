"""Labels left out and in, and how well they rank answers."""

from __future__ import annotations

import math
from itertools import combinations
from typing import Any

import numpy as np
import pytest

from experiments.labels import (
    PROMPT,
    NarrowModel,
    joined,
    kendall_tau,
    labels_by_row,
    predictions,
    table_of,
)
from experiments.workloads import SETUP
from fastserve.core.lengths import LengthModel
from tests.sim.machines import make_workload


def test_tau_counts_pairs_and_takes_ties_out_of_both_sides():
    """Against the definition of τ-b, with many ties."""
    rng = np.random.default_rng(0)
    first, second = rng.integers(0, 6, 40).tolist(), rng.integers(0, 6, 40).tolist()
    signs = [
        (int(np.sign(first[i] - first[j])), int(np.sign(second[i] - second[j])))
        for i, j in combinations(range(40), 2)
    ]
    agreeing = sum(a * b for a, b in signs)
    untied = math.sqrt(sum(abs(a) for a, _ in signs) * sum(abs(b) for _, b in signs))
    assert kendall_tau(first, second) == pytest.approx(agreeing / untied)


def test_an_order_agrees_with_itself_and_not_with_its_reverse():
    """A constant ranks nothing."""
    values = [3.0, 1.0, 2.0]
    assert kendall_tau(values, values) == 1.0
    assert kendall_tau(values, [-value for value in values]) == -1.0
    assert math.isnan(kendall_tau(values, [5.0, 5.0, 5.0]))


def test_a_narrow_model_is_one_that_was_never_told_the_other_labels():
    """What it does not see it neither learns nor answers by."""
    narrow, blind, whole = NarrowModel(PROMPT), NarrowModel(""), LengthModel()
    rows = [(("p10", "cann"), 10), (("p10", "cbob"), 900)] * 20
    for labels, num_tokens in rows:
        narrow.add(labels, num_tokens)
        blind.add(labels, num_tokens)
        whole.add(labels[:1], num_tokens)
    assert narrow.state() == whole.state()
    assert narrow.telling(("p10", "cann")) == ("p10",)
    assert (blind.state()["labels"], blind.telling(("p10", "cann"))) == ({}, ())


def test_an_answer_is_predicted_before_it_is_told():
    """The first one is the prior; what follows a label is known from its second request on."""
    labels = [("p4",), ("p9",)] * 30
    answered = [10, 800] * 30
    means = predictions(LengthModel(), labels, answered)
    assert means[0] == pytest.approx(predictions(LengthModel(), labels[:1], [500])[0])
    assert means[-2] < 200 < means[-1]


def test_labels_are_of_lengths_clients_and_equal_beginnings():
    """Ids of 512 tokens make equal first blocks; without them no two prompts begin alike."""
    workload = make_workload(
        (0.0, 600, 5), (1.0, 1100, 5), (2.0, 20, 5), client=("ann", "bob", "ann"),
        hash_ids=((7, 8), (7, 9, 10), (1,)),
    )  # fmt: skip
    first, second, third = labels_by_row(workload, SETUP.config("learned"))
    assert first[0] != second[0]
    assert (first[1], second[1]) == ("cann", "cbob")
    assert first[2] == second[2] != third[2]


def test_one_trace_follows_the_other_after_a_gap():
    """Neither the arrivals of one at the time of the other nor a pause between them."""
    both = joined(make_workload((5.0, 1, 2), (6.0, 3, 4)), make_workload((9.0, 5, 6), (11.0, 7, 8)))
    assert both.arrived_at.tolist() == [5.0, 6.0, 8.0, 10.0]
    assert both.prompt_tokens.tolist() == [1, 3, 5, 7]
    assert both.output_tokens.tolist() == [2, 4, 6, 8]


def test_a_label_stands_beside_what_was_without_it():
    """What nothing ranks has no τ."""
    entry: dict[str, Any] = {
        "label": "client", "trace": "t", "rows": 600, "tau_without": math.nan, "tau_with": 0.25,
        "jct_without_over_fcfs": 1.0, "jct_with_over_fcfs": 0.8,
    }  # fmt: skip
    assert table_of([entry]).splitlines()[-1] == "| client | t | 600 | - → 0.25 | 1.00 → 0.80 |"
