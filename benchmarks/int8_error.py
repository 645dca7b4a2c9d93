"""What weights of int8 change: next-token distributions against bfloat16's, token by token.

Rules: the networks that a worker makes, over the same ids, whole prompts in one step. KL is that of
the first distribution from the second, in nats; float32 against bfloat16 shows what rounding alone
changes. The demo model reads Python's documentation, which it was trained on; random weights read
random ids, and their distributions are nearly flat, so that greedy tokens turn on a little.
Must not know: how fast anything is.
"""

from __future__ import annotations

import pydoc_data.topics
import random
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from benchmarks.small_model import LARGER, write_small_model
from fastserve.checkpoint.model_config import read_model_config
from fastserve.executor.choices import choose_cpu_kernels, choose_ops
from fastserve.host.provenance import ROOT
from fastserve.model.attention.interfaces import PagedKV
from fastserve.model.decoder import Decoder
from fastserve.model.families.architectures import load_network
from fastserve.model.input_batch import build_input_batch
from fastserve.model.loader import open_weights

DEMO = ROOT / "fastserve" / "demo"
CPU = torch.device("cpu")
BLOCK_SIZE = 16


class Case(NamedTuple):
    """A model and how much of what it reads."""

    model: str
    num_texts: int
    length: int  # tokens of a text


CASES = (Case("demo", 16, 400), Case("llama-125m, random", 4, 256))


def compare(case: Case) -> dict[str, Any]:
    """Return the errors of a model."""
    with tempfile.TemporaryDirectory() as beside, torch.inference_mode():
        is_random = case.model != "demo"
        directory = Path(beside) if is_random else DEMO
        if is_random:
            write_small_model(directory, LARGER)
        load_format = "dummy" if is_random else "auto"
        exact = load(directory, load_format, torch.float32, case.length)
        rounded = load(directory, load_format, torch.bfloat16, case.length)
        quantized = load(directory, load_format, torch.bfloat16, case.length, "int8")
        texts = list(random_texts(case) if is_random else read_texts(case))
        compared = {
            "float32, bfloat16": differences(exact, rounded, texts),
            "bfloat16, int8": differences(rounded, quantized, texts),
        }
        quantized.head = rounded.head
        compared["bfloat16, int8 but for the head"] = differences(rounded, quantized, texts)
    return {"model": case.model, "tokens": case.num_texts * case.length, "compared": compared}


def load(
    directory: Path,
    load_format: str,
    dtype: torch.dtype,
    max_len: int,
    quantization: str | None = None,
) -> Decoder:
    """Return the network that a worker makes."""
    kernels = choose_cpu_kernels("auto", dtype, CPU, quantization)
    return load_network(
        read_model_config(directory),
        open_weights(directory, load_format, dtype, CPU),
        choose_ops(dtype, CPU, kernels, False, quantization),
        max_len=max_len,
        device=CPU,
    )


def read_texts(case: Case) -> Iterator[list[int]]:
    """Yield parts of Python's documentation, evenly taken from all of it."""
    tokenizer = Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    ids: list[int] = tokenizer.encode("\n".join(pydoc_data.topics.topics.values())).ids
    for first in range(0, len(ids) - case.length, len(ids) // case.num_texts):
        yield ids[first : first + case.length]


def random_texts(case: Case) -> Iterator[list[int]]:
    """Yield random ids."""
    drawn = random.Random(1)
    for _ in range(case.num_texts):
        yield [drawn.randrange(LARGER["vocab_size"]) for _ in range(case.length)]


def differences(first: Decoder, second: Decoder, texts: Sequence[list[int]]) -> dict[str, float]:
    """Return how far the distributions of two networks are apart."""
    kls, equal = [], []
    for ids in texts:
        ours, theirs = (logits_of(network, ids).double() for network in (first, second))
        logs, other_logs = ours.log_softmax(-1), theirs.log_softmax(-1)
        kls.append((logs.exp() * (logs - other_logs)).sum(-1))
        equal.append(ours.argmax(-1) == theirs.argmax(-1))
    kl, is_equal = torch.cat(kls), torch.cat(equal)
    return {
        "mean_kl": kl.mean().item(),
        "largest_kl": kl.max().item(),
        "equal_greedy_tokens": is_equal.double().mean().item(),
    }


def logits_of(network: Decoder, ids: Sequence[int]) -> Tensor:
    """Return the logits after each token of a text."""
    num_blocks = -(-len(ids) // BLOCK_SIZE)
    shape = network.layers.attention.shape  # type: ignore[attr-defined]
    sizes = (num_blocks, network.stage.num_layers, 2, BLOCK_SIZE, shape.num_kv_heads)
    kv = PagedKV(torch.zeros(*sizes, shape.head_dim, dtype=network.dtype))
    batch = build_input_batch(
        token_ids=np.array(ids),
        starts=np.array([0]),
        counts=np.array([len(ids)]),
        tables=np.arange(num_blocks)[None],
        scored=None,
        block_size=BLOCK_SIZE,
        device=CPU,
    )
    return network(batch, kv)
