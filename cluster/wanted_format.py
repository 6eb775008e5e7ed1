"""What a reply has to look like, as a grammar that can be followed.

Owns: the way from a `WantedFormat` and a `ToolUse` to a grammar that has been compiled once. Knows nothing of HTTP
fields, of engines and of how a grammar is followed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from phi_cluster.cluster.errors import InvalidRequest
from phi_cluster.cluster.turn_api import ToolUse, TurnRequest, WantedFormat
from phi_cluster.model.grammar import (
    GrammarError,
    check_grammar,
    choice_grammar,
    json_object_grammar,
    json_schema_grammar,
    lark_grammar,
    regex_grammar,
)
from phi_cluster.model.tool_format import ToolFormat
from phi_cluster.model.tool_grammar import check_parameters, tools_grammar

_GRAMMARS: dict[str, Callable[[Any], str]] = {
    "json_schema": json_schema_grammar,
    "json_object": lambda value: json_object_grammar(),
    "regex": regex_grammar,
    "choice": choice_grammar,
    "grammar": lark_grammar,
}
# Beside calls, text can be held to these.
_BESIDE_CALLS = ("json_schema", "json_object")


async def grammar_of(request: TurnRequest, tool_format: ToolFormat) -> str | None:
    """None: free text. Takes about a tenth of a second at most, in a thread. Raises `InvalidRequest` naming the
    field."""
    wanted, tool_use = request.wanted_format, request.tool_use
    if tool_use is not None and (tool_use.callable or wanted is None):
        return await asyncio.to_thread(_of_tools, tool_use, wanted, tool_format)
    return None if wanted is None else await asyncio.to_thread(_of_format, wanted)


def format_param(request: TurnRequest) -> str | None:
    """The field that says what the reply looks like, for what is found out later."""
    if request.tool_use is not None and request.tool_use.callable:
        return "tools"
    return None if request.wanted_format is None else request.wanted_format.param


def _of_format(wanted: WantedFormat) -> str:
    try:
        grammar = _GRAMMARS[wanted.kind](wanted.value)
        check_grammar(grammar)
    except GrammarError as error:
        raise _refused(wanted.param, error) from None
    return grammar


def _of_tools(tool_use: ToolUse, wanted: WantedFormat | None, tool_format: ToolFormat) -> str:
    text_schema: dict[str, Any] | None = None
    if wanted is not None:
        if wanted.kind not in _BESIDE_CALLS:
            raise InvalidRequest(
                f"{wanted.param} does not go with tools: beside calls a reply is text or JSON: ask for JSON, or set "
                "tool_choice to none",
                param=wanted.param,
            )
        text_schema = {"type": "object"} if wanted.value is None or wanted.value is True else wanted.value
    try:
        grammar = tools_grammar(
            tool_format,
            {tool.name: tool.parameters for tool in tool_use.tools if tool.name in tool_use.callable},
            is_required=tool_use.is_required,
            is_parallel=tool_use.is_parallel,
            text_schema=text_schema,
        )
        check_grammar(grammar)
    except GrammarError as error:
        # Which of them it is.
        for tool in tool_use.tools:
            try:
                check_parameters(tool.parameters)
            except GrammarError as wrong:
                raise _refused(tool.param, wrong) from None
        if wanted is not None:
            _of_format(wanted)
        raise _refused("tools", error) from None
    return grammar


def _refused(param: str, error: GrammarError) -> InvalidRequest:
    return InvalidRequest(f"{param} cannot be followed: {error}", param=param)
