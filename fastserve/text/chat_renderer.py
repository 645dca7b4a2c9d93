"""One model's chat template, and messages in OpenAI's shape → prompt text. The one path there is.

Rules: how the template reads messages is found out once, when it is first needed.
Must not know: ids, HTTP.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastserve.text.chat_messages import template_messages, template_variables
from fastserve.text.chat_template import ChatTemplate
from fastserve.text.template_reading import (
    CONTENT_FORMATS,
    ContentFormat,
    TemplateReading,
    probe_template,
)


class ChatRenderer:
    """Makes prompts by one template, which may name the special tokens."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        self.source = source
        self._template = ChatTemplate(source, special_tokens)
        self._readings: dict[str, TemplateReading] = {}

    def render(
        self,
        messages: Any,
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        content_format: ContentFormat = "auto",
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """Return the prompt text; ValueError for messages that cannot be honoured.

        `content_format` forces the form in which the template gets content: "string", or
        "openai" for parts. `variables` are the template's own.
        """
        chosen = template_variables(variables)
        return self._template.render(
            template_messages(messages, self._reading(content_format)),
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            **chosen,
        )

    def _reading(self, content_format: ContentFormat) -> TemplateReading:
        reading = self._readings.get(content_format)
        if reading is None:
            if content_format not in CONTENT_FORMATS:
                raise ValueError(
                    f"chat_template_content_format must be one of {', '.join(CONTENT_FORMATS)}, "
                    f"got {content_format!r}."
                )
            reading = probe_template(self._template, content_format)
            self._readings[content_format] = reading
        return reading
