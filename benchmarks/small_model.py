"""Llamas of 17 and 125 million parameters for measurements of everything around the network.

Rules: a config and a tokenizer, no weights (--load-format dummy draws them). Every id has text of
its own, so that answers cost what turning ids into text costs, and whole characters: random weights
may repeat a piece of one for ever, and the server would hold it back.
Must not know: what is measured.
"""

from __future__ import annotations

import itertools
import json
import string
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 4096,
    "hidden_size": 384,
    "intermediate_size": 1024,
    "num_hidden_layers": 8,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "torch_dtype": "bfloat16",
}


LARGER: dict[str, Any] = {
    **CONFIG,
    "vocab_size": 32000,
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
}
NAMED = {"llama-17m": CONFIG, "llama-125m": LARGER}


def write_small_model(directory: Path, config: dict[str, Any] = CONFIG) -> None:
    """Write config.json and tokenizer.json."""
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    small_tokenizer(config["vocab_size"]).save(str(directory / "tokenizer.json"))


def small_tokenizer(size: int) -> Tokenizer:
    """Return a byte-level BPE of printable ASCII characters, pairs and threes of them."""
    letters = string.ascii_letters + string.digits + string.punctuation
    pairs = list(itertools.product(letters, letters))
    threes = itertools.product(map("".join, pairs), letters)
    merges = list(itertools.islice(itertools.chain(pairs, threes), size - len(letters)))
    tokens = [*letters, *("".join(pair) for pair in merges)]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer
