"""What `LLM` is given: vLLM's arguments are taken where they change nothing, else refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fastserve import LLM
from fastserve.offline.inputs import HARMLESS, engine_config, prompt_list
from fastserve.settings.engine import EngineConfig
from fastserve.settings.option import ConfigError
from tests.fresh_cache import make_fresh_cache

REFUSED: dict[str, Any] = {
    "compilation_config": 3,
    "cpu_offload_gb": 4,
    "enable_expert_parallel": True,
    "enable_lora": True,
    "enable_sleep_mode": True,
    "hf_overrides": {"max_position_embeddings": 9},
    "kv_cache_dtype": "fp8",
    "logits_processors": [print],
    "override_generation_config": {"temperature": 0.0},
    "rope_scaling": {"factor": 2.0},
    "runner": "pooling",
    "skip_tokenizer_init": True,
    "speculative_config": {"model": "x"},
    "task": "embed",
    "tokenizer_mode": "mistral",
    "tokenizer_revision": "main",
    "no_such_flag": 1,
}


@pytest.mark.parametrize("name", HARMLESS)
def test_arguments_of_vllm_that_ask_for_nothing_are_taken(name: str) -> None:
    """Each at every value that changes nothing; the configuration is the plain one."""
    allowed = HARMLESS[name]
    for value in (None, 5, "x", {}) if allowed is None else allowed:
        assert engine_config("demo", {name: value}) == EngineConfig()


@pytest.mark.parametrize("name", REFUSED)
def test_arguments_that_would_change_something_are_refused_by_name(name: str) -> None:
    """In one line, before anything is loaded."""
    with pytest.raises(ConfigError, match=name.replace("_", "[-_]")) as caught:
        LLM("demo", **{name: REFUSED[name]})
    assert "\n" not in str(caught.value)


def test_none_leaves_a_setting_to_its_default() -> None:
    """As vLLM's None does."""
    nothing: dict[str, Any] = dict.fromkeys(("seed", "enable_prefix_caching", "tokenizer", "dtype"))
    assert engine_config("demo", nothing) == EngineConfig()


def test_a_name_there_is_not_is_refused_at_none_too() -> None:
    """A misspelling is not dropped."""
    with pytest.raises(ConfigError, match="unknown option 'no_such_flag'"):
        engine_config("demo", {"no_such_flag": None})


def test_a_secret_is_not_repeated() -> None:
    """An error ends up in logs."""
    with pytest.raises(ConfigError, match="LLM: hf_token is not supported") as caught:
        engine_config("demo", {"hf_token": "hf_abc"})
    assert "abc" not in str(caught.value)


def test_settings_in_vllm_s_other_forms() -> None:
    """Paths, torch's dtypes, and the older name of a count of blocks."""
    config = engine_config(
        Path("/a/b"),
        {
            "dtype": torch.bfloat16,
            "num_gpu_blocks_override": 7,
            "tokenizer": "x",
            "swap_space": 2,
        },
    )
    assert (config.model, config.dtype, config.tokenizer) == ("/a/b", "bfloat16", "x")
    assert (config.num_device_blocks, config.swap_space) == (7, 2.0)


def test_a_model_loads_with_vllm_s_arguments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A synonym of a dtype, and flags that ask for what happens anyway."""
    monkeypatch.setenv("XDG_CACHE_HOME", make_fresh_cache(tmp_path))
    with LLM(
        "demo", dtype="half", enforce_eager=True, trust_remote_code=True, swap_space=4,
        disable_log_stats=True, num_device_blocks=8, num_threads=1,
    ) as llm:  # fmt: skip
        assert llm.info.dtype == "float16"
        assert llm.generate("a", use_tqdm=False)[0].outputs[0].token_ids


@pytest.mark.parametrize(
    ("prompts", "expected"),
    [
        ("a", ["a"]),
        (["a", "b"], ["a", "b"]),
        ([5, 6], [[5, 6]]),
        ((5, 6), [[5, 6]]),
        ([[5], [6]], [[5], [6]]),
        ({"prompt": "a"}, [{"prompt": "a"}]),
        ([], []),
        ((text for text in "ab"), ["a", "b"]),
    ],
)
def test_one_prompt_or_several(prompts: Any, expected: list[Any]) -> None:
    """A prompt of ids is told from a list of prompts by its first entry."""
    assert prompt_list(prompts) == expected


@pytest.mark.parametrize("prompts", [None, 5, b"bytes", 1.5])
def test_what_is_no_prompt_is_a_type_error(prompts: Any) -> None:
    """One that says what a prompt is."""
    with pytest.raises(TypeError, match="A prompt is text, token ids or a mapping"):
        prompt_list(prompts)
