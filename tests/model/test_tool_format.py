"""Which format a chat template has."""

from __future__ import annotations

import pytest

from phi_cluster.model.tool_format import HERMES, OURS, PHI4, ToolFormat, tool_format_of

PHI4_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'system' and 'tools' in message and message['tools'] is not "
    "none %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|tool|>' + message['tools'] + '<|/tool|>' + "
    "'<|end|>' }}{% else %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
QWEN_TEMPLATE = (
    "{%- if tools %}{{- '<|im_start|>system\\n# Tools\\n<tools>' }}{%- for tool in tools %}"
    "{{- '\\n' + (tool | tojson) }}{%- endfor %}{{- '\\n</tools>\\nUse <tool_call></tool_call>.<|im_end|>\\n' }}"
    "{%- endif %}"
    "{%- for message in messages %}{%- if message.role == 'tool' %}{{- '<|im_start|>user\\n<tool_response>\\n' + "
    "message.content + '\\n</tool_response><|im_end|>\\n' }}{%- else %}{{- '<|im_start|>' + message.role + '\\n' + "
    "message.content + '<|im_end|>\\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
PHI3_TEMPLATE = (
    "{% for message in messages %}{{'<|' + message['role'] + '|>\\n' + message['content'] + '<|end|>\\n'}}{% endfor %}"
)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (PHI4_TEMPLATE, PHI4),
        (PHI4_TEMPLATE.replace("message['tools']", 'message["tools"]'), PHI4),
        (QWEN_TEMPLATE, HERMES),
        (QWEN_TEMPLATE.replace("<tool_call></tool_call>", "<tool_call><function=x></function></tool_call>"), OURS),
        (PHI3_TEMPLATE, OURS),
        ("{{ tools | tojson }}", OURS),
        (None, OURS),
    ],
)
def test_a_template_shows_its_format(template: str | None, expected: ToolFormat) -> None:
    assert tool_format_of(template) == expected


def test_marks_may_be_tokens() -> None:
    added = ("<|end|>", "<tool_call>", "</tool_call>", "<|tool_call|>")
    assert tool_format_of(QWEN_TEMPLATE, added).tokens == ("<tool_call>", "</tool_call>")
    assert tool_format_of(PHI3_TEMPLATE, added).tokens == ("<tool_call>", "</tool_call>")
    assert tool_format_of(PHI4_TEMPLATE, added).tokens == ("<|tool_call|>",)
