"""A Llama of 17 million parameters for measurements of everything around the network.

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

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

CONFIG = {
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


def write_small_model(directory: Path) -> None:
    """Write config.json and tokenizer.json."""
    (directory / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n", encoding="utf-8")
    small_tokenizer().save(str(directory / "tokenizer.json"))


def small_tokenizer() -> Tokenizer:
    """Return a byte-level BPE of printable ASCII characters and pairs of them."""
    size = CONFIG["vocab_size"]
    assert isinstance(size, int)
    letters = string.ascii_letters + string.digits + string.punctuation
    merges = list(itertools.islice(itertools.product(letters, letters), size - len(letters)))
    tokens = [*letters, *("".join(pair) for pair in merges)]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer
