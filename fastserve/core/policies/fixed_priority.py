"""Fixed priority by prompt length: the shorter the prefill, the higher, for life.

A baseline of the paper: it uses what is known (the prompt) and learns nothing (the output).
"""

from __future__ import annotations

from fastserve.core.policies.by_key import ByKey


def fixed_priority() -> ByKey:
    """Return a policy of requests sorted by prompt length, then by arrival."""
    return ByKey(lambda request: request.num_prompt_tokens)
