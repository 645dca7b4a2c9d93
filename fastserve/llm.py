"""LLM: offline use in this process, with vLLM's names. Text in, text out, no HTTP.

Rules: everything a call was given is judged before anything of it runs (request_checks.py), as the
server does; n > 1 is n requests with the seeds seed, seed + 1, …; whatever ends a call early (an
error, an interrupt, a generator that is closed) aborts its requests. One thread uses an LLM at a
time. Must not know: how requests are scheduled or run.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, NamedTuple, cast

from rich.console import Console
from rich.progress import Progress

from fastserve.core import request
from fastserve.core.messages import RequestFailedError, RequestUpdate
from fastserve.core.request import Arrival, FinishReason, Handle
from fastserve.frontend.request_checks import check_params, check_prompt, fitted
from fastserve.launch.engine import open_engine, require_one_engine
from fastserve.launch.tokenizer import open_tokenizer
from fastserve.offline.hf_tokenizer import HFTokenizer
from fastserve.offline.inputs import (
    Prompt,
    engine_config,
    prompt_list,
    read_prompt,
    read_salt,
    refuse_lora,
)
from fastserve.offline.output import (
    Choice,
    CompletionOutput,
    Logprob,
    RequestOutput,
    logprob_table,
)
from fastserve.offline.sampling_params import SamplingParams, integer
from fastserve.settings.engine import EngineConfig
from fastserve.text.chat_messages import conversation_list
from fastserve.text.template_reading import ContentFormat
from fastserve.text.tokenizer import TextStream, Tokenizer

__all__ = ["LLM", "CompletionOutput", "Logprob", "RequestOutput"]

Message = Mapping[str, Any]


class _Prompt(NamedTuple):
    """Ids, the text they come from where there was one, and what their KV is shared by."""

    text: str | None
    token_ids: list[int]
    cache_salt: str = ""


@dataclasses.dataclass(frozen=True, slots=True)
class _Job:
    """One prompt of a call, judged; `choices` are those of its requests that have begun."""

    prompt: _Prompt
    params: request.SamplingParams
    priority: int
    choices: list[Choice] = dataclasses.field(default_factory=list)


class LLM:
    """A model in this process. The flags are those of `fastserve serve`, with underscores."""

    def __init__(self, model: str = "demo", **flags: Any) -> None:
        self._open(engine_config(model, flags))

    @classmethod
    def from_config(cls, config: EngineConfig) -> LLM:
        """Load the model that a configuration names."""
        llm = cls.__new__(cls)
        llm._open(config)
        return llm

    def _open(self, config: EngineConfig) -> None:
        require_one_engine(config, "LLM")
        self.config = config
        self._tokenizer = open_tokenizer(self.config)
        self._hf_tokenizer: HFTokenizer | None = None
        console = Console(stderr=True)
        with console.status("loading", spinner="dots") as status:
            self._engine, self.info = open_engine(
                self.config, lambda stage, fraction: status.update(f"{stage} {fraction:.0%}")
            )
        self._live: dict[Handle, Choice] = {}
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
        lora_request: None = None,
        priority: Sequence[int] | None = None,
    ) -> list[RequestOutput]:
        """Complete prompts: text, ids, or {"prompt_token_ids": ids}; one or a list of them.

        A mapping may have a "cache_salt": only prompts with the same one share KV.
        ValueError names what cannot be run of any of them, and then none of them is.
        """
        refuse_lora(lora_request)
        encoded = [self._encode(prompt) for prompt in prompt_list(prompts)]
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
        refuse_lora(lora_request)
        for name, given in (
            ("tokenization_kwargs", tokenization_kwargs),
            ("mm_processor_kwargs", mm_processor_kwargs),
        ):
            if given:
                raise ValueError(f"{name} is not supported.")
        prompts = [
            _Prompt(
                *self._require_tokenizer().encode_chat(
                    conversation,
                    template=chat_template,
                    content_format=chat_template_content_format,
                    add_generation_prompt=add_generation_prompt,
                    continue_final_message=continue_final_message,
                    variables={
                        **(chat_template_kwargs or {}),
                        **({"tools": tools} if tools else {}),
                    },
                )
            )
            for conversation in conversation_list(messages)
        ]
        return self._run(prompts, sampling_params, use_tqdm)

    def stream(
        self, prompt: Prompt | Sequence[Message], sampling_params: SamplingParams | None = None
    ) -> Iterator[str]:
        """Yield the answer to a prompt, or to a conversation, piece by piece."""
        if isinstance(prompt, Sequence) and prompt and isinstance(prompt[0], Mapping):
            encoded = _Prompt(*self._require_tokenizer().encode_chat(prompt))
        else:
            encoded = self._encode(cast("Prompt", prompt))
        params = self._frozen(sampling_params or self.get_default_sampling_params())
        if params.n != 1:
            raise ValueError(f"n must be 1 in a stream, got {params.n}.")
        job = self._judge(encoded, params, 0)
        try:
            self._start(job)
            choice = job.choices[0]
            while not choice.is_finished:
                self._turn()
                if piece := choice.take_text():
                    yield piece
            if piece := choice.take_text():  # another stream's turn brought the end
                yield piece
            if choice.answer.finish_reason is FinishReason.ERROR:
                raise RequestFailedError(choice.answer.error)
        finally:
            self._abandon([job])

    # ── from prompts to ids ──────────────────────────────────────────────────────────────────

    def _encode(self, prompt: Prompt) -> _Prompt:
        text, ids = read_prompt(prompt)
        if ids is None:
            assert text is not None
            ids = self._require_tokenizer().encode(text)
        return _Prompt(text, ids, read_salt(prompt))

    def _require_tokenizer(self) -> Tokenizer:
        if self._tokenizer is None:
            raise ValueError("This model has no tokenizer; prompts must be token ids.")
        return self._tokenizer

    # ── running ──────────────────────────────────────────────────────────────────────────────

    def _run(
        self,
        prompts: Sequence[_Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        use_tqdm: bool,
        priority: Sequence[int] | None = None,
    ) -> list[RequestOutput]:
        if sampling_params is None:
            sampling_params = self.get_default_sampling_params()
        if isinstance(sampling_params, Sequence):
            all_params = [self._frozen(params) for params in sampling_params]
        else:
            all_params = [self._frozen(sampling_params)] * len(prompts)
        priorities = [0] * len(prompts) if priority is None else list(priority)
        if not len(prompts) == len(all_params) == len(priorities):
            raise ValueError(
                f"{len(prompts)} prompts, {len(all_params)} sampling params and "
                f"{len(priorities)} priorities do not match."
            )
        jobs = [
            self._judge(prompt, params, integer("priority", rank))
            for prompt, params, rank in zip(prompts, all_params, priorities, strict=True)
        ]
        try:
            for job in jobs:
                self._start(job)
            with Progress(console=Console(stderr=True), disable=not use_tqdm) as progress:
                choices = [choice for job in jobs for choice in job.choices]
                task = progress.add_task("Answers", total=len(choices))
                for choice in choices:
                    while not choice.is_finished:
                        self._turn()
                        progress.update(task, completed=len(choices) - len(self._live))
                progress.update(task, completed=len(choices))
        finally:
            self._abandon(jobs)
        return [self._output(job) for job in jobs]

    def _frozen(self, params: SamplingParams) -> request.SamplingParams:
        """Return parameters as the engine takes them; ValueError naming what it cannot do."""
        if not isinstance(params, SamplingParams):
            raise TypeError(f"Sampling parameters are SamplingParams, not {type(params).__name__}.")
        frozen = params.frozen()
        check_params(frozen, self.info, has_tokenizer=self._tokenizer is not None)
        return frozen

    def _judge(self, prompt: _Prompt, params: request.SamplingParams, priority: int) -> _Job:
        """Return a job that can run; ValueError naming what cannot."""
        check_prompt(prompt.token_ids, self.info)
        return _Job(prompt, fitted(params, len(prompt.token_ids), self.info), priority)

    def _start(self, job: _Job) -> None:
        """Add the n requests of one prompt."""
        params, (_, ids, salt) = job.params, job.prompt
        seed = self._seeds.getrandbits(62) if params.seed is None else params.seed
        first = dataclasses.replace(params, n=1, seed=seed)
        for own in map(first.of_choice, range(params.n)):
            text = TextStream(self._tokenizer, ids, own, self.info.eos_token_ids)
            choice = Choice(text, self._token_text)
            handle = self._engine.add(Arrival(ids, own, priority=job.priority, cache_salt=salt))
            self._live[handle] = choice
            job.choices.append(choice)

    def _turn(self) -> None:
        """Run one step and hand out its news."""
        for update in self._engine.step():
            self._deliver(update)

    def _deliver(self, update: RequestUpdate) -> None:
        choice = self._live.get(update.handle)
        if choice is None:
            return
        choice.push(update)
        if choice.is_finished:
            del self._live[update.handle]
        elif choice.answer.finish_at is not None:
            ended = self._engine.finish(update.handle, choice.answer.finish_at)
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
        text, ids, _ = job.prompt
        has_logprobs = job.params.logprobs is not None
        first = job.choices[0].answer
        prompt_logprobs: list[dict[int, Logprob] | None] | None = None
        if job.params.prompt_logprobs is not None:
            scored = zip(ids[1:], first.prompt_logprobs, strict=False)
            prompt_logprobs = [None]  # nothing predicts the first id
            prompt_logprobs += [logprob_table(i, entry, self._token_text) for i, entry in scored]
        return RequestOutput(
            request_id=str(self._num_requests - 1),
            prompt=text,
            prompt_token_ids=ids,
            prompt_logprobs=prompt_logprobs,
            outputs=[
                choice.output(index, has_logprobs) for index, choice in enumerate(job.choices)
            ],
            finished=True,
            metrics=first.metrics,
            num_cached_tokens=None if first.metrics is None else first.metrics.cached_tokens,
        )

    def _token_text(self, token_id: int) -> str | None:
        return None if self._tokenizer is None else self._tokenizer.token_text(token_id)
