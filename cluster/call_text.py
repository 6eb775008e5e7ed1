"""Calls of tools as text: what a prompt has of a reply that called them, and what a conversation remembers of it.

Owns: how calls are written, the same for the reply that was generated and for the message that a client sends back,
whose arguments may be spelled anew: they are compared as JSON values. Knows nothing of how replies are read, of
requests and of templates.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from typing import Any

from phi_cluster.model.tool_format import CALL_CLOSING, CALL_MIDDLE, CALL_OPENING, ToolFormat


def written_reply(
    content: str, calls: Sequence[tuple[str, str]], tool_format: ToolFormat, sanitize: Callable[[str], str]
) -> str:
    """A reply as rendered text: `sanitize` makes such of its content and arguments (Tokenizer.sanitize)."""
    if not calls:
        return sanitize(content)
    written = [
        f"{CALL_OPENING}{sanitize(name)}{CALL_MIDDLE}{sanitize(canonical(arguments))}{CALL_CLOSING}"
        for name, arguments in calls
    ]
    return sanitize(content) + tool_format.opening + tool_format.between.join(written) + tool_format.closing


def canonical(arguments: str) -> str:
    """JSON text that is the same for the same value: as json.dumps writes it, keys sorted, 1.0 as 1. Nothing is {};
    what is no JSON stays as it is."""
    if not arguments.strip():
        return "{}"
    try:
        value = json.loads(arguments, parse_float=_number, parse_constant=_no_number)
        return json.dumps(value, sort_keys=True, ensure_ascii=False)
    except (ValueError, RecursionError):
        return arguments


def _number(text: str) -> Any:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(text)
    # As far as every client's numbers can tell them apart.
    return int(number) if number.is_integer() and abs(number) < 2**53 else number


def _no_number(text: str) -> Any:
    raise ValueError(text)
