"""Formats that mean no good, or ask for much: in which field they are sent, and what becomes of them.

Owns: the table, for the grammars alone (test_grammar.py) and for a real server (tests/cluster/hostile.py).
"""

from __future__ import annotations

from typing import Any, NamedTuple

from phi_cluster.model.grammar import MAX_GRAMMAR_CHARS


class Wanted(NamedTuple):
    """`kind` is one of vLLM's structured_outputs: json, regex or grammar."""

    kind: str
    value: Any


def deep(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    return schema


# By name: what is asked for, and a word of the refusal.
WRONG: dict[str, tuple[Wanted, str]] = {
    "unknown type": (Wanted("json", {"type": "intger"}), "intger"),
    "type is a number": (Wanted("json", {"type": 3}), ""),
    "unsatisfiable": (Wanted("json", {"type": "integer", "minimum": 5, "maximum": 3}), "minimum"),
    "not": (Wanted("json", {"not": {"type": "integer"}}), "not"),
    "uniqueItems": (Wanted("json", {"type": "array", "uniqueItems": True}), "uniqueItems"),
    "a reference to itself": (Wanted("json", {"$ref": "#"}), ""),
    "two references in a circle": (
        Wanted("json", {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}),
        "",
    ),
    "a file": (Wanted("json", {"$ref": "file:///etc/passwd"}), "retriev"),
    "a url": (Wanted("json", {"$ref": "http://127.0.0.1:9/x"}), "retriev"),
    "a reference to nowhere": (Wanted("json", {"$ref": "#/$defs/none"}), ""),
    "too deep": (Wanted("json", deep(200)), "recursion"),
    "far too deep": (Wanted("json", deep(10_000)), ""),
    "ten thousand choices": (
        Wanted("json", {"enum": [f"value {i}" for i in range(10_000)]}),
        str(MAX_GRAMMAR_CHARS),
    ),
    "ten megabytes": (Wanted("json", {"title": "x" * 10_000_000}), str(MAX_GRAMMAR_CHARS)),
    "an open group": (Wanted("regex", "(a"), "unclosed group"),
    "look-ahead": (Wanted("regex", "(?=a)b"), "look-around"),
    "a back-reference": (Wanted("regex", r"(a)\1"), "backreference"),
    "a huge regex": (Wanted("regex", "a" * 100_000), str(MAX_GRAMMAR_CHARS)),
    "a pattern with an open group": (Wanted("json", {"type": "string", "pattern": "(a"}), ""),
    "an unknown rule": (Wanted("grammar", "start: foo"), "foo"),
    "no rule at all": (Wanted("grammar", "???"), ""),
    "no start": (Wanted("grammar", 'other: "a"'), "start"),
    "open brackets": (Wanted("grammar", "start: (((("), ""),
}
# Large, or slow for others, and followed all the same.
HARMLESS: dict[str, Wanted] = {
    "nested repeats": Wanted("regex", "(a+)+b"),
    "a million letters": Wanted("regex", "a{1,1000000}"),
    "repeats of repeats": Wanted("regex", "((a|b){1,1000}c){1,1000}d"),
    "a billion items": Wanted("json", {"type": "array", "minItems": 10**9, "items": {"type": "integer"}}),
    "a million characters": Wanted("json", {"type": "string", "maxLength": 10**6}),
    "a nested pattern": Wanted("json", {"type": "string", "pattern": "^(a+)+$"}),
    "a hundred levels": Wanted("json", deep(30)),
    "a recursive tree": Wanted(
        "json",
        {
            "$ref": "#/$defs/node",
            "$defs": {
                "node": {
                    "type": "object",
                    "properties": {"next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}},
                    "required": ["next"],
                    "additionalProperties": False,
                }
            },
        },
    ),
    "a thousand properties": Wanted(
        "json", {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(1000)}}
    ),
    "any value": Wanted("json", {}),
}
