"""A network on several ranks: one rank's logits and KV, from no more than each rank's weights."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastserve.checkpoint.model_config import read_model_config
from fastserve.executor.choices import choose_cpu_kernels, choose_ops
from fastserve.model.families.architectures import load_network
from fastserve.model.loader import Part, Weights, open_weights
from fastserve.model.ops.interfaces import Ops
from fastserve.model.ops.torch_ops import TorchOps
from fastserve.model.parallel import ALONE, Shard, TensorGroup
from fastserve.settings.option import ConfigError
from tests.checkpoints import ARCHITECTURES, VOCAB_SIZE, make_checkpoint
from tests.model.kernels.cpu.kernel_cases import needs_int8
from tests.model.sharded import (
    CPU,
    NUM_TOKENS,
    make_wide_checkpoint,
    run,
    run_sharded,
)
from tests.model.thread_group import ThreadGroup, run_ranks


def open_sharded(path) -> Weights:
    """Open the weights of a checkpoint in float32."""
    return open_weights(path, "auto", torch.float32, CPU)


def plain() -> Ops:
    """Make parts of plain torch."""
    return TorchOps(torch.float32)


def chosen(dtype=torch.float32, *, is_deterministic: bool, quantization=None) -> Ops:
    """Make the parts that a worker takes on a CPU: packed products, compiled kernels."""
    kernels = choose_cpu_kernels(
        "auto", dtype, CPU, quantization, is_deterministic=is_deterministic
    )
    return choose_ops(dtype, CPU, kernels, is_deterministic, quantization)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logits_and_kv_are_those_of_one_rank(name, tmp_path):
    """In chunks and token by token, on two and on four ranks, which have two key-value heads."""
    make_wide_checkpoint(tmp_path, name)
    config = read_model_config(tmp_path)
    whole = run(tmp_path, ALONE, plain())
    assert whole.logits.shape == (NUM_TOKENS, VOCAB_SIZE)
    for size in (2, 4):
        ranks = run_sharded(size, tmp_path, plain)
        torch.testing.assert_close(ranks[0].logits, whole.logits, atol=1e-4, rtol=0)
        for rank, part in enumerate(ranks):
            heads = Shard(rank, size).kv_heads(config)
            own = whole.kv[..., heads.start : heads.stop, :]
            torch.testing.assert_close(part.kv, own, atol=1e-4, rtol=0)
            assert rank == 0 or part.logits.shape == (0, VOCAB_SIZE)


@pytest.mark.parametrize("is_deterministic", [False, True], ids=["fastest", "deterministic"])
@pytest.mark.parametrize("name", ["llama", "qwen3", "mixtral", "opt-norm-last", "opt", "gpt2"])
def test_shards_are_made_of_any_parts(name, is_deterministic, tmp_path):
    """Packed products and compiled kernels, and those of --deterministic, serve a shard as well."""
    make_wide_checkpoint(tmp_path, name)
    whole = run(tmp_path, ALONE, plain())
    ranks = run_sharded(2, tmp_path, partial(chosen, is_deterministic=is_deterministic))
    torch.testing.assert_close(ranks[0].logits, whole.logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("quantization", [None, pytest.param("int8", marks=needs_int8)])
@pytest.mark.parametrize("name", ["llama", "mixtral", "opt", "gpt2"])
def test_half_types_lose_no_more_than_on_one_rank(name, quantization, tmp_path):
    """In bfloat16 terms are rounded before they are added up: logits are about as far off.

    So they are with weights of int8, of which a rank scales the part that it has.
    """
    make_wide_checkpoint(tmp_path, name, inner_width=88)  # even for each of four ranks
    exact = run(tmp_path, ALONE, plain()).logits
    make_ops = partial(chosen, torch.bfloat16, is_deterministic=False, quantization=quantization)
    one = run(tmp_path, ALONE, make_ops(), dtype=torch.bfloat16).logits
    four = run_sharded(4, tmp_path, make_ops, dtype=torch.bfloat16)[0].logits
    assert 0 < (four - exact).square().mean() < 2 * (one - exact).square().mean()


@pytest.mark.parametrize("name", ["llama", "opt-norm-last", "gpt2", "mixtral"])
def test_stages_of_shards(name, tmp_path):
    """Two stages of two shards: the bits of the two shards alone, and one rank's logits."""
    make_wide_checkpoint(tmp_path, name)
    whole = run(tmp_path, ALONE, plain())
    one, two = (run_sharded(2, tmp_path, plain, num_stages=num_stages) for num_stages in (1, 2))
    torch.testing.assert_close(two[0].logits, whole.logits, atol=1e-4, rtol=0)
    for staged, unstaged in zip(two, one, strict=True):
        assert torch.equal(staged.logits, unstaged.logits)
        assert torch.equal(staged.kv, unstaged.kv)


@pytest.mark.parametrize(("name", "size"), [("qwen3", 2), ("mixtral", 4), ("gpt2", 4)])
def test_deterministic_bits_do_not_depend_on_the_batch_of_a_shard(name, size, tmp_path):
    """One number of ranks has one result, however a prompt is cut, and layers are."""
    make_wide_checkpoint(tmp_path, name)
    make_ops = partial(chosen, is_deterministic=True)
    ranks = run_sharded(size, tmp_path, make_ops, cuts=())
    for other in (
        run_sharded(size, tmp_path, make_ops),
        run_sharded(size, tmp_path, make_ops, cuts=(), num_stages=3),
    ):
        for found, expected in zip(other, ranks, strict=True):
            assert torch.equal(found.logits, expected.logits)
            assert torch.equal(found.kv, expected.kv)


class CountedWeights:
    """Fits `Weights`: counts the elements that are handed out of each tensor."""

    def __init__(self, inner: Weights) -> None:
        self.inner = inner
        self.dtype = inner.dtype
        self.num_elements: dict[str, int] = {}

    def has(self, name: str) -> bool:
        """Fit `Weights`."""
        return self.inner.has(name)

    def get(self, name: str, *shape: int, part: Part = ()) -> Tensor:
        """Fit `Weights`."""
        tensor = self.inner.get(name, *shape, part=part)
        self.num_elements[name] = self.num_elements.get(name, 0) + tensor.numel()
        return tensor

    def finish(self, elsewhere=()) -> None:
        """Fit `Weights`."""
        self.inner.finish(elsewhere)


UNDIVIDED = ("norm", "ln_", "embed_positions", "wpe", "project_", "gate.weight", "mlp.router")


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", [*ARCHITECTURES, "mixtral-stacked"])
def test_a_rank_reads_only_its_part(name, size, tmp_path):
    """Every big matrix is read once by all ranks together, but for keys and values they share."""
    if name == "mixtral-stacked":
        make_stacked_checkpoint(tmp_path)
    else:
        make_wide_checkpoint(tmp_path, name)
    config = read_model_config(tmp_path)

    def load(group: TensorGroup) -> dict[str, int]:
        weights = CountedWeights(open_sharded(tmp_path))
        ops = TorchOps(torch.float32)
        load_network(config, weights, ops, max_len=64, device=CPU, group=group)
        return weights.num_elements

    ranks = run_ranks(size, load)
    tensors = load_file(tmp_path / "model.safetensors")
    big = {
        key: tensor.numel()
        for key, tensor in tensors.items()
        if tensor.ndim > 1 and not any(part in key for part in UNDIVIDED)
    }
    assert len(big) > config.num_layers * 3
    for key, whole in big.items():
        is_shared = "k_proj" in key or "v_proj" in key
        copies = max(size // config.num_kv_heads, 1) if is_shared else 1
        assert sum(counts[key] for counts in ranks) == whole * copies
        assert max(counts[key] for counts in ranks) <= whole * copies / size * 1.1


def make_stacked_checkpoint(path) -> None:
    """Make a Mixtral whose experts lie in one tensor, as transformers 5 keeps them in memory."""
    changes = {"num_attention_heads": 8, "intermediate_size": 82}
    model = make_checkpoint(path, "mixtral", **changes)
    tensors = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    assert any("gate_up_proj" in key for key in tensors)
    save_file(tensors, path / "model.safetensors")


def test_stacked_experts_are_divided_alike(tmp_path):
    """The other way to store experts gives the same shards."""
    make_stacked_checkpoint(tmp_path / "stacked")
    make_wide_checkpoint(tmp_path / "single", "mixtral")
    one, other = (run_sharded(2, tmp_path / folder, plain) for folder in ("stacked", "single"))
    assert torch.equal(one[0].logits, other[0].logits)


def test_ranks_meet_as_rarely_as_they_can(tmp_path):
    """Twice a layer, for the ids and for the logits; not for a bias."""
    make_wide_checkpoint(tmp_path, "llama-mha-biased")
    config = read_model_config(tmp_path)

    def count(group: TensorGroup) -> int:
        assert isinstance(group, ThreadGroup)
        run(tmp_path, group, plain(), cuts=())
        return group.num_calls

    assert run_ranks(2, count) == [2 * config.num_layers + 2] * 2


def test_a_network_that_cannot_be_divided_is_not_loaded(tmp_path):
    """Nothing of it is read."""
    make_checkpoint(tmp_path, "llama")
    weights = CountedWeights(open_sharded(tmp_path))

    def load(group: TensorGroup) -> None:
        load_network(
            read_model_config(tmp_path),
            weights,
            TorchOps(torch.float32),
            max_len=64,
            device=CPU,
            group=group,
        )

    with pytest.raises(ConfigError, match=r"--tensor-parallel-size 3: .* \(possible: 1, 2, 6\)"):
        run_ranks(3, load)
    assert not weights.num_elements
