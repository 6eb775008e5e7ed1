"""Formats that can be followed become grammars; others are refused by the field that asked for them."""

from __future__ import annotations

from typing import Any

import pytest

from phi_cluster.cluster.errors import InvalidRequest
from phi_cluster.cluster.turn_api import WantedFormat
from phi_cluster.cluster.wanted_format import grammar_of
from phi_cluster.model.grammar import choice_grammar, json_object_grammar, json_schema_grammar, regex_grammar

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}


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
    assert await grammar_of(WantedFormat("field", kind, value)) == grammar


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
        await grammar_of(WantedFormat("the.field", kind, value))
    assert caught.value.param == "the.field"
    assert word in caught.value.message


def test_a_format_is_not_printed() -> None:
    assert "secret" not in repr(WantedFormat("field", "regex", "secret"))
