"""Which layers a stage gets: by cost, or as counted."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from fastserve.checkpoint.model_config import read_model_config
from fastserve.model.stages import Stage, balance, layer_costs, split_layers
from fastserve.settings.option import ConfigError
from tests.checkpoints import ARCHITECTURES, make_checkpoint

ALL_EXPERTS = {"mixtral": 4, "qwen3-moe": 6, "qwen3-moe-step": 6}
TABLES = ("embed_tokens", "embed_positions", "wte", "wpe")


@settings(max_examples=100, deadline=None)
@given(first=st.integers(-2, 6), stop=st.integers(-2, 6), num_layers=st.integers(1, 4))
def test_a_stage_has_layers_of_its_network(first, stop, num_layers):
    """A range that is empty or leaves the network is refused; the ends know that they are."""
    if not set(range(first, stop)) or not set(range(first, stop)) <= set(range(num_layers)):
        with pytest.raises(ValueError, match="no layers"):
            Stage(first, stop, num_layers)
        return
    stage = Stage(first, stop, num_layers)
    assert stage.is_first == (0 in range(first, stop))
    assert stage.is_last == (num_layers - 1 in range(first, stop))


@settings(max_examples=200, deadline=None)
@given(costs=st.lists(st.integers(0, 9), min_size=1, max_size=8), data=st.data())
def test_the_dearest_stage_is_as_cheap_as_any_cut_makes_it(costs, data):
    """Against all cuts there are."""
    num_stages = data.draw(st.integers(1, len(costs)))
    counts = balance(costs, num_stages)
    assert (len(counts), sum(counts)) == (num_stages, len(costs))
    assert min(counts) >= 1
    cuts = itertools.combinations(range(1, len(costs)), num_stages - 1)
    assert dearest(costs, counts) == min(
        dearest(costs, [b - a for a, b in itertools.pairwise((0, *cut, len(costs)))])
        for cut in cuts
    )


def dearest(costs, counts) -> int:
    """Return the cost of the dearest stage."""
    rest = iter(costs)
    return max(sum(itertools.islice(rest, count)) for count in counts)


@pytest.mark.parametrize(
    ("costs", "counts"),
    [([1] * 12, (4, 4, 4)), ([1] * 9 + [6], (4, 5, 1)), ([4, 1, 1, 1, 1], (1, 2, 2))],
)
def test_equal_layers_are_spread_evenly_and_a_dear_end_gets_fewer(costs, counts):
    """What a reader would choose."""
    assert balance(costs, 3) == counts


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_costs_are_the_weights_of_the_checkpoint(name, tmp_path):
    """Every matrix of a layer, and of the ends; tables are read by the row. All experts chosen."""
    changes = {"num_experts_per_tok": ALL_EXPERTS[name]} if name in ALL_EXPERTS else {}
    model = make_checkpoint(tmp_path, name, **changes)
    config = read_model_config(tmp_path)
    sizes = {
        key: tensor.numel()
        for key, tensor in load_file(tmp_path / "model.safetensors").items()
        if tensor.ndim > 1 and not any(table in key for table in TABLES)
    }
    if config.tie_word_embeddings:
        sizes["lm_head.weight"] = model.get_output_embeddings().weight.numel()
    expected = [
        sum(size for key, size in sizes.items() if f".{index}." in key.partition(".experts")[0])
        for index in range(config.num_layers)
    ]
    ends = {key: size for key, size in sizes.items() if not any(c.isdigit() for c in key)}
    is_in = {key: "project_in" in key for key in ends}
    expected[0] += config.hidden_size + sum(ends[key] for key in ends if is_in[key])
    expected[-1] += sum(ends[key] for key in ends if not is_in[key])
    assert layer_costs(config) == expected


def test_a_split_covers_the_network(tmp_path):
    """By cost the head weighs; counts that are given are taken as they are."""
    make_checkpoint(tmp_path, "llama")
    config = replace(read_model_config(tmp_path), num_layers=6)
    assert split_layers(config, 1) == [Stage(0, 6, 6)]
    assert split_layers(config, 2, (5, 1)) == [Stage(0, 5, 6), Stage(5, 6, 6)]
    heavy = split_layers(replace(config, vocab_size=2000), 2)
    light = split_layers(replace(config, vocab_size=20), 2)
    assert light == [Stage(0, 3, 6), Stage(3, 6, 6)]
    assert heavy[0].stop > 3
    assert heavy[1] == Stage(heavy[0].stop, 6, 6)


@pytest.mark.parametrize(
    ("num_stages", "counts", "expected"),
    [
        (4, None, "--pipeline-parallel-size 4: the model has 3 layers"),
        (0, None, "--pipeline-parallel-size 0"),
        (2, (2, 2), "--pipeline-layers 2,2: 2 counts of at least 1 are needed that add up to 3"),
        (2, (3, 0), "--pipeline-layers 3,0"),
        (2, (3,), "--pipeline-layers 3: 2 counts"),
        (2, (), "--pipeline-layers : 2 counts"),
    ],
)
def test_a_split_that_cannot_be_is_said_in_one_line(num_stages, counts, expected, tmp_path):
    """The flag and what would be possible."""
    make_checkpoint(tmp_path, "llama")
    with pytest.raises(ConfigError) as error:
        split_layers(read_model_config(tmp_path), num_stages, counts)
    assert str(error.value).startswith(expected)
    assert "\n" not in str(error.value)
