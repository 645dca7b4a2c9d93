"""A network in stages: the bits of the whole one, from no more than each stage's weights."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from fastserve.checkpoint.model_config import read_model_config
from fastserve.model.attention.interfaces import PagedKV
from fastserve.model.decoder import Decoder
from fastserve.model.families.architectures import load_network
from fastserve.model.input_batch import build_input_batch
from fastserve.model.loader import open_weights
from fastserve.model.ops.torch_ops import TorchOps
from fastserve.model.stages import Stage
from fastserve.settings.option import ConfigError
from tests.checkpoints import ARCHITECTURES, make_checkpoint
from tests.model.families.test_architectures import random_ids

CPU = torch.device("cpu")
BLOCK_SIZE = 8
NUM_TOKENS = 40


def load_stages(path, cuts) -> list[Decoder]:
    """Load the stages that end before the layers `cuts`, and the last."""
    config = read_model_config(path)
    ends = [0, *cuts, config.num_layers]
    return [
        load_network(
            config,
            open_weights(path, "auto", torch.float32, CPU),
            TorchOps(torch.float32),
            max_len=64,
            device=CPU,
            stage=Stage(first, stop, config.num_layers),
        )
        for first, stop in itertools.pairwise(ends)
    ]


@torch.inference_mode()
def run_stages(path, stages, scored) -> torch.Tensor:
    """Run two chunks of a prompt through all stages; returns their logits."""
    config = read_model_config(path)
    num_blocks = NUM_TOKENS // BLOCK_SIZE
    kv_of = [
        PagedKV(
            torch.zeros(
                num_blocks,
                stage.stage.stop - stage.stage.first,
                2,
                BLOCK_SIZE,
                config.num_kv_heads,
                config.head_dim,
            )
        )
        for stage in stages
    ]
    ids, logits = np.array(random_ids(NUM_TOKENS)), []
    for start, stop in ((0, 23), (23, NUM_TOKENS)):
        batch = build_input_batch(
            token_ids=ids[start:stop],
            starts=np.array([start]),
            counts=np.array([stop - start]),
            tables=np.arange(num_blocks)[None],
            scored=None if scored is None else np.array(scored),
            block_size=BLOCK_SIZE,
            device=CPU,
        )
        hidden: torch.Tensor | None = None
        for stage, kv in zip(stages, kv_of, strict=True):
            hidden = stage(batch, kv, hidden)
            if not stage.stage.is_last:
                assert hidden.shape == (stop - start, config.hidden_size)
        assert hidden is not None
        logits.append(hidden)
    return torch.cat(logits)


@pytest.mark.parametrize("scored", [None, [16, 3]], ids=["all", "scored"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_stages_compute_the_bits_of_the_whole(name, scored, tmp_path):
    """In two and in three stages the logits of every family are those of one."""
    make_checkpoint(tmp_path, name)
    num_layers = read_model_config(tmp_path).num_layers
    whole = run_stages(tmp_path, load_stages(tmp_path, ()), scored)
    for count in (1, 2):
        for cuts in itertools.combinations(range(1, num_layers), count):
            assert torch.equal(run_stages(tmp_path, load_stages(tmp_path, cuts), scored), whole)


@pytest.mark.parametrize("name", ["llama", "opt-norm-last", "gpt2"])
def test_a_stage_reads_only_its_own_weights(name, tmp_path):
    """A middle stage needs neither ends nor the other layers, and refuses a stray of its own."""
    make_checkpoint(tmp_path, name)
    config = read_model_config(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    own = {key: tensor for key, tensor in tensors.items() if ".1." in key}
    assert 0 < len(own) < len(tensors)
    stage = Stage(1, 2, config.num_layers)

    def load() -> Decoder:
        weights = open_weights(tmp_path, "auto", torch.float32, CPU)
        ops = TorchOps(torch.float32)
        return load_network(config, weights, ops, max_len=64, device=CPU, stage=stage)

    root = {key for key in tensors if "embed_tokens" in key or "wte" in key}
    save_file(own | {key: tensors[key] for key in root}, file)  # names tell how it was saved
    assert load().stage == stage
    stray = next(iter(own)).rpartition(".")[0] + ".stray"
    save_file(tensors | {stray: torch.zeros(1)}, file)
    with pytest.raises(ConfigError, match=r"1 weights do not belong .*\.stray"):
        load()


def test_a_stage_without_its_input_says_so(tmp_path):
    """Hidden state is not made up, and a part at the wrong end is no stage."""
    make_checkpoint(tmp_path, "llama")
    first, last = load_stages(tmp_path, (1,))
    with pytest.raises(ValueError, match="takes hidden state"):
        run_stages(tmp_path, [last], None)
    with pytest.raises(ValueError, match="an end of Stage"):
        Decoder(
            last.stage,
            last.layers,
            dtype=last.dtype,
            rotary=last.rotary,
            embed=first.embed,
            head=last.head,
        )
