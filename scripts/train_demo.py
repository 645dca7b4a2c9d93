"""Trains the bundled demonstration model (fastserve/demo) on the text every Python carries.

Job: corpus (pydoc topics and the docstrings of the standard library) → byte-level BPE tokenizer →
a small Llama → a Hugging Face model directory. Nothing is downloaded.

    python -m scripts.train_demo --output DIR --weights random  # corpus, tokenizer, config
    python -m scripts.train_demo --output DIR --minutes 30      # and the training itself

Rules: a tokenizer already in DIR is kept, so weights can be trained again without moving a token.
The corpus depends on the Python release, the order of the batches only on --seed. The learning
rate follows --steps; --minutes stops a slow machine early by running the same schedule faster.
"""

import argparse
import json
import math
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM

from scripts.demo_corpus import BOS, EOS, PROMPTS, SPECIAL, Entry, collect, examples

VOCAB_SIZE, WINDOW = 3072, 2048
MODEL_CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 256,
    "intermediate_size": 640,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "hidden_act": "silu",
    "max_position_embeddings": WINDOW,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "mlp_bias": False,
    "initializer_range": 0.02,
    "bos_token_id": SPECIAL.index(BOS),
    "eos_token_id": SPECIAL.index(EOS),
    "torch_dtype": "bfloat16",
}
CHAT_TEMPLATE = (
    "{{- bos_token }}"
    "{%- for message in messages %}"
    "{%- set role = 'system' if message['role'] == 'developer' else message['role'] %}"
    "{%- if role not in ['system', 'user', 'assistant'] %}"
    "{{- raise_exception('The demo model knows the roles system, user and assistant only') }}"
    "{%- endif %}"
    "{{- '<|' + role + '|>' }}"
    "{%- if message['content'] is string %}{{- message['content'] | trim }}"
    "{%- else %}{%- for part in message['content'] %}{{- part['text'] | trim }}{%- endfor %}"
    "{%- endif %}"
    "{%- if role == 'assistant' %}{{- eos_token }}{%- endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|assistant|>' }}{%- endif %}"
)


def encode(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    """Each text as ids, cut at the window."""
    encodings = tokenizer.encode_batch(texts, add_special_tokens=False)
    return [encoding.ids[:WINDOW] for encoding in encodings]


def batches(rows: list[list[int]], rng: random.Random, num_tokens: int) -> Iterator[torch.Tensor]:
    """Rows of like length together, padded with -100: about `num_tokens` a batch."""
    rows = sorted(rows, key=lambda row: len(row) + rng.random())
    groups: list[list[list[int]]] = [[]]
    for row in rows:
        if groups[-1] and (len(groups[-1]) + 1) * len(row) > num_tokens:
            groups.append([])
        groups[-1].append(row)
    rng.shuffle(groups)
    for group in groups:
        longest = max(map(len, group))
        padded = [row + [-100] * (longest - len(row)) for row in group]
        yield torch.tensor(padded)  # [num_rows, longest]


def train_tokenizer(entries: list[Entry]) -> Tokenizer:
    """Byte-level BPE over the corpus; encodes any text, knows the special tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE, special_tokens=list(SPECIAL), show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    texts = [f"{entry.name}\n\n" + "\n\n".join(entry.paragraphs) for entry in entries]
    tokenizer.train_from_iterator(texts + PROMPTS * 3, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, SPECIAL.index(BOS))]
    )
    return tokenizer


def write_atomically(path: Path, text: str) -> None:
    """A reader sees the old file or the new one."""
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def write_weights(model: LlamaForCausalLM, directory: Path) -> None:
    """model.safetensors in bfloat16; the tied output matrix is not written twice."""
    weights = {
        name: tensor.detach().to(torch.bfloat16).contiguous()
        for name, tensor in model.state_dict().items()
        if name != "lm_head.weight"
    }
    temporary = directory / "model.safetensors.part"
    temporary.write_bytes(save(weights, metadata={"format": "pt"}))
    temporary.replace(directory / "model.safetensors")


def write_settings(directory: Path) -> None:
    """config.json, generation_config.json, tokenizer_config.json."""
    special = {"bos_token_id": SPECIAL.index(BOS), "eos_token_id": SPECIAL.index(EOS)}
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": EOS,
        "add_bos_token": True,
        "model_max_length": WINDOW,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    generation_config = {**special, "do_sample": True, "temperature": 0.7, "top_p": 0.95}
    for name, settings in (
        ("config.json", MODEL_CONFIG),
        ("generation_config.json", generation_config),
        ("tokenizer_config.json", tokenizer_config),
    ):
        write_atomically(directory / name, json.dumps(settings, indent=2) + "\n")


def loss_of(model: LlamaForCausalLM, batch: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy of every token but the first of a row."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(input_ids=batch[:, :-1].clamp(min=0), use_cache=False).logits
    return torch.nn.functional.cross_entropy(
        logits.flatten(0, 1).float(), batch[:, 1:].flatten(), ignore_index=-100
    )


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, held_out: list[torch.Tensor]) -> float:
    """Mean loss over texts the model has not been trained on."""
    return sum(loss_of(model, batch).item() for batch in held_out) / len(held_out)


def optimizers_for(model: LlamaForCausalLM, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for the embedding and the norms."""
    matrices = [p for n, p in model.named_parameters() if ".layers." in n and p.ndim == 2]
    others = [p for n, p in model.named_parameters() if ".layers." not in n or p.ndim != 2]
    return [
        torch.optim.Muon(matrices, lr=lr, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def train(
    model: LlamaForCausalLM, tokenizer: Tokenizer, entries: list[Entry], args: argparse.Namespace
) -> None:
    """Warm-up, then a cosine to a tenth of the rate; the weights are written as it goes."""
    rng = random.Random(args.seed)
    kept = [entry for i, entry in enumerate(entries) if i % 50 != 49]
    rows = encode(tokenizer, examples(entries[49::50], random.Random(args.seed)))
    held_out = list(batches(rows, random.Random(args.seed), args.batch_tokens))
    optimizers = optimizers_for(model, args.lr)
    queue: list[torch.Tensor] = []
    began, step, num_tokens, smooth, progress = time.monotonic(), 0, 0, 0.0, 0.0
    while progress < 1.0:
        if not queue:
            rows = encode(tokenizer, examples(kept, rng))
            queue = list(batches(rows, rng, args.batch_tokens))
        batch = queue.pop()
        elapsed = (time.monotonic() - began) / 60
        progress = min(1.0, max((step + 1) / args.steps, elapsed / args.minutes))
        rate = args.lr * min(1.0, (step + 1) / 100) * (0.55 + 0.45 * math.cos(math.pi * progress))
        loss = loss_of(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            optimizer.zero_grad()
        step, num_tokens = step + 1, num_tokens + int((batch >= 0).sum())
        smooth = 0.98 * smooth + 0.02 * loss.item() if step > 1 else loss.item()
        if step % 100 == 0 or progress == 1.0:
            unseen = held_out_loss(model, held_out)
            print(
                f"step {step}  tokens {num_tokens}  minutes {elapsed:.1f}  "
                f"loss {smooth:.3f}  held out {unseen:.3f}",
                flush=True,
            )
            write_weights(model, args.output)


def main() -> None:
    """Reads the options, writes the model directory."""
    parser = argparse.ArgumentParser(description="Train the bundled demonstration model.")
    parser.add_argument("--output", type=Path, required=True, help="the model directory")
    parser.add_argument("--weights", choices=("trained", "random"), default="trained")
    parser.add_argument("--steps", type=int, default=2900, help="length of the schedule")
    parser.add_argument("--minutes", type=float, default=60.0, help="shorten it to this time")
    parser.add_argument("--batch-tokens", type=int, default=2048)
    parser.add_argument("--lr", type=float, default=6e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    entries = collect()
    tokenizer_file = args.output / "tokenizer.json"
    if not tokenizer_file.exists():
        write_atomically(tokenizer_file, train_tokenizer(entries).to_str())
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    write_settings(args.output)
    model = LlamaForCausalLM(LlamaConfig(**MODEL_CONFIG)).float().train()
    write_weights(model, args.output)
    num_parameters = sum(p.numel() for p in model.parameters())
    print(f"{len(entries)} entries, {num_parameters} parameters")
    if args.weights == "trained":
        train(model, tokenizer, entries, args)


if __name__ == "__main__":
    main()
