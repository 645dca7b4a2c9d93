"""Where weights come from: safetensors files of a Hugging Face checkpoint, or random numbers.

Rules: names and shapes are the checkpoint's; every tensor asked for must be there with its shape,
and every tensor there must have been asked for, so that no part of a model is silently left out.
Must not know: what the tensors mean.
"""

from __future__ import annotations

import zlib
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


class Weights(Protocol):
    """Hands out named tensors of a checkpoint."""

    def has(self, name: str) -> bool:
        """Whether there is a tensor `name`: checkpoints of one architecture differ in names."""

    def get(self, name: str, *shape: int) -> Tensor:
        """Return the tensor `name`, which must have this shape, in the dtype and place to run."""

    def finish(self) -> None:
        """Say that everything has been asked for."""


class SafetensorsWeights:
    """Tensors of a directory with one .safetensors file, or several and their index."""

    def __init__(self, model_dir: Path, dtype: torch.dtype, device: torch.device) -> None:
        self._dir = model_dir
        self._dtype = dtype
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
        """Fit `Weights`."""
        return name in self._file_of

    def get(self, name: str, *shape: int) -> Tensor:
        """Fit `Weights`."""
        file = self._file_of.get(name)
        if file is None:
            self._refuse_quantized()
            raise ConfigError(f"{self._dir}: the checkpoint has no weights {name!r}")
        tensor = file.get_tensor(name)
        if tensor.dtype not in DTYPES:
            kind = str(tensor.dtype).removeprefix("torch.")
            raise ConfigError(
                f"{self._dir}: {name!r} is stored as {kind}: quantized weights are not supported"
            )
        if tuple(tensor.shape) != shape:
            raise ConfigError(
                f"{self._dir}: {name!r} has shape {list(tensor.shape)}, "
                f"config.json asks for {list(shape)}"
            )
        self._unused.discard(name)
        return torch.as_tensor(tensor, device=self._device, dtype=self._dtype)

    def _refuse_quantized(self) -> None:
        """Raise ConfigError where other names than asked for tell of quantized weights."""
        for name in sorted(self._file_of):
            if name.endswith(QUANTIZED):
                raise ConfigError(
                    f"{self._dir}: {name!r} is of quantized weights, which are not supported"
                )

    def finish(self) -> None:
        """Raise ConfigError when the checkpoint holds weights that the network has no use for."""
        unused = sorted(
            name
            for name in self._unused
            # Tied heads are often stored too.
            if name != "lm_head.weight" and not name.endswith(TABLES)
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
        self._dtype = dtype
        self._device = device

    def has(self, name: str) -> bool:
        """Fit `Weights`: whatever is asked for is made."""
        return True

    def get(self, name: str, *shape: int) -> Tensor:
        """Fit `Weights`."""
        if len(shape) == 1 and name.endswith(".weight"):  # a norm's: nothing else has one row
            return torch.ones(shape, dtype=self._dtype, device=self._device)
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        tensor = torch.randn(shape, generator=generator) * 0.02
        return tensor.to(device=self._device, dtype=self._dtype)

    def finish(self) -> None:
        """Fit `Weights`: nothing can be left over."""


def open_weights(
    model_dir: Path, load_format: str, dtype: torch.dtype, device: torch.device
) -> Weights:
    """Return the weights that `--load-format` asks for."""
    if load_format == "dummy":
        return DummyWeights(dtype, device)
    return SafetensorsWeights(model_dir, dtype, device)


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
