"""A message's content as clients send it: a string, or parts of which each is text.

Owns: taking the texts out, and refusing what is none. Knows nothing of which messages there are.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from phi_cluster.cluster.http.strict_model import refusal


def texts_of(
    given: Any,
    kinds: Sequence[str],
    harmless: Mapping[str, tuple[Any, ...]] | None = None,
    ignored: Collection[str] = (),
) -> list[str]:
    """The text of each part, of a type in `kinds` (the first of which is told as the example). `harmless`: what a part
    may have beside its text, by name, and the values that say nothing; what is `ignored` may be anything. Raises a
    validation error."""
    if isinstance(given, str):
        return [given]
    if not isinstance(given, list):
        raise refusal(f'must be a string or an array of {{"type": "{kinds[0]}", "text": ...}}')
    allowed = harmless or {}
    texts = []
    for index, part in enumerate(given):
        kind = part.get("type") if isinstance(part, dict) else None
        if not isinstance(kind, str):
            raise refusal(f'part {index} must be an object, {{"type": "{kinds[0]}", "text": ...}}')
        if kind not in kinds:
            raise refusal(f"part {index} has type {kind[:32]}, which is not supported: this model reads text only")
        rest = part.keys() - {"type", "text", *ignored}
        if not isinstance(part.get("text"), str) or any(part[name] not in allowed.get(name, ()) for name in rest):
            raise refusal(f'part {index} must be exactly {{"type": "{kind}", "text": "a string"}}')
        texts.append(part["text"])
    if not texts:
        raise refusal("must have at least one part")
    return texts
