"""The grid of ranks: each place has one rank, and hidden state goes from stage to stage."""

from __future__ import annotations

import itertools

import pytest

from fastserve.executor.layout import Layout
from fastserve.settings.engine import EngineConfig

GRID = list(itertools.product((1, 2, 4), (1, 2, 3)))


@pytest.mark.parametrize(("tp", "pp"), GRID)
def test_every_place_has_one_rank(tp: int, pp: int) -> None:
    """A rank is found where it says it is; the shards of a stage are neighbours."""
    layout = Layout(tp, pp)
    places = [(layout.stage_of(rank), layout.shard_of(rank)) for rank in range(layout.num_ranks)]
    assert places == list(itertools.product(range(pp), range(tp)))
    assert [layout.rank_at(*place) for place in places] == list(range(layout.num_ranks))
    assert [rank for stage in range(pp) for rank in layout.shards_of(stage)] == list(
        range(layout.num_ranks)
    )


@pytest.mark.parametrize(("tp", "pp"), GRID)
def test_hidden_state_goes_from_the_first_stage_to_the_last(tp: int, pp: int) -> None:
    """Through every stage once, always on the same shard; one shard leads each stage."""
    layout = Layout(tp, pp)
    for shard in range(tp):
        rank: int | None = layout.rank_at(0, shard)
        passed: list[int] = []
        while rank is not None:
            assert layout.before(rank) == (passed[-1] if passed else None)
            passed.append(rank)
            rank = layout.behind(rank)
        assert passed == [layout.rank_at(stage, shard) for stage in range(pp)]
    leaders = [rank for rank in range(layout.num_ranks) if layout.is_leader(rank)]
    assert leaders == [layout.rank_at(stage, 0) for stage in range(pp)]


def test_it_is_what_the_settings_ask_for() -> None:
    """And says in words where a rank is."""
    layout = Layout.of(EngineConfig(tensor_parallel_size=2, pipeline_parallel_size=3))
    assert layout == Layout(tensor_parallel_size=2, pipeline_parallel_size=3)
    assert layout.describe(3) == "stage 1 of 3, shard 1 of 2"
