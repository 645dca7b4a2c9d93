"""What becomes of request fields that this server does not read: refused, let pass, or unknown.

Rules: a field that would change the answer is refused by name, unless its value asks for nothing;
null never asks for anything. A field that cannot change the answer, or only qualifies one that is
refused, passes. Any other is unknown: it is ignored, and logged once per name.
Must not know: the engine, how the fields that are read are judged.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from fastserve.server.errors import invalid
from fastserve.server.protocol import (
    Body,
    ChatCompletionRequest,
    CompletionRequest,
    GenerationRequest,
    TokenizeRequest,
)

logger = logging.getLogger(__name__)

# Field → the values that ask for nothing, besides null.
Refusals = Mapping[str, tuple[Any, ...]]

MAX_LOGGED_NAMES = 256  # clients choose the names: neither memory nor the log may grow with them
MAX_NAME_CHARS = 64

STRUCTURE: Refusals = {
    "response_format": ({"type": "text"},),
    "structured_outputs": (),
    "structural_tag": ("",),
    "guided_json": (),
    "guided_regex": ("",),
    "guided_choice": ([],),
    "guided_grammar": ("",),
    "guided_json_object": (False,),
    "regex": ("",),
    "ebnf": ("",),
    "grammar": ("",),
    "json_schema": (),
    "format": ("",),
}
SAMPLING: Refusals = {
    "use_beam_search": (False,),
    "num_beams": (1,),
    "early_stopping": (False,),
    "length_penalty": (1,),
    "do_sample": (True,),
    "bad_words": ([],),
    "allowed_token_ids": ([],),
    "logits_processors": ([],),
    "custom_logit_processor": ("",),
    "repetition_detection": (),
    "vllm_xargs": ({},),
    "samplers": ("", []),
    "temperature_last": (False,),
    "dynatemp_range": (0,),
    "typical_p": (1,),
    "typ_p": (1,),
    "top_n_sigma": (-1, 0),
    "top_a": (0,),
    "tfs": (1,),
    "tfs_z": (1,),
    "min_keep": (0,),
    "xtc_probability": (0,),
    "dry_multiplier": (0,),
    "mirostat": (0,),
    "mirostat_mode": (0,),
    "adaptive_target": (-1,),
    "smoothing_factor": (0,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "penalty_alpha": (0,),
    "guidance_scale": (1,),
    "negative_prompt": ("",),
    "no_repeat_ngram_size": (0,),
    "repeat_penalty": (1,),
    "watermark": (False,),
    "n_indent": (0,),
}
LENGTHS: Refusals = {
    "n_predict": (),
    "max_new_tokens": (),
    "max_output_tokens": (),
    "max_length": (),
    "min_new_tokens": (0,),
    "min_length": (0,),
    "stop_sequences": ([],),
    "stop_regex": ("", []),
    "no_stop_trim": (False,),
    "t_max_predict_ms": (-1, 0),
    "max_time": (),
    "n_cmpl": (1,),
    "num_return_sequences": (1,),
}
PROMPTS: Refusals = {
    "suffix": ("",),
    "truncate_prompt_tokens": (),
    "truncate": (),
    "prompt_embeds": (),
    "input_ids": ([],),
    "input_embeds": ([],),
    "inputs": ("",),
    "system": ("",),
    "template": ("",),
    "context": ([],),
    "images": ([],),
    "image_data": ([],),
    "video_data": ([],),
    "audio_data": ([],),
    "multimodal_data": ([], {}),
    "multi_modal_data": ([], {}),
    "extra_key": ("",),
    "kv_transfer_params": (),
    "session_params": ({},),
    "bootstrap_host": (),
    "bootstrap_port": (),
    "bootstrap_room": (),
    "lora": ([],),
    "lora_path": ("",),
    "lora_request": (),
    "adapter_id": ("",),
    "extra_body": ({},),
    "parameters": ({},),
    "options": ({},),
}
TEMPLATE: Refusals = {
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none", "auto"),
    "function_call": ("none", "auto"),
    "documents": ([],),
    "chat_template": ("",),
}
CHAT_ANSWERS: Refusals = {
    "modalities": (["text"],),
    "audio": (),
    "web_search_options": (),
    "plugins": ([],),
    "moderation": (),
    "verbosity": ("medium",),
    "reasoning_effort": (),
    "reasoning": (),
    "thinking": (),
    "think": (),
    "enable_thinking": (),
    "thinking_budget": (),
    "thinking_budget_tokens": (-1,),
    "thinking_token_budget": (),
    "reasoning_budget": (-1,),
    "reasoning_format": ("none", "auto"),
    "thinking_forced_open": (False,),
    "include_reasoning": (True,),
}
RETURNED: Refusals = {
    "n_probs": (0,),
    "logprob_token_ids": ([],),
    "top_n_tokens": (0,),
    "post_sampling_probs": (False,),
    "return_logprob": (False,),
    "return_tokens": (False,),
    "return_full_text": (False,),
    "return_hidden_states": (False,),
    "return_routed_experts": (False,),
    "decoder_input_details": (False,),
    "response_fields": ([],),
}
NEITHER_ROUTE: Refusals = {
    **STRUCTURE, **SAMPLING, **LENGTHS, **PROMPTS, **TEMPLATE, **CHAT_ANSWERS, **RETURNED,
}  # fmt: skip
REFUSED: Mapping[type[Body], Refusals] = {
    CompletionRequest: {
        **NEITHER_ROUTE,
        "messages": ([],),
        "max_completion_tokens": (),
        "top_logprobs": (0,),
        "continue_final_message": (False,),
        "chat_template_kwargs": ({},),
    },
    ChatCompletionRequest: {
        **NEITHER_ROUTE,
        "prompt": ("", []),
        "best_of": (1,),
        "echo": (False,),
    },
    TokenizeRequest: {**TEMPLATE, "truncate_prompt_tokens": ()},
}

# What may be called → the field by which a client says that none of it is to be.
CHOICES: Mapping[str, str] = {"tools": "tool_choice", "functions": "function_call"}

INSTEAD: Mapping[str, str] = {
    "n_predict": "max_tokens",
    "max_new_tokens": "max_tokens",
    "max_output_tokens": "max_tokens",
    "max_completion_tokens": "max_tokens",
    "min_new_tokens": "min_tokens",
    "stop_sequences": "stop",
    "no_stop_trim": "include_stop_str_in_output",
    "n_cmpl": "n",
    "num_return_sequences": "n",
    "repeat_penalty": "repetition_penalty",
    "do_sample": "temperature",
    "input_ids": "prompt",
    "inputs": "prompt",
    "extra_key": "cache_salt",
    "n_probs": "logprobs",
    "top_n_tokens": "logprobs",
    "top_logprobs": "logprobs",
    "return_logprob": "logprobs",
    "return_tokens": "return_token_ids",
    "return_full_text": "echo",
    "reasoning_effort": "chat_template_kwargs",
    "thinking": "chat_template_kwargs",
    "think": "chat_template_kwargs",
    "enable_thinking": "chat_template_kwargs",
}

HARMLESS = frozenset({
    # accounts, caches and routing: the answer is the same
    "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key",
    "prompt_cache_retention", "prompt_cache_options", "cache_prompt", "id_slot", "session_id",
    "request_id", "rid", "custom_labels", "log_metrics", "no_logs", "data_parallel_rank",
    "routed_dp_rank", "disagg_prefill_dp_rank", "keep_alive", "backend_sampling",
    "include_obfuscation", "sse_ping_interval",
    # how fast, or what is told besides
    "prediction", "timings_per_token", "return_progress", "return_cached_tokens_details", "details",
    "speculative.n_max", "speculative.n_min", "speculative.p_min",
    # what happens anyway here, or what only qualifies a refused field
    "add_generation_prompt", "spaces_between_special_tokens", "separate_reasoning",
    "stream_reasoning", "reasoning_in_content", "parallel_tool_calls", "parse_tool_calls",
    "truncation_side", "media_io_kwargs", "mm_processor_kwargs", "guided_decoding_backend",
    "guided_whitespace_pattern", "grammar_lazy", "grammar_triggers", "preserved_tokens",
    "custom_params", "n_keep", "n_discard", "dynatemp_exponent", "xtc_threshold", "dry_base",
    "dry_allowed_length", "dry_penalty_last_n", "dry_sequence_breakers", "mirostat_tau",
    "mirostat_eta", "repeat_last_n", "adaptive_decay",
})  # fmt: skip


def asks_for_nothing(value: Any, harmless: tuple[Any, ...]) -> bool:
    """Whether a refused field's value may pass; true is not taken for 1, nor false for 0."""
    return value is None or any(
        value == other and isinstance(value, bool) == isinstance(other, bool) for other in harmless
    )


class UnreadFields:
    """Judges what requests carry besides the fields that are read; remembers what it logged."""

    def __init__(self) -> None:
        self._logged: set[str] = set()

    def check(self, body: Body) -> None:
        """Raise 400 for the first field that cannot be honoured; log the unknown ones."""
        refused = REFUSED.get(type(body), {})
        extra = body.model_extra or {}
        for name, value in extra.items():
            if name not in refused:
                self._note(name)
            elif name in CHOICES and extra.get(CHOICES[name]) == "none":
                continue
            elif not asks_for_nothing(value, refused[name]):
                known = INSTEAD.get(name)
                has_other = known in type(body).model_fields
                hint = f"; use {known}" if has_other else ""
                raise invalid(f"{name} is not supported by this server{hint}.", name)
        if isinstance(body, GenerationRequest) and body.stream_options is not None:
            for name in body.stream_options.model_extra or {}:
                self._note(name, "stream_options.")

    def _note(self, name: str, prefix: str = "") -> None:
        if name in HARMLESS or len(self._logged) >= MAX_LOGGED_NAMES:
            return
        shown = prefix + name[:MAX_NAME_CHARS]
        if shown not in self._logged:
            self._logged.add(shown)
            logger.warning("requests carry an unknown field, which is ignored: %r", shown)
