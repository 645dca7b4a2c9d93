"""What a request asks for at most, in tokens and scores, before any of it is made.

Rules: pure. Every choice takes its prompt and the longest answer it may have, each token once for
itself and once for each alternative that is asked for beside it: that is what the device computes,
what is held of an answer, and what is written of it. Must not know: bodies, the engine, HTTP.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """All choices of all prompts together; lengths in tokens.

    `prompt_tokens` are the sum over the prompts. `max_tokens` is the limit of one answer.
    """

    num_prompts: int = 1
    n: int = 1
    prompt_tokens: int
    max_tokens: int
    logprobs: int = 0
    prompt_logprobs: int = 0

    @property
    def price(self) -> int:
        """Tokens and scores."""
        return self.n * (
            self._prompt_price + self.num_prompts * self.max_tokens * self._token_price
        )

    def affordable_tokens(self, max_price: int) -> int:
        """Return the longest answer that a price allows each choice; less than 1: there is none."""
        left = max_price // self.n - self._prompt_price
        return left // (self.num_prompts * self._token_price)

    @property
    def _prompt_price(self) -> int:
        return self.prompt_tokens * (1 + self.prompt_logprobs)

    @property
    def _token_price(self) -> int:
        return 1 + self.logprobs

    def __str__(self) -> str:
        """Return the price as it comes about."""
        answers = f"{self.num_prompts} × " if self.num_prompts > 1 else ""
        return (
            f"n {self.n} × (prompt {self.prompt_tokens} × (1 + prompt_logprobs "
            f"{self.prompt_logprobs}) + {answers}max_tokens {self.max_tokens} × (1 + logprobs "
            f"{self.logprobs})) = {self.price}"
        )

    @property
    def lever(self) -> str:
        """The field that raises the price most, of those that could be less."""
        factors = {
            "n": self.n,
            "prompt_logprobs": 1 + self.prompt_logprobs,
            "logprobs": 1 + self.logprobs,
        }
        most = max(factors, key=lambda name: factors[name])
        return most if factors[most] > 1 else "prompt"
