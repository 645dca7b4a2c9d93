"""Arrivals of any kind, for tests of what must carry them unchanged."""

from __future__ import annotations

import hypothesis.strategies as st

from fastserve.core.request import Arrival, SamplingParams

token_ids = st.lists(st.integers(0, 2**31 - 1), max_size=6).map(tuple)


def arrivals() -> st.SearchStrategy[Arrival]:
    """Return a strategy of arrivals."""
    params = st.builds(
        SamplingParams,
        temperature=st.floats(0.0, 4.0),
        seed=st.none() | st.integers(0, 2**63 - 1),
        logit_bias=st.dictionaries(st.integers(0, 99), st.floats(-100, 100), max_size=3),
        stop=st.lists(st.text(min_size=1, max_size=3), max_size=2),
        stop_token_ids=st.lists(st.integers(0, 99), max_size=2),
    )
    return st.builds(
        Arrival,
        token_ids,
        params,
        age_s=st.floats(-1e-6, 1e9),
        output_token_ids=token_ids,
        block_hashes=st.lists(st.binary(max_size=32), max_size=2),
        priority=st.integers(-100, 100),
        client=st.text(max_size=4),
        cache_salt=st.text(max_size=4),
        tenant=st.text(max_size=4),
    )
