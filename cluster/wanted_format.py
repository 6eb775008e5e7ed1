"""What a reply has to look like, as a grammar that can be followed.

Owns: the way from a `WantedFormat` to a grammar that has been compiled once. Knows nothing of HTTP fields, of engines
and of how a grammar is followed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from phi_cluster.cluster.errors import InvalidRequest
from phi_cluster.cluster.turn_api import WantedFormat
from phi_cluster.model.grammar import (
    GrammarError,
    check_grammar,
    choice_grammar,
    json_object_grammar,
    json_schema_grammar,
    lark_grammar,
    regex_grammar,
)

_GRAMMARS: dict[str, Callable[[Any], str]] = {
    "json_schema": json_schema_grammar,
    "json_object": lambda value: json_object_grammar(),
    "regex": regex_grammar,
    "choice": choice_grammar,
    "grammar": lark_grammar,
}


async def grammar_of(wanted: WantedFormat) -> str:
    """Takes about a tenth of a second at most, in a thread. Raises `InvalidRequest` naming the field."""
    try:
        return await asyncio.to_thread(_compiled, wanted)
    except GrammarError as error:
        raise InvalidRequest(f"{wanted.param} cannot be followed: {error}", param=wanted.param) from None


def _compiled(wanted: WantedFormat) -> str:
    grammar = _GRAMMARS[wanted.kind](wanted.value)
    check_grammar(grammar)
    return grammar
