"""The grammar of replies that may, or must, call tools.

Owns: the Lark text that follows from tools and a tool format, and what a tool's parameters may be. Compiling is
grammar.py's. Knows nothing of requests and of how tools are told of.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from phi_cluster.model.grammar import GrammarError, check_grammar, check_size, json_text, lark_grammar
from phi_cluster.model.tool_format import CALL_CLOSING, CALL_MIDDLE, CALL_OPENING, ToolFormat

# In one reply. A small model may repeat itself for ever.
MAX_CALLS = 32
# As json.dumps writes, like the rest of a call; a small model that may write more spaces writes them for ever.
_SPACED = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
_COMPACT = {"whitespace_flexible": False, "item_separator": ",", "key_separator": ":"}
# A schema of these only says all that there is to say of its properties, so that it can be closed.
_CLOSABLE = {"type", "properties", "required", "title", "description", "$defs", "definitions", "$schema"}
_ANY_TEXT = r"/(.|\n)*/"


def parameters_schema(given: Mapping[str, Any] | None) -> dict[str, Any]:
    """What a tool's arguments have to be: an object, with no more properties than are named where nothing is said of
    others (a small model makes them up). Raises GrammarError for a schema of something else."""
    schema = dict(given or {"properties": {}})
    if schema.setdefault("type", "object") != "object":
        raise GrammarError('it must be the schema of an object, {"type": "object", ...}')
    if schema.keys() <= _CLOSABLE and "properties" in schema:
        schema["additionalProperties"] = False
    return schema


def tools_grammar(
    tool_format: ToolFormat,
    parameters: Mapping[str, Mapping[str, Any] | None],
    *,
    is_required: bool = False,
    is_parallel: bool = True,
    text_schema: Mapping[str, Any] | None = None,
) -> str:
    """`parameters`: of the tools that may be called, by name; without any the reply is text in which no call begins.
    `text_schema`: a reply without calls is JSON by this schema. Raises GrammarError for what is too large; what is
    wrong in a schema is found when the grammar is compiled."""
    opening, between, closing = (
        _spelled(mark, tool_format.tokens) for mark in (tool_format.opening, tool_format.between, tool_format.closing)
    )
    rules = []
    for number, (name, given) in enumerate(parameters.items()):
        schema = _json(parameters_schema(given), _SPACED)
        beginning, end = json.dumps(f"{CALL_OPENING}{name}{CALL_MIDDLE}"), json.dumps(CALL_CLOSING)
        rules.append(f"call_{number}: {beginning} %json {schema} {end}")
    starts = []
    is_text = not is_required and text_schema is None
    if rules:
        rules.append("call: " + " | ".join(f"call_{number}" for number in range(len(rules))))
        more = f"({between} call){{0,{MAX_CALLS - 1}}}" if is_parallel else ""
        rules.append(f"calls: call {more} {closing}")
        if not is_text:
            starts.append(f"{opening} calls")
        elif tool_format.tokens:
            starts.append(f"TEXT {opening} calls")
        else:
            # As text the opening ends what is in front of it only where it comes first.
            starts.append("called calls")
            rules.append(f"called[lazy]: {_ANY_TEXT} {opening}")
    if is_text:
        starts.append("TEXT")
        rules.append(f"TEXT: {_ANY_TEXT} & ~/(.|\\n)*{_pattern(tool_format.opening)}(.|\\n)*/")
    elif not is_required:
        starts.append("answer")
        rules.append(f"answer: %json {_json(text_schema or {}, _COMPACT)}")
    text = "\n".join([f"start: {' | '.join(starts)}", *rules])
    check_size(text)
    return lark_grammar(text)


def check_parameters(given: Mapping[str, Any] | None) -> None:
    """Raises GrammarError for a schema that a tool's arguments cannot be held to."""
    check_grammar(lark_grammar(f"start: %json {_json(parameters_schema(given), _SPACED)}"))


def _json(schema: Mapping[str, Any], options: Mapping[str, Any]) -> str:
    return json_text({**schema, "x-guidance": options})


def _spelled(text: str, tokens: Sequence[str]) -> str:
    """As Lark: what is a token of its own is not its letters."""
    parts = re.split("(" + "|".join(map(re.escape, tokens)) + ")", text) if tokens else [text]
    return " ".join(part if part in tokens else json.dumps(part) for part in parts if part)


def _pattern(text: str) -> str:
    return re.escape(text).replace("\\\n", "\\n").replace("/", "\\/")
