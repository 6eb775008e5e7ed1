"""JSON schemas of which no two are alike, some of them beyond what can be followed.

Owns: these schemas. Knows nothing of who sends them.
"""

from __future__ import annotations

from typing import Any, NamedTuple


class UniqueSchema(NamedTuple):
    """`is_followed`: replies can be held to it; otherwise it is to be refused by name."""

    schema: dict[str, Any]
    is_followed: bool


def unique_schema(number: int) -> UniqueSchema:
    """Always the same for a number, of one of nine kinds."""
    word = f"w{number:x}"
    words = [f"{word}{i}" for i in range(12)]
    kinds: list[dict[str, Any]] = [
        {"type": "object", "properties": {one: {"type": "integer"} for one in words[:4]}, "required": words[:4]},
        {"enum": words},
        {"type": "array", "items": {"enum": words[:3]}, "minItems": 2, "maxItems": 3 + number % 5},
        {"type": "string", "pattern": f"^[a-c]{{2,{4 + number % 7}}}-{number}$"},
        {"type": "integer", "minimum": number, "maximum": number + 1000},
        {"$ref": f"#/$defs/{word}", "$defs": {word: {"type": "array", "items": {"const": word}, "minItems": 1}}},
        {"anyOf": [{"const": words[0]}, {"type": "object", "properties": {word: {"type": "boolean"}}}]},
        {"not": {"const": word}},
        {"type": "string", "pattern": f"^(?={word})a"},
    ]
    kind = number % len(kinds)
    return UniqueSchema({"title": word, **kinds[kind]}, kind < 7)
