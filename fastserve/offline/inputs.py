"""What `LLM` is given, read with care: prompts in every form, and vLLM's arguments.

Rules: an argument of vLLM's that changes nothing here is taken at the values that ask for nothing,
and refused by name at all others; nothing is dropped without a word. Numpy arrays and tensors are
known by their `tolist`. Must not know: the engine, how prompts become ids, torch.
"""

from __future__ import annotations

import dataclasses
import numbers
import os
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fastserve.frontend.request_checks import check_cache_salt
from fastserve.offline.sampling_params import is_one_of
from fastserve.settings.engine import EngineConfig
from fastserve.settings.mapping import from_mapping
from fastserve.settings.option import ConfigError

Prompt = str | Sequence[int] | Mapping[str, Any]

PROMPT_KEYS = ("prompt", "prompt_token_ids")
SALT_KEY = "cache_salt"
SECRET = ("hf_token",)
OTHER_NAMES = {"num_gpu_blocks_override": "num_device_blocks"}

# Arguments of vllm.LLM and vllm.EngineArgs that are not settings here, and the values that ask for
# nothing; None: no value asks for anything.
HARMLESS: Mapping[str, tuple[Any, ...] | None] = {
    "allowed_local_media_path": ("",),
    "allowed_media_domains": (None,),
    "async_scheduling": (None, False, True),
    "attention_config": (None,),
    "compilation_config": (None,),
    "convert": ("auto", "none"),
    "cpu_offload_gb": (0,),
    "disable_cascade_attn": (None, False, True),
    "disable_custom_all_reduce": (False, True),
    "disable_log_requests": (False, True),
    "disable_log_stats": (False, True),
    "disable_sliding_window": (False,),
    "enable_expert_parallel": (False,),
    "enable_lora": (False,),
    "enable_prompt_adapter": (False,),
    "enable_sleep_mode": (False,),
    "guided_decoding_backend": None,
    "hf_overrides": (None, {}),
    "hf_token": (None, False, True),
    "kv_cache_dtype": ("auto",),
    "kv_transfer_config": (None,),
    "limit_mm_per_prompt": None,
    "logits_processors": (None, []),
    "logprobs_mode": ("raw_logprobs",),
    "max_logprobs": (20,),
    "max_seq_len_to_capture": None,
    "mm_processor_kwargs": (None, {}),
    "num_lookahead_slots": (0,),
    "num_speculative_tokens": (None,),
    "override_generation_config": (None, {}),
    "override_pooler_config": (None,),
    "pooler_config": (None,),
    "profiler_config": (None,),
    "quantization_config": (None,),
    "rope_scaling": (None, {}),
    "rope_theta": (None,),
    "runner": ("auto", "generate"),
    "skip_tokenizer_init": (False,),
    "speculative_config": (None,),
    "structured_outputs_config": (None,),
    "task": (None, "auto", "generate"),
    "tokenizer_mode": ("auto", "hf"),
    "tokenizer_revision": (None,),
    "trust_remote_code": (False, True),
    "use_v2_block_manager": (None, False, True),
}


def engine_config(model: Any, arguments: Mapping[str, Any]) -> EngineConfig:
    """Return the configuration that `LLM(model, **arguments)` asks for; ConfigError by name."""
    settings = {field.name for field in dataclasses.fields(EngineConfig)}
    values: dict[str, Any] = {}
    for given, value in {"model": model, **arguments}.items():
        name = OTHER_NAMES.get(given, given)
        if name in HARMLESS:
            allowed = HARMLESS[name]
            if allowed is not None and not is_one_of(value, allowed):
                shown = "" if name in SECRET else f"={reprlib.repr(value)}"
                raise ConfigError(f"LLM: {name}{shown} is not supported")
        elif value is not None or name not in settings:  # None leaves a setting to its default
            values[name] = value
    for name in ("model", "tokenizer"):
        if isinstance(values.get(name), os.PathLike):
            values[name] = os.fspath(values[name])
    if "dtype" in values and not isinstance(values["dtype"], str):  # torch.float16, for one
        values["dtype"] = str(values["dtype"]).removeprefix("torch.")
    return from_mapping(EngineConfig, values, source="LLM")


def refuse_lora(lora_request: Any) -> None:
    """Refuse what there is no part for: adapters; an empty list asks for none."""
    requests = lora_request if isinstance(lora_request, list | tuple) else [lora_request]
    if any(request is not None for request in requests):
        raise ValueError("lora_request is not supported.")


def prompt_list(prompts: Any) -> list[Any]:
    """Return the prompts of a call, given one or several of them."""
    if hasattr(prompts, "tolist"):
        prompts = prompts.tolist()
    if isinstance(prompts, str | Mapping):
        return [prompts]
    if isinstance(prompts, bytes) or not isinstance(prompts, Iterable):
        raise TypeError(f"A prompt is text, token ids or a mapping, not {type(prompts).__name__}.")
    found = list(prompts)
    return [found] if found and isinstance(found[0], numbers.Number) else found


def read_prompt(prompt: Any) -> tuple[str | None, list[int] | None]:
    """Return a prompt's text and ids, whichever were given.

    Raises ValueError naming a key that would change the prompt in ways there are not.
    """
    if isinstance(prompt, str):
        return prompt, None
    if not isinstance(prompt, Mapping):
        return None, token_ids(prompt)
    text, ids = (prompt.get(key) for key in PROMPT_KEYS)
    if ids is None and text is None:
        raise ValueError('A prompt mapping needs "prompt" or "prompt_token_ids".')
    if not isinstance(text, str | None):
        raise TypeError(f'The "prompt" of a mapping is text, not {type(text).__name__}.')
    for key, value in prompt.items():
        if key not in (*PROMPT_KEYS, SALT_KEY) and value is not None:
            raise ValueError(f"{key} of a prompt is not supported.")
    return text, None if ids is None else token_ids(ids)


def read_salt(prompt: Any) -> str:
    """Return what a prompt shares its KV by, "" for no salt; ValueError for one that is none."""
    salt = prompt.get(SALT_KEY) if isinstance(prompt, Mapping) else None
    if not isinstance(salt, str | None):
        raise TypeError(f"The {SALT_KEY} of a prompt is text, not {type(salt).__name__}.")
    check_cache_salt(salt)
    return salt or ""


def token_ids(ids: Any) -> list[int]:
    """Return ids as a list of plain integers."""
    if hasattr(ids, "tolist"):
        ids = ids.tolist()
    if isinstance(ids, str | bytes | Mapping) or not isinstance(ids, Iterable):
        raise TypeError(f"A prompt is text, token ids or a mapping, not {type(ids).__name__}.")
    found = list(ids)
    for position, token_id in enumerate(found):
        if type(token_id) is int:
            continue
        if isinstance(token_id, bool) or not isinstance(token_id, numbers.Integral):
            raise ValueError(f"Token ids are integers; position {position} holds {token_id!r}.")
        found[position] = int(token_id)
    return found
