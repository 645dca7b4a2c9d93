"""LLM: offline use in this process, with vLLM's names. Text in, text out, no HTTP.

Rules: n > 1 is n requests with the seeds seed, seed + 1, …; whatever ends a call early (an error,
an interrupt, a generator that is closed) aborts its requests. One thread uses an LLM at a time.
Must not know: how requests are scheduled or run.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, cast

from rich.console import Console
from rich.progress import Progress

from fastserve.chat_messages import conversation_list
from fastserve.config import EngineConfig
from fastserve.core.output import RequestUpdate
from fastserve.core.request import SamplingParams
from fastserve.hf_tokenizer import HFTokenizer
from fastserve.launch import open_engine, open_tokenizer
from fastserve.llm_output import (
    Choice,
    CompletionOutput,
    Logprob,
    RequestOutput,
    logprob_table,
)
from fastserve.options import from_mapping
from fastserve.template_reading import ContentFormat
from fastserve.tokenizer import TextStream, Tokenizer

__all__ = ["LLM", "CompletionOutput", "Logprob", "RequestOutput"]

Prompt = str | Sequence[int] | Mapping[str, Any]
Message = Mapping[str, Any]


@dataclasses.dataclass(frozen=True, slots=True)
class _Job:
    """One prompt of a call."""

    prompt: str | None
    prompt_token_ids: list[int]
    params: SamplingParams
    choices: list[Choice]


class LLM:
    """A model in this process. The flags are those of `fastserve serve`, with underscores."""

    def __init__(self, model: str = "demo", **flags: Any) -> None:
        self.config = from_mapping(EngineConfig, {"model": model, **flags}, source="LLM")
        self._tokenizer = open_tokenizer(self.config)
        self._hf_tokenizer: HFTokenizer | None = None
        console = Console(stderr=True)
        with console.status("loading", spinner="dots") as status:
            self._engine, self.info = open_engine(
                self.config, lambda stage, fraction: status.update(f"{stage} {fraction:.0%}")
            )
        self._live: dict[int, Choice] = {}
        self._seeds = random.Random(self.config.seed)
        self._num_requests = 0

    def __enter__(self) -> LLM:
        """Use the LLM in a `with` block; it is closed at its end."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close."""
        self.close()

    def close(self) -> None:
        """Stop the engine and free its memory."""
        self._engine.close()

    def get_tokenizer(self) -> HFTokenizer:
        """Return the tokenizer, with transformers' names; ValueError when the model has none."""
        if self._hf_tokenizer is None:
            self._hf_tokenizer = HFTokenizer(
                self._require_tokenizer(), self.config.model, self.info.max_model_len
            )
        return self._hf_tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """Return the model's own sampling, as its generation_config.json has it."""
        return SamplingParams(**self.info.sampling_defaults)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        *,
        priority: Sequence[int] | None = None,
    ) -> list[RequestOutput]:
        """Complete prompts: text, ids, or {"prompt_token_ids": ids}; one or a list of them."""
        batch = cast("list[Prompt]", [prompts] if is_one_prompt(prompts) else list(prompts))
        encoded = [self._encode(prompt) for prompt in batch]
        return self._run(encoded, sampling_params, use_tqdm, priority)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        lora_request: None = None,
        chat_template: str | None = None,
        chat_template_content_format: ContentFormat = "auto",
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        tokenization_kwargs: Mapping[str, Any] | None = None,
        mm_processor_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answer one conversation, or a list of them. Messages are judged as over HTTP.

        `chat_template` is a template that replaces the model's own. What there is only for vLLM's
        sake (adapters, other media) may be given as None or empty.
        """
        for name, given in (
            ("lora_request", lora_request),
            ("tokenization_kwargs", tokenization_kwargs),
            ("mm_processor_kwargs", mm_processor_kwargs),
        ):
            if given:
                raise ValueError(f"{name} is not supported.")
        prompts = [
            self._require_tokenizer().encode_chat(
                conversation,
                template=chat_template,
                content_format=chat_template_content_format,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                variables={**(chat_template_kwargs or {}), **({"tools": tools} if tools else {})},
            )
            for conversation in conversation_list(messages)
        ]
        return self._run(prompts, sampling_params, use_tqdm)

    def stream(
        self, prompt: Prompt | Sequence[Message], sampling_params: SamplingParams | None = None
    ) -> Iterator[str]:
        """Yield the answer to a prompt, or to a conversation, piece by piece."""
        if isinstance(prompt, Sequence) and prompt and isinstance(prompt[0], Mapping):
            encoded: tuple[str | None, list[int]] = self._require_tokenizer().encode_chat(prompt)
        else:
            encoded = self._encode(cast("Prompt", prompt))
        params = sampling_params or self.get_default_sampling_params()
        if params.n != 1:
            raise ValueError(f"n must be 1 in a stream, got {params.n}.")
        job = self._start(*encoded, params, 0)
        choice = job.choices[0]
        try:
            while choice.finish_reason is None:
                self._turn()
                if piece := choice.take_text():
                    yield piece
            if piece := choice.take_text():  # another stream's turn brought the end
                yield piece
        finally:
            self._abandon([job])

    # ── from prompts to ids ──────────────────────────────────────────────────────────────────

    def _encode(self, prompt: Prompt) -> tuple[str | None, list[int]]:
        if isinstance(prompt, Mapping):
            if "prompt_token_ids" in prompt:
                return prompt.get("prompt"), list(prompt["prompt_token_ids"])
            if not isinstance(prompt.get("prompt"), str):
                raise ValueError('A prompt mapping needs "prompt" or "prompt_token_ids".')
            prompt = str(prompt["prompt"])
        if isinstance(prompt, str):
            return prompt, self._require_tokenizer().encode(prompt)
        return None, list(prompt)

    def _require_tokenizer(self) -> Tokenizer:
        if self._tokenizer is None:
            raise ValueError("This model has no tokenizer; prompts must be token ids.")
        return self._tokenizer

    # ── running ──────────────────────────────────────────────────────────────────────────────

    def _run(
        self,
        prompts: Sequence[tuple[str | None, list[int]]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        use_tqdm: bool,
        priority: Sequence[int] | None = None,
    ) -> list[RequestOutput]:
        if sampling_params is None:
            sampling_params = self.get_default_sampling_params()
        if isinstance(sampling_params, SamplingParams):
            sampling_params = [sampling_params] * len(prompts)
        priorities = priority or [0] * len(prompts)
        if not len(prompts) == len(sampling_params) == len(priorities):
            raise ValueError(
                f"{len(prompts)} prompts, {len(sampling_params)} sampling params and "
                f"{len(priorities)} priorities do not match."
            )
        jobs: list[_Job] = []
        try:
            for (text, ids), params, rank in zip(prompts, sampling_params, priorities, strict=True):
                jobs.append(self._start(text, ids, params, rank))
            with Progress(console=Console(stderr=True), disable=not use_tqdm) as progress:
                choices = [choice for job in jobs for choice in job.choices]
                task = progress.add_task("Answers", total=len(choices))
                for choice in choices:
                    while choice.finish_reason is None:
                        self._turn()
                        progress.update(task, completed=len(choices) - len(self._live))
                progress.update(task, completed=len(choices))
        finally:
            self._abandon(jobs)
        return [self._output(job) for job in jobs]

    def _start(
        self, prompt: str | None, ids: list[int], params: SamplingParams, priority: int
    ) -> _Job:
        """Add the n requests of one prompt."""
        seed = self._seeds.getrandbits(62) if params.seed is None else params.seed
        job = _Job(prompt, ids, params, [])
        try:
            for index in range(params.n):
                own = dataclasses.replace(
                    params,
                    n=1,
                    seed=(seed + index + 2**63) % 2**64 - 2**63,
                    prompt_logprobs=params.prompt_logprobs if index == 0 else None,
                )
                text = TextStream(self._tokenizer, ids, own, self.info.eos_token_ids)
                choice = Choice(text, self._token_text)
                handle = self._engine.add(ids, own, priority=priority)
                self._live[handle] = choice
                job.choices.append(choice)
        except ValueError:
            self._abandon([job])
            raise
        return job

    def _turn(self) -> None:
        """Run one step and hand out its news."""
        for update in self._engine.step():
            self._deliver(update)

    def _deliver(self, update: RequestUpdate) -> None:
        choice = self._live.get(update.request)
        if choice is None:
            return
        matched_at = choice.push(update)
        if update.finish_reason is not None:
            del self._live[update.request]
        elif matched_at is not None:
            ended = self._engine.finish(update.request, matched_at)
            if ended is not None:
                self._deliver(ended)

    def _abandon(self, jobs: Sequence[_Job]) -> None:
        """Abort what is left of some jobs."""
        choices = {id(choice) for job in jobs for choice in job.choices}
        for handle in [h for h, choice in self._live.items() if id(choice) in choices]:
            self._engine.abort(handle)
            del self._live[handle]

    def _output(self, job: _Job) -> RequestOutput:
        self._num_requests += 1
        has_logprobs = job.params.logprobs is not None
        first = job.choices[0]
        prompt_logprobs: list[dict[int, Logprob] | None] | None = None
        if job.params.prompt_logprobs is not None:
            scored = zip(job.prompt_token_ids[1:], first.prompt_logprobs, strict=False)
            prompt_logprobs = [None]  # nothing predicts the first id
            prompt_logprobs += [logprob_table(i, entry, self._token_text) for i, entry in scored]
        return RequestOutput(
            request_id=str(self._num_requests - 1),
            prompt=job.prompt,
            prompt_token_ids=job.prompt_token_ids,
            prompt_logprobs=prompt_logprobs,
            outputs=[
                choice.output(index, has_logprobs) for index, choice in enumerate(job.choices)
            ],
            finished=True,
            metrics=first.metrics,
        )

    def _token_text(self, token_id: int) -> str | None:
        return None if self._tokenizer is None else self._tokenizer.token_text(token_id)


def is_one_prompt(prompts: Prompt | Sequence[Prompt]) -> bool:
    """Whether this is a prompt rather than a list of prompts."""
    if isinstance(prompts, str | Mapping):
        return True
    return bool(prompts) and all(isinstance(entry, int) for entry in prompts)
