"""--deterministic: a token's logits and KV are the same bits however it came to be computed."""

from __future__ import annotations

import itertools
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from fastserve.llm import LLM
from fastserve.model.sampler import Draws, sample, score
from fastserve.offline.output import RequestOutput
from fastserve.offline.sampling_params import SamplingParams
from tests.bitwise import Case, differing, digest, load
from tests.checkpoints import VOCAB_SIZE, make_checkpoint
from tests.model.kernels.cpu.kernel_cases import needs_int8

DTYPES = (torch.float32, torch.bfloat16)
ALL_CASES = tuple(
    Case(chunk, batch_size, place)
    for chunk, batch_size in itertools.product((1, 7, 64, 200), (1, 3, 16))
    for place in sorted({0, batch_size // 2, batch_size - 1})
)
WIDTHS = {"opt": {"hidden_size": 768, "ffn_dim": 2048}, "gpt2": {"n_embd": 768, "n_inner": 2048}}
FEW_CASES = (Case(1, 1, 0), Case(1, 3, 1), Case(7, 16, 5), Case(64, 3, 2))
WIDE_CASES = (*FEW_CASES, Case(64, 16, 15), Case(200, 3, 1), Case(200, 16, 8))


@pytest.mark.parametrize("dtype", DTYPES)
def test_chunks_and_company_do_not_change_a_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    """Chunks of 1, 7, 64, 200 tokens, batches of 1, 3, 16, first, middle and last row."""
    make_checkpoint(tmp_path, "llama")
    assert differing(load(tmp_path, dtype, kernels="auto"), ALL_CASES) == []


@pytest.mark.parametrize("dtype", DTYPES)
def test_plain_torch_keeps_the_bits(dtype: torch.dtype, tmp_path: Path) -> None:
    """Where there is no compiler, a token's bits are its own too."""
    make_checkpoint(tmp_path, "llama")
    assert differing(load(tmp_path, dtype, kernels="torch"), FEW_CASES) == []


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "name", ["llama-mha-biased", "qwen3", "opt", "opt-norm-last", "opt-bare", "gpt2", "mixtral"]
)
def test_every_architecture_keeps_the_bits(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Norms of heads, learned positions, other activations, experts: nothing depends on others."""
    make_checkpoint(tmp_path, name)
    assert differing(load(tmp_path, dtype, kernels="auto"), FEW_CASES) == []


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
@pytest.mark.parametrize("name", ["llama", "qwen3", "opt", "gpt2", "mixtral"])
def test_wide_models_keep_the_bits(
    name: str, dtype: torch.dtype, num_threads: int, tmp_path: Path
) -> None:
    """Widths at which a single row is summed in another order, and threads cut within rows.

    There are no kernels for float16 on a CPU: it is plain torch throughout.
    """
    make_checkpoint(
        tmp_path, name, **WIDTHS.get(name, {"hidden_size": 768, "intermediate_size": 2048})
    )
    torch.set_num_threads(num_threads)
    try:
        assert differing(load(tmp_path, dtype, kernels="auto"), WIDE_CASES) == []
    finally:
        torch.set_num_threads(1)


@pytest.mark.processes
def test_a_restart_changes_no_bit(tmp_path: Path) -> None:
    """Another process computes the same logits and KV from the same files."""
    make_checkpoint(tmp_path, "llama")
    code = "import sys; from tests.bitwise import digest; print(digest(sys.argv[1]))"
    again = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert again.stdout.strip() == digest(str(tmp_path))


def generate(path: Path, dtype: str, **settings: int | float | bool | str) -> list[RequestOutput]:
    """Return greedy and sampled answers to prompts with a common beginning, with logprobs."""
    rng = random.Random(3)
    shared = [rng.randrange(2, VOCAB_SIZE) for _ in range(24)]
    prompts = [
        {"prompt_token_ids": shared + [rng.randrange(2, VOCAB_SIZE) for _ in range(length)]}
        for length in (1, 9, 17, 30, 40, 56)
    ]
    params = [
        SamplingParams(
            temperature=temperature,
            seed=11,
            max_tokens=40,
            ignore_eos=True,
            logprobs=3,
            prompt_logprobs=scored,
            top_p=0.9,
        )
        for temperature, scored in (
            (0.0, None),
            (1.0, None),
            (0.0, 2),
            (1.0, 2),
            (0.7, None),
            (0, 0),
        )
    ]
    with LLM(
        str(path), dtype=dtype, num_threads=1, block_size=4, deterministic=True, **settings
    ) as llm:
        return llm.generate(prompts, params, use_tqdm=False)


@pytest.mark.parametrize(
    ("name", "dtype", "settings"),
    [
        *((name, dtype, {}) for name in ("llama", "mixtral") for dtype in ("float32", "bfloat16")),
        pytest.param("llama", "bfloat16", {"quantization": "int8"}, marks=needs_int8),
    ],
)
def test_preempted_requests_keep_tokens_and_logprobs(
    name: str, dtype: str, settings: dict[str, str], tmp_path: Path
) -> None:
    """Preempted, recomputed and on other requests' prefix blocks: the very same log probabilities.

    The reference runs one request at a time, its prompt in one step, and shares nothing.
    """
    make_checkpoint(tmp_path, name)
    alone = generate(tmp_path, dtype, max_num_seqs=1, enable_prefix_caching=False, **settings)
    pressed = generate(
        tmp_path,
        dtype,
        num_device_blocks=48,  # one request may need 30
        preemption_mode="recompute",
        max_num_seqs=3,
        max_num_batched_tokens=16,
        scheduling_policy="skip-join-mlfq",
        starvation_limit=0.01,
        **settings,
    )
    metrics = [output.metrics for output in pressed if output.metrics is not None]
    assert sum(item.num_preemptions for item in metrics) > 0
    assert sum(item.recomputed_tokens for item in metrics) > 0
    assert sum(item.cached_tokens for item in metrics) > 0
    for one, other in zip(alone, pressed, strict=True):
        assert one.prompt_logprobs == other.prompt_logprobs
        assert one.outputs[0].token_ids == other.outputs[0].token_ids
        assert one.outputs[0].logprobs == other.outputs[0].logprobs


@pytest.mark.parametrize("vocab_size", [199, 50257])
def test_a_row_is_sampled_and_scored_alike_in_any_batch(vocab_size: int) -> None:
    """Draws with every filter, log probabilities and ranks of a row: alone and among others."""
    num_rows = 12
    logits = torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(1)) * 3

    def draws(rows: slice) -> Draws:
        index = np.arange(num_rows)[rows]
        return Draws(
            is_greedy=index % 5 == 0,
            temperature=(0.5 + index / num_rows).astype(np.float32),
            top_k=np.where(index % 3 == 0, 40, 0),
            top_p=np.where(index % 2 == 0, np.float32(0.9), np.float32(1.0)),
            min_p=np.where(index % 7 == 0, np.float32(0.01), np.float32(0.0)),
            seeds=index * 7919,
            positions=index + 100,
        )

    for num_threads in (1, 2):
        torch.set_num_threads(num_threads)
        try:
            together = sample(logits.clone(), draws(slice(None)), None)
            scores = score(logits, together, 5)
            for row in range(num_rows):
                own = slice(row, row + 1)
                alone = sample(logits[own].clone(), draws(own), None)
                assert torch.equal(alone, together[own])
                mine = score(logits[own].clone(), alone, 5)
                assert mine.logprobs.tobytes() == scores.logprobs[own].tobytes()
                assert mine.ranks.tolist() == scores.ranks[own].tolist()
                assert mine.top_ids.tolist() == scores.top_ids[own].tolist()
                assert mine.top_logprobs.tobytes() == scores.top_logprobs[own].tobytes()
        finally:
            torch.set_num_threads(1)
