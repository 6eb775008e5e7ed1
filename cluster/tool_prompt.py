"""Tools, their calls and their results in a prompt, by the format of the model.

Owns: what the template is given in place of messages that it may not know. Knows nothing of tokens, sessions and of
how a reply is read.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from phi_cluster.cluster.call_text import written_reply
from phi_cluster.cluster.turn_api import Tool, ToolUse
from phi_cluster.model.special_text import Rendered
from phi_cluster.model.tool_format import CALL_CLOSING, CALL_MIDDLE, CALL_OPENING, ToolFormat

_DEFAULT_SYSTEM = "You are a helpful assistant with some tools."


@dataclass(frozen=True)
class TemplateInput:
    """What a template is given; `tools` is its variable of that name."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None


def template_input(
    messages: Sequence[dict[str, Any]],
    tool_use: ToolUse | None,
    tool_format: ToolFormat,
    sanitize: Callable[[str], str],
) -> TemplateInput:
    """Messages as in `TurnRequest.messages`; `sanitize` as in call_text.written_reply."""
    written: list[dict[str, Any]] = []
    order: dict[str, int] = {}
    results: list[dict[str, Any]] = []
    for message in [*messages, None]:
        if message is not None and message["role"] == "tool":
            results.append(message)
            continue
        if results:
            # In the order of the calls: that is what tells them apart.
            results.sort(key=lambda result: order.get(result["tool_call_id"], len(order)))
            written += _results([result["content"] for result in results], tool_format)
            results = []
        if message is None:
            break
        calls = message.get("tool_calls")
        if calls:
            order = {call["id"]: index for index, call in enumerate(calls)}
            named = [(call["name"], call["arguments"]) for call in calls]
            text = written_reply(message["content"], named, tool_format, sanitize)
            message = {name: value for name, value in message.items() if name != "tool_calls"}
            message["content"] = Rendered(text)
        written.append(message)
    if tool_use is None:
        return TemplateInput(written, None)
    told = [_told(tool) for tool in tool_use.tools]
    if tool_format.told == "variable":
        return TemplateInput(written, told)
    if written[:1] and written[0]["role"] == "system":
        system, *others = written
    else:
        system, others = None, written
    if tool_format.told == "field":
        functions = json.dumps([tool["function"] for tool in told], ensure_ascii=False)
        system = (system or {"role": "system", "content": _DEFAULT_SYSTEM}) | {"tools": functions}
    else:
        parts = [] if system is None else [system["content"]]
        system = {"role": "system", **(system or {}), "content": "\n\n".join([*parts, _manual(told, tool_format)])}
    return TemplateInput([system, *others], None)


def _results(contents: list[str], tool_format: ToolFormat) -> list[dict[str, Any]]:
    if tool_format.result_role != "user":
        return [{"role": tool_format.result_role, "content": content} for content in contents]
    # One message: many templates want user and assistant to take turns.
    told = "\n".join(f"<tool_response>\n{content}\n</tool_response>" for content in contents)
    return [{"role": "user", "content": told}]


def _told(tool: Tool) -> dict[str, Any]:
    """As transformers' templates expect it, which is OpenAI's form."""
    function: dict[str, Any] = {"name": tool.name}
    if tool.description is not None:
        function["description"] = tool.description
    function["parameters"] = tool.parameters or {"type": "object", "properties": {}}
    return {"type": "function", "function": function}


def _manual(tools: list[dict[str, Any]], tool_format: ToolFormat) -> str:
    """For a model that was not trained for tools, or in another way."""
    listed = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
    example = f"{CALL_OPENING}FUNCTION{CALL_MIDDLE}{{...}}{CALL_CLOSING}"
    return (
        f"You can call functions. These are there, each with the JSON schema of its parameters:\n{listed}\n\n"
        "To call one, reply in exactly this form, with its name and an object of arguments:\n"
        f"{tool_format.opening}{example}{tool_format.closing}\n"
        "What it returns comes in the next message, between <tool_response> and </tool_response>. "
        "If no function helps, answer in words."
    )
