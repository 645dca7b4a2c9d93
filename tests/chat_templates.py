"""Chat templates as models bring them, cut down to how they read messages."""

from __future__ import annotations

STRING = "{% for m in messages %}<{{ m.role }}>{{ m['content'] }}{% endfor %}"
TRIM = "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}{% endfor %}"
CONCATENATED = "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] }}{% endfor %}"
PARTS = (
    "{% for m in messages %}<{{ m.role }}>"
    "{% for part in m.content %}{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}"
    "{% endfor %}"
)
# Llama 4, Gemma 3, Qwen2-VL: either.
BOTH = (
    "{% for m in messages %}<{{ m.role }}>{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for part in m.content %}{% if part['type'] == 'image' %}<image>"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{% endfor %}"
)
# Qwen3-VL, GLM: the loop is in a macro.
MACRO = (
    "{% macro show(content) %}{% if content is string %}{{ content }}{% else %}"
    "{% for item in content %}{{ item.text }}{% endfor %}{% endif %}{% endmacro %}"
    "{% for m in messages %}<{{ m.role }}>{{ show(m.content) }}{% endfor %}"
)
# SmolVLM, Idefics: the first part is looked at before the loop.
SMOLVLM = (
    "{% for m in messages %}<{{ m['role'] }}{% if m['content'][0]['type'] == 'image' %}:"
    "{% endif %}>{% for line in m['content'] %}{% if line['type'] == 'text' %}{{ line['text'] }}"
    "{% elif line['type'] == 'image' %}<image>{% endif %}{% endfor %}{% endfor %}"
)
# Only one part is read.
FIRST_PART = "{% for m in messages %}<{{ m.role }}>{{ m.content[0].text }}{% endfor %}"
# Llama 3.2 Vision: a user's content either way, a system's only as a string.
MIXED = (
    "{% if messages[0].role == 'system' %}<system>{{ messages[0].content | trim }}"
    "{% set messages = messages[1:] %}{% endif %}" + BOTH
)
# Qwen3: parts of a user's content only, and lost elsewhere.
USER_PARTS = (
    "{% for m in messages %}<{{ m.role }}>{% if m.content is string %}{{ m.content }}"
    "{% elif m.role == 'user' %}{% for part in m.content %}{{ part.text }}{% endfor %}{% endif %}"
    "{% endfor %}"
)

CALLS = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}"
    "{% for call in m.tool_calls %}{{ call.function.name }}(BODY){% endfor %}{% endfor %}"
)
CALLS_JSON = CALLS.replace("BODY", "{{ call.function.arguments | tojson }}")
CALLS_ITEMS = CALLS.replace(
    "BODY", "{% for k, v in call.function.arguments.items() %}{{ k }}={{ v }};{% endfor %}"
)
CALLS_TEXT = CALLS.replace("BODY", "{{ '' + call.function.arguments }}")
CALLS_PRINTED = CALLS.replace("BODY", "{{ call.function.arguments }}")
# DeepSeek R1: calls only where the content is none, arguments as text.
CALLS_WITHOUT_CONTENT = (
    "{% for m in messages %}<{{ m.role }}>"
    "{% if m.role == 'assistant' and m['content'] is none %}{% for call in m['tool_calls'] %}"
    "{{ call['function']['name'] + '(' + call['function']['arguments'] + ')' }}{% endfor %}"
    "{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
)
