"""Logits of every architecture against transformers', in float32, to 1e-4."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from fastserve.checkpoint.model_config import read_model_config
from fastserve.model.attention.interfaces import PagedKV, ReferenceAttention
from fastserve.model.families.architectures import load_network
from fastserve.model.input_batch import build_input_batch
from fastserve.model.loader import open_weights
from fastserve.model.ops.torch_ops import TorchOps
from tests.checkpoints import ARCHITECTURES, VOCAB_SIZE, make_checkpoint, write_old_dialect

CPU = torch.device("cpu")
BLOCK_SIZE = 8
NUM_TOKENS = 150
FAMILIES = ("llama", "qwen3", "opt", "opt-norm-last", "gpt2", "mixtral", "qwen3-moe")


class ReferenceOps(TorchOps):
    """Plain parts over the definition of attention."""

    def attention(self, shape):
        """Fit `Ops`."""
        return ReferenceAttention(shape)


@torch.inference_mode()
def logits_in_chunks(
    path, ids, cuts, *, dtype=torch.float32, load_format="auto", is_reference=False, scored=None
):
    """Run a sequence in chunks that end at `cuts`, over scattered blocks; returns all logits."""
    config = read_model_config(path)
    weights = open_weights(path, load_format, dtype, CPU)
    ops = ReferenceOps(dtype) if is_reference else TorchOps(dtype)
    network = load_network(config, weights, ops, max_len=200, device=CPU)
    num_blocks = -(-len(ids) // BLOCK_SIZE)
    shape = (3 * num_blocks, config.num_layers, 2, BLOCK_SIZE, config.num_kv_heads)
    kv = PagedKV(torch.zeros(*shape, config.head_dim, dtype=dtype))
    table = np.random.default_rng(0).permutation(3 * num_blocks)[:num_blocks]
    logits = []
    for start, stop in zip([0, *cuts], [*cuts, len(ids)], strict=True):
        batch = build_input_batch(
            token_ids=np.array(ids[start:stop]),
            starts=np.array([start]),
            counts=np.array([stop - start]),
            tables=table[None, : -(-stop // BLOCK_SIZE)],
            scored=None if scored is None else np.array(scored),
            block_size=BLOCK_SIZE,
            device=CPU,
        )
        logits.append(network(batch, kv))
    return torch.cat(logits)


def random_ids(num_tokens, seed=1):
    """Return ids of the tiny vocabulary."""
    return np.random.default_rng(seed).integers(0, VOCAB_SIZE, num_tokens).tolist()


@pytest.mark.parametrize("name", ["mistral", "mixtral", "qwen2", "qwen3", "qwen3-moe"])
def test_up_to_its_sliding_window_a_network_is_exact(name, tmp_path):
    """The longest context that is allowed has transformers' logits, and one token more has not."""
    settings = {"use_sliding_window": True, "max_window_layers": 1} if "qwen" in name else {}
    model = make_checkpoint(tmp_path, name, sliding_window=90, **settings)
    window = read_model_config(tmp_path).max_model_len
    ids = random_ids(window + 1)
    with torch.inference_mode():
        expected = model(torch.tensor([ids])).logits[0]
    logits = logits_in_chunks(tmp_path, ids, [50])
    torch.testing.assert_close(logits[:window], expected[:window], atol=1e-4, rtol=0)
    assert (logits[window] - expected[window]).abs().max() > 1e-4


@pytest.mark.parametrize("is_old", [False, True], ids=["new-dialect", "old-dialect"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logits_equal_transformers(name, is_old, tmp_path):
    """Whole, chunked, and token by token: the logits are those of transformers."""
    model = make_checkpoint(tmp_path, name)
    if is_old:
        write_old_dialect(tmp_path)
    ids = random_ids(NUM_TOKENS)
    with torch.inference_mode():
        expected = model(torch.tensor([ids])).logits[0]
    for cuts in ([], [37, 64, 65, 90], [100, *range(101, NUM_TOKENS)]):
        torch.testing.assert_close(
            logits_in_chunks(tmp_path, ids, cuts), expected, atol=1e-4, rtol=0
        )


@pytest.mark.parametrize("name", FAMILIES)
def test_only_scored_rows_get_logits(name, tmp_path):
    """Rows that are asked for, in the order asked for, get the logits they get among all."""
    make_checkpoint(tmp_path, name)
    ids = random_ids(40)
    torch.testing.assert_close(
        logits_in_chunks(tmp_path, ids, [], scored=[39, 3, 17]),
        logits_in_chunks(tmp_path, ids, [])[[39, 3, 17]],
        atol=1e-5,
        rtol=1e-5,
    )


@pytest.mark.parametrize("name", ["llama3", "opt-norm-last"])
def test_reference_attention_gives_the_same_logits(name, tmp_path):
    """The network over the reference attention agrees, so an error is in one of the two."""
    make_checkpoint(tmp_path, name)
    ids = random_ids(40, seed=2)
    torch.testing.assert_close(
        logits_in_chunks(tmp_path, ids, [11, 30], is_reference=True),
        logits_in_chunks(tmp_path, ids, [11, 30]),
        atol=1e-5,
        rtol=1e-5,
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", FAMILIES)
def test_half_types_come_near(name, dtype, tmp_path):
    """In half precision every family runs, and its logits stay near those of float32.

    Weights are small here: with the large ones of the other tests rounding alone would move a
    token to other experts.
    """
    make_checkpoint(tmp_path, name, **{"init_std" if "opt" in name else "initializer_range": 0.05})
    ids = random_ids(60)
    exact = logits_in_chunks(tmp_path, ids, [20, 21])
    rounded = logits_in_chunks(tmp_path, ids, [20, 21], dtype=dtype)
    assert rounded.dtype == torch.float32
    error = (rounded - exact).square().mean().sqrt() / exact.square().mean().sqrt()
    assert 0 < error < (0.04 if dtype == torch.bfloat16 else 0.01)


@pytest.mark.parametrize("name", FAMILIES)
def test_dummy_weights(name, tmp_path):
    """Every family computes something from a config.json alone, the same at every start."""
    make_checkpoint(tmp_path, name)
    (tmp_path / "model.safetensors").unlink()
    first, second = (
        logits_in_chunks(tmp_path, random_ids(9), [4], load_format="dummy") for _ in range(2)
    )
    assert torch.equal(first, second)
    assert bool(first.isfinite().all())
    assert float(first.std()) > 0.01  # norms have weight one: nothing vanishes


@pytest.mark.parametrize(
    ("name", "prefix"), [("opt", "model."), ("opt-norm-last", "model."), ("gpt2", "transformer.")]
)
def test_networks_saved_without_their_head(name, prefix, tmp_path):
    """Names without the outermost prefix are those of the first OPT and GPT-2 checkpoints."""
    make_checkpoint(tmp_path, name)
    expected = logits_in_chunks(tmp_path, random_ids(9), [])
    tensors = load_file(tmp_path / "model.safetensors")
    assert all(key.startswith(prefix) for key in tensors)
    bare = {key.removeprefix(prefix): tensor for key, tensor in tensors.items()}
    save_file(bare, tmp_path / "model.safetensors")
    torch.testing.assert_close(logits_in_chunks(tmp_path, random_ids(9), []), expected)


def test_masks_stored_with_gpt2_are_no_weights(tmp_path):
    """The original checkpoint holds its causal masks, which nothing needs."""
    make_checkpoint(tmp_path, "gpt2")
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["transformer.h.0.attn.bias"] = torch.ones(1, 1, 256, 256).tril()
    tensors["transformer.h.0.attn.masked_bias"] = torch.tensor(-1e4)
    save_file(tensors, tmp_path / "model.safetensors")
    assert len(logits_in_chunks(tmp_path, random_ids(9), [])) == 9


@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe"])
def test_stacked_experts(name, tmp_path):
    """Experts stacked in one tensor, as transformers 5 names them, are the same experts."""
    model = make_checkpoint(tmp_path, name)
    expected = logits_in_chunks(tmp_path, random_ids(9), [])
    names = set(load_file(tmp_path / "model.safetensors"))
    tensors = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    assert "model.layers.0.mlp.experts.gate_up_proj" in set(tensors) - names
    save_file(tensors, tmp_path / "model.safetensors")
    torch.testing.assert_close(logits_in_chunks(tmp_path, random_ids(9), []), expected)


def test_a_position_beyond_the_table_is_refused_by_the_window(tmp_path):
    """Learned positions end: the window is exactly as long as their table."""
    make_checkpoint(tmp_path, "opt")
    assert read_model_config(tmp_path).max_model_len == 256
    file = tmp_path / "config.json"
    values = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps({**values, "max_position_embeddings": 300}), encoding="utf-8")
    with pytest.raises(Exception, match=r"embed_positions.*\[258, 48\].*\[302, 48\]"):
        logits_in_chunks(tmp_path, random_ids(9), [])
