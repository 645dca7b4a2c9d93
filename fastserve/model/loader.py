"""Where weights come from: safetensors files of a Hugging Face checkpoint, or random numbers.

Rules: names and shapes are the checkpoint's; every tensor asked for must be there with its shape,
and every tensor there must have been asked for or belong to another stage, so that no part of a
model is silently left out. Of a tensor that is asked for in part, only that part is read.
Must not know: what the tensors mean.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fastserve.checkpoint.weight_index import indexed_files
from fastserve.settings.option import ConfigError

TABLES = ("rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias")
"""Ends of names under which old checkpoints store tabulated frequencies and GPT-2's masks."""

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""Others hold whole numbers or eight bits, whose scales stand elsewhere."""

QUANTIZED = (".qweight", ".weight_packed", ".weight_scale", ".weight_scale_inv", ".SCB", ".scales")
"""Ends of names of GPTQ and AWQ, compressed-tensors, fp8, bitsandbytes and MLX."""


@dataclass(frozen=True, slots=True)
class Slice:
    """Indices [start, stop) of one dimension."""

    start: int
    stop: int
    dim: int = 0

    @classmethod
    def of(cls, indices: range, dim: int = 0) -> Slice:
        """Return the slice of consecutive indices."""
        return cls(indices.start, indices.stop, dim)


Part = Slice | tuple[Slice, ...]
"""Of one dimension, or of several; of none: the whole tensor."""


def part_index(part: Part, shape: Sequence[int]) -> tuple[slice, ...]:
    """Return what selects a part of a tensor; nothing where that is all of it."""
    index = [slice(0, size) for size in shape]
    for one in (part,) if isinstance(part, Slice) else part:
        index[one.dim] = slice(one.start, one.stop)
    return () if index == [slice(0, size) for size in shape] else tuple(index)


class Weights(Protocol):
    """Hands out named tensors of a checkpoint."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of what is handed out."""

    def has(self, name: str) -> bool:
        """Whether there is a tensor `name`: checkpoints of one architecture differ in names."""

    def get(self, name: str, *shape: int, part: Part = ()) -> Tensor:
        """Return the tensor `name`, or a part of it, contiguous, in the dtype and place to run.

        `shape` is that of the whole tensor, which must have it.
        """

    def finish(self, elsewhere: Sequence[str] = ()) -> None:
        """Say that all has been asked for, but names that begin with one of `elsewhere`."""


class SafetensorsWeights:
    """Tensors of a directory with one .safetensors file, or several and their index."""

    def __init__(self, model_dir: Path, dtype: torch.dtype, device: torch.device) -> None:
        self._dir = model_dir
        self.dtype = dtype
        self._device = device
        self._unused: set[str] = set()
        self._file_of: dict[str, Any] = {}  # safe_open handles, which are untyped
        for path in _weight_files(model_dir):
            try:
                file: Any = safe_open(path, framework="pt")
            except (OSError, SafetensorError) as error:
                raise ConfigError(f"{path}: cannot be read: {error}") from None
            for name in file.keys():  # noqa: SIM118 - a file handle, not a mapping
                self._file_of[name] = file
                self._unused.add(name)

    def has(self, name: str) -> bool:
        return name in self._file_of

    def get(self, name: str, *shape: int, part: Part = ()) -> Tensor:
        file = self._file_of.get(name)
        if file is None:
            self._refuse_quantized()
            raise ConfigError(f"{self._dir}: the checkpoint has no weights {name!r}")
        stored = file.get_slice(name)
        stored_shape = stored.get_shape()
        index = part_index(part, shape)
        if not index or stored_shape != list(shape):  # what has another shape is refused below
            tensor = file.get_tensor(name)
        else:
            tensor = stored[index]
        if tensor.dtype not in DTYPES:
            kind = str(tensor.dtype).removeprefix("torch.")
            raise ConfigError(
                f"{self._dir}: {name!r} is stored as {kind}: quantized weights are not supported"
            )
        if stored_shape != list(shape):
            raise ConfigError(
                f"{self._dir}: {name!r} has shape {stored_shape}, "
                f"config.json asks for {list(shape)}"
            )
        self._unused.discard(name)
        return torch.as_tensor(tensor, device=self._device, dtype=self.dtype).contiguous()

    def _refuse_quantized(self) -> None:
        """Raise ConfigError where other names than asked for tell of quantized weights."""
        for name in sorted(self._file_of):
            if name.endswith(QUANTIZED):
                raise ConfigError(
                    f"{self._dir}: {name!r} is of quantized weights, which are not supported"
                )

    def finish(self, elsewhere: Sequence[str] = ()) -> None:
        """Raise ConfigError when the checkpoint holds weights that the network has no use for."""
        unused = sorted(
            name
            for name in self._unused
            # Tied heads are often stored too.
            if name != "lm_head.weight" and not name.endswith(TABLES)
            if not name.startswith(tuple(elsewhere))
        )
        if unused:
            self._refuse_quantized()
            raise ConfigError(
                f"{self._dir}: {len(unused)} weights do not belong to this architecture, "
                f"{unused[0]!r} for one"
            )


class DummyWeights:
    """Small random tensors, the same ones at every start: for tests and measurements."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype = dtype
        self._device = device

    def has(self, name: str) -> bool:
        """Fit `Weights`: whatever is asked for is made."""
        return True

    def get(self, name: str, *shape: int, part: Part = ()) -> Tensor:
        """Fit `Weights`: a part holds the numbers that stand there in the whole tensor."""
        if len(shape) == 1 and name.endswith(".weight"):  # a norm's: nothing else has one row
            tensor = torch.ones(shape)
        else:
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            tensor = torch.randn(shape, generator=generator) * 0.02
        if index := part_index(part, shape):
            tensor = tensor[index].clone(memory_format=torch.contiguous_format)
        return tensor.to(device=self._device, dtype=self.dtype)

    def finish(self, elsewhere: Sequence[str] = ()) -> None:
        """Fit `Weights`: nothing can be left over."""


class CheckedWeights:
    """Weights of which every number is looked at as it is read."""

    def __init__(self, weights: Weights, source: Path) -> None:
        self._weights = weights
        self._source = source
        self.dtype = weights.dtype

    def has(self, name: str) -> bool:
        return self._weights.has(name)

    def get(self, name: str, *shape: int, part: Part = ()) -> Tensor:
        """Fit `Weights`; ConfigError for a tensor with a number in it that is not finite."""
        tensor = self._weights.get(name, *shape, part=part)
        least, most = tensor.aminmax()  # NaN where there is one
        if not (least.isfinite() and most.isfinite()):
            kind = str(self.dtype).removeprefix("torch.")
            raise ConfigError(f"{self._source}: {name!r} has numbers that are not finite in {kind}")
        return tensor

    def finish(self, elsewhere: Sequence[str] = ()) -> None:
        self._weights.finish(elsewhere)


def open_weights(
    model_dir: Path,
    load_format: str,
    dtype: torch.dtype,
    device: torch.device,
    *,
    is_checked: bool = False,
) -> Weights:
    """Return the weights that `--load-format` asks for."""
    if load_format == "dummy":
        return DummyWeights(dtype, device)
    weights = SafetensorsWeights(model_dir, dtype, device)
    return CheckedWeights(weights, model_dir) if is_checked else weights


def _weight_files(model_dir: Path) -> list[Path]:
    index = model_dir / "model.safetensors.index.json"
    single = model_dir / "model.safetensors"
    if single.is_file():
        return [single]
    if index.is_file():
        return indexed_files(index)
    found = sorted(model_dir.glob("*.safetensors"))
    if found:
        return found
    if any(model_dir.glob("*.bin")):
        raise ConfigError(
            f"{model_dir}: only pickled .bin weights, which can run code and are not loaded; "
            f"`fastserve convert {model_dir}` makes safetensors of them"
        )
    raise ConfigError(
        f"{model_dir}: no .safetensors weights (--load-format dummy needs none; .bin weights are "
        "not fetched from a hub: download them, then `fastserve convert DIR`)"
    )
