"""Turns pickled weights (pytorch_model.bin) into safetensors files beside them.

Rules: meant for a process of its own, which may run out of memory or crash. Pickles are read with
`weights_only`, which builds tensors and nothing else; what asks for more is refused. That alone
keeps a hostile pickle from running. Files are written under another name and renamed
when all are complete, the index last, so that a checkpoint is there as a whole or not at all.
Must not know: what the tensors mean, what shows the progress.
"""

from __future__ import annotations

import json
import pickle
import re
import shutil
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from fastserve.checkpoint.model_config import read_model_config
from fastserve.checkpoint.weight_index import indexed_files
from fastserve.settings.option import ConfigError

INDEX = "pytorch_model.bin.index.json"
OTHER_PICKLES = ("training_args.bin", "optimizer.bin", "scheduler.bin", "scaler.bin")
SHARD_BYTES = 2 * 2**30
"""A shard is in memory while it is written."""

OnProgress = Callable[[int, int], None]
"""Is told how many bytes are written, and how many there are."""


def convert_pickles(
    model_dir: Path, on_progress: OnProgress, shard_bytes: int = SHARD_BYTES
) -> list[str]:
    """Write the weights of a directory as safetensors; returns the names of the files."""
    tensors: dict[str, Tensor] = {}
    pickles = find_pickles(model_dir)
    for path in pickles:
        tensors.update(load_pickle(path))
    if is_tied_twice(model_dir, tensors):
        del tensors["lm_head.weight"]
    shards = split_shards(tensors, shard_bytes)
    names = shard_names(len(shards))
    total = sum(tensor.nbytes for tensor in tensors.values())
    written = 0
    on_progress(written, total)
    parts = [model_dir / f".{name}.part" for name in (*names, "model.safetensors.index.json")]
    try:
        for part, shard in zip(parts, shards, strict=False):
            # Tensors that share memory become separate ones: the format knows no sharing.
            copies = {
                name: tensors[name].clone(memory_format=torch.contiguous_format) for name in shard
            }
            save_file(copies, part, metadata={"format": "pt"})
            shutil.copymode(pickles[0], part)  # it would be its owner's alone
            written += sum(tensor.nbytes for tensor in copies.values())
            on_progress(written, total)
        if len(shards) > 1:
            weight_map = {
                name: file for file, shard in zip(names, shards, strict=True) for name in shard
            }
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            parts[-1].write_text(json.dumps(index, indent=2, sort_keys=True), encoding="utf-8")
            names.append("model.safetensors.index.json")
        for part, name in zip(parts, names, strict=False):
            part.replace(model_dir / name)
    finally:
        for part in parts:
            part.unlink(missing_ok=True)
    return names


def find_pickles(model_dir: Path) -> list[Path]:
    """Return the files of weights: the one, or those that an index names, else all there are."""
    index, single = model_dir / INDEX, model_dir / "pytorch_model.bin"
    if single.is_file():
        return [single]
    if index.is_file():
        return indexed_files(index)
    found = sorted(model_dir.glob("*.bin"))
    paths = [path for path in found if path.name not in OTHER_PICKLES]
    if not paths:
        raise ConfigError(f"{model_dir}: no .bin weights to convert")
    return paths


def load_pickle(path: Path) -> dict[str, Tensor]:
    """Read one file, without running what it may say; its tensors stay on disk where they can."""
    try:
        # Files of torch before 1.6 are no archives, and cannot be mapped.
        content = torch.load(
            path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
        )
    except pickle.UnpicklingError as error:
        asked = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it asks for {asked[1]}" if asked else "it is no pickle of tensors"
        raise ConfigError(f"{path}: refused, for {reason}") from None
    except (OSError, EOFError, RuntimeError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split()).partition(". ")[0]
        raise ConfigError(f"{path}: cannot be read: {reason or type(error).__name__}") from None
    if not isinstance(content, Mapping) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) and tensor.layout == torch.strided
        for name, tensor in content.items()
    ):
        raise ConfigError(f"{path}: holds something else than names and their tensors")
    return dict(content)


def is_tied_twice(model_dir: Path, tensors: Mapping[str, Tensor]) -> bool:
    """Whether the head is stored though it is the embedding, and the network knows that it is."""
    head = tensors.get("lm_head.weight")
    if head is None or not any(
        other.data_ptr() == head.data_ptr() and other.shape == head.shape
        for name, other in tensors.items()
        if name != "lm_head.weight"
    ):
        return False
    try:
        return read_model_config(model_dir).tie_word_embeddings
    except ConfigError:  # a network of another kind: its head is kept, whatever it is
        return False


def split_shards(tensors: Mapping[str, Tensor], shard_bytes: int) -> list[list[str]]:
    """Return the names in each file, in the order given; a tensor is never cut."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += tensor.nbytes
    return shards


def shard_names(count: int) -> list[str]:
    """Return the names that Hugging Face gives one file or several."""
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{index:05}-of-{count:05}.safetensors" for index in range(1, count + 1)]
