"""A server with weights of int8, over real sockets."""

from __future__ import annotations

import openai
import pytest

from tests.model.kernels.cpu.kernel_cases import needs_int8
from tests.server.conftest import API_KEY, serving

pytestmark = pytest.mark.processes


@needs_int8
def test_it_answers_and_streams() -> None:
    """Greedy text, and the same in pieces, through OpenAI's client."""
    with (
        serving("--quantization", "int8", "--deterministic", "--num-device-blocks", "64") as (
            _,
            url,
        ),
        openai.OpenAI(base_url=url + "/v1", api_key=API_KEY, max_retries=0) as client,
    ):

        def ask(stream: bool):
            return client.completions.create(
                model="demo",
                prompt="The for statement",
                max_tokens=24,
                temperature=0,
                stream=stream,
                extra_body={"ignore_eos": True},
            )

        whole = ask(False)
        assert whole.usage.completion_tokens == 24
        assert "".join(chunk.choices[0].text for chunk in ask(True)) == whole.choices[0].text
