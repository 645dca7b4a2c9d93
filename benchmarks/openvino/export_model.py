"""Writes a small Llama with random weights, as a checkpoint and in OpenVINO's format.

    benchmarks/openvino/.venv/bin/python -m benchmarks.openvino.export_model llama-125m DIRECTORY

Both are of the same bfloat16 weights. Must not know: what they are for.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from optimum.exporters.openvino import main_export
from optimum.intel import OVConfig
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.small_model import NAMED, write_small_model


def write_checkpoint(name: str, directory: Path) -> None:
    """Write config, tokenizer and weights."""
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**NAMED[name])).to(torch.bfloat16).save_pretrained(directory)
    write_small_model(directory, NAMED[name])
    told = {"tokenizer_class": "PreTrainedTokenizerFast"}
    (directory / "tokenizer_config.json").write_text(json.dumps(told), encoding="utf-8")


def main() -> None:
    """Write both."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=NAMED)
    parser.add_argument("directory", type=Path)
    args = parser.parse_args()
    checkpoint, exported = args.directory / "checkpoint", args.directory / "openvino"
    checkpoint.mkdir(parents=True)
    write_checkpoint(args.name, checkpoint)
    main_export(
        str(checkpoint),
        exported,
        task="text-generation-with-past",
        ov_config=OVConfig(dtype="bf16"),
    )


if __name__ == "__main__":
    main()
