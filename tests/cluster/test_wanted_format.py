"""Formats that can be followed become grammars; others are refused by the field that asked for them."""

from __future__ import annotations

from typing import Any

import pytest

from phi_cluster.cluster.errors import InvalidRequest
from phi_cluster.cluster.turn_api import Tool, ToolUse, TurnRequest, WantedFormat
from phi_cluster.cluster.wanted_format import format_param, grammar_of
from phi_cluster.model.grammar import choice_grammar, json_object_grammar, json_schema_grammar, regex_grammar
from phi_cluster.model.tool_format import OURS
from phi_cluster.model.tool_grammar import tools_grammar

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
TOOL = Tool("f", "tools[0].parameters", SCHEMA)


def request(wanted: WantedFormat | None = None, tool_use: ToolUse | None = None) -> TurnRequest:
    return TurnRequest("tenant", None, "0" * 32, {}, messages=[], wanted_format=wanted, tool_use=tool_use)


@pytest.mark.parametrize(
    ("kind", "value", "grammar"),
    [
        ("json_schema", SCHEMA, json_schema_grammar(SCHEMA)),
        ("json_object", None, json_object_grammar()),
        ("json_object", True, json_object_grammar()),
        ("regex", "a+", regex_grammar("a+")),
        ("choice", ["yes", "no"], choice_grammar(["yes", "no"])),
    ],
)
async def test_each_kind_has_its_grammar(kind: Any, value: Any, grammar: str) -> None:
    assert await grammar_of(request(WantedFormat("field", kind, value)), OURS) == grammar


@pytest.mark.parametrize(
    ("kind", "value", "word"),
    [
        ("json_schema", {"type": "intger"}, "intger"),
        ("json_schema", {"$ref": "http://127.0.0.1:9/"}, "retriev"),
        ("json_schema", {"$ref": "#/nowhere"}, ""),
        ("json_schema", {"enum": ["x" * 70_000]}, "65536"),
        ("regex", "(a", "unclosed group"),
        ("grammar", "start: foo", "foo"),
    ],
)
async def test_what_cannot_be_followed_is_refused(kind: Any, value: Any, word: str) -> None:
    with pytest.raises(InvalidRequest, match=r"the\.field cannot be followed") as caught:
        await grammar_of(request(WantedFormat("the.field", kind, value)), OURS)
    assert caught.value.param == "the.field"
    assert word in caught.value.message


def test_a_format_is_not_printed() -> None:
    assert "secret" not in repr(WantedFormat("field", "regex", "secret"))


async def test_without_a_wish_the_reply_is_free() -> None:
    assert await grammar_of(request(), OURS) is None
    assert format_param(request()) is None


@pytest.mark.parametrize(
    ("wanted", "tool_use", "grammar"),
    [
        (None, ToolUse((TOOL,), ("f",)), tools_grammar(OURS, {"f": SCHEMA})),
        (
            None,
            ToolUse((TOOL,), ("f",), True, False),
            tools_grammar(OURS, {"f": SCHEMA}, is_required=True, is_parallel=False),
        ),
        (None, ToolUse((TOOL,), ()), tools_grammar(OURS, {})),
        (WantedFormat("x", "regex", "a+"), ToolUse((TOOL,), ()), regex_grammar("a+")),
        (
            WantedFormat("x", "json_schema", SCHEMA),
            ToolUse((TOOL,), ("f",)),
            tools_grammar(OURS, {"f": SCHEMA}, text_schema=SCHEMA),
        ),
        (
            WantedFormat("x", "json_object"),
            ToolUse((TOOL,), ("f",)),
            tools_grammar(OURS, {"f": SCHEMA}, text_schema={"type": "object"}),
        ),
    ],
)
async def test_tools_and_formats_together(wanted: Any, tool_use: ToolUse, grammar: str) -> None:
    assert await grammar_of(request(wanted, tool_use), OURS) == grammar


BROKEN = Tool("g", "tools[1].parameters", {"type": "object", "properties": {"a": {"type": "intger"}}})
LARGE = Tool("h", "tools[2].parameters", {"type": "object", "properties": {"a": {"enum": ["x" * 40_000]}}})


@pytest.mark.parametrize(
    ("wanted", "tools", "param"),
    [
        (None, (TOOL, BROKEN), "tools[1].parameters"),
        (None, (LARGE, LARGE), "tools"),
        (WantedFormat("x", "regex", "a+"), (TOOL,), "x"),
        (WantedFormat("x", "json_schema", {"type": "intger"}), (TOOL,), "x"),
    ],
)
async def test_what_is_wrong_with_tools_is_told_by_its_field(wanted: Any, tools: Any, param: str) -> None:
    names = tuple(f"{tool.name}{number}" for number, tool in enumerate(tools))
    tools = tuple(Tool(name, tool.param, tool.parameters) for name, tool in zip(names, tools, strict=True))
    with pytest.raises(InvalidRequest) as caught:
        await grammar_of(request(wanted, ToolUse(tools, names)), OURS)
    assert caught.value.param == param
    assert format_param(request(wanted, ToolUse(tools, names))) == "tools"
