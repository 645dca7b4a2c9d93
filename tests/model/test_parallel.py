"""How a network is divided among ranks, and what is said of one that cannot be."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastserve.checkpoint.model_config import ModelConfig, parse_model_config
from fastserve.model.attention.shape import AttentionShape
from fastserve.model.parallel import ALONE, Parts, Shard
from fastserve.settings.option import ConfigError


def llama(**changes) -> ModelConfig:
    """Return a config of the Llama family."""
    values = {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 199,
        "hidden_size": 64,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 8,
    }
    return parse_model_config({**values, **changes}, source="config.json")


@settings(max_examples=200, deadline=None)
@given(size=st.integers(1, 16), groups=st.integers(1, 8), group_size=st.integers(1, 8))
def test_every_head_is_computed_once_beside_its_keys(size, groups, group_size):
    """Each query head is one rank's, in order, and that rank has the key-value head it reads."""
    config = llama(num_attention_heads=groups * group_size, num_key_value_heads=groups)
    parts = Parts.of(config)
    if not parts.can_divide(size):
        with pytest.raises(ConfigError):
            parts.check(size)
        return
    shards = [Shard(rank, size) for rank in range(size)]
    shape = AttentionShape.of(config, size)
    heads = [head for shard in shards for head in shard.heads(config)]
    assert heads == list(range(config.num_heads))
    for shard in shards:
        mine, keys = shard.heads(config), shard.kv_heads(config)
        assert (len(mine), len(keys)) == (shape.num_heads, shape.num_kv_heads)
        # Head i of a rank reads its key-value head i // group_size: the one it reads in the whole.
        read = [keys[i // shape.group_size] for i in range(len(mine))]
        assert read == [head // group_size for head in mine]


@settings(max_examples=200, deadline=None)
@given(size=st.integers(1, 16), width=st.integers(1, 300))
def test_widths_and_vocabularies_are_divided_without_rest(size, width):
    """Columns are spread evenly; rows of a vocabulary stand where they are looked for."""
    shards = [Shard(rank, size) for rank in range(size)]
    columns = [shard.columns(width) for shard in shards]
    assert [index for part in columns for index in part] == list(range(width))
    assert max(map(len, columns)) - min(map(len, columns)) <= 1
    height = shards[0].vocabulary_height(width)
    assert height * size - width < size  # no more is filled up than must be
    for shard in shards:
        rows = shard.vocabulary(width)
        assert list(rows) == [i for i in range(width) if i // height == shard.rank]


@pytest.mark.parametrize(
    ("changes", "size", "expected"),
    [
        ({}, 3, r"8 attention heads and 2 key-value heads .* \(possible: 1, 2, 4, 8\)"),
        ({"num_key_value_heads": 8}, 16, r"model's 8 attention heads cannot .* 1, 2, 4, 8\)"),
        ({"num_attention_heads": 6}, 3, r"6 attention heads and 2 key-value .* 1, 2, 6\)"),
        ({"intermediate_size": 3}, 4, r"3 columns of an MLP cannot be divided so .* 1, 2\)"),
        ({}, 0, r"possible: 1, 2, 4, 8\)"),
    ],
)
def test_what_cannot_be_divided_is_said_in_one_line(changes, size, expected):
    """The flag, what is in the way, and the sizes that are possible."""
    with pytest.raises(ConfigError, match=rf"--tensor-parallel-size {size}: .*{expected}") as error:
        Parts.of(llama(**changes)).check(size)
    assert "\n" not in str(error.value)


def test_odd_widths_and_vocabularies_are_no_obstacle():
    """Only heads must come out even, as with vLLM; the rest is spread or filled up."""
    Parts.of(llama(vocab_size=7, intermediate_size=83)).check(4)
    Parts.of(llama(vocab_size=2)).check(8)


def test_the_narrowest_mlp_counts():
    """Experts narrower than the ranks are many cannot be divided, where a layer has some."""
    sparse = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 3,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [1],
    }
    with pytest.raises(ConfigError, match="3 columns of an MLP"):
        Parts.of(llama(**sparse)).check(4)
    only_sparse = {**sparse, "mlp_only_layers": [], "moe_intermediate_size": 40}
    Parts.of(llama(**only_sparse, intermediate_size=1)).check(4)  # no layer has such an MLP
    with pytest.raises(ConfigError, match="1 columns of an MLP"):
        Parts.of(llama(**{**only_sparse, "mlp_only_layers": [1]}, intermediate_size=1)).check(4)


def test_alone_nothing_is_done():
    """One rank hands back the very tensors it is given."""
    x = torch.ones(2, 3)
    assert ALONE.all_reduce(x) is x
    assert ALONE.gather(x) is x
    assert Shard.of(ALONE) == Shard(0, 1)


def test_a_division_is_judged_without_torch():
    """Before any rank is started, and by what starts none."""
    code = "import sys; from fastserve.model import parallel, stages; print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "False"
