"""What a template is given in place of tools, calls and results."""

from __future__ import annotations

import json
from typing import Any

import pytest

from phi_cluster.cluster.tool_prompt import template_input
from phi_cluster.cluster.turn_api import Tool, ToolUse
from phi_cluster.model.special_text import Rendered
from phi_cluster.model.tool_format import HERMES, OURS, PHI4

SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}
TOOL_USE = ToolUse((Tool("weather", "", SCHEMA, "Of a city"), Tool("now", "")), ("weather",))
TOLD: list[Any] = [
    {"name": "weather", "description": "Of a city", "parameters": SCHEMA},
    {"name": "now", "parameters": {"type": "object", "properties": {}}},
]
SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "Hi"}
CALLS = [{"id": "1", "name": "weather", "arguments": '{"city":"Rome"}'}, {"id": "2", "name": "now", "arguments": ""}]
HISTORY = [
    USER,
    {"role": "assistant", "content": "Look:", "tool_calls": CALLS},
    {"role": "tool", "content": "noon", "tool_call_id": "2"},
    {"role": "tool", "content": "sunny", "tool_call_id": "1"},
]


def test_messages_without_tools_stay_as_they_are() -> None:
    for tool_format in (HERMES, PHI4, OURS):
        given = template_input([SYSTEM, USER], None, tool_format, str.upper)
        assert (given.messages, given.tools) == ([SYSTEM, USER], None)


def test_a_template_that_knows_tools_gets_them() -> None:
    given = template_input([SYSTEM, USER], TOOL_USE, HERMES, str)
    assert given.messages == [SYSTEM, USER]
    assert given.tools == [{"type": "function", "function": function} for function in TOLD]


@pytest.mark.parametrize("messages", [[SYSTEM, USER], [USER]])
def test_phi4s_system_message_has_them(messages: list[dict[str, Any]]) -> None:
    given = template_input(messages, TOOL_USE, PHI4, str)
    system, user = given.messages
    assert (user, given.tools) == (USER, None)
    assert json.loads(system["tools"]) == TOLD
    assert system["content"] == (
        SYSTEM["content"] if len(messages) == 2 else "You are a helpful assistant with some tools."
    )


@pytest.mark.parametrize("messages", [[SYSTEM, USER], [USER]])
def test_where_nobody_knows_tools_the_system_message_explains_them(messages: list[dict[str, Any]]) -> None:
    system, user = template_input(messages, TOOL_USE, OURS, str).messages
    assert user == USER
    assert system["content"].startswith("Be brief.\n\n" if len(messages) == 2 else "You can call")
    for function in TOLD:
        assert json.dumps(function) in system["content"]
    assert '<tool_call>\n{"name": "FUNCTION", "arguments": {...}}\n</tool_call>' in system["content"]
    assert messages[0]["content"] in ("Be brief.", "Hi")


@pytest.mark.parametrize(
    ("tool_format", "spelled", "results"),
    [
        (
            HERMES,
            '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>\n<tool_call>\n'
            '{"name": "now", "arguments": {}}\n</tool_call>',
            [("tool", "sunny"), ("tool", "noon")],
        ),
        (
            PHI4,
            '<|tool_call|>[{"name": "weather", "arguments": {"city": "Rome"}}, {"name": "now", "arguments": {}}]'
            "<|/tool_call|>",
            [("tool_response", "sunny"), ("tool_response", "noon")],
        ),
        (
            OURS,
            '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>\n<tool_call>\n'
            '{"name": "now", "arguments": {}}\n</tool_call>',
            [("user", "<tool_response>\nsunny\n</tool_response>\n<tool_response>\nnoon\n</tool_response>")],
        ),
    ],
)
def test_calls_and_results(tool_format: Any, spelled: str, results: list[tuple[str, str]]) -> None:
    _, assistant, *others = template_input([*HISTORY, USER], None, tool_format, str).messages
    assert assistant == {"role": "assistant", "content": "Look:" + spelled}
    # Its marks are meant, whoever looks at them.
    assert isinstance(assistant["content"], Rendered)
    assert [(message["role"], message["content"]) for message in others] == [*results, ("user", "Hi")]
    assert HISTORY[1]["tool_calls"] == CALLS


def test_only_content_and_arguments_are_a_strangers() -> None:
    call = {"id": "1", "name": "f", "arguments": '{"a": "<x>"}'}
    messages = [{"role": "assistant", "content": "<x>", "tool_calls": [call]}]
    [assistant] = template_input(messages, None, OURS, lambda text: text.replace("<x>", "<|x>")).messages
    assert assistant["content"] == '<|x><tool_call>\n{"name": "f", "arguments": {"a": "<|x>"}}\n</tool_call>'
