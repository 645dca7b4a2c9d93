"""Tiny random checkpoints of every supported architecture, made with transformers, our oracle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers

torch.set_num_threads(1)  # models this small lose by a second thread

EOS_TOKEN_ID = 1
VOCAB_SIZE = 199

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "bos_token_id": 0,
    "eos_token_id": EOS_TOKEN_ID,
}
OPT_SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 48,
    "ffn_dim": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "max_position_embeddings": 256,
    "init_std": 0.2,
    "bos_token_id": 0,
    "eos_token_id": EOS_TOKEN_ID,
}
GPT2_SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "n_embd": 48,
    "n_inner": 80,
    "n_layer": 3,
    "n_head": 6,
    "n_positions": 256,
    "initializer_range": 0.2,
    "bos_token_id": 0,
    "eos_token_id": EOS_TOKEN_ID,
}
SHAPES = {"OPT": OPT_SHAPE, "GPT2": GPT2_SHAPE}  # of the others: SHAPE
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama-mha-biased": (
        "Llama",
        {"num_key_value_heads": 6, "attention_bias": True, "mlp_bias": True},
    ),
    "llama-linear-rope": (
        "Llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 2.0}},
    ),
    "llama3": ("Llama", {"rope_parameters": LLAMA3_ROPE, "tie_word_embeddings": True}),
    "mistral": ("Mistral", {"sliding_window": None, "head_dim": 16}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "opt": ("OPT", {}),
    "opt-norm-last": ("OPT", {"do_layer_norm_before": False, "word_embed_proj_dim": 32}),
    "opt-bare": (
        "OPT",
        {
            "enable_bias": False,
            "layer_norm_elementwise_affine": False,
            "_remove_final_layer_norm": True,
            "activation_function": "gelu",
            "tie_word_embeddings": False,
        },
    ),
    "gpt2": ("GPT2", {}),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3-moe": (
        "Qwen3Moe",
        {
            "head_dim": 16,
            "num_experts": 6,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 40,
            "norm_topk_prob": True,
            "mlp_only_layers": [1],
        },
    ),
    "qwen3-moe-step": (
        "Qwen3Moe",
        {
            "num_experts": 6,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 40,
            "decoder_sparse_step": 2,
        },
    ),
}


def make_checkpoint(path: Path, name: str, **changes: Any) -> transformers.PreTrainedModel:
    """Save a random model of the architecture to `path`; returns it, in float32."""
    family, extra = ARCHITECTURES[name]
    config = getattr(transformers, f"{family}Config")(
        **{**SHAPES.get(family, SHAPE), **extra, **changes}
    )
    torch.manual_seed(sum(map(ord, name)))
    head = "LMHeadModel" if family == "GPT2" else "ForCausalLM"
    model = getattr(transformers, f"{family}{head}")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # ones and zeros would hide their absence
                parameter.add_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained(path)
    return model


def write_old_dialect(path: Path) -> None:
    """Rewrite config.json as transformers 4 wrote it."""
    file = path / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    if rope := config.pop("rope_parameters", None):
        config["rope_theta"] = rope.pop("rope_theta")
        config["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    config["torch_dtype"] = config.pop("dtype")
    if config["model_type"] == "qwen3_moe":
        config["num_experts"] = config.pop("num_local_experts")
    file.write_text(json.dumps(config), encoding="utf-8")


@torch.inference_mode()
def greedy(model: transformers.PreTrainedModel, ids: list[int], num_tokens: int) -> list[int]:
    """Return what transformers chooses for each of the last `num_tokens` ids, given those before.

    One uncached pass: if it returns these very ids, they are its greedy continuation.
    """
    logits = model(torch.tensor([ids[:-1]])).logits[0]
    return logits[-num_tokens:].argmax(-1).tolist()
