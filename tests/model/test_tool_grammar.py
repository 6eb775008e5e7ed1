"""Replies that may or must call tools: what their grammar lets pass, with a real matcher over bytes."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from phi_cluster.model.byte_level import BYTE_OF_CHAR
from phi_cluster.model.grammar import GrammarError, Grammars, check_grammar
from phi_cluster.model.tool_format import HERMES, OURS, PHI4, ToolFormat
from phi_cluster.model.tool_grammar import MAX_CALLS, check_parameters, parameters_schema, tools_grammar

CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOLS: dict[str, Any] = {"weather": CITY, "now": None}
TOKENS = ("<|tool_call|>", "<|/tool_call|>", "<tool_call>", "</tool_call>")
FORMATS = [HERMES, PHI4, replace(HERMES, tokens=TOKENS[2:]), replace(PHI4, tokens=TOKENS[:2])]


@pytest.fixture(scope="module")
def backend(tmp_path_factory: pytest.TempPathFactory) -> tuple[Backend, Path]:
    """Bytes, the marks of all formats as added tokens that are not called special, and an end."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE({piece: number for number, piece in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<|end|>")])
    backend.add_tokens([AddedToken(mark, special=False, normalized=False) for mark in TOKENS])
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "tokenizer.json").write_text(backend.to_str())
    return backend, folder


@pytest.fixture(scope="module")
def grammars(backend: tuple[Backend, Path]) -> Grammars:
    return Grammars(backend[1], backend[0].get_vocab_size())


def spelled(tool_format: ToolFormat, *calls: tuple[str, str], content: str = "") -> str:
    written = [f'{{"name": "{name}", "arguments": {arguments}}}' for name, arguments in calls]
    return content + tool_format.opening + tool_format.between.join(written) + tool_format.closing


@pytest.fixture(scope="module")
def passes(backend: tuple[Backend, Path], grammars: Grammars) -> Any:
    def passes(grammar: str, text: str, tokens: Sequence[str] = ()) -> bool:
        """Whether the whole reply is allowed, and may end there. Marks among `tokens` are tokens of their own, others
        are spelled."""
        end = backend[0].token_to_id("<|end|>")
        parts = re.split("(" + "|".join(map(re.escape, tokens)) + ")", text) if tokens else [text]
        ids: list[int] = []
        for part in parts:
            if part in tokens:
                ids.append(backend[0].token_to_id(part))
            else:
                ids += [backend[0].token_to_id(BYTE_LEVEL[byte]) for byte in part.encode()]
        matcher = grammars.matcher(grammar, [end])
        return matcher.num_allowed([*ids, end]) == len(ids) + 1

    return passes


BYTE_LEVEL = {byte: char for char, byte in BYTE_OF_CHAR.items()}
ROME = ("weather", '{"city": "Rome"}')


@pytest.mark.parametrize("tool_format", FORMATS)
@pytest.mark.parametrize(
    ("settings", "text", "one", "two", "after_text"),
    [
        ({}, True, True, True, True),
        ({"is_parallel": False}, True, True, False, True),
        ({"is_required": True}, False, True, True, False),
        ({"is_required": True, "is_parallel": False}, False, True, False, False),
    ],
)
def test_text_and_calls(
    passes: Any, tool_format: ToolFormat, settings: Any, text: bool, one: bool, two: bool, after_text: bool
) -> None:
    grammar = tools_grammar(tool_format, TOOLS, **settings)
    check_grammar(grammar)
    assert passes(grammar, "It is 3 < 4.\nYes, <tool_calls> é") == text
    assert passes(grammar, "") == text
    assert passes(grammar, spelled(tool_format, ROME), tool_format.tokens) == one
    assert passes(grammar, spelled(tool_format, ("now", "{}")), tool_format.tokens) == one
    assert passes(grammar, spelled(tool_format, ROME, ("now", "{}")), tool_format.tokens) == two
    assert passes(grammar, spelled(tool_format, ROME, content="Let me see.\n"), tool_format.tokens) == after_text


@pytest.mark.parametrize("tool_format", FORMATS)
def test_nothing_but_whole_calls_of_what_there_is(passes: Any, tool_format: ToolFormat) -> None:
    grammar = tools_grammar(tool_format, TOOLS)
    good = spelled(tool_format, ROME)
    assert passes(grammar, good, tool_format.tokens)
    assert not passes(grammar, good.removesuffix(">"), tool_format.tokens)
    assert not passes(grammar, good + " And then?", tool_format.tokens)
    assert not passes(grammar, spelled(tool_format, ("weathers", '{"city": "Rome"}')), tool_format.tokens)
    assert not passes(grammar, spelled(tool_format, ("weather", "{}")), tool_format.tokens)
    assert not passes(grammar, spelled(tool_format, ("weather", '{"city": 5}')), tool_format.tokens)
    assert not passes(grammar, spelled(tool_format, ("weather", '{"city": "Rome", "more": 1}')), tool_format.tokens)
    assert not passes(grammar, spelled(tool_format, ("weather", '{"city":"Rome"}')), tool_format.tokens)
    assert not passes(grammar, spelled(tool_format, ("now", '{"a": 1}')), tool_format.tokens)
    assert not passes(grammar, tool_format.opening, tool_format.tokens)


@pytest.mark.parametrize("tool_format", FORMATS)
def test_without_any_to_call_the_reply_is_text(passes: Any, tool_format: ToolFormat) -> None:
    grammar = tools_grammar(tool_format, {})
    assert passes(grammar, "Hello {}")
    assert not passes(grammar, spelled(tool_format, ROME), tool_format.tokens)


def test_text_may_be_held_to_a_schema_beside_calls(passes: Any) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    grammar = tools_grammar(HERMES, TOOLS, text_schema=schema | {"additionalProperties": False})
    assert passes(grammar, '{"a":1}')
    assert passes(grammar, spelled(HERMES, ROME))
    assert not passes(grammar, "Hello")
    assert not passes(grammar, spelled(HERMES, ROME, content="Hello"))
    only_calls = tools_grammar(HERMES, TOOLS, text_schema=schema, is_required=True)
    assert passes(only_calls, spelled(HERMES, ROME))
    assert not passes(only_calls, '{"a":1}')


def test_calls_are_not_made_for_ever(passes: Any) -> None:
    grammar = tools_grammar(HERMES, TOOLS)
    assert passes(grammar, spelled(HERMES, *[("now", "{}")] * MAX_CALLS))
    assert not passes(grammar, spelled(HERMES, *[("now", "{}")] * (MAX_CALLS + 1)))


def test_references_stay_within_a_tools_own_schema(passes: Any) -> None:
    def schema(kind: str) -> dict[str, Any]:
        properties = {"x": {"$ref": "#/$defs/T"}}
        return {"type": "object", "properties": properties, "required": ["x"], "$defs": {"T": {"type": kind}}}

    grammar = tools_grammar(OURS, {"a": schema("integer"), "b": schema("boolean")})
    assert passes(grammar, spelled(OURS, ("a", '{"x": 1}'), ("b", '{"x": true}')))
    assert not passes(grammar, spelled(OURS, ("a", '{"x": true}')))


def test_an_object_is_closed_only_where_its_properties_are_all_there_is() -> None:
    assert parameters_schema(None) == {"type": "object", "properties": {}, "additionalProperties": False}
    assert parameters_schema(CITY)["additionalProperties"] is False
    assert parameters_schema({**CITY, "additionalProperties": True})["additionalProperties"] is True
    for more in ({"allOf": [CITY]}, {"$ref": "#/$defs/x"}, {"patternProperties": {}}):
        assert "additionalProperties" not in parameters_schema({**CITY, **more})
    assert "additionalProperties" not in parameters_schema({"type": "object"})
    assert "additionalProperties" not in CITY


@pytest.mark.parametrize(
    ("schema", "word"),
    [
        ({"type": "string"}, "object"),
        ({"type": ["object", "null"]}, "object"),
        ({"type": "object", "properties": {"a": {"type": "intger"}}}, "intger"),
        ({"type": "object", "properties": {"a": {"$ref": "http://127.0.0.1:9/"}}}, "retriev"),
        ({"type": "object", "properties": {"a": {"$ref": "#/nowhere"}}}, "nowhere"),
        ({"type": "object", "properties": {"a": {"not": {}}}}, "not"),
        ({"type": "object", "properties": {"a": {"enum": ["x" * 70_000]}}}, "65536"),
    ],
)
def test_what_arguments_cannot_be_held_to_is_refused(schema: dict[str, Any], word: str) -> None:
    with pytest.raises(GrammarError, match=word):
        check_parameters(schema)


def test_all_tools_together_have_a_size() -> None:
    large = {"type": "object", "properties": {"a": {"enum": ["x" * 40_000]}}}
    check_parameters(large)
    with pytest.raises(GrammarError, match="65536"):
        tools_grammar(HERMES, {"a": large, "b": large})


def test_a_clients_guidance_is_overruled(passes: Any) -> None:
    schema = {**CITY, "x-guidance": {"whitespace_flexible": True, "item_separator": ";"}}
    grammar = tools_grammar(HERMES, {"weather": schema})
    assert passes(grammar, spelled(HERMES, ROME))
    assert not passes(grammar, spelled(HERMES, ("weather", '{ "city" : "Rome"}')))
    assert json.loads('{"city": "Rome"}') == {"city": "Rome"}
