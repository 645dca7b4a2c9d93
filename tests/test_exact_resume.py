"""Preemption is invisible: what is preempted, recomputed and chunked yields the same tokens."""

from __future__ import annotations

import itertools
import logging
import random
from functools import partial
from pathlib import Path

import pytest
import torch
import transformers

from fastserve.executor import local
from fastserve.llm import LLM
from fastserve.offline.output import RequestOutput
from fastserve.offline.sampling_params import SamplingParams
from tests.checkpoints import VOCAB_SIZE, make_checkpoint, write_old_dialect

logger = logging.getLogger(__name__)

NUM_TOKENS = 64
PROMPT_LENGTHS = (5, 9, 17, 33, 50, 64)
MARGIN = 1e-3  # where the reference's two best logits are closer, either may be chosen
MAX_EXCUSED_SHARE = 0.005
ROUTING_MARGIN = 5e-5


def prompts() -> list[list[int]]:
    """Return prompts of several lengths, some with a common beginning."""
    rng = random.Random(3)
    shared = [rng.randrange(2, VOCAB_SIZE) for _ in range(32)]
    return [
        (shared[: length // 2] + [rng.randrange(2, VOCAB_SIZE) for _ in range(length)])[:length]
        for length in PROMPT_LENGTHS
    ]


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every KV block that belongs to no request be NaN."""
    monkeypatch.setattr(local, "LocalExecutor", partial(local.LocalExecutor, is_poisoned=True))


def assert_preempted(outputs: list[RequestOutput]) -> None:
    """Preemption must have happened, and cost KV, or the test shows nothing."""
    metrics = [output.metrics for output in outputs if output.metrics is not None]
    assert len(metrics) == len(outputs)
    assert sum(item.num_preemptions for item in metrics) > 0
    assert sum(item.recomputed_tokens for item in metrics) > 0


def num_excused(model: torch.nn.Module, prompt: list[int], output: list[int]) -> int:
    """Hold each token against an uncached pass of the reference; return how many were ties."""
    with torch.inference_mode():
        logits = model(torch.tensor([prompt + output[:-1]])).logits[0, -len(output) :]
    excused = 0
    for row, token_id in zip(logits, output, strict=True):
        best, second = row.topk(2).values.tolist()
        if int(row.argmax()) != token_id:
            assert best - second < MARGIN
            assert best - float(row[token_id]) < MARGIN
            excused += 1
    return excused


@torch.inference_mode()
def routing_margin(model: transformers.PreTrainedModel, ids: list[int]) -> float:
    """Return by how much, at least, an expert that was chosen beat one that was not."""
    layers = model(torch.tensor([ids[:-1]]), output_router_logits=True).router_logits
    top_k = int(model.config.num_experts_per_tok)
    scores = torch.cat([layer for layer in layers if layer is not None]).softmax(-1)
    ranked = scores.sort(-1, descending=True).values
    return float((ranked[:, top_k - 1] - ranked[:, top_k]).min())


@pytest.mark.parametrize("policy", ["skip-join-mlfq", "mlfq"])
@pytest.mark.parametrize(
    ("name", "dialect"),
    [
        *itertools.product(["llama", "llama3", "mistral", "qwen2", "qwen3"], ["new", "old"]),
        *itertools.product(["opt", "opt-norm-last", "gpt2", "mixtral", "qwen3-moe"], ["new"]),
    ],
)
def test_preempted_tokens_are_the_reference_s(
    name: str, dialect: str, policy: str, tmp_path: Path
) -> None:
    """With too few blocks for all, 64 greedy tokens of each request still equal the reference's."""
    model = make_checkpoint(tmp_path, name)
    if dialect == "old":
        write_old_dialect(tmp_path)
    params = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True)
    with LLM(
        str(tmp_path),
        dtype="float32",
        num_threads=1,
        block_size=4,
        num_device_blocks=48,  # one request may need 32
        preemption_mode="recompute",
        max_num_seqs=3,
        max_num_batched_tokens=16,  # the longest prompt takes at least four chunks
        scheduling_policy=policy,
        starvation_limit=0.02,
    ) as llm:
        outputs = llm.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts()], params, use_tqdm=False
        )
    assert_preempted(outputs)
    excused = sum(
        num_excused(model, output.prompt_token_ids, list(output.outputs[0].token_ids))
        for output in outputs
    )
    num_tokens = NUM_TOKENS * len(outputs)
    logger.info("%d of %d tokens excused", excused, num_tokens)  # shown by --log-cli-level=INFO
    assert excused <= MAX_EXCUSED_SHARE * num_tokens, f"{excused} of {num_tokens} tokens excused"
    if name in ("mixtral", "qwen3-moe"):
        # Sums are rounded differently in other batches; that must not choose the experts.
        texts = [out.prompt_token_ids + list(out.outputs[0].token_ids) for out in outputs]
        assert min(routing_margin(model, ids) for ids in texts) > ROUTING_MARGIN


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_demo_text_does_not_depend_on_the_company(temperature: float) -> None:
    """The bundled model writes the same under pressure as alone, greedy and sampled."""
    questions = ["The function returns", "A list is", "def", "Explain", "If the argument"]
    params = SamplingParams(temperature=temperature, seed=7, max_tokens=60, ignore_eos=True)
    with LLM(
        "demo",
        num_threads=1,
        num_device_blocks=12,
        max_model_len=128,
        enable_prefix_caching=False,
    ) as llm:
        alone = [llm.generate(text, params, use_tqdm=False)[0].outputs[0] for text in questions]
    with LLM(
        "demo",
        num_threads=1,
        num_device_blocks=12,
        preemption_mode="recompute",
        max_model_len=128,
        max_num_seqs=2,
        max_num_batched_tokens=8,
        scheduling_policy="skip-join-mlfq",
        starvation_limit=0.02,
    ) as llm:
        outputs = llm.generate(questions, params, use_tqdm=False)
    assert_preempted(outputs)
    assert [output.outputs[0].token_ids for output in outputs] == [one.token_ids for one in alone]
