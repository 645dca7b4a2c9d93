"""Says what a file or directory is that is taken for a model and is none that can be served.

Rules: by its name and the small files in it; one clause with the way out where there is one.
Must not know: weights, networks, torch.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
FILE_SUFFIXES = (*WEIGHT_SUFFIXES, ".gguf", ".ggml", ".onnx", ".h5", ".json")
GGUF = (
    "GGUF, llama.cpp's format, is not read: take the checkpoint in safetensors that it is made of"
)
MERGE = "merge it into its base (peft: merge_and_unload, save_pretrained)"
# What a directory holds, and what it therefore is.
HINTS = (
    ("model_index.json", "a diffusers pipeline, which makes images and no text"),
    ("modules.json", "a sentence-transformers model, which embeds text and generates none"),
    ("quantize_config.json", "GPTQ weights: quantized weights are not supported"),
    ("quant_config.json", "AWQ weights: quantized weights are not supported"),
    ("hf_quant_config.json", "ModelOpt weights: quantized weights are not supported"),
)
HINTS_WITHOUT_CONFIG = (
    ("*.gguf", GGUF),
    ("params.json", "weights in the layout of their makers: take the one of transformers"),
    ("consolidated*", "weights in the layout of their makers: take the one of transformers"),
    ("*.onnx", "an ONNX graph, which is not read"),
    ("tf_model.h5", "TensorFlow weights, which are not read"),
    ("flax_model.msgpack", "Flax weights, which are not read"),
    ("*.nemo", "a NeMo archive, which is not read"),
)


def describe_file(path: Path) -> str:
    """Say what a file is, where a directory is asked for."""
    if path.suffix == ".gguf" or (path.is_file() and _begins_with(path, b"GGUF")):
        return GGUF
    home = path.parent
    kind = "a file of weights" if path.suffix in WEIGHT_SUFFIXES else "a file"
    if (home / "config.json").is_file():
        return f"{kind}; a model is the directory: {home}"
    return f"{kind}; a model is a directory with config.json and safetensors weights"


def describe_directory(path: Path) -> str | None:
    """Say what a directory is that is no model to be served; None where nothing tells."""
    if (path / "adapter_config.json").is_file() and not _has_weights(path):
        base = _read(path / "adapter_config.json").get("base_model_name_or_path")
        of = f" of {base}" if base else ""
        return f"a LoRA adapter{of}; adapters are not supported: {MERGE}"
    has_config = (path / "config.json").is_file()
    for pattern, kind in HINTS if has_config else (*HINTS, *HINTS_WITHOUT_CONFIG):
        if any(path.glob(pattern)):
            return kind
    if has_config:
        return None
    # The hub's cache, or a directory of several checkpoints.
    inside = sorted(found.parent for found in path.glob("*/config.json"))
    inside += sorted(found.parent for found in path.glob("snapshots/*/config.json"))
    return f"no config.json; did you mean {str(inside[-1])!r}?" if inside else None


def similar_directory(path: Path) -> Path | None:
    """Return the directory that a path to nothing may have meant: one name in it misspelt."""
    missing = path
    while not missing.parent.exists():
        missing = missing.parent
    try:
        names = {entry.name.lower(): entry for entry in missing.parent.iterdir()}
    except OSError:  # not to be listed by this user
        return None
    for name in difflib.get_close_matches(missing.name.lower(), names, cutoff=0.7):
        meant = names[name] / path.relative_to(missing)
        if meant.is_dir():
            return meant
    return None


def did_you_mean(path: Path) -> str:
    """Return the end of an error about a path to nothing: a similar directory, the demo, or ""."""
    similar = similar_directory(path)
    if similar is None and difflib.get_close_matches(str(path), ["demo"], cutoff=0.7):
        similar = Path("demo")
    return "" if similar is None else f"; did you mean {str(similar)!r}?"


def describe_quantization(values: Mapping[str, Any]) -> str | None:
    """Say how the weights of a config.json are quantized; None: they are not."""
    for key in ("quantization_config", "compression_config", "quantization"):
        settings = values.get(key)
        if not settings:
            continue
        settings = settings if isinstance(settings, dict) else {}
        method = settings.get("quant_method") or ("mlx" if key == "quantization" else key)
        bits = settings.get("bits") or settings.get("w_bit")
        return f"{method}, {bits} bits" if bits else str(method)
    return None


def _has_weights(path: Path) -> bool:
    names = {found.name for suffix in WEIGHT_SUFFIXES for found in path.glob(f"*{suffix}")}
    return any(not name.startswith(("adapter_model", "training_args")) for name in names)


def _begins_with(path: Path, magic: bytes) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(len(magic)) == magic
    except OSError:  # whatever it is, it is named as a file
        return False


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):  # that it is there is enough to tell what it is
        return {}
    return content if isinstance(content, dict) else {}
