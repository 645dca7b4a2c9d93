"""Checkpoints: shards, dummies, and the one-line errors of those that cannot be loaded."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fastserve.checkpoint.model_config import read_model_config
from fastserve.model import loader
from fastserve.model.families.architectures import load_network
from fastserve.model.loader import Slice, open_weights
from fastserve.model.ops.torch_ops import TorchOps
from fastserve.settings.option import ConfigError
from tests.checkpoints import make_checkpoint

CPU = torch.device("cpu")


def load(path, load_format="auto", dtype=torch.float32) -> Any:
    """Load the network of a directory."""
    weights = open_weights(path, load_format, dtype, CPU)
    return load_network(read_model_config(path), weights, TorchOps(dtype), max_len=64, device=CPU)


@pytest.fixture
def checkpoint(tmp_path):
    """A tiny Llama in one file."""
    make_checkpoint(tmp_path, "llama")
    return tmp_path


def change(path, function) -> None:
    """Rewrite the weights of a checkpoint."""
    file = path / "model.safetensors"
    tensors = load_file(file)
    function(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_checked_weights_are_finite_or_named(checkpoint, value):
    """Also in the dtype to run: half precision has no room for large numbers."""
    name = "model.layers.1.mlp.up_proj.weight"

    def network(dtype=torch.float32):
        weights = open_weights(checkpoint, "auto", dtype, CPU, is_checked=True)
        config = read_model_config(checkpoint)
        return load_network(config, weights, TorchOps(dtype), max_len=64, device=CPU)

    read = network().layers.layers[1].qkv.weight
    assert torch.equal(read, load(checkpoint).layers.layers[1].qkv.weight)
    change(checkpoint, lambda tensors: tensors[name][3].fill_(1e20))
    network(torch.bfloat16)
    with pytest.raises(ConfigError, match="not finite in float16"):
        network(torch.float16)
    change(checkpoint, lambda tensors: tensors[name][3, 4:5].fill_(value))
    load(checkpoint)
    with pytest.raises(ConfigError, match=f"'{name}' has numbers that are not finite in float32"):
        network()


def test_shards_equal_one_file(tmp_path):
    """A checkpoint in shards with an index loads the same weights."""
    model = make_checkpoint(tmp_path / "one", "llama")
    model.save_pretrained(tmp_path / "many", max_shard_size="40KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 1
    one, many = load(tmp_path / "one"), load(tmp_path / "many")
    assert torch.equal(one.layers.layers[2].qkv.weight, many.layers.layers[2].qkv.weight)
    assert torch.equal(one.head.vocabulary.weight, many.head.vocabulary.weight)


def test_missing_shard(tmp_path):
    """A shard that the index names and the directory lacks is named."""
    make_checkpoint(tmp_path, "llama").save_pretrained(tmp_path / "many", max_shard_size="40KB")
    shard = sorted((tmp_path / "many").glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(ConfigError, match=shard.name):
        load(tmp_path / "many")


def test_index_may_not_leave_the_directory(checkpoint):
    """An index that points elsewhere is refused."""
    (checkpoint / "model.safetensors").rename(checkpoint.parent / "elsewhere.safetensors")
    index = {"weight_map": {"lm_head.weight": "../elsewhere.safetensors"}}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(ConfigError, match="outside the model's directory"):
        load(checkpoint)


def test_broken_index(checkpoint):
    """An index without a weight map is a ConfigError."""
    (checkpoint / "model.safetensors").unlink()
    (checkpoint / "model.safetensors.index.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ConfigError, match="cannot be read"):
        load(checkpoint)


def test_broken_file(checkpoint):
    """A truncated file is a ConfigError."""
    file = checkpoint / "model.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ConfigError, match="cannot be read"):
        load(checkpoint)


def test_only_bin_weights(checkpoint):
    """Pickled weights are refused, with the reason."""
    (checkpoint / "model.safetensors").rename(checkpoint / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"`fastserve convert /.*`"):
        load(checkpoint)


def test_no_weights(checkpoint):
    """A directory without weights points to --load-format dummy, which then works."""
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="--load-format dummy"):
        load(checkpoint)
    model = load(checkpoint, "dummy")
    assert torch.equal(model.embed.tokens, load(checkpoint, "dummy").embed.tokens)
    assert float(model.embed.tokens.std()) == pytest.approx(0.02, rel=0.1)


def test_missing_weights(checkpoint):
    """A tensor that the network needs and the checkpoint lacks is named."""
    change(checkpoint, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(ConfigError, match=r"no weights 'model\.layers\.1\.mlp\.up_proj\.weight'"):
        load(checkpoint)


def test_weights_left_over(checkpoint):
    """Weights that the architecture has no use for are refused, tabulated frequencies are not."""

    def add(name):
        return lambda tensors: tensors.update({name: torch.zeros(3)})

    change(checkpoint, add("model.layers.0.self_attn.rotary_emb.inv_freq"))
    load(checkpoint)
    change(checkpoint, add("model.layers.0.self_attn.q_proj.bias"))
    with pytest.raises(ConfigError, match=r"q_proj\.bias"):
        load(checkpoint)


def test_wrong_shape(checkpoint):
    """A tensor of another shape than config.json implies is named with both shapes."""
    change(checkpoint, lambda tensors: tensors.update({"model.norm.weight": torch.ones(47)}))
    with pytest.raises(ConfigError, match=r"shape \[47\], config.json asks for \[48\]"):
        load(checkpoint)


def test_dtype(checkpoint):
    """Weights come in the dtype asked for."""
    model = load(checkpoint, dtype=torch.bfloat16)
    assert {model.dtype, model.head.vocabulary.weight.dtype, model.head.norm.weight.dtype} == {
        torch.bfloat16
    }


@pytest.mark.parametrize("end", ["qweight", "weight_packed", "SCB", "weight_scale_inv", "scales"])
def test_quantized_weights_are_called_so(checkpoint, end):
    """An old layout of GPTQ and its kin, which no config.json tells of: known by its names."""
    name = "model.layers.0.self_attn.q_proj"

    def quantize(tensors) -> None:
        weight = tensors[f"{name}.weight"]
        if end in ("qweight", "weight_packed"):
            del tensors[f"{name}.weight"]
        tensors[f"{name}.{end}"] = weight.to(torch.int32)

    change(checkpoint, quantize)
    with pytest.raises(ConfigError, match=f"'{name}.{end}' is of quantized weights") as caught:
        load(checkpoint)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.uint8])
def test_weights_of_eight_bits_are_not_taken_for_numbers(checkpoint, dtype):
    """Their scales stand elsewhere, or nowhere: loaded as they are they would be silently wrong."""
    name = "model.layers.0.mlp.up_proj.weight"
    change(checkpoint, lambda tensors: tensors.update({name: tensors[name].to(dtype)}))
    kind = str(dtype).removeprefix("torch.")
    with pytest.raises(ConfigError, match=f"'{name}' is stored as {kind}: quantized"):
        load(checkpoint)


class CountingFile:
    """A file that counts the bytes of what is taken from it."""

    def __init__(self, file) -> None:
        self.file = file
        self.num_bytes = 0

    def keys(self):
        """Return the names."""
        return self.file.keys()

    def get_tensor(self, name):
        """Take a whole tensor."""
        return self._count(self.file.get_tensor(name))

    def get_slice(self, name):
        """Return what slices a tensor."""
        return CountingSlice(self.file.get_slice(name), self._count)

    def _count(self, tensor):
        self.num_bytes += tensor.numel() * tensor.element_size()
        return tensor


class CountingSlice:
    """A slice of a CountingFile."""

    def __init__(self, inner, count) -> None:
        self.inner = inner
        self.count = count

    def get_shape(self):
        """Return the shape of the whole tensor."""
        return self.inner.get_shape()

    def __getitem__(self, index):
        return self.count(self.inner[index])


@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    cuts=st.sets(st.integers(1, 8)),
    dim=st.integers(0, 2),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_slices_make_up_the_whole(tmp_path_factory, shape, cuts, dim, dtype):
    """From files and of dummies, along any dimension; of a file only the slice's bytes are read."""
    dim %= len(shape)
    path = tmp_path_factory.mktemp("sliced")
    save_file({"a.weight": torch.randn(shape)}, path / "model.safetensors")
    ends = [0, *sorted(cut for cut in cuts if cut < shape[dim]), shape[dim]]
    for load_format in ("auto", "dummy"):
        whole = open_weights(path, load_format, dtype, CPU).get("a.weight", *shape)
        files: list[CountingFile] = []

        def open_counted(file, framework, files=files):
            files.append(CountingFile(safe_open(file, framework=framework)))
            return files[-1]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loader, "safe_open", open_counted)
            weights = open_weights(path, load_format, dtype, CPU)
        parts = []
        for start, stop in pairwise(ends):
            before = [file.num_bytes for file in files]
            parts.append(weights.get("a.weight", *shape, part=Slice(start, stop, dim)))
            assert parts[-1].is_contiguous()
            read = [file.num_bytes - was for file, was in zip(files, before, strict=True)]
            assert read == [parts[-1].numel() * 4 for _ in files]
        assert torch.equal(torch.cat(parts, dim), whole)


def test_a_slice_of_another_shape_is_refused(checkpoint):
    """The shape that is asked for is the whole tensor's, whatever part is wanted."""
    weights = open_weights(checkpoint, "auto", torch.float32, CPU)
    with pytest.raises(ConfigError, match=r"shape \[48\], config.json asks for \[50\]"):
        weights.get("model.norm.weight", 50, part=Slice(49, 50))


@pytest.mark.parametrize("load_format", ["auto", "dummy"])
def test_a_part_may_be_cut_along_several_dimensions(load_format, tmp_path):
    """As a rank reads its rows of one expert; a part that is everything is the whole."""
    save_file({"a": torch.randn(3, 4, 5)}, tmp_path / "model.safetensors")
    weights = open_weights(tmp_path, load_format, torch.float32, CPU)
    whole = weights.get("a", 3, 4, 5)
    part = weights.get("a", 3, 4, 5, part=(Slice(1, 2), Slice(2, 5, dim=2)))
    assert torch.equal(part, whole[1:2, :, 2:5])
    assert part.is_contiguous()
    assert torch.equal(weights.get("a", 3, 4, 5, part=(Slice(0, 3), Slice.of(range(4), 1))), whole)
    assert weights.get("a", 3, 4, 5, part=Slice(3, 3)).shape == (0, 4, 5)
