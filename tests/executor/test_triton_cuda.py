"""The engine on a CUDA device: graphs, half types, lookahead and preemption."""

from __future__ import annotations

import random

import pytest
import torch

from fastserve.executor.opening import open_worker
from fastserve.llm import LLM
from fastserve.offline.sampling_params import SamplingParams
from fastserve.settings.engine import EngineConfig
from tests.checkpoints import EOS_TOKEN_ID, VOCAB_SIZE, make_checkpoint
from tests.executor.driver import Driven, Driver
from tests.test_exact_resume import MARGIN

pytestmark = pytest.mark.gpu

PROMPTS = [
    [random.Random(length * 1000 + i).randrange(2, VOCAB_SIZE) for i in range(length)]
    for length in (5, 9, 17, 33, 50, 64)
]


def run_worker(path, dtype: str, *, is_eager: bool) -> list[list[int]]:
    """Decode all prompts in one batch on the device; returns their tokens."""
    worker = open_worker(
        EngineConfig(
            model=str(path),
            device="cuda",
            dtype=dtype,
            block_size=8,
            num_device_blocks=128,
            max_num_seqs=7,
            enforce_eager=is_eager,
        ),
        path,
        num_threads=1,
        eos_token_ids=frozenset({EOS_TOKEN_ID}),
        on_progress=lambda stage, fraction: None,
        is_poisoned=True,
    ).worker
    requests = [Driven(prompt, num_tokens=24, chunk=20) for prompt in PROMPTS]
    Driver(worker.execute, 128, 8).run(*requests)
    return [request.output for request in requests]


def assert_reference_s(model: torch.nn.Module, prompt: list[int], output: list[int]) -> int:
    """Hold each token against the float32 oracle on the CPU; returns how many were ties."""
    with torch.inference_mode():
        logits = model(torch.tensor([prompt + output[:-1]])).logits[0, -len(output) :]
    excused = 0
    for row, token_id in zip(logits, output, strict=True):
        if int(row.argmax()) != token_id:
            assert float(row.max() - row[token_id]) < MARGIN
            excused += 1
    return excused


@pytest.mark.parametrize("name", ["llama", "qwen3", "opt", "mixtral"])
def test_graphs_and_eager_yield_the_reference_s_tokens(name, tmp_path):
    """In float32 both ways to run a decode give the tokens of the oracle on the CPU."""
    model = make_checkpoint(tmp_path, name)
    eager = run_worker(tmp_path, "float32", is_eager=True)
    captured = run_worker(tmp_path, "float32", is_eager=False)
    for outputs in (eager, captured):
        excused = sum(
            assert_reference_s(model, prompt, output)
            for prompt, output in zip(PROMPTS, outputs, strict=True)
        )
        assert excused <= 1


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_types(dtype, tmp_path):
    """Half types run, and the same run gives the same tokens, all of them in the vocabulary."""
    make_checkpoint(tmp_path, "llama")
    first = run_worker(tmp_path, dtype, is_eager=False)
    assert first == run_worker(tmp_path, dtype, is_eager=False)
    assert all(0 <= token_id < VOCAB_SIZE for output in first for token_id in output)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_preempted_with_a_step_in_flight(temperature, tmp_path):
    """With too few blocks for all, tokens equal those of requests that were alone."""
    model = make_checkpoint(tmp_path, "llama")
    params = SamplingParams(temperature=temperature, seed=7, max_tokens=64, ignore_eos=True)
    prompts = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
    settings = {"device": "cuda", "dtype": "float32", "block_size": 4}
    with LLM(str(tmp_path), **settings, num_device_blocks=256, max_num_seqs=1) as llm:
        alone = llm.generate(prompts, params, use_tqdm=False)
    with LLM(
        str(tmp_path),
        **settings,
        num_device_blocks=48,
        max_num_seqs=3,
        max_num_batched_tokens=16,
        scheduling_policy="skip-join-mlfq",
        starvation_limit=0.02,
    ) as llm:
        outputs = llm.generate(prompts, params, use_tqdm=False)
    assert sum(output.metrics.num_preemptions for output in outputs if output.metrics) > 0
    for output, single in zip(outputs, alone, strict=True):
        ids = list(output.outputs[0].token_ids)
        if temperature:
            assert ids == list(single.outputs[0].token_ids)
        else:
            assert assert_reference_s(model, output.prompt_token_ids, ids) <= 1
